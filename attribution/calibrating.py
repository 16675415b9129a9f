"""The calibration of a run: all its predictors held against a bank of retrained models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from attribution.calibration_bank import FEWEST_EACH, FORGET_SETS, calibration_bank
from attribution.cases import KINDS, Case, Numbers, cases_of, common_share
from attribution.combined import Weights, forget_rows_together, weigh, weighed_sum
from attribution.counterfactual import Change
from attribution.datamodels import FEWEST_MODELS, fit_datamodels
from attribution.ensemble import Ensemble
from attribution.folders import store_places
from attribution.linear_datamodel import LinearDatamodel
from attribution.newton import GroupNewton, calibrate, predicted_changes
from attribution.residual import models_like_requests, residual_models
from attribution.run import CALIBRATION, Run, RunSettings
from attribution.run_calibration import RunCalibration
from attribution.uncertainty import fitted_by_older
from attribution.weighing import held_out_error
from stores import Place, Store, name_blocks, taken_out

RESIDUAL_MODELS = 1000  # at most: group Newton predicts the outputs of each
# Of the bank: its share of the run's models, and most models of a forget set.
BANK_SHARE, MOST_EACH = 0.08, 16


def calibrate_run(
    run: Run,
    *,
    device: str = "cpu",
    workers: int | None = None,
    scheduler: str | None = None,
) -> RunCalibration:
    """Trains a run's calibration bank and holds all its predictors against it.

    The bank has 20 forget sets. Its models are 8 % of those that the run has anyway, but no fewer
    than 4 and no more than 16 of each set: the more there are, the better an error is told from
    chance. A bank that is there stays as it is.

    Args:
        run: with full models, features and perhaps datamodels.
        device: where to compute.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The calibration, which is written to the run's folder as well.

    Raises:
        ValueError: the stores of the run do not belong together.
    """
    at: dict[str, Any] = {"workers": workers, "scheduler": scheduler}
    seed, to = run.settings.seed + 4, run.path / "calibration"
    each = _models_each(run.settings, to / "bank")
    bank = calibration_bank(run.task, to / "bank", models_each=each, seed=seed, device=device, **at)
    plain = GroupNewton(run.task, run.features, damping=1.0)
    folder = to / f"newton-{run.features.trainings}"
    newton = calibrate(plain, bank, folder, full=run.full, **at)
    cases = cases_of(bank, run.full.outputs)
    chosen = replace(
        plain, damping=newton.damping, temperature=newton.temperature, steps=newton.steps
    )
    raw = predicted_changes(chosen, cases, bank, folder / "changes", **at)
    first = [
        newton.applied(
            change, case.forget, case.targets, common_share(change.mean[case.forget.rows])
        )
        for case, change in zip(cases, raw, strict=True)
    ]
    linear = [run.datamodel.change(case.forget) for case in cases]
    trak = run.fit_trak(run.damping_by(newton), **at)
    scored = [trak.change(case.forget) for case in cases]
    changes = {"newton": raw, "datamodel": linear, "trak": scored}
    residual: dict[str, Weights] = {}
    missed = _fit_residual(run, chosen, **at)
    if missed is not None:
        lacking = [missed.change(case.forget) for case in cases]
        changes["lacking"] = lacking
        # The factor on group Newton's deviation, fitted to the bank, holds what it leaves, too.
        residual = weigh(cases, list(zip(first, lacking, strict=True)), trusted=False)
        first = [
            weighed_sum(residual, one, two, case.kind_numbers, one.mean[case.forget.rows])
            for case, one, two in zip(cases, first, lacking, strict=True)
        ]
    weights = weigh(cases, list(zip(first, linear, strict=True)), grows=True)
    # With growth its outputs come nearer, but neither its margins nor models matched to it do.
    fitted = weigh(cases, list(zip(linear, scored, strict=True)), trusted=False)
    sums = {kind: one.as_sure_as_the_first() for kind, one in fitted.items()}
    together = forget_rows_together(cases, first)
    grows = [together if weights[kind].growth else None for kind in KINDS]
    errors = _held_out_errors(cases, changes, grows)
    found = RunCalibration(newton, weights, errors, residual, sums)
    found.save(run.path / CALIBRATION)
    return found


def _held_out_errors(
    cases: Sequence[Case],
    changes: Mapping[str, Sequence[Change]],
    grows: Sequence[Numbers | None],
) -> dict[str, float]:
    """Of each predictor: one with more factors must not look nearer for them alone."""
    means = {name: [change.mean for change in each] for name, each in changes.items()}
    datamodel = means["datamodel"]
    own = [case.error(mean) for case, mean in zip(cases, datamodel, strict=True)]
    errors = {"datamodel": float(np.mean(own)), "newton": held_out_error(cases, means["newton"])}
    errors["linear"] = held_out_error(cases, datamodel, means["trak"])
    first = [means[name] for name in ("newton", "lacking") if name in means]
    if len(first) > 1:
        errors["residual"] = held_out_error(cases, *first)
    errors["combined"] = held_out_error(cases, *first, added=datamodel, together=grows)
    return errors


def _models_each(settings: RunSettings, bank: Place) -> int:
    if bank.taken():
        return max(1, Store.open(bank).spec.array("outputs").shape[0] // FORGET_SETS)
    share = BANK_SHARE * (settings.full_models + settings.subset_models) / FORGET_SETS
    return min(MOST_EACH, max(FEWEST_EACH, round(share)))


def calibrated_before(run: Run) -> bool:
    """Whether the calibration was fitted on these checkpoints before rows were purged.

    Args:
        run: the run.

    Returns:
        True where nothing of it is to be computed.

    Raises:
        ValueError: a block of it is pending, which cannot be computed alone.
    """
    folder = run.path / "calibration" / f"newton-{run.features.trainings}"
    # The weights were fitted to all of it together.
    residual = run.path / "calibration" / "residual"
    whole = [run.path / CALIBRATION, folder, residual, run.residual_path]
    choices = [folder / name for name in store_places(folder) if name.startswith("choice")]
    for part in (*choices, run.residual_path):
        made_before(part, remove=whole)
    return made_before(folder / "changes", remove=whole) and run.path.exists(CALIBRATION)


def refuse_older(run: Run) -> None:
    """Refuses a run whose datamodels an older version fitted.

    Args:
        run: the run.

    Raises:
        ValueError: some were; it names all that must be removed.

    Example:
        >>> from examples.digits import task
        >>> from stores import place
        >>> refuse_older(Run(place("nowhere"), RunSettings("examples/digits.py:task"), task))
    """
    fitted = run.path / f"datamodel-{run.settings.subsets}", run.residual_path
    remove = [part for part in fitted if part.taken() and fitted_by_older(Store.open(part))]
    if not remove:
        return
    if run.residual_path in remove:
        remove.append(run.path / "calibration/residual")
    if run.purged:  # it is not fitted to other datamodels by itself then
        remove += [run.path / CALIBRATION, run.path / "calibration/newton-*"]
    raise ValueError(
        f"datamodels in {run.path} were fitted by an older version, which expected the effects of"
        f" all rows alike: remove {', '.join(map(str, remove))}, and the same command fits them"
        " anew"
    )


def made_before(where: Place, *, remove: Sequence[Place]) -> bool:
    """Whether a store was made before rows were purged; then no block of it can be made alone.

    Args:
        where: the store.
        remove: what a refusal names, as made together with it.

    Returns:
        True where rows were taken out of it.

    Raises:
        ValueError: a block of such a store is pending.

    Example:
        >>> from stores import place
        >>> made_before(place("nowhere"), remove=[])
        False
    """
    if taken_out(where) is None:
        return False
    if pending := Store.open(where).pending():
        raise ValueError(
            f"{name_blocks(pending)} of {where} cannot be computed alone, as rows were purged since"
            f" the others were: remove {', '.join(map(str, remove))}, and the same command makes"
            " all of it anew from what is left"
        )
    return True


def _fit_residual(run: Run, newton: GroupNewton, **at: Any) -> LinearDatamodel | None:
    """The datamodel of what group Newton lacks, if some models are like deletion requests."""
    to = run.residual_path
    if to.taken() and not Store.open(to).pending():
        # Once fitted it stays, also where the calibration changes: its weights are fitted anew.
        _refuse_other_projections(run, to)
        return LinearDatamodel.open(to)
    ensemble = Ensemble.open(run.path / f"ensemble-{run.settings.subsets}", run.task)
    seed = run.settings.seed
    chosen = models_like_requests(ensemble, RESIDUAL_MODELS, seed)
    if len(chosen) < FEWEST_MODELS:
        return None
    folder = run.path / "calibration" / "residual"
    left = residual_models(ensemble, newton, folder, anchor=run.full, models=chosen, **at)
    return fit_datamodels(left, anchor=run.full, to=to, seed=seed, **at)


def _refuse_other_projections(run: Run, residual: Place) -> None:
    told = Store.open(residual).provenance.settings["ensemble"]["features"][0]["projection"]
    wanted = run.features.stores[0].provenance.settings["projection"]
    if told != wanted:
        raise ValueError(
            f"{residual} was fitted to what group Newton lacked with projections {told}, the run's"
            f" are {wanted}: remove it and {run.path}/calibration/residual, and call this again"
        )
