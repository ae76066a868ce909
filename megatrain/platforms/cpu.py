"""CPU with Gloo: what Megatron must be told so that its CUDA-only lines run without a GPU.

Nothing in `torch` itself is changed.  Each Megatron module gets a stand-in for its global name
`torch` that answers `torch.cuda` for a machine without CUDA and turns a `device="cuda"` argument
into `"cpu"`; Transformers and PEFT in the same process keep the real one.
"""

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed

from megatrain.platforms.platform import Patch

CPU = torch.device("cpu")

FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
"""Functions of torch that Megatron calls with a CUDA device."""


class CpuPlatform:
    """The machine's processors, one process a rank, collectives over Gloo."""

    name = "cpu"
    collective_backend = "gloo"

    def is_available(self) -> bool:
        """Return True: there is always a CPU."""
        return True

    def device(self, local_rank: int) -> torch.device:
        """Return the CPU, whatever the rank."""
        return CPU

    def environment(self) -> dict[str, str]:
        """Return nothing: Gloo needs no variables."""
        return {}

    def patches(self) -> tuple[Patch, ...]:
        """Return the changes to Megatron's modules; none to torch."""
        return PATCHES


class _Stream:
    """A CUDA stream on a machine that runs everything in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()


class _Event:
    """A CUDA event that has always happened."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


_STREAM = _Stream()


def _zero(*args: object, **kwargs: object) -> int:
    return 0


def _nothing(*args: object, **kwargs: object) -> None:
    return None


@contextlib.contextmanager
def _stream_context(stream: object) -> Iterator[None]:
    yield


def _stand_in(module: types.ModuleType, **overrides: object) -> types.ModuleType:
    """Return a module that has `overrides` and takes every other name from `module`."""
    proxy = types.ModuleType(module.__name__, f"megatrain's CPU stand-in for {module.__name__}")
    proxy.__dict__.update(overrides)
    proxy.__dict__["__getattr__"] = functools.partial(getattr, module)
    return proxy


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a factory function so that a CUDA device means the CPU."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if isinstance(device, int) or (device is not None and "cuda" in str(device)):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapper


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state)


def _cuda_stand_in() -> types.ModuleType:
    generator = {
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
    }
    return _stand_in(
        torch.cuda,
        **generator,
        random=_stand_in(torch.cuda.random, **generator),
        current_device=lambda: CPU,
        set_device=_nothing,
        synchronize=_nothing,
        empty_cache=_nothing,
        Stream=_Stream,
        Event=_Event,
        current_stream=lambda device=None: _STREAM,
        default_stream=lambda device=None: _STREAM,
        stream=_stream_context,
        memory_allocated=_zero,
        max_memory_allocated=_zero,
        memory_reserved=_zero,
        reset_peak_memory_stats=_nothing,
        is_current_stream_capturing=lambda: False,
    )


def _all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    **kwargs: Any,
) -> Any:
    def ints(sizes: Any) -> list[int] | None:
        return None if sizes is None else [int(size) for size in sizes]

    return torch.distributed.all_to_all_single(
        output, input, ints(output_split_sizes), ints(input_split_sizes), **kwargs
    )


def _all_gather(
    outputs: list[torch.Tensor], input: torch.Tensor, group: Any = None, **kwargs: Any
) -> Any:
    sizes = {out.shape[0] for out in outputs} if input.dim() else {0}
    if len(sizes) == 1:
        return torch.distributed.all_gather(outputs, input, group=group, **kwargs)
    rows = max(sizes)
    padded = input.new_zeros(rows, *input.shape[1:])
    padded[: input.shape[0]] = input
    wide = [torch.empty_like(padded) for _ in outputs]
    torch.distributed.all_gather(wide, padded, group=group)
    for out, rows_of_rank in zip(outputs, wide, strict=True):
        out.copy_(rows_of_rank[: out.shape[0]])
    return None


