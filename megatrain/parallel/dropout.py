"""Random numbers of dropout: a function of the seed, the step and the rank, so no state is kept."""

import hashlib

from megatron.core import tensor_parallel

from megatrain.parallel.groups import Groups


def seed_dropout(groups: Groups, *key: object) -> None:
    """Let this rank's dropout draw what `key` (seed, adapter, step, pass) and its place decide.

    Ranks that see other tokens or other layers draw other numbers; so do TP ranks, in Megatron's
    own tracker.
    """
    place = (groups.collection.dp_cp.rank(), groups.collection.pp.rank())
    digest = hashlib.blake2b(repr((*key, *place)).encode(), digest_size=4).digest()
    tensor_parallel.model_parallel_cuda_manual_seed(int.from_bytes(digest, "big") >> 1)
