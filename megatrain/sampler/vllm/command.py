"""How vLLM's server is started: its options and its environment."""

from pathlib import Path

from megatrain.config.service import SamplerConfig
from megatrain.errors import ConfigError
from megatrain.sampler.transformers_sampler import device_list
from megatrain.sampler.vllm.checkpoint import has_tokenizer
from megatrain.sampler.vllm.environment import Environment

Option = bool | int | float | str | list[str]
"""What an option of vLLM's server may be; True and False are --NAME and --no-NAME."""
BASE = "base"
"""The base's name in the engines that we start."""
PLUGIN = Path(__file__).with_name("plugin")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be."""
MAX_LOGPROBS = 256
"""Tokens of one position that vLLM tells of; more than the service's limits let through."""
CPU_CACHE_BYTES = 1 << 30
NEEDED: dict[str, Option] = {
    "enable-lora": True,
    # Log-probabilities are of the distribution that was sampled from.
    "logprobs-mode": "processed_logprobs",
    "max-logprobs": MAX_LOGPROBS,
    # Adapters of experts one by one, and of all in one tensor, as PEFT has them.
    "enable-mixed-moe-lora-format": True,
    # Token ids in and out, at /inference/v1/generate.
    "enable-scale-out": True,
}
"""Options without which a server does not do."""
NEEDED_VARIABLES = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_PLUGINS": "megatrain",
    "PYTHONPATH": str(PLUGIN),
}
OURS = frozenset(
    {
        *("model", "served-model-name", "uds", "host", "port", "api-key", "dtype"),
        *("tensor-parallel-size", "max-num-seqs", "max-model-len", "kv-cache-memory-bytes"),
        *("gpu-memory-utilization", "max-loras", "max-cpu-loras", "max-lora-rank"),
        *NEEDED,
    }
)
"""Options that follow from SamplerConfig's other fields, or that the sampler needs as they are."""


def command(
    config: SamplerConfig, environment: Environment, model: str, *, dtype: str, socket: Path
) -> list[str]:
    """Return the command line of a server of `model` that listens at a socket.

    Raises ConfigError for options of SamplerConfig that do not go together.
    """
    options: dict[str, Option] = {
        "model": model,
        "served-model-name": BASE,
        "uds": str(socket),
        "dtype": dtype,
        "tensor-parallel-size": config.tp,
        "max-num-seqs": config.max_batch,
        "max-loras": min(config.max_loras, config.max_adapters),
        "max-cpu-loras": config.max_adapters,
        "max-lora-rank": max_rank(config.max_lora_rank),
        **NEEDED,
        "enable-prompt-tokens-details": True,
        "disable-uvicorn-access-log": True,
    }
    if config.max_model_len is not None:
        options["max-model-len"] = config.max_model_len
    if config.gpu_memory_utilization is not None:
        options["gpu-memory-utilization"] = config.gpu_memory_utilization
    if config.kv_cache_bytes is not None:
        options["kv-cache-memory-bytes"] = config.kv_cache_bytes
    elif environment.is_cpu:
        options["kv-cache-memory-bytes"] = CPU_CACHE_BYTES
    if environment.is_cpu:
        options["enforce-eager"] = True
    if not has_tokenizer(Path(model)):
        options["skip-tokenizer-init"] = True
    module = "vllm.entrypoints.openai.api_server"
    # -P: no module is taken from the folder that we happen to be in.
    return [str(environment.python), "-P", "-m", module, *_flags(options | _further(config))]


def _further(config: SamplerConfig) -> dict[str, Option]:
    found = {name.lstrip("-").replace("_", "-"): value for name, value in config.vllm.items()}
    if taken := sorted(OURS & set(found)):
        raise ConfigError(
            f"these options of vLLM are set by the sampler itself: {', '.join(taken)}",
            hint="SamplerConfig has fields for tp, max_loras, max_model_len and the like",
        )
    return found


def _flags(options: dict[str, Option]) -> list[str]:
    flags: list[str] = []
    for name, value in options.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is False:
            flags.append(f"--no-{name}")
        else:
            flags += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return flags


def by_hand() -> str:
    """Return the variables and options that a server of somebody else's needs, for a shell."""
    variables = [f"{name}={value}" for name, value in NEEDED_VARIABLES.items()]
    return " ".join([*variables, "...", *_flags(NEEDED)])


def max_rank(rank: int) -> int:
    """Return the least rank that vLLM can be started for.  Raises ConfigError."""
    for each in RANKS:
        if each >= rank:
            return each
    raise ConfigError(f"vLLM takes adapters of rank {RANKS[-1]} at most: max_lora_rank={rank}")


def variables(config: SamplerConfig, environment: Environment, key: str) -> dict[str, str]:
    """Return what is added to the server's environment."""
    added = {
        # Not on the command line, which every user of this host can read.
        "VLLM_API_KEY": key,
        **NEEDED_VARIABLES,
        "HF_HUB_OFFLINE": "1",  # base and adapters are folders
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if config.devices is not None:
        added["CUDA_VISIBLE_DEVICES"] = device_list(config.devices)
    if environment.is_cpu:
        # Each first completion would compile C++ for 15 s; threads are bound to cores by default.
        added |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return added
