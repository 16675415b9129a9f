"""The table of methods: one name, one file, what it needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from attribution import Counterfactual, Oracle
from attribution.moments import Moments
from unlearning.method import PLAIN
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
from unlearning.runner import UnlearningMethod

SWITCH = {"true": True, "false": False}


@dataclass(frozen=True)
class Evidence:
    """What a run can give to a method; each is opened only by a method that needs it.

    Args:
        predictor: predicted counterfactual outputs, of the predictor of that name; None: of the
            one that was asked for, or else the best.
        oracle: outputs of retrained models for this forget set.
        moments: input moments of the models.
    """

    predictor: Callable[[str | None], Counterfactual]
    oracle: Callable[[], Oracle]
    moments: Callable[[], Moments]


METHODS: dict[str, Callable[[Evidence], UnlearningMethod]] = {
    "do_nothing": lambda _: DoNothing(),
    "dmm": lambda given: Matching(given.predictor(None)),
    "dmm_datamodel": lambda given: Matching(given.predictor("datamodel")),
    "dmm_newton": lambda given: Matching(given.predictor("newton")),
    "om": lambda given: Matching(given.oracle()),
    "om_absolute": lambda given: Matching(replace(given.oracle(), absolute=True)),
    "pgu": lambda given: ProjectedGradient(given.moments()),
    "dmm_pgu": lambda given: Matching(
        given.predictor(None), backend=GradientProjection(given.moments())
    ),
    "gradient_ascent": lambda _: GradientAscent(),
    "fine_tune": lambda _: FineTune(),
    "neggrad_plus": lambda _: NegGradPlus(),
    "ascent_descent": lambda _: AscentDescent(),
    "scrub": lambda _: Scrub(),
    "ssd": lambda _: SelectiveSynapticDampening(),
    "salun": lambda _: SaliencyUnlearning(),
    "bad_teacher": lambda _: BadTeacher(),
}


def check_method(name: str) -> None:
    """Refuses a name that is not in the table.

    Args:
        name: the name.

    Raises:
        ValueError: names the known methods.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")


def build_method(
    name: str, evidence: Evidence, settings: Mapping[str, str] | None = None
) -> UnlearningMethod:
    """A method of the table with some of its settings changed.

    Args:
        name: its name in the table.
        evidence: what it may need.
        settings: values by field name, as text.

    Returns:
        The method.

    Raises:
        ValueError: an unknown name or field, or a value of another type.
    """
    check_method(name)
    method = METHODS[name](evidence)
    changed = {f: _parsed(method, name, f, v) for f, v in (settings or {}).items()}
    return replace(method, **changed)  # type: ignore[type-var]


def _parsed(method: UnlearningMethod, name: str, field: str, text: str) -> Any:
    known = {f.name: getattr(method, f.name) for f in fields(method)}  # type: ignore[arg-type]
    known = {key: value for key, value in known.items() if isinstance(value, PLAIN)}
    if field not in known:
        listed = ", ".join(known) or "none"
        raise ValueError(f"method {name!r} has no setting {field!r}; it has: {listed}")
    kind = type(known[field])
    try:
        return SWITCH[text] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        wanted = "true or false" if kind is bool else f"{kind.__name__} values"
        raise ValueError(
            f"setting {field!r} of method {name!r} takes {wanted}, got {text!r}"
        ) from error
