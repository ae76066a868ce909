"""`megatrain bench train`: its batch, its arithmetic, its order of work, and its verdicts."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatrain.cli.bench import command, report
from megatrain.cli.bench.data import draw_batch, draw_lengths, padded_batches
from megatrain.cli.bench.job import Job
from megatrain.cli.bench.race import (
    DisagreementError,
    Entrant,
    Race,
    is_hopeless,
    merge_ranks,
)
from megatrain.cli.bench.shapes import SHAPES
from megatrain.cli.bench.turns import System
from megatrain.cli.quickstart.child import ChildFailedError
from megatrain.config.estimate.work import Work
from megatrain.errors import ConfigError
from megatrain.parallel.layout import DeviceMesh


def _parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", "train", *options])


def _job(folder: Path, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "folder": folder,
        "checkpoint": folder / "checkpoint",
        "shape_name": "tiny",
        "dtype": "float32",
        "threads": 2,
        "mesh": DeviceMesh(),
        "repeats": 3,
    }
    return Job(**values | changes)


def test_the_command_imports_no_torch() -> None:
    code = (
        "import sys, argparse; from megatrain.cli.bench import command;"
        "parser = argparse.ArgumentParser(); command.add_parser(parser.add_subparsers());"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_lengths_are_mixed_and_the_same_every_time(name: str) -> None:
    wanted = SHAPES[name].lengths
    lengths = draw_lengths(wanted, seed=0)
    assert lengths == draw_lengths(wanted, seed=0)
    assert len(lengths) == wanted.count
    assert (min(lengths), max(lengths)) == (wanted.shortest, wanted.longest)
    short = sum(n <= wanted.longest // 8 for n in lengths) / wanted.count
    long = sum(n >= 3 * wanted.longest // 4 for n in lengths) / wanted.count
    assert abs(short - 0.15) < 0.1
    assert abs(long - 0.15) < 0.1


def test_every_token_of_the_batch_has_a_label() -> None:
    batch = draw_batch(SHAPES["tiny"].lengths, vocab_size=512, seed=3)
    assert all(item["labels"] == item["input_ids"] for item in batch)
    assert all(0 <= token < 512 for item in batch for token in item["input_ids"])


def test_padded_batches_hold_each_datum_once_within_the_budget() -> None:
    lengths = draw_lengths(SHAPES["100m"].lengths, seed=0)
    batches = padded_batches(lengths, max_tokens=2048)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 2048 for batch in batches)
    assert padded_batches([100], max_tokens=10) == [[0]]


def test_active_parameters_leave_out_the_embedding_and_idle_experts() -> None:
    shapes = {
        "model.embed_tokens.weight": (50, 4),
        "lm_head.weight": (50, 4),
        "model.layers.0.self_attn.q_proj.weight": (8, 4),
        "model.layers.0.input_layernorm.weight": (4,),
        **{f"model.layers.0.mlp.experts.{e}.up_proj.weight": (6, 4) for e in range(4)},
    }
    config = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 4,
        "hidden_size": 4,
        "tie_word_embeddings": False,
    }
    work = Work.of(shapes, config)
    assert work.active_parameters == 200 + 32 + 2 * 24
    assert work.total_parameters == 200 + 200 + 32 + 4 + 4 * 24
    # One sequence of three: 2 * 280 * 3, and q k^T and p v of one layer, half of them masked.
    assert work.forward_flops([3]) == 2 * 280 * 3 + 2 * 8 * 9
    assert work.lora_flops([3]) == 4 * 280 * 3 + 6 * 8 * 9
    assert Work.of(shapes, config | {"tie_word_embeddings": True}).active_parameters == 280 + 200


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("100m", 76.9e6, 60.5e6),
        ("qwen3-8b", 8.19e9, 7.57e9),
        ("qwen3.5-9b", 8.95e9, 7.94e9),
        ("qwen3-30b-a3b", 30.5e9, 3.04e9),
    ],
)
def test_shapes_have_the_parameters_that_they_are_named_for(
    name: str, total: float, active: float, tmp_path: Path
) -> None:
    from megatrain.cli.bench.checkpoint import skeleton, tensor_shapes

    model = skeleton(_job(tmp_path, shape_name=name, dtype="bf16"))
    work = Work.of(tensor_shapes(model), model.config.to_dict())
    assert work.total_parameters == pytest.approx(total, rel=0.005)
    assert work.active_parameters == pytest.approx(active, rel=0.005)


def test_a_checkpoint_is_kept_until_it_must_be_another(tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from megatrain.cli.bench.checkpoint import make_checkpoint

    job = _job(tmp_path)
    make_checkpoint(job)
    file = job.checkpoint / "model-00001.safetensors"
    made = file.stat().st_mtime_ns
    make_checkpoint(job)
    assert file.stat().st_mtime_ns == made
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint)
    name = "model.layers.1.mlp.up_proj.weight"
    with safe_open(file, framework="np") as tensors:
        np.testing.assert_array_equal(
            model.get_parameter(name).detach().numpy(), tensors.get_tensor(name)
        )
    make_checkpoint(_job(tmp_path, seed=1))
    assert file.stat().st_mtime_ns != made


class FakeSystem:
    """Answers as a system would, at once, and remembers what it was asked."""

    def __init__(
        self, name: str, job: Job, *, seconds: dict[str, float], shift: float = 0.0
    ) -> None:
        self.name, self.job, self.seconds, self.shift = name, job, seconds, shift
        self.asked: list[tuple[str, str]] = []

    def __enter__(self) -> "FakeSystem":
        return self

    def __exit__(self, *exc: object) -> None: ...

    def start(self, *, timeout_s: float) -> list[dict[str, Any]]:
        return [{"device": "cpu", "torch_threads": 2, "num_parameters": 7}]

    def ask(self, unit: dict[str, Any], *, timeout_s: float) -> list[dict[str, Any]]:
        if unit["phase"] == "gemm":
            return [{"flops_per_second": 1e9}]
        self.asked.append((unit["name"], unit["phase"]))
        if unit["phase"] == "check":
            return [self._check(unit["name"])]
        seconds = self.seconds[unit["name"]]
        times = {"seconds": seconds, "cpu_seconds": 2 * seconds, "step_seconds": 0.5}
        return [times | {"bytes": 10, "resident": 20}]

    def _check(self, configuration: str) -> dict[str, Any]:
        file = f"{self.name}-{configuration}.npz"
        values = np.full(3, -2.0 + self.shift, np.float32)
        own = np.concatenate([[0.0], values]) if self.name == "ours" else values
        np.savez(self.job.folder / file, own)
        return {"loss": 2.0 - self.shift, "grad_norm": 1.0, "logps": file}


PEER_SECONDS = {
    "padded batch": 4.0,
    "padded batch, checkpointing": 9.0,
    "batch of one": 3.0,
    "batch of one, checkpointing": 4.0,
}


def _race(job: Job, *, shift: float = 0.0) -> tuple[Race, list[FakeSystem]]:
    ours = FakeSystem("ours", job, seconds={"packed": 1.0})
    peer = FakeSystem("peer", job, seconds=PEER_SECONDS, shift=shift)
    systems: Any = {"ours": ours, "peer": peer}
    return Race(job, systems, lambda text: None), [ours, peer]


def test_systems_take_turns_and_the_hopeless_are_not_repeated(tmp_path: Path) -> None:
    race, (ours, peer) = _race(_job(tmp_path, repeats=4))
    outcome = race.run()
    assert ours.asked[0] == ("packed", "check")
    assert ours.asked.count(("packed", "train")) == 4
    assert peer.asked.count(("batch of one", "train")) == 4
    assert peer.asked.count(("padded batch, checkpointing", "train")) == 2
    assert all(name != "batch of one, checkpointing" for name, p in peer.asked if p == "forward")
    table = report.rows(race.job, outcome, Work(1000, 1000, 0))
    ratio = table[-1]
    assert (ratio.forward, ratio.forward_backward, ratio.step_seconds) == (3.0, 3.0, 1.0)
    tokens = sum(race.job.lengths())
    assert table[0].forward == tokens
    assert report.cpu_ratio(outcome).endswith("3.00x forward, 3.00x forward+backward")
    assert table[0].mfu == pytest.approx(4 * 1000 * tokens / 1e9)


def test_different_numbers_are_an_error_not_a_table(tmp_path: Path) -> None:
    race, _ = _race(_job(tmp_path), shift=2e-3)
    with pytest.raises(DisagreementError, match=r"padded batch.*2\.00e-03"):
        race.run()


def test_a_difference_that_is_not_a_number_is_an_error(tmp_path: Path) -> None:
    race, _ = _race(_job(tmp_path), shift=float("nan"))
    with pytest.raises(DisagreementError):
        race.run()


def test_ranks_give_the_slowest_time_and_their_memory_together() -> None:
    answers = [
        {"seconds": 1.0, "cpu_seconds": 0.5, "bytes": 5, "resident": 6},
        {"seconds": 2.0, "cpu_seconds": 1.5, "bytes": 7, "resident": 8},
    ]
    expected = {"seconds": 2.0, "cpu_seconds": 2.0, "bytes": 12, "resident": 14}
    assert merge_ranks(answers, device="cpu") == expected
    assert merge_ranks(answers, device="NVIDIA")["bytes"] == 7


def test_what_has_the_best_forward_is_measured_on() -> None:
    slow_backward = Entrant("peer", "a", forward=[{"seconds": 1.0}], train=[{"seconds": 9.0}])
    other = Entrant("peer", "b", forward=[{"seconds": 2.0}], train=[{"seconds": 3.0}])
    assert not is_hopeless(slow_backward, [slow_backward, other])


def test_the_table_says_out_of_memory_and_the_ratio_leaves_it_out() -> None:
    ours = report.Row("ours, packed", 10.0, 4.0, 0.1, 1e6, 2e6, 0.5, 5)
    peer = report.Row("peer, batch of one", 5.0, 5.0, 0.2, 1e6, 1e6, 0.25, 5)
    failed = report.Row(
        "peer, padded batch", None, None, None, None, None, None, 0, "out of memory"
    )
    text = report.markdown([ours, failed, report.ratios(ours, [failed, peer])])
    assert "| peer, padded batch | out of memory |" in text
    assert "| ours / best of peer | 2.00x | 0.80x | 0.50x | 1.00x | 2.00x | 2.00x |  |" in text


SERVER = """
import sys
from pathlib import Path
from megatrain.cli.bench.turns import serve
def do(unit):
    if unit["phase"] == "die":
        raise RuntimeError("the disk is on fire")
    return {"twice": 2 * unit["value"]}
