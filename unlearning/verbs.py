"""The verbs of the command line: each reads its options and calls one public function."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import wraps
from typing import Any, TypeAlias

from attribution import Model, load_model, parse_forget
from attribution.counterfactual import parse_targets
from attribution.precompute import precompute, precompute_checkpoints
from attribution.prediction_files import (
    check_prediction_file,
    check_writable,
    write_prediction,
)
from attribution.purging.purge import purge
from attribution.purging.turns import writers_turn
from attribution.run import Run, read_settings
from stores import place
from unlearning.evaluation import evaluate_methods, plain
from unlearning.explanation import explain, explanation_table, render_explanation, run_scores
from unlearning.methods import METHODS, Evidence, build_method, check_method
from unlearning.recipes import read_recipe, unexpected
from unlearning.report import render_report
from unlearning.run_files import (
    EVALUATION,
    REPORT,
    beside,
    keep_evaluation,
    read_evaluation,
    write_text,
)
from unlearning.runner import still_there
from unlearning.states import refuse_unseen, store_states
from unlearning.tables import (
    evaluation_table,
    prediction_table,
    purge_notes,
    purge_text,
    status_table,
    tuning_table,
)
from unlearning.thumbnails import report_thumbnails, row_thumbnails
from unlearning.tuning import TUNED, tune_methods, tuned_settings
from unlearning.unaudited import evaluate_checkpoints

NEED_MODELS = ("tuned", "recipe", "budgets", "relearning", "lds_models")
"""Options of dmm evaluate that a run of checkpoints alone cannot serve."""

Told: TypeAlias = tuple[Any, str]
"""What --json prints, and what is printed without it."""


def _precompute(options: argparse.Namespace) -> Told:
    if options.checkpoint:
        return _precompute_checkpoints(options)
    if options.damping is not None:
        raise ValueError("--damping goes with --checkpoint: otherwise the calibration finds it")
    run = precompute(
        options.task,
        options.run,
        full_models=options.full_models,
        subset_models=options.subset_models,
        design=options.design,
        checkpoints=options.newton_checkpoints,
        segments=options.newton_segments,
        principal=options.newton_principal,
        datamodel=options.datamodel,
        factors=options.factors,
        seed=options.seed,
        **_where(options),
    )
    own, other = run.datamodel.shrink
    told = {"run": options.run, "stores": [s.path for s in run.stores()], "shrink": [own, other]}
    told |= {"predictors": run.predictors, "best": run.best}
    text = (
        f"{options.run}: {len(run.full)} full models, {options.subset_models} models on"
        f" {options.design} subsets, datamodels of {len(run.task.target_ids)} targets\n"
        f"next: dmm predict --run {options.run} --forget random:50:0"
    )
    return told, text


def _precompute_checkpoints(options: argparse.Namespace) -> Told:
    if options.newton_segments:
        raise ValueError(
            "--newton-segments does not go with --checkpoint: the path that led to a checkpoint is"
            " not known"
        )
    run = precompute_checkpoints(
        options.task,
        options.run,
        options.checkpoint,
        damping=options.damping,
        principal=options.newton_principal,
        factors=options.factors,
        seed=options.seed,
        **_where(options),
    )
    told = {"run": options.run, "stores": [s.path for s in run.stores()]}
    told |= {"predictors": run.predictors, "best": run.best}
    text = (
        f"{options.run}: gradients of {len(run.features)} checkpoints, {run.features.width}"
        " features; group Newton predicts from them, uncalibrated, because nothing was retrained\n"
        f"next: dmm predict --run {options.run} --forget random:50:0"
    )
    return told, text


def _predict(options: argparse.Namespace) -> Told:
    if options.out:
        check_prediction_file(options.out)
    run = Run.open(options.run, options.device)
    forget = parse_forget(run.task, options.forget)
    targets = parse_targets(run.task, options.targets, forget)
    model = _model(run, options.checkpoint)
    chosen = options.predictor or run.best
    prediction = run.predictor(chosen).predict(model, forget, targets, device=options.device)
    if options.out:
        write_prediction(prediction, options.out, forget)
    columns = ("before", "mean", "std", "noise")
    told: dict[str, Any] = {"predictor": chosen, "calibrated": run.calibration is not None}
    told |= {"forget": list(forget.ids), "targets": list(prediction.targets)}
    told |= {name: getattr(prediction, name).tolist() for name in columns}
    bare = " (uncalibrated)" if chosen != "datamodel" and run.calibration is None else ""
    return told, f"{prediction_table(run.task, prediction, targets)}\npredicted by {chosen}{bare}"


def _explain(options: argparse.Namespace) -> Told:
    if options.thumbnails and not options.out:
        raise ValueError("--thumbnails shows images on a page: name it with --out FILE.html")
    if options.out:
        check_writable(options.out)
    run = Run.open(options.run, options.device)
    found = explain(run_scores(run, options.predictor), run.task, options.target, options.top)
    text = explanation_table(found)
    if options.out:
        ids = [found.target, *(row.id for row in found.rows)]
        images = row_thumbnails(run.task, ids) if options.thumbnails else None
        write_text(options.out, render_explanation(found, thumbnails=images))
        text += f"\n\nwritten to {options.out}"
    return asdict(found), text


def _unlearn(options: argparse.Namespace) -> Told:
    check_method(options.method)
    if not options.out.endswith(".safetensors"):
        raise ValueError(f"models are written as .safetensors, got {options.out!r}")
    if "://" in options.out:
        raise ValueError(f"models are written to files, got {options.out!r}")
    check_writable(options.out)
    run = Run.open(options.run, options.device)
    forget = parse_forget(run.task, options.forget)
    model = _model(run, options.checkpoint)
    still_there(run.task, forget, model.forgotten)
    where = {key: value for key, value in _where(options).items() if value is not None}
    gone = forget.union(run.task, model.forgotten)
    evidence = Evidence(
        predictor=lambda name: run.predictor(name or options.predictor),
        oracle=lambda: run.oracle(gone, len(run.full), **where),
        moments=lambda: run.moments,
        full=lambda: run.full,
        forgotten=model.forgotten,
    )
    method = build_method(options.method, evidence, _settings(options.set))
    result = method(model, run.task, forget, seed=options.seed, device=options.device)
    result.model.save(options.out)
    told = {
        "out": options.out,
        "method": options.method,
        "status": result.status,
        "ending": result.ending.told(),
        "seconds": result.seconds,
        "gradient_evaluations": result.gradient_evaluations,
        "history": list(result.history),
        "forgotten": len(result.model.forgotten) if result.model.forgotten else 0,
    }
    return told, (
        f"{options.out}: {len(forget)} rows forgotten by {options.method} ({result.status}) in"
        f" {result.seconds:.2f} s, {result.gradient_evaluations} gradient evaluations\n"
        f"{result.status}: {result.ending.reason}"
    )


def _evaluate(options: argparse.Namespace) -> Told:
    methods = _methods(options)
    out = options.out or beside(options.run, EVALUATION)
    check_writable(out)
    recipe = read_recipe(options.recipe) if options.recipe else None
    run = Run.open(options.run, options.device)
    forgets = [parse_forget(run.task, spec) for spec in options.forget]
    shared = {"seed": options.seed, "predictor": options.predictor}
    if run.settings.files:
        given = vars(options)
        if asked := [f"--{name.replace('_', '-')}" for name in NEED_MODELS if given[name]]:
            raise ValueError(
                f"{run.path} holds checkpoints and no retrained models: leave {' and '.join(asked)}"
                " out"
            )
        told = evaluate_checkpoints(run, forgets, methods, device=options.device, **shared)
    else:
        more = _where(options) | {"n_models": options.n_models, "lds_models": options.lds_models}
        more |= {"relearning": options.relearning, "budgets": options.budgets}
        if options.tuned:
            more["settings"] = tuned_settings(run, methods, forgets, predictor=options.predictor)
        if recipe:
            more["settings"] = recipe["settings"]
        told = evaluate_methods(run, forgets, methods, **shared, **more)
    told = plain(told)
    outside = {"unexpected": unexpected(recipe, told)} if recipe else {}
    told |= outside
    kept = "" if options.out else keep_evaluation(options.run)
    write_text(out, json.dumps(told, indent=1) + "\n")
    parts = [evaluation_table(told), *told.get("missing", ()), *purge_notes(told)]
    parts += told.get("unexpected", ())
    before = f"\nthe evaluation before it is now {kept}" if kept else ""
    return told, "\n\n".join(parts) + f"\nwritten to {out}{before}"


def _tune(options: argparse.Namespace) -> Told:
    methods = _methods(options)
    run = Run.open(options.run, options.device)
    told = tune_methods(
        run,
        methods,
        specs=options.forget,
        trials=options.trials,
        n_models=options.n_models,
        seed=options.seed,
        predictor=options.predictor,
        held=_held(options.hold),
        **_where(options),
    )
    return told, f"{tuning_table(told)}\nwritten to {beside(options.run, TUNED)}"


def _methods(options: argparse.Namespace) -> list[str]:
    methods = [name for part in options.methods for name in part.split(",") if name]
    if not methods:
        raise ValueError(f"name at least one method: {', '.join(METHODS)}")
    for name in methods:
        check_method(name)
    return methods


def _status(options: argparse.Namespace) -> Told:
    settings = read_settings(options.run)
    run = Run(place(options.run), settings, task=None)  # type: ignore[arg-type]
    verify = options.verify or options.discard
    refuse_unseen(run.path, verify=verify)
    found = store_states(run, verify=verify, discard=options.discard)
    text = status_table(found, verified=options.verify and not any(row["bad"] for row in found))
    links = run.path.links()
    text += f"\nnot looked at, as symbolic links: {', '.join(links)}" if links else ""
    text += f"\n{run.purged} rows were purged" if run.purged else ""
    told = {"run": options.run, "stores": found, "purged": run.purged, "links": links}
    return told, text


def _purge(options: argparse.Namespace) -> Told:
    done = purge(options.run, options.forget)
    return asdict(done), purge_text(options.run, done)


def _report(options: argparse.Namespace) -> Told:
    evaluation, out = read_evaluation(options.run), options.out or beside(options.run, REPORT)
    check_writable(out)
    images = (
        report_thumbnails(Run.open(options.run).task, evaluation) if options.thumbnails else None
    )
    title = f"Unlearning on {evaluation.get('task', 'a task')}"
    missing = [*evaluation.get("missing", ()), *purge_notes(evaluation)]
    write_text(out, render_report(evaluation, title=title, thumbnails=images, missing=missing))
    return {"out": out}, f"written to {out}"


def _where(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": options.device,
        "workers": options.workers,
        "scheduler": options.scheduler,
    }


def _model(run: Run, checkpoint: str | None) -> Model:
    if not checkpoint:
        return run.model(0)
    return load_model(run.task, checkpoint, purged=run.purged)


def _held(pairs: Sequence[str]) -> dict[str, dict[str, str]]:
    held: dict[str, dict[str, str]] = {}
    for setting, value in _settings(pairs, "--hold", "method.field=value").items():
        method, dot, field = setting.partition(".")
        if not dot:
            given = f"{setting}={value}"
            raise ValueError(f"--hold takes method.field=value, got {given!r}")
        held.setdefault(method, {})[field] = value
    return held


def _settings(
    pairs: Sequence[str], option: str = "--set", form: str = "field=value"
) -> dict[str, str]:
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise ValueError(f"{option} takes {form}, got {wrong[0]!r}")
    settings = dict(pair.split("=", 1) for pair in pairs)
    if len(settings) < len(pairs):
        names = [pair.split("=", 1)[0] for pair in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{option} gives {twice!r} twice: give each field once")
    return settings


def _in_turn(verb: Callable[[argparse.Namespace], Told]) -> Callable[[argparse.Namespace], Told]:
    """The verb, while no rows are purged: what it reads may have to be written first."""

    @wraps(verb)
    def call(options: argparse.Namespace) -> Told:
        with writers_turn(options.run):
            return verb(options)

    return call


VERBS: dict[str, Callable[[argparse.Namespace], Told]] = {
    "precompute": _precompute,
    "predict": _in_turn(_predict),
    "explain": _in_turn(_explain),
    "unlearn": _in_turn(_unlearn),
    "evaluate": _in_turn(_evaluate),
    "tune": _in_turn(_tune),
    "status": _in_turn(_status),
    "purge": _purge,
    "report": _in_turn(_report),
}
