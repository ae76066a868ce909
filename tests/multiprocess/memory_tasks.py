"""What ranks do for test_loading_memory."""

import gc
import json
import threading
from pathlib import Path
from typing import Any

from tests.multiprocess.tasks import make_model


def resident_bytes() -> int:
    """Return this process's anonymous resident memory; mapped files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


class Peak:
    """The largest resident memory while it is entered, looked at every millisecond."""

    def __enter__(self) -> "Peak":
        self.largest = self.before = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.largest = max(self.largest, resident_bytes())

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.largest = max(self.largest, resident_bytes())


def loading_growth(folder: Path) -> dict[str, Any]:
    """Return bytes: the growth while loading, this rank's parameters, and its largest fused one.

    The fused one is counted as this rank holds it: under TP that is the stricter bound.
    """
    gc.collect()
    with Peak() as peak:
        model = make_model(folder, {})
    chunks = model._network.chunks
    sizes = [p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters()]
    fused = [
        p.numel() * p.element_size()
        for chunk in chunks
        for name, p in chunk.named_parameters()
        if name.endswith(("linear_fc1.weight", "linear_qkv.weight"))
    ]
    growth = {"growth": peak.largest - peak.before, "parameters": sum(sizes)}
    return growth | {"largest": max(fused)}


def split(folder: Path) -> Path:
    """Write the same checkpoint as eight shards with an index, once; return its folder."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    target = folder.parent / f"{folder.name}-sharded"
    if target.is_dir():
        return target
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    files: dict[str, str] = {}
    with safe_open(folder / "model.safetensors", framework="pt") as source:
        names = sorted(source.keys())
        for number in range(8):
            shard = f"model-{number + 1:05d}-of-00008.safetensors"
            mine = names[number::8]
            save_file({name: source.get_tensor(name) for name in mine}, target / shard)
            files |= dict.fromkeys(mine, shard)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return target
