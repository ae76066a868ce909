"""TRL's trainers as functions of log-probabilities: their own loss code, without a model.

Each trainer's method runs on an object with just the attributes that it reads.
"""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from tests.unit.train.losses.batches import padded

with warnings.catch_warnings():
    # "APIs here are unstable": its version is pinned.
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.experimental.sdpo.loss_utils import add_tail_bucket, compute_divergence

__all__ = ["CPOTrainer", "GKDTrainer", "ORPOTrainer", "add_tail_bucket", "compute_divergence"]


class OneProcess:
    """accelerate.Accelerator where there is one process."""

    device = torch.device("cpu")
    num_processes = 1

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_for_metrics(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


class Trainer(SimpleNamespace):
    """What a trainer's loss reads of itself."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(
            accelerator=OneProcess(),
            aux_loss_enabled=False,
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
            **attributes,
        )

    @property
    def metrics(self) -> dict[str, float]:
        """The last value that was logged under each name."""
        return {name: values[-1] for name, values in self._metrics["train"].items()}


class Model:
    """A model in training that returns what it is told."""

    training = True

    def __init__(self, **outputs: Any) -> None:
        self.outputs = SimpleNamespace(**outputs)

    def __call__(self, **_: Any) -> SimpleNamespace:
        return self.outputs


def with_prompt(mask_BT: Tensor) -> Tensor:
    """Return a mask with one prompt token before each completion, as trainers shift by one."""
    return torch.cat([torch.zeros(len(mask_BT), 1, dtype=mask_BT.dtype), mask_BT], 1)


def language_model(logps_BT: Tensor, mask_BT: Tensor) -> Model:
    nothing = torch.zeros_like(logps_BT)
    return Model(
        log_probs=logps_BT * mask_BT, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )


def grpo(logps_BT: Tensor, lengths: Sequence[int], given: dict[str, Any], **options: Any) -> Any:
    """Return GRPOTrainer's loss of a batch, and its metrics."""
    mask_BT = padded([[0.0] * n for n in lengths])[1]
    epsilon = options.get("epsilon", 0.2)
    trainer = Trainer(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=options.get("importance_sampling_level", "token"),
        beta=options.get("beta", 0.0),
        loss_type=options["loss_type"],
        epsilon_low=epsilon,
        epsilon_high=options.get("epsilon_high") or epsilon,
        args=SimpleNamespace(
            delta=options.get("delta"), use_bias_correction_kl=False, steps_per_generation=1
        ),
        max_completion_length=options.get("max_completion_length"),
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            logps_BT,
            torch.zeros_like(logps_BT),
            None,
        ),
    )
    trainer.model = Model()
    nothing = torch.zeros(len(lengths), 0, dtype=torch.int64)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": torch.zeros_like(mask_BT),
        "completion_mask": mask_BT,
        "num_items_in_batch": mask_BT.sum(),
        **given,
    }
    return GRPOTrainer._compute_loss(trainer, trainer.model, inputs), trainer.metrics


def dpo(
    logps_BT: Tensor,
    lengths: Sequence[int],
    ref_BT: Tensor,
    *,
    beta: float,
    loss_types: Sequence[str],
    weights: Sequence[float] = (1.0,),
    label_smoothing: float = 0.0,
) -> Any:
    """Return DPOTrainer's loss and metrics; rows 0, 2, ... are chosen, 1, 3, ... rejected."""
    order = torch.cat([torch.arange(0, len(lengths), 2), torch.arange(1, len(lengths), 2)])
    mask_BT = padded([[0.0] * n for n in lengths])[1][order]
    ref_B = (ref_BT[order] * mask_BT).sum(1)
    trainer = Trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(loss_types),
        loss_weights=list(weights),
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
    )
    trainer.model = language_model(logps_BT[order], mask_BT)
    full = with_prompt(mask_BT)
    inputs = {
        "input_ids": torch.zeros_like(full),
        "attention_mask": torch.ones_like(full),
        "completion_mask": full,
        "ref_chosen_logps": ref_B[: len(ref_B) // 2],
        "ref_rejected_logps": ref_B[len(ref_B) // 2 :],
    }
    return DPOTrainer._compute_loss(trainer, trainer.model, inputs, False), trainer.metrics


def kto(
    logps_BT: Tensor,
    lengths: Sequence[int],
    ref_BT: Tensor,
    labels: Sequence[bool],
    kl: float,
    **o: Any,
) -> Any:
    """Return KTOTrainer's loss and metrics where the mismatched pairs' mean log-ratio is `kl`."""
    mask_BT = padded([[0.0] * n for n in lengths])[1]
    trainer = Trainer(
        precompute_ref_logps=True,
        calculate_KL=o["loss_type"] == "kto",
        _compute_kl_logps=lambda *_: torch.full((len(lengths),), kl, dtype=torch.float64),
        **o,
    )
    trainer.model = language_model(logps_BT, mask_BT)
    full = with_prompt(mask_BT)
    inputs = {
        "input_ids": torch.zeros_like(full),
        "attention_mask": torch.ones_like(full),
        "completion_mask": full,
        "label": torch.tensor(labels),
        "ref_logps": (ref_BT * mask_BT).sum(1),
        "ref_KL_logps": torch.zeros(len(lengths), dtype=torch.float64),
    }
    return KTOTrainer._compute_loss(trainer, trainer.model, inputs, False), trainer.metrics


def reward(scores_B: Tensor, margin_P: Tensor | None, coefficient: float | None) -> Any:
    """Return RewardTrainer's loss and metrics; scores 0, 2, ... are of chosen answers."""
    trainer = Trainer(args=SimpleNamespace(center_rewards_coefficient=coefficient))
    trainer.model = Model(logits=torch.cat([scores_B[0::2], scores_B[1::2]])[:, None])
    inputs = {"attention_mask": torch.ones(1)} | ({} if margin_P is None else {"margin": margin_P})
    # Margins are no input of a model, but the stand-in takes any.
    return RewardTrainer.compute_loss(trainer, trainer.model, inputs), trainer.metrics