serve(Path(sys.argv[1]), "fake", rank=0, ready={"hello": 1}, do=do)
"""


def _server(folder: Path) -> System:
    line = [sys.executable, "-c", SERVER, str(folder)]
    return System("fake", line, folder=folder, num_ranks=1, threads=1)


def test_a_system_answers_each_unit_once_and_stops(tmp_path: Path) -> None:
    with _server(tmp_path) as system:
        assert system.start(timeout_s=30) == [{"hello": 1}]
        for value in (3, 4):
            unit = {"phase": "x", "value": value}
            assert system.ask(unit, timeout_s=30) == [{"twice": 2 * value}]
        process = system._process
    assert process is not None
    assert process.returncode == 0


def test_a_system_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    with _server(tmp_path) as system:
        system.start(timeout_s=30)
        with pytest.raises(ChildFailedError, match=r"fake ended(.|\n)*the disk is on fire"):
            system.ask({"phase": "die"}, timeout_s=30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--max-tokens", "-1"], "--max-tokens must be at least 1"),
        (["--ep", "2", "--dp", "2"], "--ep above 1 needs a model with experts"),
        (["--out", "/nowhere/at/all.json"], "--out must be a file"),
    ],
)
def test_options_that_cannot_work_are_refused(options: list[str], message: str) -> None:
    args = _parse(*options)
    with pytest.raises(ConfigError, match=message):
        args.run(args)


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    job = _job(tmp_path, mesh=DeviceMesh(tp=2))
    assert Job.read(job.write()) == job
    assert job.threads_per_rank == 1


@pytest.mark.slow
def test_the_whole_run_prints_a_table_and_writes_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = _parse("--shape", "tiny", "--repeats", "1", "--out", str(tmp_path / "out.json"))
    assert args.run(args) == 0
    assert "| ours / best of peer |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["agreement"]) == 4
    assert all(each["max_logprob_difference"] < 1e-4 for each in found["agreement"])
    assert found["trained_parameters"]["ours"] == found["trained_parameters"]["peer"]
