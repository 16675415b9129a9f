"""The whole road in Python on the digits: attribute, predict, unlearn, compare with retraining.

Run it from the project's folder: python examples/whole_road.py (about a minute on two cores).
Every step is stored under runs/digits and resumes there.
"""

import numpy as np

from attribution import ForgetSet, Oracle, draw_subsets, fit_datamodels, train_models
from examples.digits import task
from unlearning import Matching, klom, margins, unlearn_models


def main() -> None:
    """Takes all steps and prints what each of them gives."""
    # 1. Offline, once: models on all rows, models on subsets, and the effects of all rows.
    subsets = draw_subsets(task, models=100, design="full", seed=1)
    full = train_models(task, subsets, to="runs/digits/full", keep="weights")
    subsets = draw_subsets(task, models=1000, design="half", seed=0)
    ensemble = train_models(task, subsets, to="runs/digits/ensemble")
    datamodel = fit_datamodels(ensemble, anchor=full, to="runs/digits/datamodel")

    # 2. What would the model output without these rows?
    forget = ForgetSet.of(task, ["train-17", "train-403"])
    predicted = datamodel.predict(full.model(0), forget, targets=forget.ids)
    for row, before, mean, std in zip(
        predicted.targets, predicted.before, predicted.mean, predicted.std, strict=True
    ):
        label = int(np.argmax(before))
        print(f"{row}: logit of {label} now {before[label]:.2f},"
              f" without the rows {mean[label]:.2f} +- {std[label]:.2f}")  # fmt: skip

    # 3. Make it so, for one model.
    result = Matching(datamodel)(full.model(0), task, forget, seed=0)
    print(f"unlearned in {result.seconds:.3f} s, {result.gradient_evaluations} gradients")

    # 4. The evidence: models really retrained without the rows, and 100 unlearned ones.
    subsets = draw_subsets(task, models=100, design="full", without=forget, seed=2)
    oracles = train_models(task, subsets, to="runs/digits/oracles/two")
    after = unlearn_models(Matching(datamodel), full, task, forget)
    for name, models in (("doing nothing", full), ("datamodel matching", after)):
        score = klom(margins(models, task), margins(oracles, task))
        print(f"{name}: KLOM {score[forget.rows].mean():.2f} on the forgotten rows,"
              f" {score.mean():.2f} on all")  # fmt: skip

    change = Oracle(full, oracles).change(forget, targets=forget.rows)
    labels = predicted.before.argmax(-1)
    measured = change.mean[np.arange(len(labels)), labels]
    print("measured change of the same logits:", measured.round(2))


if __name__ == "__main__":
    main()
