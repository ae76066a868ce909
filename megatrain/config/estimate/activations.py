"""Entries that autograd keeps from forward to backward, with the torch layers of this project.

T tokens of a micro-batch on this CP rank, t = tp, T/t of them outside the tensor parallel parts
(sequence parallelism).  Counted by what a layer saves, tensor by tensor: linears their inputs (for
the weight's gradient, or LoRA's A), norms and SwiGLU their inputs, attention q, k, v and its
output.  A test compares the sum with what saved_tensors_hooks see.
"""

from dataclasses import dataclass

from megatrain.config.estimate.linears import Mesh, is_target, layer_linears
from megatrain.config.estimate.model import ModelShape
from megatrain.config.estimate.training import Training

LOGITS_PER_CHUNK = 1 << 22
"""Entries of a chunk of logits, as in megatrain_kernels.logprobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerActivations:
    """One layer's, for one micro-batch on one rank."""

    kept: float
    """Entries from forward to backward."""
    workspace: float
    """The most entries that backward needs besides: gradients of the widest part."""
    input: float
    """Entries of the layer's input: all that recomputation keeps."""


def layer_activations(
    shape: ModelShape, mesh: Mesh, training: Training, layer: int
) -> LayerActivations:
    """Count one layer."""
    tokens = training.microbatch / mesh.cp
    split = tokens / mesh.tp
    hidden = split * shape.hidden
    trained = _trained_leaves(shape, training, layer)
    # The inputs of both norms, and what they hand on where a linear after them is trained.
    kept = 2 * hidden + hidden * bool(trained & _AFTER_NORM)
    attention = _latent_entries if shape.latent is not None else _attention_entries
    kept += attention(shape, mesh, training, tokens)
    if "o_proj" in trained and training.microbatch > training.sequence_length:
        # Attention's output, put together from the outputs of sequences.
        kept += tokens * shape.heads * shape.value_dim / mesh.tp
    if shape.is_moe(layer):
        experts, workspace = _expert_entries(shape, mesh, split, trained)
        kept += hidden + experts  # the router keeps its input
    else:
        ffn = tokens * shape.ffn / mesh.tp
        # SwiGLU's input (gate and up) and its output.
        kept += hidden * bool(trained & _INTO_MLP) + (2 + ("down_proj" in trained)) * ffn
        # Gradients of both, and the two products inside SwiGLU's backward.
        workspace = 5 * ffn
    kept += _factor_entries(shape, mesh, training, layer, tokens)
    return LayerActivations(kept=kept, workspace=workspace + 2 * hidden, input=hidden)


_AFTER_NORM = {"q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"}
_INTO_MLP = {"gate_proj", "up_proj", "gate_up_proj"}


def _trained_leaves(shape: ModelShape, training: Training, layer: int) -> set[str]:
    """Return the last parts of the names of linears that get a gradient in this layer."""
    linears = [each for each in layer_linears(shape, layer) if each.kind != "norm"]
    if training.lora is not None:
        linears = [each for each in linears if is_target(each, training.lora)]
    return {each.module.rpartition(".")[2] for each in linears}


def _attention_entries(shape: ModelShape, mesh: Mesh, training: Training, tokens: float) -> float:
    """Count q, k, v, what is made of them, and the output."""
    groups = max(1, shape.groups // mesh.tp)
    q, kv = shape.heads * shape.head_dim / mesh.tp, groups * shape.head_dim
    fused = q + 2 * kv
    # The fused projection (v is a view of it), rotated q and k, attention's output, log-sum-exp.
    kept = tokens * (fused + q + kv + q + shape.heads / mesh.tp)
    # More than one group: q out of the fused projection is a copy, which the norm keeps.
    if shape.traits.qk_norm and groups > 1:
        kept += tokens * q
    if mesh.cp > 1:
        # Keys and values of all CP ranks, in the order of the sequence.
        kept += 2 * tokens * (mesh.cp - 1) * kv
    if shape.traits.sinks:
        # The mask with the sink's logit, one for each head.
        kept += tokens * training.sequence_length * shape.heads / mesh.tp
    return kept


def _latent_entries(shape: ModelShape, mesh: Mesh, training: Training, tokens: float) -> float:
    """Count latent attention: compressed q and kv and their norms, then q, k and v of all heads."""
    sizes = shape.latent
    assert sizes is not None
    heads = shape.heads / mesh.tp
    down = 2 * (sizes.q_rank or 0) + 2 * sizes.kv_rank + sizes.rope
    q, value = heads * (sizes.nope + sizes.rope), heads * sizes.value
    # q and k put together from their parts, k's and v's projection, the output, log-sum-exp.
    return tokens * (down / mesh.tp + 2 * q + heads * sizes.nope + 2 * value + heads)


def _expert_entries(
    shape: ModelShape, mesh: Mesh, split: float, trained: set[str]
) -> tuple[float, float]:
    """Return entries kept and workspace of routed and shared experts, under an even load."""
    sizes = shape.experts
    assert sizes is not None
    routed = split * mesh.etp * sizes.per_token
    ffn, shared = sizes.ffn / mesh.etp, split * sizes.shared_ffn
    down = "down_proj" in trained
    # Sorted inputs, gate and up, SwiGLU's output before and after the router's weight.
    kept = routed * (shape.hidden * bool(trained & _INTO_MLP) + (3 + down) * ffn)
    kept += (2 + down) * shared + 4 * split * sizes.count
    # Gradients of these, and the tokens on their way back through the dispatcher.
    return kept, routed * (5 * ffn + 2 * shape.hidden)


def _factor_entries(
    shape: ModelShape, mesh: Mesh, training: Training, layer: int, tokens: float
) -> float:
    """Count x A^T of each adapted linear, and the copies of A and B side by side."""
    if training.lora is None:
        return 0.0
    total = 0.0
    for linear in layer_linears(shape, layer):
        if not is_target(linear, training.lora):
            continue
        rank = training.lora.rank_of(linear.module)
        seen = tokens
        if linear.is_expert and shape.experts is not None:
            seen = tokens / mesh.tp * mesh.etp * shape.experts.per_token
        total += 2 * seen * rank + 2 * linear.factors(training.lora, mesh)
    return total


def head_workspace(shape: ModelShape, mesh: Mesh, training: Training) -> float:
    """Return the entries, float32, that the head needs for the labels of one micro-batch."""
    rows = -(-shape.vocab // mesh.tp)
    labels = training.microbatch / mesh.cp * training.label_fraction
    chunk = min(labels, max(16, LOGITS_PER_CHUNK // rows)) * rows
    # Logits; with a gradient for the weight, they are computed again, with three gradients.
    return chunk * (4 if training.trains_all else 1)


def head_kept(shape: ModelShape, mesh: Mesh, training: Training) -> float:
    """Return the entries that the head keeps: the hidden states of labels, or their gradient."""
    labels = training.microbatch / mesh.cp * training.label_fraction
    return labels * shape.hidden + training.microbatch / mesh.cp / mesh.tp * shape.hidden
