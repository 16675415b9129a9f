"""How the steps of one model ended, in numbers and in words."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

REASONS = {
    "unchanged": "the method takes no step",
    "finished": "all {steps} steps were taken",
    "rewound": "of {steps} steps taken, the state after {kept} was kept",
    "crossed": "{measure} fell below {reference:.3f} after {steps} steps; the state after {kept}"
    " is nearest to it, with {reached:.3f}",
    "too fast": "{measure} was {reached:.3f}, below {reference:.3f}, before the first step: by"
    " this rule there is nothing to forget, and the weights are as they were",
    "never crossed": "{measure} was still {reached:.3f} after all {steps} steps, not below"
    " {reference:.3f}; the last state was kept",
}
"""Every status, and what it says."""


@dataclass(frozen=True)
class Ending:
    """How the steps of one model ended.

    Args:
        status: a key of `REASONS`.
        steps: steps taken.
        kept: number of steps after which the model was as it is now; fewer than `steps` where an
            earlier state was kept.
        measure: what a stopping rule watched, in words; None without such a rule.
        reached: its value in the kept state.
        reference: the value below which the model stops.

    Example:
        >>> Ending("crossed", 8, 6, "accuracy on the forget rows", 0.95, 0.94).reason
        'accuracy on the forget rows fell below 0.940 after 8 steps; the state after 6 is
        nearest to it, with 0.950'
    """

    status: str
    steps: int = 0
    kept: int = 0
    measure: str | None = None
    reached: float | None = None
    reference: float | None = None

    @property
    def reason(self) -> str:
        """The status as a sentence, with its numbers."""
        if self.status == "finished" and not self.steps:
            return "the weights were changed at once, without steps"
        return REASONS[self.status].format_map(asdict(self))

    def told(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self) | {"reason": self.reason}


def told_endings(endings: Sequence[Ending]) -> dict[str, Any]:
    """How many models ended how, as plain values.

    Args:
        endings: of the models.

    Returns:
        By status, `models` and the means over them of `steps`, `kept`, `reached` and `reference`;
        the last two are None without a stopping rule.

    Example:
        >>> told_endings([Ending("finished", 8, 8), Ending("finished", 8, 8)])
        {'finished': {'models': 2, 'steps': 8.0, 'kept': 8.0, 'reached': None, 'reference': None}}
    """
    return {status: _means([e for e in endings if e.status == status])
            for status in dict.fromkeys(ending.status for ending in endings)}  # fmt: skip


def _means(endings: Sequence[Ending]) -> dict[str, Any]:
    values = {
        name: [getattr(ending, name) for ending in endings]
        for name in ("steps", "kept", "reached", "reference")
    }
    means = {n: None if None in found else float(np.mean(found)) for n, found in values.items()}
    return {"models": len(endings)} | means
