"""The gated delta rule in chunks against its definition and against Transformers' code."""

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from megatrain_kernels.causal_conv import l2_norm
from megatrain_kernels.delta_rule import delta_rule, delta_rule_reference, packed_delta_rule

HEADS, KEY, VALUE = 3, 16, 8
LENGTHS = (0, 1, 63, 64, 65, 127)
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
SCALE = KEY**-0.5


def inputs(tokens: int, *, seed: int = 0, decay: float = 1.0) -> list[torch.Tensor]:
    """Return q, k, v, g and beta as a layer makes them: unit rows, g < 0, 0 < beta < 1."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make)

    q, k = l2_norm(normal(tokens, HEADS, KEY)), l2_norm(normal(tokens, HEADS, KEY))
    g, beta = -normal(tokens, HEADS).exp() * decay, normal(tokens, HEADS).sigmoid()
    values = [q, k, normal(tokens, HEADS, VALUE), g, beta]
    return [x.requires_grad_() for x in values]


def gradients(function, given: list[torch.Tensor]) -> list[torch.Tensor]:
    output = function(*given, scale=SCALE)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), given, allow_unused=True)]


@pytest.mark.parametrize("decay", [1e-3, 1.0, 50.0], ids=["slow", "usual", "fast"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_chunks_give_the_definition_forward_and_backward(tokens, decay):
    given = inputs(tokens, decay=decay)
    if not tokens:
        assert delta_rule(*given, scale=SCALE).shape == (0, HEADS, VALUE)
        return
    for ours, expected in zip(
        gradients(delta_rule, given), gradients(delta_rule_reference, given), strict=True
    ):
        torch.testing.assert_close(ours, expected, **FLOAT32)


@pytest.mark.parametrize("tokens", LENGTHS[1:])
def test_it_is_transformers_own(tokens):
    given = inputs(tokens)
    theirs, _ = torch_chunk_gated_delta_rule(*(x[None] for x in given))
    torch.testing.assert_close(delta_rule(*given, scale=SCALE), theirs[0], **FLOAT32)


def test_bfloat16_is_rounded_once_at_the_end():
    given = [x.detach().bfloat16() for x in inputs(70)]
    ours = delta_rule(*given, scale=SCALE)
    exact = delta_rule_reference(*(x.float() for x in given), scale=SCALE)
    torch.testing.assert_close(ours, exact.bfloat16(), rtol=1e-2, atol=1e-3)


def test_packed_sequences_see_nothing_of_each_other():
    lengths = [5, 0, 64, 1, 70]
    given = inputs(sum(lengths))
    packed = packed_delta_rule(*given, lengths, scale=SCALE)
    alone = [
        delta_rule_reference(*one, scale=SCALE)
        for one in zip(*(x.split(lengths) for x in given), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone), **FLOAT32)
    wanted = torch.autograd.grad(packed[5:69].sum(), given)
    for gradient in wanted:
        assert not gradient[:5].any()
        assert not gradient[69:].any()
