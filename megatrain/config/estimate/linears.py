"""The tensors of a model by Hugging Face module, and how much of each a rank holds.

tp splits column-parallel linears over out-features, row-parallel ones over in-features, embedding
and head over the vocabulary (padded to a multiple of tp); norms, the router and latent
attention's down-projections are whole on every rank; experts are dealt over ep and split over etp.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from megatrain.config.estimate.model import Latent, ModelShape
from megatrain.config.lora import LoraSpec

Split = Literal["column", "row", "whole", "vocabulary"]
Kind = Literal["embedding", "head", "attention", "mlp", "router", "experts", "norm"]


class Mesh(Protocol):
    """Sizes of the parallel axes, as DeviceMesh has them."""

    @property
    def tp(self) -> int: ...
    @property
    def pp(self) -> int: ...
    @property
    def cp(self) -> int: ...
    @property
    def dp(self) -> int: ...
    @property
    def ep(self) -> int: ...
    @property
    def etp(self) -> int: ...
    @property
    def vpp(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A weight, or as many alike as there are experts.  A norm is a weight with one column."""

    module: str
    """Hugging Face's name; an expert's is without its number."""
    kind: Kind
    rows: int
    """Out-features."""
    columns: int = 1
    """In-features."""
    split: Split = "whole"
    has_bias: bool = False
    copies: int = 1
    """Experts."""

    @property
    def total(self) -> int:
        """Entries of the whole model's."""
        return self.copies * (self.rows * self.columns + self.has_bias * self.rows)

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to the experts."""
        return self.kind == "experts"

    def local_size(self, mesh: Mesh) -> tuple[int, int, int]:
        """Return rows, columns and copies on one rank."""
        parts = mesh.etp if self.is_expert else mesh.tp
        copies = self.copies // mesh.ep if self.is_expert else self.copies
        rows, columns = self.rows, self.columns
        if self.split in ("column", "vocabulary"):
            rows = -(-rows // parts)
        elif self.split == "row":
            columns //= parts
        return rows, columns, copies

    def local(self, mesh: Mesh) -> int:
        """Return the entries on one rank."""
        rows, columns, copies = self.local_size(mesh)
        return copies * (rows * columns + self.has_bias * rows)

    def factors(self, spec: LoraSpec, mesh: Mesh) -> int:
        """Return the entries of LoRA's A and B on one rank; 0 if it is no target."""
        if not is_target(self, spec):
            return 0
        rows, columns, copies = self.local_size(mesh)
        return copies * spec.rank_of(self.module) * (rows + columns)


def is_target(linear: Linear, spec: LoraSpec) -> bool:
    """Tell whether an adapter has factors on this linear."""
    if linear.kind == "norm":
        return False
    if spec.is_all_linear:
        by_name_only = linear.kind in ("embedding", "head", "router")
        module = linear.module
        return not by_name_only and spec.chooses_layer_of(module) and not spec.excludes(module)
    return spec.matches(linear.module)


def stage_layers(shape: ModelShape, mesh: Mesh, stage: int) -> list[int]:
    """Return the layers of a pipeline stage, over all its chunks."""
    each = shape.layers // (mesh.pp * mesh.vpp)
    starts = [(chunk * mesh.pp + stage) * each for chunk in range(mesh.vpp)]
    return [start + i for start in starts for i in range(each)]


def stage_linears(shape: ModelShape, mesh: Mesh, stage: int) -> Iterator[Linear]:
    """Yield every weight of a stage.  A tied head is a copy where embedding and head are apart."""
    if stage == 0:
        yield embedding(shape)
    for layer in stage_layers(shape, mesh, stage):
        yield from layer_linears(shape, layer)
    if stage == mesh.pp - 1:
        yield Linear(module="model.norm", kind="norm", rows=shape.hidden)
        if not shape.tied or mesh.pp > 1:
            yield head(shape)


def embedding(shape: ModelShape) -> Linear:
    """Return the token embedding."""
    return Linear(
        module="model.embed_tokens",
        kind="embedding",
        rows=shape.vocab,
        columns=shape.hidden,
        split="vocabulary",
    )


def head(shape: ModelShape) -> Linear:
    """Return the output layer."""
    return Linear(
        module="lm_head",
        kind="head",
        rows=shape.vocab,
        columns=shape.hidden,
        split="vocabulary",
    )


