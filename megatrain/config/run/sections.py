"""The sections of a run's TOML file.  Each option is stated once, with its default."""

from difflib import get_close_matches
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

from megatrain.config.model import ModelConfig

Tracker = Literal["tensorboard", "wandb", "mlflow", "swanlab"]


class Section(BaseModel):
    """A table of the file whose keys are all known."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Named(BaseModel):
    """Something chosen by name; every other key is an option of it, and checked by it.

    The name alone, as a string, stands for a table without options.
    """

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str
    """A built-in name, `package.module:Name`, an entry point, or `folder/file.py:Name`."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """What is given beside the name."""
        return dict(self.model_extra or {})


class TemplateSection(Named):
    """Encodes rows."""

    name: str = "Template"
    """Template, or a subclass of it."""


class LossSection(Named):
    """What is minimised."""

    name: str = ""
    """By default the recipe's."""


class OptimizerSection(Named):
    """How parameters move."""

    name: str = "AdamW"
    """A name that MegatronModel.set_optimizer takes."""
    lr: PositiveFloat = 1e-4
    """Learning rate after warm-up."""

    @property
    def options(self) -> dict[str, Any]:
        """The learning rate and what else is given beside the name."""
        return {"lr": self.lr} | super().options


class ModelSection(ModelConfig):
    """What is trained, and how it is held."""

    id: str
    """A folder, a hub id, `hf://id` or `ms://id`."""
    task: Literal["causal_lm", "reward"] = Field(default="causal_lm", exclude=True)
    """Not an option here: the recipe decides."""

    @model_validator(mode="before")
    @classmethod
    def _recipe_decides(cls, value: Any) -> Any:
        if isinstance(value, dict) and "task" in value:
            raise ValueError('task follows from the recipe ("rm" has a score head): leave it out')
        return value


class MeshSection(Section):
    """Sizes of the parallel axes; data parallelism takes the ranks that the others leave."""

    dp: PositiveInt | None = None
    """Data parallel ranks; by default what is left of the ranks that were started."""
    tp: PositiveInt = 1
    """Tensor parallel ranks."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    cp: PositiveInt = 1
    """Context parallel ranks."""
    ep: PositiveInt = 1
    """Expert parallel ranks, taken out of dp * cp * tp."""
    etp: PositiveInt = 1
    """Tensor parallel ranks inside one expert."""
    vpp: PositiveInt = 1
    """Model chunks per pipeline stage."""
    fsdp: PositiveInt = 1
    """Ranks, out of dp, over which parameters, gradients and moments are split."""


class SourceSection(Section):
    """One dataset: where it is, and how its rows become standard rows."""

    dataset_id: str
    """A json, jsonl, csv, parquet or arrow file, a folder, `hf://id` or `ms://id`."""
    subset_name: str | None = None
    """A subset of a hub dataset."""
    split: str = "train"
    """A split of a hub dataset."""
    data_slice: tuple[int, ...] | None = Field(default=None, min_length=2, max_length=3)
    """Rows start to stop (exclusive), and a step; all by default."""
    weight: PositiveFloat | None = None
    """Share of the mixture; without weights on any source, all rows of all sources are taken."""
    preprocessor: Named | None = None
    """Turns the columns into a standard row; by default data.preprocessor."""
    filters: tuple[Named, ...] = ()
    """Rows that one of these refuses are left out."""


class DataSection(Section):
    """Training and evaluation data, and how they are encoded."""

    train: tuple[SourceSection, ...]
    """Sources of training rows."""
    eval: tuple[SourceSection, ...] = ()
    """Sources of evaluation rows; none: no evaluation."""
    preprocessor: Named | None = None
    """For every source without one of its own; by default the recipe's."""
    template: TemplateSection = TemplateSection()
    """Name and options of the template; the model's tokenizer and chat template by default."""
    max_length: PositiveInt = 2048
    """Tokens of one row, and of one packed row."""
    packing: bool = False
    """Pack several rows into one of max_length; their borders are kept."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a row that cannot be used does: end the run with its file and line, or be left out."""
    streaming: bool = False
    """Read sources as they are needed; the number of rows is then unknown: set train.max_steps."""
    num_proc: PositiveInt | None = None
    """Processes that map and encode."""
    load_from_cache_file: bool = True
    """Take mapped and encoded rows from an earlier run's cache."""
    trust_remote_code: bool = False
    """Allow preprocessors, filters, templates, processors, patches and losses from files and hub
    repositories."""


