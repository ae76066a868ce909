"""Start training from a PEFT adapter: its weights alone, as a state that knows no step yet."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatrain.checkpoint.remote import local_source
from megatrain.errors import CheckpointError, MegatrainError
from megatrain.export.adapters.import_adapter import import_adapter
from megatrain.export.rank_zero import broadcast_text, on_rank_zero, texts_of_all
from megatrain.train.step import Trainer


@contextmanager
def imported(trainer: Trainer, place: str) -> Iterator[Path]:
    """Give a training state made of a PEFT directory, hub id or URL.  Collective.

    Rank 0 makes it; ranks of other hosts, which cannot see its folder, make their own.  Raises
    CheckpointError on every rank.
    """
    groups = trainer.network.groups
    config = json.loads((trainer.network.folder / "config.json").read_text())
    model_type = config.get("text_config", config).get("model_type")
    with tempfile.TemporaryDirectory(prefix="megatrain-adapter-") as own:
        state = Path(own) / "adapter"

        def make() -> None:
            with local_source(place, is_checkpoint=False) as folder:
                import_adapter(folder, state, model_type=model_type, seed=trainer.seed)

        def failed(text: str, hint: str | None) -> MegatrainError:
            return CheckpointError(f"cannot start from {place}: {text}", hint=hint)

        on_rank_zero(make, groups, failed)
        shared = Path(broadcast_text(str(state), groups))
        failure = ""
        try:
            if not shared.is_dir():
                make()
                shared = state
        except (MegatrainError, OSError) as error:
            failure = str(error)
        if found := next(filter(None, texts_of_all(failure, groups)), None):
            raise failed(found, None)
        yield shared
        texts_of_all("", groups)  # nobody's folder goes before everybody has read it
