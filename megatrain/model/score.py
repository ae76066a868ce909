"""The score head of a reward model: one number a sequence, from its last token's hidden state."""

import hashlib

import torch

from megatrain.model.tensor_slice import TensorPart, TrainedParameter

SCORE = "score.weight"
"""Its name in Transformers' models for sequence classification with one label."""


def make_score(
    hidden_size: int, *, seed: int, std: float, device: torch.device
) -> TrainedParameter:
    """Return w of score = w . h, float32 (1, H), the same on every rank.

    Normal with standard deviation `std`, Transformers' initializer_range, from the seed alone.
    """
    digest = hashlib.blake2b(f"{seed}:{SCORE}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    weight = torch.empty(1, hidden_size).normal_(std=std, generator=generator)
    part = TensorPart(SCORE, (1, hidden_size), None, None, is_expert=False)
    return TrainedParameter(
        torch.nn.Parameter(weight.to(device)),
        is_expert=False,
        is_replicated=True,
        parts=(part,),
        place="head",
    )
