"""The words after `dmm`: one parser, and the checks that every verb shares."""

import argparse
from typing import Any, NoReturn

import torch

from attribution.datamodels import REGRESSIONS
from attribution.run import PREDICTORS
from attribution.subsets import DESIGNS
from unlearning.explanation import PREDICTORS as EXPLAINERS
from unlearning.methods import METHODS
from unlearning.tuning import TUNING_SETS

BAD_INPUT = 2


def check_options(options: argparse.Namespace) -> None:
    """Refuses words that contradict each other, and a device that is not there.

    Args:
        options: what the parser read.

    Raises:
        ValueError: names the first that is wrong.

    Example:
        >>> check_options(make_parser().parse_args(["status", "--run", "runs/a"]))
    """
    if options.seed < 0:
        raise ValueError(f"a seed must not be negative, got {options.seed}")
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"expected 0 or more workers, got {options.workers}")
    if options.workers is not None and options.scheduler is not None:
        raise ValueError("give --workers or --scheduler, not both")
    # Only the workers of a scheduler elsewhere may own the device that trains.
    remote = options.scheduler is not None and options.verb == "precompute"
    try:
        torch.zeros(1, device="meta" if remote else torch.device(options.device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot compute on device {options.device!r}: {reason}") from error


class _Parser(argparse.ArgumentParser):
    """One line for words that are off, like every other refusal."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with 2."""
        self.exit(BAD_INPUT, f"{self.prog}: {message}; {self.prog} --help tells more\n")


def make_parser() -> argparse.ArgumentParser:
    """Gives the parser of the command line.

    Returns:
        A parser whose options hold the verb's name in `verb`.

    Example:
        >>> make_parser().parse_args(["status", "--run", "runs/a"]).verb
        'status'
    """
    parser = _Parser(
        prog="dmm",
        description="Predict what a model would output without some of its training"
        " rows, make it so, and show the evidence.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    make = _verb(verbs, "precompute", "train models and fit attributions")
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
        "--newton-segments",
        type=int,
        metavar="S",
        help="parts of training whose mean weights these gradients are taken at, say 2; 0, or not"
        " told: those of the trained models",
    )
    make.add_argument(
        "--newton-principal",
        type=int,
        metavar="K",
        help="features of these gradients along principal directions, for each layer in the mean;"
        " 0: random directions; not told: as in the run, or 256 in a new one",
    )
    make.add_argument(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="FILE",
        help="use these trained models and train none",
    )
    make.add_argument(
        "--no-factors",
        dest="factors",
        action="store_false",
        help="keep gradients whole only, for a model that calls its layers otherwise for some rows;"
        " what is there stays as it is",
    )
    text = "lambda of group Newton with --checkpoint; else rows x the recipe's weight decay"
    make.add_argument("--damping", type=float, metavar="LAMBDA", help=text)
    predict = _verb(verbs, "predict", "predict outputs without a forget set")
    _forget(predict)
    _predictor(predict)
    text = "train, test, forget, ids or @file"
    predict.add_argument("--targets", default="forget", metavar="SPEC", help=text)
    predict.add_argument("--checkpoint", metavar="FILE", help="start from this model")
    predict.add_argument("--out", metavar="FILE", help="also write a .zarr folder or a .csv file")
    why = _verb(verbs, "explain", "the rows that pushed an output up and down most")
    why.add_argument("--target", required=True, metavar="ID", help="a training or test row")
    why.add_argument("--top", type=int, default=20, help="rows of either direction")
    why.add_argument("--predictor", choices=EXPLAINERS, help="default: the first the run has")
    why.add_argument("--thumbnails", action="store_true", help="show the rows' images")
    why.add_argument("--out", metavar="FILE.html", help="also write a page")
    unlearn = _verb(verbs, "unlearn", "make one model forget")
    _forget(unlearn)
    _predictor(unlearn)
    unlearn.add_argument("--method", required=True, metavar="NAME", help=", ".join(METHODS))
    unlearn.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    unlearn.add_argument("--checkpoint", metavar="FILE", help="start from this model")
    unlearn.add_argument("--out", required=True, metavar="FILE.safetensors")
    _evaluate(_verb(verbs, "evaluate", "compare methods with retrained models"))
    _tune(_verb(verbs, "tune", "choose the settings of methods on forget sets of their own"))
    status = _verb(verbs, "status", "what a run holds and what is pending")
    status.add_argument("--verify", action="store_true", help="recompute all checksums")
    status.add_argument(
        "--discard",
        action="store_true",
        help="make damaged blocks pending, and write metadata that is gone again",
    )
    purge = _verb(verbs, "purge", "take rows out of everything that a run holds of them")
    _forget(purge, required=False)
    report = _verb(verbs, "report", "write the report of an evaluation")
    report.add_argument("--thumbnails", action="store_true", help="show images of rows")
    report.add_argument("--out", metavar="FILE.html")
    return parser


def _verb(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(verb=name)
    parser.add_argument(
        "--run", required=True, metavar="DIR", help="folder of the run, or s3://bucket/prefix"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, metavar="W", help="processes; 0: this one")
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="a dask scheduler; 1 thread a worker"
    )
    return parser


def _forget(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    text = "ids, @file, rows:10:20, random:50:seed or cluster:60:seed"
    text += "" if required else "; without it, an interrupted purge is finished"
    parser.add_argument("--forget", required=required, metavar="SPEC", help=text)


def _predictor(parser: argparse.ArgumentParser) -> None:
    text = "default: the best on the calibration bank"
    parser.add_argument("--predictor", choices=PREDICTORS, help=text)


def _evaluate(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("--forget", nargs="+", required=True, metavar="SPEC")
    evaluate.add_argument("--methods", nargs="+", required=True, metavar="NAME,NAME")
    evaluate.add_argument("--n-models", type=int, default=100)
    text = "also score how predictors rank subsets (LDS), on so many models"
    evaluate.add_argument("--lds-models", type=int, default=0, metavar="M", help=text)
    text = "also count the steps in which models learn the forgotten rows again"
    evaluate.add_argument("--relearning", action="store_true", help=text)
    text = "also audit matching with 1, 2, 5, 10 and 30 %% of a retraining's gradient evaluations"
    evaluate.add_argument("--budgets", action="store_true", help=text)
    text = "take the settings that dmm tune chose in this run"
    chosen = evaluate.add_mutually_exclusive_group()
    chosen.add_argument("--tuned", action="store_true", help=text)
    text = "take the settings of a file, and say which results are outside the ranges it expects"
    chosen.add_argument("--recipe", metavar="FILE.json", help=text)
    _predictor(evaluate)
    evaluate.add_argument("--out", metavar="FILE.json")


def _tune(tune: argparse.ArgumentParser) -> None:
    tune.add_argument("--methods", nargs="+", required=True, metavar="NAME,NAME")
    text = "forget sets to tune on, which may not be audited; default: %(default)s"
    tune.add_argument("--forget", nargs="+", default=TUNING_SETS, metavar="SPEC", help=text)
    tune.add_argument("--trials", type=int, default=16, help="settings tried of each method")
    tune.add_argument("--n-models", type=int, default=100)
    text = "a setting that every trial has, as in dmm.passes=0.6"
    tune.add_argument(
        "--hold", action="append", default=[], metavar="METHOD.FIELD=VALUE", help=text
    )
    _predictor(tune)
