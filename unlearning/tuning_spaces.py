"""What may be tuned of every method, and between which bounds."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

NEAR = 0.15  # standard deviation, as a share of the space


class Setting(ABC):
    """A setting that is drawn at random."""

    @abstractmethod
    def draw(self, random: np.random.Generator) -> str:
        """A value, as text."""

    @abstractmethod
    def near(self, value: str, random: np.random.Generator) -> str:
        """A value near one that is known to be good, as text."""


@dataclass(frozen=True)
class Between(Setting):
    """A number, uniform in its logarithm.

    Args:
        low: the least, above 0.
        high: the most.
    """

    low: float
    high: float

    def draw(self, random: np.random.Generator) -> str:
        """Three significant digits."""
        return f"{np.exp(random.uniform(np.log(self.low), np.log(self.high))):.3g}"

    def near(self, value: str, random: np.random.Generator) -> str:
        """Not outside the bounds, or only if the value is."""
        known = float(value)
        moved = known * (self.high / self.low) ** (NEAR * random.normal())
        return f"{np.clip(moved, min(known, self.low), max(known, self.high)):.3g}"


@dataclass(frozen=True)
class Among(Setting):
    """One of some values, each as likely.

    Args:
        values: as text.
    """

    values: tuple[str, ...]

    def draw(self, random: np.random.Generator) -> str:
        """One of them."""
        return str(random.choice(self.values))

    def near(self, value: str, random: np.random.Generator) -> str:
        """The same in half of the draws."""
        drawn = self.draw(random)
        return value if random.random() < 0.5 else drawn


Space = Mapping[str, Setting]

MATCHING: Space = {
    "rate": Between(3e-4, 2e-2),
    "forget_multiplier": Among(("1", "2", "3", "5")),
    "retain_multiplier": Among(("1", "2", "4")),
    "retain_extra": Among(("50", "100", "200", "400")),
}
EPOCHS = Among(("1", "2", "3", "5"))
BATCH = Among(("16", "32", "64"))
FORGET_BATCH = Among(("4", "16", "64"))

# The number of passes of matching is its cost, and stays what it is.
SPACES: Mapping[str, Space] = {
    "do_nothing": {},
    "dmm": MATCHING,
    "dmm_datamodel": MATCHING,
    "dmm_linear": MATCHING,
    "dmm_newton": MATCHING,
    "om": MATCHING,
    "om_absolute": MATCHING,
    "match_reference": MATCHING,
    "match_untrained": MATCHING,
    "dmm_pgu": {**MATCHING, "backend.gamma": Between(0.5, 0.999)},
    "pgu": {
        "rate": Between(3e-2, 3),
        "last_rate": Between(1e-2, 1),
        "gamma": Between(0.5, 0.999),
        "entropy_weight": Between(0.05, 1),
    },
    "gradient_ascent": {"rate": Between(1e-4, 0.1), "epochs": EPOCHS},
    "fine_tune": {"rate": Between(1e-3, 0.3), "epochs": EPOCHS},
    "neggrad_plus": {
        "rate": Between(1e-4, 0.5),
        "alpha": Among(("0.3", "0.5", "0.7", "0.8", "0.9", "0.95", "0.99", "0.999")),
        "epochs": EPOCHS,
        "forget_batch_size": FORGET_BATCH,
    },
    "ascent_descent": {
        "rate": Between(1e-3, 0.5),
        "forget_rate": Between(1e-3, 1),
        "epochs": Among(("2", "3", "5")),  # as many as forget_epochs, or more
        "forget_epochs": Among(("1", "2")),
        "forget_batch_size": FORGET_BATCH,
    },
    "scrub": {
        "rate": Between(1e-3, 0.1),
        "epochs": Among(("3", "4", "6")),
        "forget_epochs": Among(("1", "2")),
        "alpha": Between(0.1, 2),
        "gamma": Between(0.3, 3),
        "temperature": Among(("1", "2", "4")),
        "forget_batch_size": FORGET_BATCH,
    },
    "ssd": {"selection": Between(1, 100), "dampening": Between(0.03, 2)},
    "salun": {
        "rate": Between(1e-6, 0.03),
        "epochs": EPOCHS,
        "share": Among(("0.1", "0.3", "0.5", "0.8", "0.95")),
        "forget_batch_size": FORGET_BATCH,
    },
    "bad_teacher": {
        "rate": Between(3e-6, 0.01),
        "epochs": EPOCHS,
        "temperature": Among(("1", "2", "4")),
        "retain_share": Among(("0.1", "0.3", "1")),
        "batch_size": BATCH,
    },
}
