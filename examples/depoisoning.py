"""Undo a label-flip poison: most fours of the digits were filed as nines, and then found out.

Run it from the project's folder: python examples/depoisoning.py (two minutes on two cores; --out
examples/results/depoisoning.md writes the table too). It trains models on the poisoned labels,
takes the poisoned rows out of them again with dmm, dmm_pgu and pgu, and compares them with models
that were trained without these rows.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from attribution import (
    Ensemble,
    ForgetSet,
    GroupNewton,
    Task,
    compute_moments,
    draw_subsets,
    featurize,
    train_models,
)
from examples.digits import task as clean
from examples.digits import train
from examples.pages import machine, made_by, table
from unlearning import GradientProjection, Matching, ProjectedGradient, unlearn_models
from unlearning.klom import Array

CLASS, WRONG, FLIPPED = 4, 9, 90  # this class, filed as that one, in so many rows


def poisoned(seed: int = 0) -> tuple[Task, ForgetSet]:
    """The digits with wrong labels in some rows of one class, and these rows."""
    inputs, labels = train.tensors
    own = np.flatnonzero(labels.numpy() == CLASS)
    rows = np.sort(np.random.default_rng(seed).permutation(own)[:FLIPPED])
    wrong = labels.clone()
    wrong[torch.from_numpy(rows)] = WRONG
    task = replace(clean, name="poisoned digits", train_data=TensorDataset(inputs, wrong))
    return task, ForgetSet.at(task, rows, "poison")


def accuracies(outputs: Array, forget: ForgetSet) -> dict[str, float]:
    """Mean accuracy of models: test rows of the class and of the others, and the poisoned rows."""
    _, labels = clean.targets()
    right = outputs.argmax(-1) == labels.numpy()
    test = np.arange(len(clean.train_ids), len(clean.target_ids))
    of_class = labels.numpy()[test] == CLASS
    return {
        "class": float(right[:, test[of_class]].mean()),
        "others": float(right[:, test[~of_class]].mean()),
        "wrong label": float((outputs[:, forget.rows].argmax(-1) == WRONG).mean()),
    }


def main(
    models: int = 20, checkpoints: int = 4, to: str = "runs/poisoned", workers: int | None = None
) -> dict[str, dict[str, float]]:
    """Trains, unlearns and returns the accuracies of every kind of model."""
    task, forget = poisoned()

    def trained(name: str, seed: int, without: ForgetSet | None = None) -> Ensemble:
        subsets = draw_subsets(task, models=models, design="full", seed=seed, without=without)
        return train_models(task, subsets, f"{to}/{name}", keep="weights", workers=workers)

    full, without = trained("full", 1), trained("without", 2, forget)
    moments = compute_moments(full, f"{to}/moments", workers=workers)
    features = featurize(task, full.checkpoints(checkpoints), f"{to}/features", workers=workers)
    newton = GroupNewton(task, features)
    methods = {
        "dmm": Matching(newton),
        "dmm_pgu": Matching(newton, GradientProjection(moments)),
        # Models without the poison hardly ever give the wrong label: stop near that, not at the
        # accuracy on test rows, which the poison itself has lowered.
        "pgu": ProjectedGradient(
            moments, rate=0.5, last_rate=0.1, batch_size=16, offset=0.1, entropy="lower_others",
            reference=0.05,
        ),
    }  # fmt: skip
    found = {"poisoned": full.outputs, "trained without": without.outputs}
    for name, method in methods.items():
        after = unlearn_models(method, full, task, forget)
        print(f"{name}: {after.status}; the first model: {after.endings[0].reason}")
        found[name] = after.outputs
    return {name: accuracies(outputs, forget) for name, outputs in found.items()}


def page(found: dict[str, dict[str, float]], models: int) -> str:
    """The table as Markdown."""
    header = ["models", "test rows of the class", "of the others", "wrong label on poisoned rows"]
    rows = [[name, *(f"{share:.1%}" for share in row.values())] for name, row in found.items()]
    title = f"# {FLIPPED} rows of class {CLASS} filed as {WRONG}"
    told = f"Mean accuracy of {models} models, one draw of the rows."
    return "\n\n".join([title, machine(), made_by(), told, table(header, rows)]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=20, help="poisoned ones, and clean ones")
    parser.add_argument("--to", default="runs/poisoned")
    parser.add_argument("--out", help="also write the page")
    options = parser.parse_args()
    text = page(main(options.models, to=options.to), options.models)
    print(f"\n{text}")
    if options.out:
        Path(options.out).write_text(text)
