"""`megatrain train --dry-run`: layout, batches and estimated memory, from row lengths alone.

Names and options are checked and rows encoded, as they are for the run (and cached for it); no
weight is read, no rank started.
"""

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.checkpoint.locate import TOKENIZER_FILES, locate
from megatrain.cli.train import rows
from megatrain.cli.train.check import check_run
from megatrain.cli.train.job import count_steps
from megatrain.cli.train.mesh import mesh_of
from megatrain.cli.train.model import adapter_options, complete_schedule
from megatrain.cli.train.recipes import RECIPES, loss_of
from megatrain.config.estimate import Training, estimate, render
from megatrain.config.model import DEFAULT_TOKENS_PER_MICROBATCH
from megatrain.config.run import RunConfig
from megatrain.data.loader import DataLoader
from megatrain.data.packed_dataset import PackingDataset
from megatrain.parallel.layout import DeviceMesh
from megatrain.platforms.choose import choose_platform, prepare
from megatrain.train.bins import plan_bins

MAX_BATCHES = 200
"""Batches that are planned: the first of the run."""


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """One call of forward_backward."""

    tokens: int
    labels: int
    micro_batches: int
    """On each data parallel rank."""
    largest: int
    """Tokens of the largest micro-batch."""
    longest: int
    """Tokens of the longest row."""
    fill: float
    """Share of all micro-batches that tokens fill, if each were as long as the largest."""


def dry_run(config: RunConfig, *, num_ranks: int) -> None:
    """Print what a run would do.  Raises what the run itself would raise up to its weights."""
    mesh = mesh_of(config, num_ranks)
    loss = loss_of(config)
    prepare(choose_platform("cpu"))  # any will do: nothing is computed, and it is always there
    check_run(config, loss)
    spec = adapter_options(config)
    what = "all parameters" if spec is None else f"LoRA r={spec.r}"
    print(f"recipe    {config.recipe}: {type(loss).__name__}, {what}, {config.optimizer.name}")
    print(f"layout    {mesh.describe()} on {num_ranks} rank(s)")
    rows.say_progress(shows="RANK" not in os.environ)
    held_out = rows.evaluation_rows(config)
    loader = rows.training_loader(config, rows.training_rows(config), mesh)
    complete_schedule(config, count_steps(config, loader))
    batches = plan(config, mesh, itertools.islice(loader, MAX_BATCHES))
    for line in describe(config, loader, batches):
        print(line)
    if held_out is not None:
        print(f"held out  {len(held_out):,} rows")
    for line in render(estimate(str(folder_of(config)), mesh, training_of(config, batches))):
        print(line)


def folder_of(config: RunConfig) -> Path:
    """Return the checkpoint's folder."""
    return locate(config.model.id, TOKENIZER_FILES)


def plan(
    config: RunConfig, mesh: DeviceMesh, batches: Iterable[Sequence[Any]]
) -> list[PlannedBatch]:
    """Deal each batch into micro-batches, as training does."""
    section, unit = config.model, RECIPES[config.recipe].unit
    planned = []
    for batch in batches:
        lengths = [row.num_tokens for row in batch]
        bins = plan_bins(
            lengths,
            num_ranks=mesh.dp,
            multiple=mesh.pp if mesh.vpp > 1 else 1,
            max_tokens=section.max_tokens_per_microbatch,
            max_data=section.micro_batch_size and max(1, section.micro_batch_size // unit),
        )
        sizes = [sum(lengths[index] for index in members) for members in bins]
        planned.append(
            PlannedBatch(
                tokens=sum(sizes),
                labels=sum(row.num_labels for row in batch),
                micro_batches=len(bins) // mesh.dp,
                largest=max(sizes),
                longest=max(lengths),
                fill=sum(sizes) / (len(sizes) * max(sizes)),
            )
        )
    return planned


def describe(
    config: RunConfig, loader: DataLoader, batches: Sequence[PlannedBatch]
) -> Iterable[str]:
    """Yield lines on the data, the steps and the micro-batches."""
    train, section = config.train, config.model
    yield _data_line(config, loader)
    calls, steps = train.gradient_accumulation_steps, count_steps(config, loader)
    yield f"steps     {steps:,} optimizer steps of {calls} batch(es)"
    tokens = [batch.tokens for batch in batches]
    labels = sum(batch.labels for batch in batches) / sum(tokens)
    yield (
        f"tokens    {np.mean(tokens):,.0f} a batch ({min(tokens):,} to {max(tokens):,}),"
        f" {labels:.1%} with a label; over the run {np.mean(tokens) * steps * calls:,.0f}"
    )
    counts = [batch.micro_batches for batch in batches]
    budget = section.max_tokens_per_microbatch or DEFAULT_TOKENS_PER_MICROBATCH
    limit = f"{section.micro_batch_size} data" if section.micro_batch_size else f"{budget} tokens"
    yield (
        f"batches   {min(counts)} to {max(counts)} micro-batches a rank, of at most {limit},"
        f" {np.mean([batch.fill for batch in batches]):.1%} filled"
    )


def _data_line(config: RunConfig, loader: DataLoader) -> str:
    size = config.train.batch_size
    if config.data.streaming:
        return f"data      a stream, {size} rows a batch"
    line = f"data      {len(loader.dataset):,} rows, {len(loader):,} batches of {size} an epoch"
    if isinstance(loader.dataset, PackingDataset):
        fill = loader.dataset.statistics().fill_rate
        line += f"; packed to {config.data.max_length} tokens, {fill:.1%} full"
    return line


def training_of(config: RunConfig, batches: Sequence[PlannedBatch]) -> Training:
    """Return what the estimate needs to know of the run."""
    tokens = sum(batch.tokens for batch in batches)
    return Training(
        precision=config.model.mixed_precision,
        lora=adapter_options(config),
        optimizer=config.optimizer.name,
        offload_optimizer=_offloads(config),
        recompute=config.model.recompute,
        sequence_length=max(batch.longest for batch in batches),
        tokens_per_microbatch=max(batch.largest for batch in batches),
        tokens_per_step=tokens // len(batches) * config.train.gradient_accumulation_steps,
        label_fraction=sum(batch.labels for batch in batches) / tokens,
    )


def _offloads(config: RunConfig) -> bool:
    """Tell whether the optimizer's state leaves the device: a CPU has no other place for it."""
    asked = config.optimizer.options.get("offload_optimizer", False)
    return bool(asked) and config.platform != "cpu"