class ScheduleSection(Named):
    """Learning rate over the steps."""

    name: str = "CosineWarmupScheduler"
    """A name that MegatronModel.set_lr_scheduler takes, or `none` for a constant rate."""
    warmup_ratio: NonNegativeFloat = Field(default=0.0, le=1.0)
    """Share of all steps over which the rate rises, unless num_warmup_steps says how many."""

    @model_validator(mode="after")
    def _is_no_option(self) -> Self:
        # The schedule's own options do not know this key, and would name another one as nearest.
        for key in self.options:
            if get_close_matches(key, ["warmup_ratio"], cutoff=0.8):
                raise ValueError(f"unknown key {key!r} in [schedule]; did you mean 'warmup_ratio'?")
        return self


class TrainSection(Section):
    """How long, how much at a time, and what is kept."""

    batch_size: PositiveInt = 8
    """Rows (pairs) of one forward_backward, over all ranks."""
    gradient_accumulation_steps: PositiveInt = 1
    """Calls of forward_backward in one optimizer step."""
    epochs: PositiveInt = 1
    """Passes over the training data, unless max_steps says how many steps."""
    max_steps: PositiveInt | None = None
    """Optimizer steps."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient's global norm to this; 0 does not clip."""
    seed: NonNegativeInt = 42
    """Decides initial adapters, dropout and the order of rows."""
    shuffle: bool = True
    """Another order of rows in every epoch."""
    eval_every: PositiveInt | None = None
    """Optimizer steps between evaluations; by default once, at the end."""
    eval_batch_size: PositiveInt | None = None
    """Rows of one evaluation batch; by default batch_size."""
    save_every: PositiveInt | None = None
    """Optimizer steps between checkpoints `checkpoint-<step>`; by default `last` at the end."""
    keep: PositiveInt | None = None
    """Newest checkpoints `checkpoint-<step>` that are kept; by default all."""
    background_save: bool = True
    """Write `checkpoint-<step>` while training goes on; the first rank holds a copy meanwhile."""
    best_metric: str = "loss"
    """Evaluation metric that decides what `best` is: loss, or a statistic of the loss."""
    greater_is_better: bool | None = None
    """Whether best_metric should rise; by default: accuracies, margins and rewards should."""
    early_stop: PositiveInt | None = None
    """Evaluations in a row without a better best_metric after which training ends."""
    log_every: PositiveInt = 1
    """Optimizer steps between lines of metrics.jsonl."""
    adapter: str | None = None
    """A PEFT adapter to start from: a folder, a hub's id or a URL.  Its options take the place of
    [lora]; what is resumed counts more.  DPO, KTO and their like compare with it as it was."""
    resume: str = "none"
    """`none`, `auto` (the newest checkpoint in output_dir, if there is one), or a checkpoint."""
    skip_damaged: bool = False
    """With resume = auto: pass over checkpoints that are incomplete or altered."""
    other_data: bool = False
    """With resume: go on after as many rows although the seed, the order or the data are others."""
    overwrite: bool = False
    """Delete an earlier run's results in output_dir."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.skip_damaged and self.resume != "auto":
            raise ValueError(f'skip_damaged needs resume = "auto": resume={self.resume!r}')
        if self.other_data and self.resume == "none":
            raise ValueError('other_data is for going on: resume = "none"')
        if self.overwrite and self.resume == "auto":
            raise ValueError('overwrite deletes what resume = "auto" looks for; choose one')
        if self.keep is not None and self.save_every is None:
            raise ValueError(f"keep needs save_every: keep={self.keep}")
        return self


class ReportSection(Section):
    """Where progress is told beside the console, metrics.jsonl and loss.png."""

    trackers: tuple[Tracker, ...] = ()
    """Each needs its package."""
    project: str = "megatrain"
    """Project (experiment) name in wandb, mlflow and swanlab."""
    run_name: str | None = None
    """Name of the run there; by default output_dir's last part."""
    push_to_hub: str | None = None
    """`owner/name` of a repository that gets the trained model when the run is done."""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Which hub."""
    hub_private: bool = True
    """Whether a repository that is made for this is private."""
