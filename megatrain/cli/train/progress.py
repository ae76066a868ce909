"""What a run says on the console: a bar on a terminal, lines in a log."""

import sys
import time
from collections.abc import Mapping

PLAIN_LINE_EVERY_S = 5.0
"""Seconds between two lines where there is no terminal."""
SHOWN = {"loss": "loss {:.4f}", "lr": "lr {:.2e}", "grad_norm": "|g| {:.3f}"}
"""Metrics that come first, and how."""
COUNTS = (
    "step",
    "epoch",
    "tokens",
    "label_tokens",
    "tokens_per_second",
    "mfu",
    "seconds",
    "data_wait",
)
"""Metrics that are no result of the loss."""


class Progress:
    """Shows steps of one run; silent unless `shows`, which is for one rank only."""

    def __init__(self, total: int, *, first: int, shows: bool) -> None:
        self._total, self._shows = total, shows
        self._said_at = 0.0
        self._bar = None
        if shows and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=first, desc="train", unit="step")

    def step(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """Tell that a step is done; metrics are there on logged steps."""
        if self._bar is not None:
            if metrics is not None:
                self._bar.set_postfix_str(describe(metrics), refresh=False)
            self._bar.update(1)
            return
        due = step == self._total or time.monotonic() - self._said_at >= PLAIN_LINE_EVERY_S
        if metrics is not None and due:
            self._said_at = time.monotonic()
            self.say(f"step {step}/{self._total}: {describe(metrics)}")

    def say(self, text: str) -> None:
        """Write one line."""
        if not self._shows:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def describe(metrics: Mapping[str, float]) -> str:
    """Return one line: loss, rate and norm, the loss's statistics, speed."""
    parts = [form.format(metrics[key]) for key, form in SHOWN.items() if key in metrics]
    own = [key for key in metrics if key not in SHOWN and key not in COUNTS]
    parts += [f"{key} {metrics[key]:.3f}" for key in own]
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)
