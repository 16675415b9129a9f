"""TRAK: effects of all training rows on all targets, in output units, from a few checkpoints."""

from attribution.trak.fitting import fit_trak, resume_trak
from attribution.trak.scores import TrakScores
from attribution.trak.single import margin_effects

__all__ = [
    "fit_trak",
    "resume_trak",
    "TrakScores",
    "margin_effects",
]
