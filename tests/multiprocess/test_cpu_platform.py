"""megatrain in a process leaves torch, Transformers and PEFT as they were."""

import subprocess
import sys

import pytest

from megatrain.platforms.cpu import CpuPlatform

pytestmark = pytest.mark.multiprocess

PROGRAM = """
import sys
import torch, transformers
from peft import LoraConfig, get_peft_model

torch.set_num_threads(1)
folder = sys.argv[1]
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
peft = get_peft_model(
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
).eval()
ids = torch.arange(40).view(2, 20) * 7 % 512
places = {"torch": torch, "cuda": torch.cuda, "random": torch.cuda.random,
          "distributed": torch.distributed, "tensor": torch.Tensor, "linear": torch.nn.functional}


def logits():
    with torch.no_grad():
        return model(ids).logits, peft(ids).logits


def names():
    return {(place, name): value for place, owner in places.items()
            for name, value in list(vars(owner).items())
            if callable(value) and not name.startswith("__")}


before, old = logits(), names()
import megatrain

megatrain.initialize(mode="local", platform="cpu")
trained = megatrain.MegatronModel(folder, mixed_precision="no")
trained.add_adapter_to_model("default", LoraConfig(r=4, target_modules="all-linear"))
trained.set_optimizer("AdamW", lr=1e-4)
trained.forward_backward(inputs=[{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
trained.clip_grad_and_step()
after, new = logits(), names()
assert all(torch.equal(a, b) for a, b in zip(before, after)), "logits differ"
changed = [key for key in old if new.get(key) is not old[key]]
assert not changed, changed
left = [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]
assert not left, left
assert not torch.cuda.is_available() or torch.zeros(1, device="cuda").is_cuda
# PEFT looks for Transformer Engine's specification and fails on a stand-in.
get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"]))
# A second model of a freshly loaded checkpoint gives the same, too.
fresh = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    assert torch.equal(fresh(ids).logits, before[0]), "a fresh model differs"
print("same")
"""


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.slow
def test_transformers_and_peft_give_the_same_bits_before_and_after(family, checkpoints):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(checkpoints(family))],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("same\n")


def test_every_patch_has_a_name_of_its_own_and_a_reason():
    patches = CpuPlatform().patches()
    assert len({patch.name for patch in patches}) == len(patches) > 0
    for patch in patches:
        assert patch.name.startswith("megatron"), "only Megatron's modules are changed"
        assert len(patch.reason.split()) > 5


def test_this_process_has_neither_megatron_nor_a_patch():
    assert "megatron.core.parallel_state" not in sys.modules
