"""Choose the settings of methods on forget sets of their own, each with the same budget."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
from tqdm import tqdm

from attribution import ForgetSet, Oracle, parse_forget
from attribution.run import Run
from attribution.seeds import generator
from unlearning.audit import Audit
from unlearning.evaluation import evidence_of, plain
from unlearning.execution import Diverged
from unlearning.klom import FEWEST_MODELS
from unlearning.measures import told_divergences
from unlearning.methods import Evidence, build_method, check_method
from unlearning.runner import UnlearningMethod, unlearn_models
from unlearning.standings import GIVEN_THE_ANSWER
from unlearning.tuning_spaces import SPACES

SCHEMA = 1
TUNED = "tuned.json"
# Seeds that no example audits.
TUNING_SETS = ("random:50:1000", "random:140:1001", "cluster:60:1002")

Json = dict[str, Any]
Settings = dict[str, str]


def tune_methods(
    run: Run,
    methods: Sequence[str],
    *,
    specs: Sequence[str] = TUNING_SETS,
    trials: int = 16,
    n_models: int = 100,
    seed: int = 0,
    predictor: str | None = None,
    held: Mapping[str, Settings] | None = None,
    device: str = "cpu",
    workers: int | None = None,
    scheduler: str | None = None,
) -> Json:
    """Searches settings of methods at random and keeps the best of each in the run.

    The score is the mean over forget sets and over forget, retain and test rows of the mean
    distance to retrained models: KLOM with 80 models or more, else the Gaussian KL. The first
    trial is the settings as they are, or as they are held, so that the score chosen is never
    worse; half of the trials are drawn from the whole space of `SPACES`, the others near the best
    so far. Each method is kept when its trials are done, and the same call takes up after it.

    Args:
        run: a finished run.
        methods: names of the table.
        specs: forget sets; they must not be audited afterwards.
        trials: settings tried of each method.
        n_models: full models unlearned and compared with as many oracles.
        seed: of the settings and of every unlearning.
        predictor: which predictions matching uses; None: the best on the calibration bank.
        held: settings by method and field, as text, that every trial has: say the passes of
            matching, which are its cost and never searched.
        device: where to compute.
        workers: processes that train the oracles; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        By method: `settings`, `score`, `default_score`, all `trials`, and what they were found on.

    Raises:
        ValueError: an unknown method, no trial, too few full models, held settings of a method
            that is not tuned or does not take them, or methods that cannot serve the task, once
            all others are tuned.
    """
    for name in methods:
        check_method(name)
    fixed = _held(held or {}, methods)
    if trials < 1 or not 2 <= n_models <= len(run.full):
        raise ValueError(
            f"expected 1 trial or more and 2 to {len(run.full)} models, got {trials} and {n_models}"
        )
    where: Json = {"device": device, "workers": workers, "scheduler": scheduler}
    chosen = predictor or run.best
    header = {"specs": list(specs), "n_models": n_models, "seed": seed, "predictor": chosen}
    header |= {"data": run.task.digests["train"]}
    _check_held(run, chosen, fixed)
    before = _tuned_before(run)
    found = {
        name: before[name]
        for name in methods
        if _same(before.get(name), name, trials, header | {"held": fixed[name]})
    }
    left, failed = [name for name in methods if name not in found], {}
    audits = [_audit(run, parse_forget(run.task, spec), n_models, where) for spec in specs if left]
    total = sum(len(drawn_settings(name, trials, seed)) for name in left)
    with tqdm(total=total, desc="tuning", unit="trial", disable=None) as bar:
        for name in left:

            def score(settings: Settings, name: str = name) -> float:
                built = [build_method(name, evidence_of(run, a, chosen), settings) for a in audits]
                scores = [
                    _score(audit, method, n_models, seed, device)
                    for audit, method in zip(audits, built, strict=True)
                ]
                bar.update()
                return float(np.mean(scores))

            try:
                start = build_method(name, evidence_of(run, audits[0], chosen), fixed[name])
                tried = _tried(name, score, start, trials, seed, fixed[name])
            except ValueError as error:
                failed[name] = error
                continue
            told = {"trials": tried, "held": fixed[name]}
            found[name] = plain(_best(tried) | told | header)
            # A run of many methods takes long: what is found of one is kept at once.
            _keep(run, found)
    if failed:
        name, reason = next(iter(failed.items()))
        raise ValueError(
            f"cannot tune {', '.join(failed)} here ({name}: {reason}): leave them out; what was"
            " found of the others is kept"
        ) from reason
    return {name: found[name] for name in methods}


def _held(held: Mapping[str, Settings], methods: Sequence[str]) -> dict[str, Settings]:
    """What is held of each method."""
    if unknown := [name for name in held if name not in methods]:
        raise ValueError(
            f"settings of {unknown[0]!r} are held, but it is not tuned: name it among the methods"
        )
    return {name: dict(held.get(name, {})) for name in methods}


def _check_held(run: Run, chosen: str, held: Mapping[str, Settings]) -> None:
    """Refuses unknown fields and values before hours are spent on oracles."""
    given = Evidence(
        predictor=lambda name: run.predictor(name or chosen),
        oracle=_no_oracle,
        moments=lambda: run.moments,
        full=lambda: run.full,
    )
    for name, settings in held.items():
        if settings:
            # Methods that need oracles are matching like dmm.
            build_method("dmm" if name in GIVEN_THE_ANSWER else name, given, settings)


def _no_oracle() -> Oracle:
    raise AssertionError("oracles are trained later")


def _tried(  # noqa: PLR0917 - all of them a search's own
    name: str,
    score: Callable[[Settings], float],
    start: UnlearningMethod,
    trials: int,
    seed: int,
    held: Settings,
) -> list[Json]:
    """Settings with their scores: first all over the space, then near the best."""
    tried: list[Json] = []
    for number, drawn in enumerate(drawn_settings(name, trials, seed, held)):
        settings = drawn
        if number > trials // 2:
            best = {field: _told(start, field) for field in SPACES[name]} | _best(tried)["settings"]
            random = generator(seed, f"tuning {name} near the best", number)
            settings = {f: s.near(best[f], random) for f, s in SPACES[name].items()} | held
        tried.append({"settings": settings, "score": score(settings)})
    return tried


def _told(method: UnlearningMethod, field: str) -> str:
    """What a setting is, such as rate or backend.gamma."""
    return str(reduce(getattr, field.split("."), method))


def _best(tried: Sequence[Json]) -> Json:
    best = min(tried, key=lambda trial: float(trial["score"]))
    return best | {"default_score": tried[0]["score"]}


def _same(told: Json | None, name: str, trials: int, header: Json) -> bool:
    """Whether this very tuning of a method is done already."""
    if told is None:
        return False
    if any(({"held": {}} | told).get(field) != value for field, value in header.items()):
        return False
    drawn = drawn_settings(name, trials, header["seed"], header["held"])
    known = told["trials"]
    over = trials // 2 + 1
    return len(known) == len(drawn) and [t["settings"] for t in known[:over]] == drawn[:over]


def _keep(run: Run, found: Json) -> None:
    text = json.dumps({"schema": SCHEMA, "methods": _tuned_before(run) | found}, indent=1)
    run.path.write(TUNED, text.encode() + b"\n")


def drawn_settings(
    name: str, trials: int, seed: int, held: Settings | None = None
) -> list[Settings]:
    """Settings to try: those that a method has by itself, then random ones.

    Args:
        name: of the method.
        trials: how many; a method without anything left to tune has one.
        seed: of the draw.
        held: settings that all of them have.

    Returns:
        Values by field, as text.

    Example:
        >>> drawn_settings("do_nothing", 12, 0), len(drawn_settings("dmm", 12, 0))
        ([{}], 12)
    """
    space, same = SPACES[name], held or {}
    random = [generator(seed, f"tuning {name}", number) for number in range(trials - 1)]
    searched = set(space) - set(same)
    each = [{f: s.draw(r) for f, s in space.items()} for r in random if searched]
    return [drawn | same for drawn in ({}, *each)]


def tuned_settings(
    run: Run,
    methods: Sequence[str],
    forget_sets: Sequence[ForgetSet],
    *,
    predictor: str | None = None,
) -> dict[str, Settings]:
    """Settings that were chosen for methods, for an audit of other forget sets.

    Args:
        run: a run in which `tune_methods` left them.
        methods: names of the table.
        forget_sets: what will be audited; the rows of one, or of a set that methods were tuned on,
            may not lie in the other by more than half, so that what is in common is chance.
        predictor: which predictions matching will use; None: the best on the calibration bank.

    Returns:
        Settings by method.

    Raises:
        ValueError: a method was not tuned, or on one of these forget sets, with another predictor,
            or with other training rows.
    """
    known = _tuned_before(run)
    missing = [name for name in methods if SPACES[name] and name not in known]
    if missing:
        raise ValueError(
            f"{missing[0]!r} has no tuned settings in {run.path}: run dmm tune --methods"
            f" {','.join(missing)}"
        )
    told = {name: known[name] for name in methods if name in known}
    _check_same(run, told, predictor or run.best)
    tuned_on = {spec for one in told.values() for spec in one["specs"]}
    for spec in sorted(tuned_on):
        for forget in forget_sets:
            _check_apart(forget, parse_forget(run.task, spec), spec)
    return {name: dict(one["settings"]) for name, one in told.items()}


def _check_same(run: Run, told: Mapping[str, Json], predictor: str) -> None:
    for name, one in told.items():
        if one.get("data") != run.task.digests["train"]:
            raise ValueError(
                f"{name!r} was tuned with other training rows: run dmm tune --methods {name} again"
            )
        if one["predictor"] != predictor:
            raise ValueError(
                f"{name!r} was tuned with predictor {one['predictor']!r}, got {predictor!r}: give"
                f" --predictor {one['predictor']}, or tune with the other one"
            )


def _check_apart(forget: ForgetSet, tuned: ForgetSet, spec: str) -> None:
    shared = len(np.intersect1d(forget.rows, tuned.rows))
    if 2 * shared > min(len(forget), len(tuned)):
        raise ValueError(
            f"forget set {forget.name!r} shares {shared} of its {len(forget)} rows with {spec},"
            f" {len(tuned)} rows that methods were tuned on: audit another one"
        )


def _tuned_before(run: Run) -> Json:
    if not run.path.exists(TUNED):
        return {}
    try:
        told = json.loads(run.path.read(TUNED))
        if told["schema"] != SCHEMA:
            raise ValueError(f"its schema is {told['schema']}, this version reads {SCHEMA}")
        return dict(told["methods"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot read {run.path / TUNED}: {error}; remove it and run dmm tune again"
        ) from error


def _audit(run: Run, forget: ForgetSet, n_models: int, where: Json) -> Audit:
    banks = [run.bank(forget, which, n_models, **where) for which in (0, 1)]
    return Audit(run.task, forget, run.full, *banks)


def _score(audit: Audit, method: UnlearningMethod, models: int, seed: int, device: str) -> float:
    try:
        after = unlearn_models(
            method, audit.full, audit.task, audit.forget, count=models, seed=seed, device=device
        )
        outputs = after.outputs
    except Diverged:
        return float("inf")
    measure = "klom" if models >= FEWEST_MODELS else "gaussian_kl"
    told = told_divergences(audit, outputs)[measure]
    return float(np.mean([split["mean"] for split in told.values() if split["mean"] is not None]))
