"""LDS of our TRAK against the `trak` package, at the same checkpoints and number of features.

python examples/benchmarks/trak_lds.py trains a few models on all rows, takes TRAK scores of the
test rows' margins from them, ours (along random directions, with and without R, and along as many
principal ones as a run has) and the package's (float32, its own projector and score computer),
chooses lambda of each over one grid on one bank of models retrained on halves, and prints their LDS
on another bank with the 95 % interval of the paired bootstrap over targets. The grid is in units of
the mean eigenvalue of each one's own Gram matrix, so that both search the same range. Tasks whose
data is not there are left out. Digits take about two minutes on one core.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trak
from trak.projectors import BasicProjector
from trak.score_computers import BasicScoreComputer

from attribution import Ensemble, Task, draw_subsets, train_models
from attribution.bootstrap import paired_difference
from attribution.gradients import Features, Projection, featurize
from attribution.lds import LDS, lds_bank, linear_datamodeling_score
from attribution.precompute import PRINCIPAL
from attribution.task_file import load_task
from attribution.trak import margin_effects
from attribution.trak.curvature import gram_matrix
from attribution.trak.pulls import output_pulls
from attribution.trak.score_blocks import margin_slopes
from attribution.trak.traker_results import TrakResults, open_trak_results
from unlearning.cost import hardware

TASKS = ("examples/digits.py:task", "examples/cifar.py:cat_dog")
GRID = tuple(10.0**power for power in np.arange(-3, 2.1, 0.5))
ROWS_AT_ONCE = 512

Scores = np.ndarray[Any, Any]


def our_scores(features: Features, weighting: bool) -> list[Scores]:
    """Effects on the test rows' margins for each lambda of the grid, [train, test]."""
    task, found = features.task, [np.zeros(())] * len(GRID)
    train = np.arange(len(task.train_ids))
    test = np.arange(len(train), len(task.target_ids))
    for checkpoint in range(len(features)):
        gram = gram_matrix(features, checkpoint, weighting=weighting, dtype="float32")
        values, vectors = np.linalg.eigh(gram)
        pulled = -contracted(features, checkpoint, train, output_pulls) @ vectors
        margins = contracted(features, checkpoint, test, margin_slopes) @ vectors
        for index, factor in enumerate(GRID):
            damped = np.maximum(values, 0) + factor * values.mean()
            found[index] = found[index] + (pulled / damped) @ margins.T / len(features)
    return found


