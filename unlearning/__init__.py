"""From predicted outputs to an unlearned model, and the evidence for it."""

from unlearning.attacks import loss_attack, rmia, ulira
from unlearning.bias import corrected_klom, corrected_mean
from unlearning.epsilon import forgetting_epsilon
from unlearning.evaluation import evaluate_methods
from unlearning.klom import gaussian_kl, klom, shift, spread
from unlearning.methods.ascent_descent import AscentDescent
from unlearning.methods.bad_teacher import BadTeacher
from unlearning.methods.do_nothing import DoNothing
from unlearning.methods.fine_tune import FineTune
from unlearning.methods.gradient_ascent import GradientAscent
from unlearning.methods.matching import Matching
from unlearning.methods.neggrad_plus import NegGradPlus
from unlearning.methods.projected_gradient import ProjectedGradient
from unlearning.methods.saliency_unlearning import SaliencyUnlearning
from unlearning.methods.scrub import Scrub
from unlearning.methods.selective_synaptic_dampening import SelectiveSynapticDampening
from unlearning.projection import GradientProjection
from unlearning.relearning import relearning_steps
from unlearning.report import render_report
from unlearning.runner import (
    Unlearned,
    UnlearnedModels,
    UnlearningMethod,
    margins,
    unlearn_models,
)
from unlearning.side_effects import logit_distance, most_harmed, tug_of_war

__all__ = [
    # methods
    "UnlearningMethod",
    "DoNothing",
    "Matching",
    "ProjectedGradient",
    "GradientProjection",
    "GradientAscent",
    "FineTune",
    "NegGradPlus",
    "AscentDescent",
    "Scrub",
    "SelectiveSynapticDampening",
    "SaliencyUnlearning",
    "BadTeacher",
    # results
    "Unlearned",
    "UnlearnedModels",
    "unlearn_models",
    "margins",
    # evidence
    "klom",
    "gaussian_kl",
    "shift",
    "spread",
    "corrected_klom",
    "corrected_mean",
    "ulira",
    "loss_attack",
    "rmia",
    "forgetting_epsilon",
    "relearning_steps",
    "tug_of_war",
    "logit_distance",
    "most_harmed",
    "evaluate_methods",
    "render_report",
]
