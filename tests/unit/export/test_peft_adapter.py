"""Adapters on disk against PEFT itself: every layout gives the logits of a manual merge."""

import copy
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatrain.config.lora import LoraSpec
from megatrain.errors import ExportError
from megatrain.export import peft_adapter
from megatrain.export.peft_adapter import CONFIG, WEIGHTS, read_adapter, write_adapter
from megatrain.export.verify import compare_with_peft, label_logprobs, load_model

pytestmark = pytest.mark.filterwarnings("ignore:::peft")

H, F, D, E, V = 16, 8, 24, 4, 64
COMMON = {
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
DEEPSEEK = {
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
CONFIGS = {
    "qwen3": Qwen3Config(**COMMON, intermediate_size=D),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=2
    ),
    "deepseek_v3": DeepseekV3Config(
        **COMMON | {"num_key_value_heads": 2, "head_dim": 4},
        **DEEPSEEK,
        intermediate_size=D,
        moe_intermediate_size=F,
        n_routed_experts=E,
        num_experts_per_tok=2,
    ),
    "mixtral": MixtralConfig(**COMMON, intermediate_size=F, num_local_experts=E),
    "gpt_oss": GptOssConfig(
        **COMMON, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2
    ),
}
MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = {f"model.layers.{n}.self_attn.q_proj": (H, 2 * F) for n in (0, 1)}
EXPERTS = {
    f"model.layers.{n}.mlp.experts.{e}.{leaf}": (F, H) if leaf == "down_proj" else (H, F)
    for n in (0, 1)
    for e in range(E)
    for leaf in MLP
}


def only(modules, pattern):
    return {name: shape for name, shape in modules.items() if re.search(pattern, name)}


def base(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


def factors(modules, spec, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (num_in, num_out) in modules.items():
        rank = spec.rank_of(name)
        tensors[f"{name}.lora_A"] = 0.3 * torch.randn(rank, num_in, generator=generator)
        tensors[f"{name}.lora_B"] = 0.3 * torch.randn(num_out, rank, generator=generator)
    return tensors


def merged(model, modules, tensors, spec):
    """The definition: W + scale B A, each expert at its place."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for name in modules:
        delta = spec.scale_of(name) * (tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"])
        name = name.replace("block_sparse_moe", "mlp")
        if name == "model.embed_tokens":
            parameters[f"{name}.weight"].data += delta.T
        elif ".experts." not in name:
            parameters[f"{name}.weight"].data += delta
        else:
            owner, expert, leaf = re.fullmatch(r"(.+\.experts)\.(\d+)\.(.+)", name).groups()
            add_to_expert(parameters, owner, int(expert), leaf, delta)
    return model


def add_to_expert(parameters, owner, expert, leaf, delta):
    fused, down = parameters[f"{owner}.gate_up_proj"], parameters[f"{owner}.down_proj"]
    if leaf == "gate_up_proj":
        fused.data[expert] += delta.T  # gpt-oss holds (in, out)
    elif leaf in ("gate_proj", "w1"):
        fused.data[expert, :F] += delta
    elif leaf in ("up_proj", "w3"):
        fused.data[expert, F:] += delta
    else:
        down.data[expert] += delta if down.shape[2] == delta.shape[1] else delta.T


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(1, 25)[None] * 7 % V).logits


def check(family, modules, spec, folder):
    model = base(family)
    tensors = factors(modules, spec)
    write_adapter(folder, spec=spec, tensors=tensors, base_model="x", hf_config=CONFIGS[family])
    expected = logits(merged(model, modules, tensors, spec))
    assert (expected - logits(model)).abs().max() > 1e-3
    actual = logits(PeftModel.from_pretrained(copy.deepcopy(model), folder))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    return tensors


def check_read(family, tensors, spec, folder):
    found, read = read_adapter(folder, hf_config=CONFIGS[family])
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)
    for key in tensors:
        module = key.rpartition(".")[0]
        assert found.matches(module)
        assert found.rank_of(module) == spec.rank_of(module)
        assert found.scale_of(module) == spec.scale_of(module)
    config = json.loads((folder / CONFIG).read_text())
    assert "all-linear" not in config["target_modules"]


DENSE = {
    **ATTENTION,
    "model.layers.1.mlp.gate_proj": (H, D),
    "model.layers.0.mlp.down_proj": (D, H),
    "model.embed_tokens": (V, H),
    "lm_head": (H, V),
}
ROUTER = {f"model.layers.{n}.mlp.gate": (H, E) for n in (0, 1)}
MLPS = {
    f"model.layers.{place}.{leaf}": (width, H) if leaf == "down_proj" else (H, width)
    for place, width in (("0.mlp", D), ("1.mlp.shared_experts", F))
    for leaf in MLP
}
MIXTRAL = {
    re.sub("down_proj", "w2", re.sub("up_proj", "w3", re.sub("gate_proj", "w1", name))).replace(
        ".mlp.", ".block_sparse_moe."
    ): shape
    for name, shape in EXPERTS.items()
}
GPT_OSS = {
    f"model.layers.{n}.mlp.experts.{e}.{leaf}": shape
    for n in (0, 1)
    for e in range(E)
    for leaf, shape in (("gate_up_proj", (H, 2 * F)), ("down_proj", (F, H)))
}
GPT_OSS_ROUTER = {"model.layers.1.mlp.router": (H, E)}
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "rank_pattern": {r"layers\.1\..*(gate|up|gate_up)_proj": 6, "q_proj": 2, "w1": 2, "w3": 2},
        "alpha_pattern": {"gate_proj": 3, "up_proj": 3, "w1": 3, "w3": 3, "lm_head": 1},
        "lora_dropout": 0.1,
    },
}
CASES = {
    "dense": ("qwen3", DENSE),
    "experts": ("qwen3_moe", {**ATTENTION, **EXPERTS, **ROUTER}),
    "experts of one layer": ("qwen3_moe", only(EXPERTS, r"layers\.1")),
    "down alone": ("qwen3_moe", only(EXPERTS, "down_proj")),
    "dense layers and shared experts": (
        "deepseek_v3",
        {**MLPS, **only(EXPERTS, r"layers\.1")},
    ),
    "old names": ("mixtral", {**MIXTRAL, "model.layers.0.block_sparse_moe.gate": (H, E)}),
    "stacked": ("gpt_oss", {**ATTENTION, **GPT_OSS, **GPT_OSS_ROUTER}),
    "stacked gate_up": ("gpt_oss", only(GPT_OSS, "gate_up")),
    "stacked down": ("gpt_oss", only(GPT_OSS, r"layers\.0.*down")),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("family", "modules"), CASES.values(), ids=CASES.keys())
@pytest.mark.slow
def test_a_written_adapter_is_a_manual_merge_in_peft_and_reads_back(
    family, modules, options, tmp_path
):
    spec = LoraSpec(r=4, target_modules="all-linear", **options)
    tensors = check(family, modules, spec, tmp_path / "adapter")
    if "block_sparse_moe.gate.lora_A" not in "".join(tensors):
        check_read(family, tensors, spec, tmp_path / "adapter")


def test_gate_and_up_without_down_are_written_stacked(tmp_path):
    spec = LoraSpec(r=4, target_modules=["gate_proj", "up_proj"], use_rslora=True)
    check("qwen3_moe", only(EXPERTS, "gate_proj|up_proj"), spec, tmp_path / "a")
    keys = load_file(tmp_path / "a" / WEIGHTS)
    assert keys["base_model.model.model.layers.0.mlp.experts.lora_A.weight"].shape == (8 * E, H)
    _, read = read_adapter(tmp_path / "a", hf_config=CONFIGS["qwen3_moe"])
    assert "model.layers.1.mlp.experts.3.gate_up_proj.lora_B" in read


def test_gate_without_up_is_refused_as_by_peft(tmp_path):
    spec = LoraSpec(r=4, target_modules=["gate_proj"])
    with pytest.raises(ExportError, match="gate_proj without up_proj"):
        check("qwen3_moe", only(EXPERTS, "gate_proj"), spec, tmp_path)


def test_gate_and_up_of_different_scale_are_refused(tmp_path):
    spec = LoraSpec(r=4, target_modules=MLP, alpha_pattern={"up_proj": 1})
    with pytest.raises(ExportError, match="one scale"):
        check("qwen3_moe", EXPERTS, spec, tmp_path)


def test_a_router_with_a_buffer_is_refused_since_peft_breaks_on_it(tmp_path):
    name = "model.layers.1.mlp.gate"
    config = LoraConfig(target_modules=[], target_parameters=[f"{name}.weight"])
    with pytest.raises(AttributeError, match="e_score_correction_bias"):
        logits(get_peft_model(base("deepseek_v3"), config))
    spec = LoraSpec(r=4, target_parameters=["mlp.gate.weight"])
    with pytest.raises(ExportError, match="e_score_correction_bias"):
        check("deepseek_v3", {name: (H, E)}, spec, tmp_path / "a")


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        ("gpt_oss", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"]),
        ("qwen3_moe", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]),
    ],
)
def test_what_peft_saved_is_read_and_written_again(family, parameters, tmp_path):
    config = LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False
    )
    model = base(family)
    theirs = get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    spec, tensors = read_adapter(tmp_path / "peft", hf_config=CONFIGS[family])
    assert spec.matches("model.layers.0.mlp.experts.2.down_proj")
    write_adapter(
        tmp_path / "ours", spec=spec, tensors=tensors, base_model="x", hf_config=CONFIGS[family]
    )
    ours = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)


def drop(weights):
    del weights[min(weights)]


def rename(weights):
    key = min(weights)
    weights[key.replace("model.model.", "model.")] = weights.pop(key)


def reshape(weights):
    key = min(weights)
    weights[key] = weights[key][:, :-1].contiguous()


def extra(weights):
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"
    weights |= {name.format("A"): torch.ones(4, H), name.format("B"): torch.ones(F, 4)}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("damage", [drop, rename, reshape, extra])
def test_a_damaged_adapter_is_not_read(family, damage, tmp_path):
    modules = {"qwen3": ATTENTION, "qwen3_moe": EXPERTS, "gpt_oss": GPT_OSS}[family]
    spec = LoraSpec(r=4, target_modules="all-linear")
    folder = write_adapter(
        tmp_path / "a",
        spec=spec,
        tensors=factors(modules, spec),
        base_model="x",
        hf_config=CONFIGS[family],
    )
    weights = load_file(folder / WEIGHTS)
    damage(weights)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ExportError):
        read_adapter(folder, hf_config=CONFIGS[family])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.lora_A"), "is missing: lm_head"),
        (lambda t: t.update({"lm_head.lora_C": t["lm_head.lora_A"]}), "lm_head.lora_C"),
        (lambda t: t.update({"lm_head.lora_A": t["lm_head.lora_A"][:2]}), "lm_head: lora_A must"),
        (lambda t: t.update({"lm_head.lora_B": t["lm_head.lora_B"][1:]}), "size mismatch"),
        (lambda t: t["lm_head.lora_B"].fill_(float("nan")), "not finite: lm_head.lora_B"),
        (lambda t: t.update({f"x.lora_{f}": t[f"lm_head.lora_{f}"] for f in "AB"}), "at x"),
    ],
)
def test_factors_that_do_not_fit_are_not_written(change, message, tmp_path):
    spec = LoraSpec(r=4, target_modules="all-linear")
    tensors = factors({"lm_head": (H, V)}, spec)
    change(tensors)
    with pytest.raises(ExportError, match=message):
        write_adapter(
            tmp_path / "a", spec=spec, tensors=tensors, base_model="x", hf_config=CONFIGS["qwen3"]
        )
    assert list(tmp_path.iterdir()) == []


def write_seed(folder, seed):
    spec = LoraSpec(r=4, target_modules="all-linear")
    tensors = factors(ATTENTION, spec, seed=seed)
    write_adapter(
        folder, spec=spec, tensors=tensors, base_model="x", hf_config=CONFIGS["qwen3"].to_dict()
    )
    return tensors


def test_an_adapter_is_replaced_and_an_interrupted_write_leaves_the_old(tmp_path, monkeypatch):
    write_seed(tmp_path / "a", 1)
    tensors = write_seed(tmp_path / "a", 2)
    real = peft_adapter.save_file

    def dies_half_way(weights, path, **options):
        real(dict(list(weights.items())[:1]), path, **options)
        raise KeyboardInterrupt

    for broken in (dies_half_way, lambda w, path, **_: real({k: w[k] + 1 for k in w}, path)):
        monkeypatch.setattr(peft_adapter, "save_file", broken)
        with pytest.raises((KeyboardInterrupt, ExportError)):
            write_seed(tmp_path / "a", 3)
    _, read = read_adapter(tmp_path / "a", hf_config=CONFIGS["qwen3"])
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_with_other_content_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="only a folder of the same kind"):
        write_seed(tmp_path, 1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_another_process_with_peft_gives_the_same_logprobs(tmp_path):
    model = base("qwen3")
    model.save_pretrained(tmp_path / "base")
    tensors = write_seed(tmp_path / "a", 1)
    data = [
        {"input_ids": list(range(3, 12)), "labels": [-100, -100, *range(5, 12)]},
        {"input_ids": [9, 1], "labels": [9, -100]},
    ]
    manual = merged(model, ATTENTION, tensors, LoraSpec(r=4, target_modules="all-linear"))
    columns = [[torch.tensor(each[c]) for c in ("input_ids", "labels")] for each in data]
    expected = [label_logprobs(manual, *each).numpy() for each in columns]
    assert (expected[0][:2] == 0).all()
    assert (expected[0][2:] < 0).all()
    assert (expected[1] == 0).all()
    paths = tmp_path / "base", tmp_path / "a"
    assert compare_with_peft(*paths, data, expected, timeout_s=120) <= 1e-6
    with pytest.raises(ExportError, match="timeout_s"):
        compare_with_peft(*paths, data, expected, timeout_s=0.01)
    alone = load_model(str(paths[0]), None, dtype=torch.float32)
    assert abs(label_logprobs(alone, *columns[0]).numpy() - expected[0]).max() > 1e-3
    weights = load_file(paths[1] / WEIGHTS)
    drop(weights)
    save_file(weights, paths[1] / WEIGHTS)
    with pytest.raises(ExportError, match="not in the file"):
        load_model(str(paths[0]), str(paths[1]), dtype=torch.float32)
