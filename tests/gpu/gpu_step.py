"""One training step in a process of its own: python gpu_step.py FOLDER PLATFORM OUT."""

import sys

import torch

import megatrain
from tests.multiprocess.data import random_batch
from tests.multiprocess.tasks import LORA, reduced_gradient


def main(folder: str, platform: str, out: str) -> None:
    """Write log-probabilities and the gradient of a batch to OUT."""
    megatrain.initialize(mode="local", platform=platform)
    model = megatrain.MegatronModel(folder, mixed_precision="no", backend="torch")
    model.add_adapter_to_model("default", LORA)
    output = model.forward_backward(inputs=random_batch(6))
    gradient = reduced_gradient(model)
    torch.save(
        {
            "logps": [torch.from_numpy(array) for array in output.logps],
            "gradient": {name: value.cpu() for name, value in gradient.items()},
        },
        out,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
