"""The run's rows: sources read, preprocessed, filtered, mixed, encoded and packed."""

import sys
from collections.abc import Sequence
from typing import Any

import datasets

from megatrain.cli.train.recipes import RECIPES
from megatrain.config.plugins import build, resolve
from megatrain.config.run import RunConfig
from megatrain.config.run.sections import Named, SourceSection
from megatrain.data.dataset import Dataset
from megatrain.data.loader import DataLoader
from megatrain.data.meta import DatasetMeta
from megatrain.data.packed_dataset import PackingDataset
from megatrain.errors import ConfigError
from megatrain.parallel.layout import DeviceMesh


def say_progress(*, shows: bool) -> None:
    """Let `datasets` show its bars on a terminal of this rank, and nowhere else."""
    if shows and sys.stderr.isatty():
        datasets.enable_progress_bars()
    else:
        datasets.disable_progress_bars()


def training_rows(config: RunConfig) -> Dataset:
    """Return the encoded training rows."""
    data = config.data
    if not data.packing:
        empty = Dataset(streaming=data.streaming, on_error=data.on_error)
        return _encoded(config, data.train, empty)
    packed = PackingDataset(on_error=data.on_error)
    _encoded(config, data.train, packed)
    return packed.pack_dataset()


def evaluation_rows(config: RunConfig) -> Dataset | None:
    """Return the encoded evaluation rows; None without evaluation data.  They are not packed."""
    data = config.data
    return _encoded(config, data.eval, Dataset(on_error=data.on_error)) if data.eval else None


def training_loader(config: RunConfig, dataset: Dataset, mesh: DeviceMesh) -> DataLoader:
    """Return the global batches to train on."""
    train = config.train
    return DataLoader(
        dataset, train.batch_size, shuffle=train.shuffle, seed=train.seed, device_mesh=mesh
    )


def evaluation_loader(config: RunConfig, dataset: Dataset) -> DataLoader:
    """Return the batches to evaluate on, in their order."""
    train = config.train
    return DataLoader(dataset, train.eval_batch_size or train.batch_size)


def check_steps(config: RunConfig) -> None:
    """Raise ConfigError for a preprocessor, filter or template that cannot be built."""
    data = config.data
    for source in (*data.eval, *data.train):
        _build(config, "preprocessor", source.preprocessor or data.preprocessor)
        for each in source.filters:
            _build(config, "filter", each)
    template_of(config)


def _encoded(config: RunConfig, sources: Sequence[SourceSection], dataset: Dataset) -> Dataset:
    """Fill an empty dataset with encoded rows, and return it."""
    data = config.data
    cached: dict[str, Any] = {
        "load_from_cache_file": data.load_from_cache_file,
        "num_proc": data.num_proc,
    }
    for source in sources:
        meta = _meta(source)
        dataset.add_dataset(meta)
        section = source.preprocessor or data.preprocessor
        dataset.map(_build(config, "preprocessor", section), dataset_meta=meta, **cached)
        for each in source.filters:
            dataset.filter(_build(config, "filter", each), dataset_meta=meta, **cached)
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        dataset.mix_dataset(weights, seed=config.train.seed)
    dataset.set_template(template_of(config))
    return dataset.encode(**cached)


def _meta(source: SourceSection) -> DatasetMeta:
    chosen = None if source.data_slice is None else range(*source.data_slice)
    return DatasetMeta(source.dataset_id, source.subset_name, source.split, chosen)


def _build(config: RunConfig, kind: Any, section: Named | None) -> Any:
    section = section or Named(name=RECIPES[config.recipe].preprocessor)
    trust = config.data.trust_remote_code
    return build(kind, section.name, section.options, trust_remote_code=trust)


def template_of(config: RunConfig) -> Any:
    """Return the template that encodes the run's rows."""
    section, options = config.data.template, config.data.template.options
    if "max_length" in options:
        raise ConfigError(
            "the length of rows is set once: data.template.max_length", hint="set data.max_length"
        )
    if not {"model_id", "tokenizer"} & set(options):
        options["model_id"] = config.model.id
    options["max_length"] = config.data.max_length
    target = resolve("template", section.name, trust_remote_code=config.data.trust_remote_code)
    return build("template", target, options)