def _reduce_scatter(
    output: torch.Tensor, inputs: list[torch.Tensor], group: Any = None, **kwargs: Any
) -> Any:
    if len({part.shape[0] for part in inputs}) == 1:
        return torch.distributed.reduce_scatter(output, inputs, group=group, **kwargs)
    whole = torch.cat(inputs)
    torch.distributed.all_reduce(whole, group=group)
    first = sum(part.shape[0] for part in inputs[: torch.distributed.get_rank(group)])
    output.copy_(whole[first : first + output.shape[0]])
    return None


def _barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
    return torch.distributed.barrier(group=group, async_op=async_op)


@functools.cache
def _torch_stand_in() -> types.ModuleType:
    return _stand_in(
        torch,
        cuda=_cuda_stand_in(),
        distributed=_stand_in(
            torch.distributed,
            all_gather=_all_gather,
            all_to_all_single=_all_to_all_single,
            barrier=_barrier,
            reduce_scatter=_reduce_scatter,
        ),
        **{name: _on_cpu(getattr(torch, name)) for name in FACTORIES},
    )


def _megatron_modules() -> list[types.ModuleType]:
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("megatron.") and isinstance(module, types.ModuleType)
    ]


def _replace_torch() -> None:
    stand_in = _torch_stand_in()
    for module in _megatron_modules():
        if module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = stand_in


def _replace_rng_setter() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")

    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random.__dict__["_set_cuda_rng_state"] = set_rng_state


def _undo_jit_fuser() -> None:
    for module in _megatron_modules():
        owners: list[Any] = [module]
        owners += [
            value
            for value in module.__dict__.values()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        for owner in owners:
            for name, value in list(vars(owner).items()):
                if isinstance(value, types.FunctionType):
                    original = vars(value).get("_torchdynamo_orig_callable")
                    if original is not None:
                        setattr(owner, name, original)


def _rotary_of_cp_rank(pos_emb: torch.Tensor, seq_dim: int, cp_group: Any) -> torch.Tensor:
    """Return chunks r and 2c-1-r of 2c along `seq_dim`, for rank r of c."""
    size, rank = cp_group.size(), cp_group.rank()
    chunks = pos_emb.chunk(2 * size, seq_dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], seq_dim)


def _replace_rotary_of_cp_rank() -> None:
    for module in _megatron_modules():
        if "get_pos_emb_on_this_cp_rank" in module.__dict__:
            module.__dict__["get_pos_emb_on_this_cp_rank"] = _rotary_of_cp_rank


def _keep_tied_embedding_on_cpu() -> None:
    name = "megatron.core.models.common.language_module.language_module"
    cls = importlib.import_module(name).LanguageModule
    original = cls.setup_embeddings_and_output_layer
    if getattr(original, "without_sync", False):
        return

    @functools.wraps(original)
    def setup(self: Any) -> None:
        meta = self.config.init_model_with_meta_device
        self.config.init_model_with_meta_device = True  # its only effect here: no Tensor.cuda()
        try:
            original(self)
        finally:
            self.config.init_model_with_meta_device = meta

    vars(setup)["without_sync"] = True
    cls.setup_embeddings_and_output_layer = setup


PATCHES = (
    Patch(
        "megatron.torch",
        "megatron-core says torch.cuda and device='cuda' in code that a CPU can run; "
        "over Gloo all_to_all_single wants its split sizes as Python integers, and all_gather and "
        "reduce_scatter want parts of one size",
        _replace_torch,
    ),
    Patch(
        "megatron.rng",
        "the tensor-parallel random number tracker sets the state of CUDA's generator",
        _replace_rng_setter,
    ),
    Patch(
        "megatron.jit_fuser",
        "megatron-core decorates small functions with torch.compile; compiling them with a C++ "
        "compiler costs minutes on a CPU and buys nothing there",
        _undo_jit_fuser,
    ),
    Patch(
        "megatron.rotary_of_cp_rank",
        "rotary embeddings are split over context parallel ranks with an index from pinned memory "
        "and Tensor.cuda()",
        _replace_rotary_of_cp_rank,
    ),
    Patch(
        "megatron.tied_embedding",
        "a tied embedding on two pipeline stages is moved with Tensor.cuda() to be made equal; "
        "both stages read it from the checkpoint anyway",
        _keep_tied_embedding_on_cpu,
    ),
)
