"""The table of methods: one name, one file, what it needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from attribution import (
    Counterfactual,
    Ensemble,
    ForgetSet,
    HeldOutReference,
    Oracle,
    UntrainedTeacher,
)
from attribution.moments import Moments
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
from unlearning.projection import Gammas, GradientProjection
from unlearning.runner import UnlearningMethod


def _no_models() -> Ensemble:
    raise ValueError(
        "methods with a teacher need models trained on all rows, and there are none: leave"
        " match_reference and match_untrained out, or precompute without --checkpoint"
    )


@dataclass(frozen=True)
class Evidence:
    """What a run can give to a method; each is opened only by a method that needs it.

    Args:
        predictor: predicted counterfactual outputs, of the predictor of that name; None: of the
            one that was asked for, or else the best.
        oracle: outputs of models retrained without all rows that are to be gone in the end.
        moments: input moments of the models.
        full: models trained on all rows.
        forgotten: rows that the model has forgotten before; None where there are none.
    """

    predictor: Callable[[str | None], Counterfactual]
    oracle: Callable[[], Oracle]
    moments: Callable[[], Moments]
    full: Callable[[], Ensemble] = _no_models
    forgotten: ForgetSet | None = None


def _oracle_of_a_change(given: Evidence) -> Oracle:
    """Refused before a bank is trained, which costs hours on a large task."""
    if given.forgotten is not None:
        raise ValueError(
            "method 'om' adds the change from models trained on all rows; this model has forgotten"
            f" {len(given.forgotten)} rows already: use om_absolute"
        )
    return given.oracle()


METHODS: dict[str, Callable[[Evidence], UnlearningMethod]] = {
    "do_nothing": lambda _: DoNothing(),
    "dmm": lambda given: Matching(given.predictor(None)),
    "dmm_datamodel": lambda given: Matching(given.predictor("datamodel")),
    "dmm_linear": lambda given: Matching(given.predictor("linear")),
    "dmm_newton": lambda given: Matching(given.predictor("newton")),
    "om": lambda given: Matching(_oracle_of_a_change(given)),
    "om_absolute": lambda given: Matching(replace(given.oracle(), absolute=True)),
    "match_reference": lambda given: Matching(HeldOutReference(given.full())),
    "match_untrained": lambda given: Matching(UntrainedTeacher(given.full())),
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
    changed: dict[str, Any] = {}
    for setting, text in (settings or {}).items():
        value = _parsed(method, name, setting, text)
        owner, _, inner = setting.rpartition(".")
        if owner:
            value = replace(changed.get(owner, getattr(method, owner)), **{inner: value})
        changed[owner or setting] = value
    return replace(method, **changed)  # type: ignore[type-var]


def settable(holder: Any) -> dict[str, Any]:
    """The settings of a method that can be given as text.

    Args:
        holder: a method.

    Returns:
        Annotations by name; those of a backend are called `backend.NAME`.

    Example:
        >>> list(settable(GradientAscent()))
        ['epochs', 'rate', 'batch_size', 'batchnorm']
    """
    found = {f.name: f.type for f in fields(holder) if f.type in READERS}
    backend = getattr(holder, "backend", None)
    if backend is not None:
        found |= {f"backend.{name}": kind for name, kind in settable(backend).items()}
    return found


def _parsed(method: UnlearningMethod, name: str, setting: str, text: str) -> Any:
    known = settable(method)
    if setting not in known:
        listed = ", ".join(known) or "none"
        raise ValueError(f"method {name!r} has no setting {setting!r}; it has: {listed}")
    wanted, read = READERS[known[setting]]
    try:
        return read(text)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"setting {setting!r} of method {name!r} takes {wanted}, got {text!r}"
        ) from error


def _layers(text: str) -> dict[str, float]:
    pairs = [part.rpartition(":") for part in text.split(",") if part]
    if any(not colon for _, colon, _ in pairs):
        raise ValueError(text)
    return {layer: float(number) for layer, _, number in pairs}


READERS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", {"true": True, "false": False}.__getitem__),
    int: ("int values", int),
    float: ("float values", float),
    str: ("str values", str),
    float | None: ("float values or none", lambda text: None if text == "none" else float(text)),
    Gammas: ("LAYER:NUMBER, separated by commas", _layers),
}
"""How a setting of each annotation is read from text, and what it takes in words."""
