"""What `megatrain serve` serves, to whom, and within which limits.  No torch."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SamplerConfig(_Options):
    """Who samples of a base model and its adapters."""

    engine: Literal["auto", "vllm", "transformers", "none"] = "auto"
    """vllm: what `megatrain sampler install` has installed, or what runs at `address`; auto: that,
    where it is installed and there is a CUDA device, else Transformers; none: nobody samples, and
    the trainer answers compute_logprobs."""
    address: str | None = None
    """http://HOST:PORT of a vLLM server that runs already, with the options that `megatrain sampler
    check` names, and sees our files; its key is in the variable VLLM_API_KEY.  None: an engine of
    our own."""
    devices: str | None = None
    """Devices that the engine sees: `4-7` or `4,5`; None: all."""
    tp: PositiveInt = 1
    """Devices that vLLM splits the model over."""
    max_adapters: PositiveInt = 64
    """Adapters that the engine holds at once; further ones are loaded again when they are used."""
    max_loras: PositiveInt = 8
    """Of these, adapters that vLLM draws with together; the rest waits.  Each takes memory of the
    device for `max_lora_rank`."""
    max_lora_rank: PositiveInt = 64
    """Greatest rank of an adapter that vLLM loads."""
    max_batch: PositiveInt = 64
    """Sequences that are generated together."""
    max_model_len: PositiveInt | None = None
    """Longest prompt with what follows it in vLLM, in tokens; None: as the checkpoint says."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of a device's memory that vLLM takes; None: its own choice, most of it."""
    kv_cache_bytes: PositiveInt | None = None
    """Size of vLLM's KV cache on each device; None: what is left of its share of memory, and 1 GiB
    on processors."""
    vllm: dict[str, bool | int | float | str | list[str]] = Field(default_factory=dict)
    """Further options of vLLM's server by their names, such as `{"enforce-eager": true}`."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Type of the engine's parameters; auto: as the trainer's."""
    live_every: NonNegativeInt = 0
    """The newest adapter goes live after every so many optimizer steps, as `<run>/latest`;
    0: on request alone."""
    probe_tolerance: PositiveFloat = 0.25
    """Greatest difference in log-probability between trainer and sampler, for a token of the probe,
    with which a new version is published (float32: 1e-3 at most)."""
    audit_every: NonNegativeInt = 64
    """Of so many samples one is scored by the trainer too, for the mismatch monitor; 0: none."""

    @model_validator(mode="after")
    def _address_is_of_vllm(self) -> Self:
        if self.address is None:
            return self
        if self.engine != "vllm":
            raise ValueError(
                f"address is a vLLM server's, and engine is {self.engine!r}: say engine = 'vllm'"
            )
        if not self.address.startswith(("http://", "https://")):
            raise ValueError(f"address must begin with http:// or https://: {self.address!r}")
        return self

    @model_validator(mode="after")
    def _loras_fit(self) -> Self:
        if self.max_loras > self.max_adapters and "max_loras" in self.model_fields_set:
            raise ValueError(
                f"max_loras are some of max_adapters: {self.max_loras} > {self.max_adapters}"
            )
        return self


class ServedModel(_Options):
    """One base model with its ranks and samplers."""

    name: str = Field(min_length=1, max_length=256)
    """As clients call it: `Qwen/Qwen3-8B`."""
    path: str
    """Folder or hub id of the checkpoint."""
    ranks: PositiveInt = 1
    """Processes that are started on this host; the rest of the sizes below is data parallel."""
    tp: PositiveInt = 1
    """Tensor parallel size."""
    pp: PositiveInt = 1
    """Pipeline parallel size."""
    cp: PositiveInt = 1
    """Context parallel size."""
    ep: PositiveInt = 1
    """Expert parallel size."""
    address: str | None = None
    """tcp://HOST:PORT of `megatrain worker`s that run already, instead of ranks started here."""
    platform: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """Where the ranks run."""
    full_parameters: bool = False
    """Whether runs train every parameter instead of an adapter: one run at a time has the ranks for
    itself, and nobody samples."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of ModelConfig: mixed_precision, max_loras, max_tokens_per_microbatch..."""
    bus: dict[str, Any] = Field(default_factory=dict)
    """Fields of BusConfig, without the journal, which is in the service's folder."""
    tokenizer: str | None = None
    """What clients are told to load the tokenizer from; None: the name."""
    max_context_length: PositiveInt | None = None
    """Longest datum or prompt with what follows it, in tokens; None: as the checkpoint says."""
    sampler: SamplerConfig = SamplerConfig()
    """Who samples."""

    @model_validator(mode="after")
    def _whole_models_are_not_sampled_from(self) -> Self:
        if self.full_parameters and (self.sampler.engine != "none" or self.sampler.live_every):
            raise ValueError(
                f"{self.name}: with full_parameters nobody samples: sampler.engine must be 'none' "
                f"({self.sampler.engine!r} is given), and live_every 0"
            )
        return self


class Limits(_Options):
    """What one request, one client and all of them may take."""

    max_body_bytes: PositiveInt = 64 << 20
    """A request's body, decompressed."""
    max_data: PositiveInt = 4096
    """Data of one forward_backward."""
    max_pass_tokens: PositiveInt = 16384
    """Tokens of several tenants that share a pass; a larger request has a pass of its own."""
    max_request_tokens: PositiveInt = 1 << 20
    """Tokens of one request."""
    max_targets: PositiveInt = 128
    """Target tokens of one position."""
    max_lora_rank: PositiveInt = 64
    """Greatest rank of an adapter."""
    max_samples: PositiveInt = 256
    """Sequences of one sampling request."""
    max_new_tokens: PositiveInt = 32768
    """Tokens of one sampled sequence."""
    max_sessions: PositiveInt = 1024
    """Sessions of one project that are alive."""
    max_runs: PositiveInt = 256
    """Runs of one project that hold an adapter on the ranks."""
    max_queued: PositiveInt = 512
    """Requests of one project that wait; the next one is told 429."""
    max_queued_total: PositiveInt = 8192
    """Requests of all projects that wait."""
    max_checkpoints: PositiveInt = 10000
    """Checkpoints of one project."""
    requests_per_s: PositiveFloat | None = None
    """Requests of one key a second, with bursts of ten times that; None: no limit."""
    tokens_per_day: PositiveInt | None = None
    """Tokens trained and sampled by one project in a day; None: no limit."""


class Times(_Options):
    """How long things last, in seconds."""

    poll_s: PositiveFloat = 25.0
    """A poll for a result is held so long, then answered 408."""
    gap_s: PositiveFloat = 60.0
    """A request waits so long for those with lower numbers."""
    session_s: PositiveFloat = 900.0
    """A session without a heartbeat for so long is over: what waits is given up, and adapters
    leave the ranks (checkpoints stay)."""
    result_s: PositiveFloat = 3600.0
    """A result is kept so long after it was made."""
    drain_s: PositiveFloat = 30.0
    """At shutdown, what runs gets so long to finish; the rest is done after the next start."""
    janitor_s: PositiveFloat = 60.0
    """Expired things are looked for so often."""


class ServiceConfig(_Options):
    """All of `megatrain serve`."""

    models: tuple[ServedModel, ...] = Field(min_length=1)
    """What is served; names differ."""
    data: Path = Path("~/.local/share/megatrain/service")
    """The service's folder: database, journals, and files unless `files` says otherwise."""
    database: str | None = None
    """SQLAlchemy URL; None: SQLite in the folder."""
    files: str | None = None
    """Where checkpoints are kept: a folder or a URL of fsspec (`s3://bucket/prefix`); None: in the
    folder."""
    publish_dir: Path | None = None
    """Where versions for samplers are written; None: in shared memory."""
    host: str = "127.0.0.1"
    """Where it listens.  Beyond loopback, keys are needed."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 is any that is free."""
    root_path: str = ""
    """Prefix of all URLs behind a proxy."""
    keys: bool = True
    """Whether a key is asked for.  Without, any key is accepted, on loopback only."""
    client: dict[str, Any] = Field(default_factory=dict)
    """Fields of the Tinker client's configuration that the server sets."""
    limits: Limits = Limits()
    """What may be asked for."""
    times: Times = Times()
    """How long things last."""
    max_passes_ahead: PositiveInt = 2
    """Passes that wait on the ranks while one runs."""
    log_format: Literal["text", "json"] = "text"
    """Of the service's own log lines; json: an object a line, with the request's id, its project,
    run and span."""
    public_url: str | None = None
    """How clients reach this service, for URLs in answers; None: as the request says."""
    priorities: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Share of a project, by name, where it is not 1."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models must have names of their own: {names}")
        return self

    @model_validator(mode="after")
    def _strangers_need_keys(self) -> Self:
        if not self.keys and self.host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(
                f"without keys the service listens on loopback only: host={self.host!r}; "
                "leave keys on, or listen on 127.0.0.1"
            )
        return self
