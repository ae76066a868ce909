"""Deficit round robin: everybody gets their share of tokens, whatever the size of their requests.

M. Shreedhar and G. Varghese, "Efficient Fair Queuing Using Deficit Round-Robin", 1996.
"""

import math
from collections.abc import Hashable, Mapping

QUANTUM = 1024.0
"""Tokens that a flow of weight one may spend a round more."""


class Fair[K: Hashable]:
    """Whose turn it is, among flows that have work now.  The work itself is elsewhere."""

    def __init__(self) -> None:
        self._deficits: dict[K, float] = {}
        """What each flow with work may spend, in the order of their turns."""

    def choose(self, heads: Mapping[K, float], weights: Mapping[K, float]) -> K | None:
        """Return the flow that goes first of those that have work, and charge it.

        `heads` are the costs, in tokens, of what each flow would do next, and `weights` its share,
        greater than 0.  A flow without work loses what it had saved, as the algorithm says.
        """
        if not heads:
            return None
        self._deficits = {name: saved for name, saved in self._deficits.items() if name in heads}
        for name in heads:
            self._deficits.setdefault(name, 0.0)
        rounds = min(
            math.ceil(max(0.0, heads[name] - saved) / (QUANTUM * weights[name]))
            for name, saved in self._deficits.items()
        )
        for name in self._deficits if rounds else ():
            self._deficits[name] += rounds * QUANTUM * weights[name]
        chosen = next(name for name, saved in self._deficits.items() if saved >= heads[name] - 1e-6)
        self.charge(chosen, heads[chosen])
        return chosen

    def charge(self, name: K, cost: float) -> None:
        """Take a cost of a flow, and put it last in the round."""
        self._deficits[name] = self._deficits.pop(name, 0.0) - cost