def layer_linears(shape: ModelShape, layer: int) -> Iterator[Linear]:
    """Yield the weights of one layer."""
    prefix = f"model.layers.{layer}"
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Linear(module=f"{prefix}.{name}", kind="norm", rows=shape.hidden)
    attention = f"{prefix}.self_attn"
    if shape.latent is not None:
        yield from _latent_attention(shape, shape.latent, attention)
    else:
        yield from _attention(shape, attention)
    if shape.is_moe(layer):
        yield from _experts(shape, f"{prefix}.mlp")
    else:
        yield from _mlp(f"{prefix}.mlp", shape.hidden, shape.ffn)


def _attention(shape: ModelShape, prefix: str) -> Iterator[Linear]:
    traits, hidden = shape.traits, shape.hidden
    q, kv = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        yield Linear(
            module=f"{prefix}.{name}",
            kind="attention",
            rows=rows,
            columns=hidden,
            split="column",
            has_bias=traits.qkv_bias,
        )
    yield Linear(
        module=f"{prefix}.o_proj",
        kind="attention",
        rows=hidden,
        columns=q,
        split="row",
        has_bias=traits.o_bias,
    )
    if traits.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield Linear(module=f"{prefix}.{name}", kind="norm", rows=shape.head_dim)
    if traits.sinks:
        yield Linear(module=f"{prefix}.sinks", kind="norm", rows=shape.heads, split="column")


def _latent_attention(shape: ModelShape, sizes: Latent, prefix: str) -> Iterator[Linear]:
    hidden, heads = shape.hidden, shape.heads
    q, kv = heads * (sizes.nope + sizes.rope), heads * (sizes.nope + sizes.value)

    def linear(name: str, rows: int, columns: int, split: Split) -> Linear:
        module = f"{prefix}.{name}"
        return Linear(module=module, kind="attention", rows=rows, columns=columns, split=split)

    if sizes.q_rank is None:
        yield linear("q_proj", q, hidden, "column")
    else:
        yield linear("q_a_proj", sizes.q_rank, hidden, "whole")
        yield Linear(module=f"{prefix}.q_a_layernorm", kind="norm", rows=sizes.q_rank)
        yield linear("q_b_proj", q, sizes.q_rank, "column")
    yield linear("kv_a_proj_with_mqa", sizes.kv_rank + sizes.rope, hidden, "whole")
    yield Linear(module=f"{prefix}.kv_a_layernorm", kind="norm", rows=sizes.kv_rank)
    yield linear("kv_b_proj", kv, sizes.kv_rank, "column")
    yield linear("o_proj", hidden, heads * sizes.value, "row")


def _mlp(prefix: str, hidden: int, ffn: int) -> Iterator[Linear]:
    for name in ("gate_proj", "up_proj"):
        yield Linear(
            module=f"{prefix}.{name}", kind="mlp", rows=ffn, columns=hidden, split="column"
        )
    yield Linear(module=f"{prefix}.down_proj", kind="mlp", rows=hidden, columns=ffn, split="row")


def _experts(shape: ModelShape, prefix: str) -> Iterator[Linear]:
    sizes, hidden = shape.experts, shape.hidden
    assert sizes is not None
    bias = shape.traits.expert_bias
    yield Linear(
        module=f"{prefix}.gate", kind="router", rows=sizes.count, columns=hidden, has_bias=bias
    )
    both: tuple[tuple[str, int, int, Split], ...] = (
        ("gate_proj", sizes.ffn, hidden, "column"),
        ("up_proj", sizes.ffn, hidden, "column"),
        ("down_proj", hidden, sizes.ffn, "row"),
    )
    if bias:  # GPT-OSS has gate and up in one tensor
        both = (("gate_up_proj", 2 * sizes.ffn, hidden, "column"), both[2])
    for name, rows, columns, split in both:
        yield Linear(
            module=f"{prefix}.experts.{name}",
            kind="experts",
            rows=rows,
            columns=columns,
            split=split,
            has_bias=bias,
            copies=sizes.count,
        )
    if sizes.shared_ffn:
        yield from _mlp(f"{prefix}.shared_experts", hidden, sizes.shared_ffn)
