"""Log-probabilities from a vocabulary split over ranks, against log_softmax of the whole."""

import pytest
import torch

from megatrain.parallel.layout import DeviceMesh
from tests.unit.kernels import shard_tasks
from tests.unit.kernels.shard_tasks import make_problem, weighted_sum

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("head", ["frozen", "general"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_shards_together_give_log_softmax_and_its_gradients(size, head, cap, ranks):
    hidden, weight, targets = make_problem()
    logits = hidden @ weight.T
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    logps = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    gradients = torch.autograd.grad(weighted_sum(logps), [hidden, weight])
    reports = ranks.run(shard_tasks.sharded_logprobs, DeviceMesh(tp=size), head, cap)
    for report in reports:
        torch.testing.assert_close(report["logps"], logps.detach(), rtol=1e-6, atol=2e-6)
        assert torch.equal(report["is_top"], logits.argmax(-1) == targets)
    # Each rank's gradient for the hidden states is its shard's part; the caller adds them up.
    summed = sum(report["hidden"] for report in reports)
    torch.testing.assert_close(summed, gradients[0], rtol=1e-6, atol=2e-6)
    if head == "general":
        ours = torch.cat([report["weight"] for report in reports])[: len(weight)]
        torch.testing.assert_close(ours, gradients[1], rtol=1e-6, atol=2e-6)