def contracted(features: Features, checkpoint: int, rows: Any, weights: Any) -> Scores:
    """Features of the rows' outputs, weighted, [row, k]."""
    parts = []
    for some in np.array_split(rows, -(-len(rows) // ROWS_AT_ONCE)):
        weight = weights(features, checkpoint, some).numpy()[:, None]
        parts.append((weight @ features.gather(checkpoint, some))[:, 0])
    return np.concatenate(parts).astype(np.float64)


def run_package(task: Task, models: Any, width: int, folder: Path) -> TrakResults:
    """Features of training and test rows by the package's own blueprint, each checkpoint once."""
    module = task.new_model(0)
    size = sum(parameter.numel() for parameter in module.parameters())
    projector = BasicProjector(size, width, 0, "normal", torch.device("cpu"))
    traker = trak.TRAKer(
        model=module,
        task="image_classification",
        train_set_size=len(task.train_ids),
        save_dir=str(folder),
        device="cpu",
        projector=projector,
        use_half_precision=False,
        logging_level=logging.ERROR,
    )
    for number, model in enumerate(models):
        traker.load_checkpoint(model.state, number, _allow_featurizing_already_registered=True)
        for rows, batch in batches(task, "train"):
            traker.featurize(batch=batch, inds=rows)
        traker.saver.model_ids[number]["is_finalized"] = 1  # scored below, for every lambda
        traker.start_scoring_checkpoint("test", model.state, number, len(task.test_ids))
        for rows, batch in batches(task, "test"):
            traker.score(batch=batch, inds=rows)
    return open_trak_results(folder)


def batches(task: Task, split: Any) -> list[tuple[Any, Any]]:
    """Positions and rows of a split."""
    pieces = np.array_split(np.arange(len(task.data(split))), -(-len(task.data(split)) // 512))
    return [(rows, list(task.rows(split, rows))) for rows in pieces]


def package_scores(results: TrakResults) -> list[Scores]:
    """The package's scores of the test rows for each lambda of the grid, [train, test]."""
    found = [np.zeros(())] * len(GRID)
    pulls = np.mean([results.out_to_loss(model) for model in results.models], axis=0)
    for model in results.models:
        gradients = torch.from_numpy(np.array(results.gradients(model)))
        targets = torch.from_numpy(np.array(results.target_gradients(model, "test")))
        gram = BasicScoreComputer(torch.float32, "cpu").get_xtx(gradients)
        for index, factor in enumerate(GRID):
            damping = factor * float(gram.diagonal().mean())
            computer = BasicScoreComputer(torch.float32, "cpu", lambda_reg=damping)
            kernel = torch.zeros(len(gradients), len(targets))
            computer.get_scores(computer.get_x_xtx_inv(gradients, gram), targets, kernel)
            found[index] = found[index] + kernel.double().numpy() * pulls[:, None]
    return found


def chosen(scores: list[Scores], tuning: Ensemble, bank: Ensemble, targets: Any) -> tuple[int, LDS]:
    """The lambda that is best on one bank, and LDS on the other."""
    tuned = [linear_datamodeling_score(one, tuning, targets=targets).mean for one in scores]
    best = int(np.argmax(tuned))
    return best, linear_datamodeling_score(scores[best], bank, targets=targets)


def compare(task: Task, folder: Path, options: argparse.Namespace) -> None:
    """Prints the comparison on one task."""
    where = {"workers": options.workers}
    subsets = draw_subsets(task, models=options.checkpoints, design="full", seed=1)
    full = train_models(task, subsets, folder / "full", keep="weights", **where)
    models = [full.model(number) for number in range(len(full))]
    features = featurize(task, models, folder / "features", **where)
    few = Projection(principal=PRINCIPAL)
    principal = featurize(task, models, folder / "principal", projection=few, **where)
    tuning = lds_bank(task, folder / "tuning", models=options.tuning, repeats=1, seed=1, **where)
    bank = lds_bank(task, folder / "bank", models=options.models, repeats=2, seed=2, **where)
    package = run_package(task, models, features.width, folder / "package")
    targets = np.arange(len(task.train_ids), len(task.target_ids))
    print(f"\n{task.name}: {len(full)} checkpoints, {features.width} features, {len(targets)} test"
          f" rows, {options.models} models on {options.models // 2} halves")  # fmt: skip
    candidates = {
        "ours": our_scores(features, weighting=True),
        "ours without R": our_scores(features, weighting=False),
        "ours, principal": our_scores(principal, weighting=True),
        "trak package": package_scores(package),
    }
    check(features, candidates["ours"])
    found = {}
    for name, scores in candidates.items():
        best, found[name] = chosen(scores, tuning, bank, targets)
        low, high = found[name].interval
        print(f"  {name:15s} LDS {found[name].mean:.4f} [{low:.4f}, {high:.4f}]  lambda"
              f" {GRID[best]:.3g} x mean eigenvalue")  # fmt: skip
    print(f"  principal directions: {principal.width} features")
    print(f"  ceiling of these models {np.nanmean(found['ours'].ceiling):.4f}")
    for name in ("ours", "ours without R", "ours, principal"):
        gap = paired_difference(found[name].values, found["trak package"].values)
        low, high = gap.interval
        print(f"  {name} - trak package {gap.mean:+.4f}, 95 % [{low:+.4f}, {high:+.4f}]")


def check(features: Features, scores: list[Scores]) -> None:
    """The scores of one target by one checkpoint are those that the library gives."""
    first = Features(features.task, features.stores[:1])
    place, index = len(features.task.train_ids), len(GRID) // 2
    damping = GRID[index] * float(np.diag(features.curvature(0)).mean())
    told = margin_effects(first, place, damping=damping)
    alone = our_scores(first, weighting=True)[index][:, 0]
    assert np.allclose(told, alone, atol=1e-4 * np.abs(alone).max())


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=TASKS, metavar="TASK")
    parser.add_argument("--to", default="runs/trak_lds")
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--models", type=int, default=400)
    parser.add_argument("--tuning", type=int, default=100)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    print(hardware())
    for spec in options.tasks:
        try:
            task = load_task(spec)
        except ValueError as error:
            print(f"\n{spec} is left out: {error}")
            continue
        compare(task, Path(options.to) / task.name, options)


if __name__ == "__main__":
    main()
