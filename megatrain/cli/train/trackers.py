"""TensorBoard, Weights & Biases, MLflow and SwanLab: the same two calls on each."""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatrain.errors import ConfigError


class Tracker(ABC):
    """Somewhere that metrics are sent to, by the first rank only."""

    package: str
    """What must be installed."""

    @abstractmethod
    def __init__(
        self, *, project: str, run_name: str, folder: Path, config: Mapping[str, Any]
    ) -> None:
        """Start a run there."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send the metrics of one step."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left."""


class TensorBoard(Tracker):
    """Event files in `folder/tensorboard`."""

    package = "tensorboard"

    def __init__(
        self, *, project: str, run_name: str, folder: Path, config: Mapping[str, Any]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard" / run_name))
        options = "\n".join(f"    {key} = {value!r}" for key, value in config.items())
        self._writer.add_text(project, options)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Tracker):
    """https://docs.wandb.ai; `WANDB_MODE=offline` keeps everything on this machine."""

    package = "wandb"

    def __init__(
        self, *, project: str, run_name: str, folder: Path, config: Mapping[str, Any]
    ) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(project=project, name=run_name, dir=str(folder), config=dict(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """https://mlflow.org; `MLFLOW_TRACKING_URI` says where to."""

    package = "mlflow"

    def __init__(
        self, *, project: str, run_name: str, folder: Path, config: Mapping[str, Any]
    ) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(project)
        self._mlflow.start_run(run_name=run_name)
        self._mlflow.log_params(dict(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class SwanLab(Tracker):
    """https://docs.swanlab.cn; `SWANLAB_MODE=local` keeps everything on this machine."""

    package = "swanlab"

    def __init__(
        self, *, project: str, run_name: str, folder: Path, config: Mapping[str, Any]
    ) -> None:
        self._swanlab = importlib.import_module("swanlab")
        self._swanlab.init(
            project=project,
            experiment_name=run_name,
            logdir=str(folder / "swanlab"),
            config=dict(config),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._swanlab.log(dict(metrics), step=step)

    def close(self) -> None:
        self._swanlab.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "swanlab": SwanLab,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    for name in names:
        package = TRACKERS[name].package
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"report.trackers asks for {name}, and the package {package} is not installed",
                hint=f"pip install {package}",
            )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one table with dotted keys, which every tracker can show."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value) if isinstance(value, list | tuple) else value
    return flat
