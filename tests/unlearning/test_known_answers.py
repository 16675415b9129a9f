"""Every method of the table on a problem whose answer is known in closed form.

One linear layer without bias; the forget row sees the first feature alone, the retain rows the
second one, so that what is done to either side can be read from a column of the weight.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch.nn import functional

from attribution import ForgetSet, Model
from attribution.seeds import derive_seed
from tests.unlearning.cases import Fixed, HeldMoments, apart
from tests.unlearning.test_methods import DISTINCT
from unlearning import Matching
from unlearning.methods import Evidence, build_method

TASK = apart()
FORGET = ForgetSet.at(TASK, [0])
START = torch.tensor([[1.0, 0.5], [-1.0, 0.7]])
MODEL = Model(TASK, {"weight": START})
CHANGE = np.array([[-3.0, 1.0], *[[0.0, 0.0]] * 7], dtype=np.float32)
INPUTS, LABELS = TASK.rows("train", range(4))


@dataclass(frozen=True)
class Measured(Fixed):
    """Stands for an oracle."""

    absolute: bool = False


GIVEN = Evidence(
    predictor=lambda _: Fixed(CHANGE),
    oracle=lambda: Measured(CHANGE),
    moments=lambda: HeldMoments(TASK, [MODEL], [0.0]),
    full=lambda: None,
)


def slope(objective, weight=START):
    free = weight.clone().requires_grad_()
    return torch.autograd.grad(objective(free), free)[0]


def forget_loss(weight):
    return functional.cross_entropy(INPUTS[:1] @ weight.T, LABELS[:1])


def retain_loss(weight):
    return functional.cross_entropy(INPUTS[1:] @ weight.T, LABELS[1:])


def matched():
    """The forget row's outputs, 2 x its column, change by what was predicted."""
    return START + torch.tensor([[-1.5, 0.0], [0.5, 0.0]])


def fine_tuned():
    """Where the retain rows' loss is least; the mean over classes does not move."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    gap = brentq(lambda d: 2 * sigmoid(d) - 1 + 2 * (sigmoid(2 * d) - 1), -5, 5)
    expected = START.clone()
    expected[:, 1] = START[:, 1].mean() + torch.tensor([-gap / 2, gap / 2])
    return expected


def projected():
    """One step of the paper's loss, which the forget row's own direction lets through."""

    def loss(weight):
        p = (INPUTS[:1] @ weight.T).softmax(1)
        return -torch.log(1.05 - p[0, 0]) + 0.2 * (p * p.log()).sum()

    return START - 0.3 * slope(loss)


def scrubbed():
    """The forget row's outputs are the teacher's: there its step is 0, but for momentum."""
    taught = (INPUTS[1:] @ START.T).log_softmax(1)

    def near(weight):
        student = (INPUTS[1:] @ weight.T).log_softmax(1)
        kl = functional.kl_div(student, taught, log_target=True, reduction="batchmean")
        return 0.5 * kl + retain_loss(weight)

    weight, velocity = START, 0
    for goes_on in (1, 0, 1):
        velocity = 0.9 * velocity + goes_on * slope(near, weight)
        weight = weight - 0.1 * velocity
    return weight


def badly_taught():
    """The forget row's class probabilities are an untrained model's."""
    bad = TASK.new_model(derive_seed(0, "bad teacher")).weight.detach()[:, 0]
    expected = START.clone()
    expected[:, 0] = START[:, 0].mean() + bad - bad.mean()
    return expected


def relabelled():
    """One step toward the only other class, and none on the weights that are not the row's."""
    other = lambda w: functional.cross_entropy(INPUTS[:1] @ w.T, 1 - LABELS[:1])  # noqa: E731
    return START - 0.1 * slope(other)


ONE_STEP = {"epochs": "1", "batch_size": "3", "rate": "0.1"}
FAR = {"passes": "600", "rate": "0.02", "batch_size": "4"}
MATCHING = (FAR, matched)
KNOWN = {
    "do_nothing": ({}, lambda: START),
    "dmm": MATCHING,
    "om": MATCHING,
    "om_absolute": MATCHING,
    "match_reference": MATCHING,
    "match_untrained": MATCHING,
    "dmm_pgu": MATCHING,
    "pgu": ({"epochs": "1", "rate": "0.3", "last_rate": "0.3"}, projected),
    "gradient_ascent": (ONE_STEP, lambda: START + 0.1 * slope(forget_loss)),
    "fine_tune": (ONE_STEP | {"epochs": "900", "rate": "0.5"}, fine_tuned),
    "neggrad_plus": (
        ONE_STEP | {"alpha": "0.7", "forget_batch_size": "1"},
        lambda: START - 0.1 * (0.7 * slope(retain_loss) - 0.3 * slope(forget_loss)),
    ),
    "ascent_descent": (
        ONE_STEP | {"forget_epochs": "1", "forget_rate": "0.3"},
        lambda: START + 0.3 * slope(forget_loss) - 0.1 * slope(retain_loss),
    ),
    "scrub": (ONE_STEP | {"epochs": "2", "forget_epochs": "1", "rewind": "false"}, scrubbed),
    # One of four rows is forgotten: the importance to it is 4 times that to all.
    "ssd": ({"selection": "3"}, lambda: START * torch.tensor([0.25, 1.0])),
    "salun": (ONE_STEP | {"forget_batch_size": "1"}, relabelled),
    "bad_teacher": (
        {"epochs": "400", "rate": "0.1", "batch_size": "4", "retain_share": "1"},
        badly_taught,
    ),
}
CONVERGED = {"fine_tune", "bad_teacher"} | {n for n, k in KNOWN.items() if k is MATCHING}


@pytest.mark.parametrize("name", DISTINCT)
def test_the_answer_is_the_known_one(name):
    settings, expected = KNOWN[name]
    method = build_method(name, GIVEN, settings)
    if isinstance(method, Matching):
        method = replace(method, counterfactual=Fixed(CHANGE))
    found = method(MODEL, TASK, FORGET).model.state["weight"]
    close = 2e-3 if name in CONVERGED else 1e-6
    torch.testing.assert_close(found, expected(), rtol=0, atol=close)
    assert torch.equal(found, START) == (name == "do_nothing")
