"""The part of the API that needs torch and Megatron: a model whose ranks run the user's script."""

from megatrain.api.session import Session
from megatrain.checkpoint.locate import locate
from megatrain.config.model import ModelConfig
from megatrain.export.gather import gather_adapter, save_adapter
from megatrain.model.network import build_network
from megatrain.platforms.choose import prepare
from megatrain.train.step import Trainer

__all__ = ["gather_adapter", "open_model", "save_adapter"]


def open_model(model_id: str, config: ModelConfig, session: Session) -> Trainer:
    """Load this rank's part of a checkpoint.  Collective: a hub's files are fetched by each host."""
    network = build_network(locate(model_id), config, session.groups)
    prepare(session.platform)  # Bridge imports some of Megatron's modules only while it builds
    return Trainer(network)
