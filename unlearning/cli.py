"""The command line: each verb reads its arguments and calls one public function."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from attribution import Model, load_model, parse_forget
from attribution.counterfactual import parse_targets
from attribution.datamodels import REGRESSIONS
from attribution.precompute import precompute, precompute_checkpoints
from attribution.prediction_files import (
    check_prediction_file,
    check_writable,
    write_prediction,
)
from attribution.run import PREDICTORS, Run
from attribution.subsets import DESIGNS
from stores import BlocksFailed, place
from unlearning.evaluation import evaluate_methods, plain
from unlearning.explanation import PREDICTORS as EXPLAINERS
from unlearning.explanation import explain, explanation_table, render_explanation, run_scores
from unlearning.methods import METHODS, Evidence, build_method, check_method
from unlearning.report import render_report
from unlearning.run_files import EVALUATION, REPORT, beside, read_evaluation, write_text
from unlearning.tables import evaluation_table, prediction_table, status_table
from unlearning.thumbnails import report_thumbnails, row_thumbnails
from unlearning.unaudited import evaluate_checkpoints

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: words after `dmm`; None: those of the process.

    Returns:
        0, 2 for bad input, 1 for a failure, 130 after Ctrl-C.

    Example:
        >>> main(["status", "--run", "nowhere"])
        2
    """
    options = _parser().parse_args(arguments)
    warnings.showwarning = _warn  # type: ignore[assignment]
    try:
        _check(options)
        told, text = options.verb(options)
    except (ValueError, TypeError, ImportError) as error:
        return _fail(error, BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("stopped; what is finished is kept, the same command resumes", INTERRUPTED)
    except (BlocksFailed, OSError, RuntimeError) as error:
        return _fail(error, FAILURE)
    print(json.dumps(plain(told), indent=2) if options.json else text)
    return 0


def _fail(error: object, code: int) -> int:
    line = " ".join(str(error).split())
    print(f"dmm: {line}", file=sys.stderr)
    return code


def _warn(message: Warning | str, *_: Any) -> None:
    print(f"dmm: warning: {message}", file=sys.stderr)


# -- verbs -----------------------------------------------------------------------------------


def _precompute(options: argparse.Namespace) -> tuple[Any, str]:
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
        datamodel=options.datamodel,
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


def _precompute_checkpoints(options: argparse.Namespace) -> tuple[Any, str]:
    run = precompute_checkpoints(
        options.task,
        options.run,
        options.checkpoint,
        damping=options.damping,
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


def _predict(options: argparse.Namespace) -> tuple[Any, str]:
    if options.out:
        check_prediction_file(options.out)
    run = Run.open(options.run)
    forget = parse_forget(run.task, options.forget)
    targets = parse_targets(run.task, options.targets or "forget", forget)
    model = _model(run, options.checkpoint)
    chosen = options.predictor or run.best
    prediction = run.predictor(chosen).predict(model, forget, targets)
    if options.out:
        write_prediction(prediction, options.out, forget)
    columns = ("before", "mean", "std", "noise")
    told: dict[str, Any] = {"predictor": chosen, "calibrated": run.calibration is not None}
    told |= {"forget": list(forget.ids), "targets": list(prediction.targets)}
    told |= {name: getattr(prediction, name).tolist() for name in columns}
    bare = " (uncalibrated)" if chosen != "datamodel" and run.calibration is None else ""
    return told, f"{prediction_table(run.task, prediction, targets)}\npredicted by {chosen}{bare}"


def _explain(options: argparse.Namespace) -> tuple[Any, str]:
    if options.thumbnails and not options.out:
        raise ValueError("--thumbnails shows images on a page: name it with --out FILE.html")
    if options.out:
        check_writable(options.out)
    run = Run.open(options.run)
    found = explain(run_scores(run, options.predictor), run.task, options.target, options.top)
    text = explanation_table(found)
    if options.out:
        ids = [found.target, *(row.id for row in found.rows)]
        images = row_thumbnails(run.task, ids) if options.thumbnails else None
        write_text(options.out, render_explanation(found, thumbnails=images))
        text += f"\n\nwritten to {options.out}"
    return asdict(found), text


def _unlearn(options: argparse.Namespace) -> tuple[Any, str]:
    check_method(options.method)
    if not options.out.endswith(".safetensors"):
        raise ValueError(f"models are written as .safetensors, got {options.out!r}")
    if "://" in options.out:
        raise ValueError(f"models are written to files, got {options.out!r}")
    check_writable(options.out)
    run = Run.open(options.run)
    forget = parse_forget(run.task, options.forget)
    model = _model(run, options.checkpoint)
    where = {key: value for key, value in _where(options).items() if value is not None}
    evidence = Evidence(
        predictor=lambda name: run.predictor(name or options.predictor),
        oracle=lambda: run.oracle(forget, len(run.full), **where),
        moments=lambda: run.moments,
    )
    method = build_method(options.method, evidence, _settings(options.set))
    result = method(model, run.task, forget, seed=options.seed, device=options.device)
    result.model.save(options.out)
    told = {
        "out": options.out,
        "method": options.method,
        "status": result.status,
        "seconds": result.seconds,
        "gradient_evaluations": result.gradient_evaluations,
        "history": list(result.history),
        "forgotten": len(result.model.forgotten) if result.model.forgotten else 0,
    }
    return told, (
        f"{options.out}: {len(forget)} rows forgotten by {options.method} ({result.status}) in"
        f" {result.seconds:.2f} s, {result.gradient_evaluations} gradient evaluations"
    )


def _evaluate(options: argparse.Namespace) -> tuple[Any, str]:
    methods = [name for part in options.methods for name in part.split(",") if name]
    if not methods:
        raise ValueError(f"name at least one method: {', '.join(METHODS)}")
    for name in methods:
        check_method(name)
    out = options.out or beside(options.run, EVALUATION)
    check_writable(out)
    run = Run.open(options.run)
    forgets = [parse_forget(run.task, spec) for spec in options.forget]
    shared = {"seed": options.seed, "predictor": options.predictor}
    if run.settings.files:
        told = evaluate_checkpoints(run, forgets, methods, device=options.device, **shared)
    else:
        more = _where(options) | {"n_models": options.n_models}
        told = evaluate_methods(run, forgets, methods, **shared, **more)
    told = plain(told)
    write_text(out, json.dumps(told, indent=1) + "\n")
    parts = [evaluation_table(told), *told.get("missing", ())]
    return told, "\n\n".join(parts) + f"\nwritten to {out}"


def _status(options: argparse.Namespace) -> tuple[Any, str]:
    from attribution.run import read_settings

    where = place(options.run)
    settings = read_settings(options.run)
    found = []
    for store in Run(where, settings, task=None).stores():  # type: ignore[arg-type]
        bad = store.verify() if options.verify or options.discard else []
        for block in bad if options.discard else []:
            store.discard(block)
        found.append(
            {
                "store": store.path.removeprefix(f"{where}/"),
                "kind": store.spec.kind,
                "blocks": store.spec.blocks,
                "done": len(store.done()),
                "pending": len(store.pending()),
                "bad": bad,
            }
        )
    damaged = [f"{row['store']} blocks {row['bad']}" for row in found if row["bad"]]
    if damaged and not options.discard:
        raise RuntimeError(
            f"damaged: {'; '.join(damaged)}; dmm status --run {options.run} --discard makes these"
            " blocks pending, and the command that made them computes them again"
        )
    return {"run": options.run, "stores": found}, status_table(
        found, verified=options.verify and not damaged
    )


def _report(options: argparse.Namespace) -> tuple[Any, str]:
    evaluation, out = read_evaluation(options.run), options.out or beside(options.run, REPORT)
    check_writable(out)
    images = (
        report_thumbnails(Run.open(options.run).task, evaluation) if options.thumbnails else None
    )
    title = f"Unlearning on {evaluation.get('task', 'a task')}"
    missing = evaluation.get("missing", ())
    write_text(out, render_report(evaluation, title=title, thumbnails=images, missing=missing))
    return {"out": out}, f"written to {out}"


# -- arguments -------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    if options.seed < 0:
        raise ValueError(f"a seed must not be negative, got {options.seed}")
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"expected 0 or more workers, got {options.workers}")
    if options.workers is not None and options.scheduler is not None:
        raise ValueError("give --workers or --scheduler, not both")
    # Only the workers of a scheduler elsewhere may own the device that trains.
    remote = options.scheduler is not None and options.verb is _precompute
    try:
        torch.zeros(1, device="meta" if remote else torch.device(options.device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot compute on device {options.device!r}: {reason}") from error


def _where(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": options.device,
        "workers": options.workers,
        "scheduler": options.scheduler,
    }


def _model(run: Run, checkpoint: str | None) -> Model:
    return load_model(run.task, checkpoint) if checkpoint else run.model(0)


def _settings(pairs: Sequence[str]) -> dict[str, str]:
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise ValueError(f"--set takes field=value, got {wrong[0]!r}")
    return dict(pair.split("=", 1) for pair in pairs)


class _Parser(argparse.ArgumentParser):
    """One line for words that are off, like every other refusal."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with 2."""
        self.exit(BAD_INPUT, f"{self.prog}: {message}; {self.prog} --help tells more\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dmm",
        description="Predict what a model would output without some of its training"
        " rows, make it so, and show the evidence.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    make = _verb(verbs, "precompute", _precompute, "train models and fit attributions")
    make.add_argument("task", metavar="TASK", help="file.py:name or module:name")
    make.add_argument("--full-models", type=int, default=100, metavar="L")
    make.add_argument("--subset-models", type=int, default=4000, metavar="M")
    make.add_argument("--design", choices=[d for d in DESIGNS if d != "full"], default="mixed")
    make.add_argument("--datamodel", choices=list(REGRESSIONS), default="ridge")
    make.add_argument(
        "--newton-checkpoints",
        type=int,
        metavar="C",
        help="full models whose gradients are stored, 8 if not told; 0: none",
    )
    make.add_argument(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="FILE",
        help="use these trained models and train none",
    )
    text = "lambda of group Newton with --checkpoint; else rows x the recipe's weight decay"
    make.add_argument("--damping", type=float, metavar="LAMBDA", help=text)
    predict = _verb(verbs, "predict", _predict, "predict outputs without a forget set")
    _forget(predict)
    _predictor(predict)
    predict.add_argument("--targets", metavar="SPEC", help="train, test, forget, ids or @file")
    predict.add_argument("--checkpoint", metavar="FILE", help="start from this model")
    predict.add_argument("--out", metavar="FILE", help="also write a .zarr folder or a .csv file")
    why = _verb(verbs, "explain", _explain, "the rows that pushed an output up and down most")
    why.add_argument("--target", required=True, metavar="ID", help="a training or test row")
    why.add_argument("--top", type=int, default=20, help="rows of either direction")
    why.add_argument("--predictor", choices=EXPLAINERS, help="default: the first the run has")
    why.add_argument("--thumbnails", action="store_true", help="show the rows' images")
    why.add_argument("--out", metavar="FILE.html", help="also write a page")
    unlearn = _verb(verbs, "unlearn", _unlearn, "make one model forget")
    _forget(unlearn)
    _predictor(unlearn)
    unlearn.add_argument("--method", required=True, metavar="NAME", help=", ".join(METHODS))
    unlearn.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    unlearn.add_argument("--checkpoint", metavar="FILE", help="start from this model")
    unlearn.add_argument("--out", required=True, metavar="FILE.safetensors")
    evaluate = _verb(verbs, "evaluate", _evaluate, "compare methods with retrained models")
    evaluate.add_argument("--forget", nargs="+", required=True, metavar="SPEC")
    evaluate.add_argument("--methods", nargs="+", required=True, metavar="NAME,NAME")
    evaluate.add_argument("--n-models", type=int, default=100)
    _predictor(evaluate)
    evaluate.add_argument("--out", metavar="FILE.json")
    status = _verb(verbs, "status", _status, "what a run holds and what is pending")
    status.add_argument("--verify", action="store_true", help="recompute all checksums")
    status.add_argument("--discard", action="store_true", help="make damaged blocks pending")
    report = _verb(verbs, "report", _report, "write the report of an evaluation")
    report.add_argument("--thumbnails", action="store_true", help="show the forgotten images")
    report.add_argument("--out", metavar="FILE.html")
    return parser


def _verb(
    verbs: Any, name: str, action: Callable[[argparse.Namespace], Any], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(verb=action)
    parser.add_argument(
        "--run", required=True, metavar="DIR", help="folder of the run, or s3://bucket/prefix"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, metavar="W", help="processes; 0: this one")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="an existing dask scheduler")
    return parser


def _forget(parser: argparse.ArgumentParser) -> None:
    text = "ids, @file, rows:10:20, random:50:seed or cluster:60:seed"
    parser.add_argument("--forget", required=True, metavar="SPEC", help=text)


def _predictor(parser: argparse.ArgumentParser) -> None:
    text = "default: the best on the calibration bank"
    parser.add_argument("--predictor", choices=PREDICTORS, help=text)


if __name__ == "__main__":
    sys.exit(main())
