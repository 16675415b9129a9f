"""Projected per-example gradients, computed layer by layer and never formed in full."""

from attribution.gradients.cotangents import output_cotangents
from attribution.gradients.curvature_blocks import compute_curvatures
from attribution.gradients.features import Features
from attribution.gradients.featurizing import featurize
from attribution.gradients.principal import principal_directions
from attribution.gradients.projection import Directions, Projection
from attribution.gradients.projector import GradientProjector, Linearisation, gradient_projector

__all__ = [
    # of given rows
    "Projection",
    "Directions",
    "principal_directions",
    "GradientProjector",
    "gradient_projector",
    "Linearisation",
    "output_cotangents",
    # of a task's targets, stored
    "featurize",
    "Features",
    "compute_curvatures",
]
