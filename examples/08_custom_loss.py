"""A loss of one's own: a function of log-probabilities, given to `set_loss`.

    python examples/08_custom_loss.py

Here: the focal loss, which looks away from tokens that are already certain (Lin et al. 2017,
1708.02002, equation 4).
"""

from peft import LoraConfig
from torch import Tensor

from megatrain import DataLoader, Dataset, Loss, LossBatch, MegatronModel
from megatrain.train.loss import Statistics

MODEL = "models/dense"


class FocalLoss(Loss):
    """The mean over labels of -(1 - p)^gamma * log p."""

    statistics = ("certain",)

    def __init__(self, *, gamma: float = 2.0) -> None:
        self.gamma = gamma

    def __call__(self, batch: LossBatch) -> tuple[Tensor, Statistics]:
        """Return the sum over labels, and how many have p > 0.9."""
        p_N = batch.logps_N.exp()
        loss = -((1 - p_N) ** self.gamma * batch.logps_N).sum()
        return loss, {"certain": ((p_N.detach() > 0.9).float().sum(), len(p_N))}


def train() -> None:
    """Train with the loss and save to `output/08-custom-loss`."""
    dataset = Dataset("examples/data/conversations.jsonl")
    dataset.set_template("Template", model_id=MODEL)
    dataset.map("MessagesProcessor").encode()

    model = MegatronModel(MODEL, mixed_precision="no")
    model.add_adapter_to_model(
        "default", LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
    )
    model.set_optimizer("AdamW", lr=5e-3)
    model.set_loss(FocalLoss, gamma=2.0)
    for step, batch in enumerate(DataLoader(dataset, batch_size=8, shuffle=True), 1):
        model.forward_backward(inputs=batch)
        model.clip_grad_and_step()
        metric = model.calculate_metric(is_training=True)
        print(f"step {step}: loss {metric['loss']:.4f}, certain {metric['certain']:.2f}")
    print(model.save("08-custom-loss"))


if __name__ == "__main__":
    train()
