"""Methods of other papers against loops written out with autograd, and against known answers."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from attribution import BinaryCrossEntropy, ForgetSet, Model, SquaredError, Task
from attribution.seeds import derive_seed, generator
from tests.unlearning.cases import apart, largest_difference, three_blobs
from unlearning import (
    AscentDescent,
    BadTeacher,
    NegGradPlus,
    SaliencyUnlearning,
    Scrub,
    SelectiveSynapticDampening,
)

NOBODY = np.zeros(0, dtype=np.int64)


def stream(rows, purpose, steps, size):
    random = generator(0, purpose, 0)
    passes = [random.permutation(rows) for _ in range(-(-steps * size // len(rows)))]
    return np.split(np.concatenate(passes)[: steps * size], steps)


def epochs_of(rows, purpose, epochs, size):
    random = generator(0, purpose, 0)
    orders = [random.permutation(rows) for _ in range(epochs)]
    return [np.array_split(order, -(-len(rows) // size)) for order in orders]


def beside(forget, epochs, sizes):
    steps = -(-epochs * len(forget.retained) // sizes[1])
    rows = stream(forget.rows, "forget order", steps, sizes[0])
    return list(zip(rows, stream(forget.retained, "retain order", steps, sizes[1]), strict=True))


def turns(forget, forget_epochs, epochs, sizes, before=0):
    first = epochs_of(forget.rows, "forget order", forget_epochs, sizes[0])
    steps = []
    for epoch, batches in enumerate(epochs_of(forget.retained, "retain order", epochs, sizes[1])):
        if before <= epoch < before + forget_epochs:
            steps += [(rows, NOBODY) for rows in first[epoch - before]]
        steps += [(NOBODY, rows) for rows in batches]
    return steps


def written_out(ground, steps, objective, *, rate, batchnorm, momentum=0.0, masks=None):
    """State of model 0 after gradient steps on the objective of two sides' outputs."""
    module = ground.task.new_model(0)
    module.load_state_dict(ground.full.model(0).state)
    module.train(batchnorm == "update")
    weights = list(module.parameters())
    velocities = [torch.zeros_like(weight) for weight in weights]
    for forget, retain in steps:
        inputs, labels = ground.task.rows("train", np.concatenate([forget, retain]))
        outputs = module(inputs)
        k = len(forget)
        loss = objective(
            (outputs[:k], labels[:k], inputs[:k]), (outputs[k:], labels[k:], inputs[k:])
        )
        for i, gradient in enumerate(torch.autograd.grad(loss, weights)):
            velocities[i].mul_(momentum).add_(gradient if masks is None else gradient * masks[i])
            weights[i].data.sub_(rate * velocities[i])
    return module.state_dict()


def mean_loss(side):
    outputs, labels, _ = side
    return functional.cross_entropy(outputs, labels) if len(labels) else outputs.sum()


def mean_divergence(teacher, temperature, side):
    outputs, labels, inputs = side
    if not len(labels):
        return outputs.sum()
    with torch.no_grad():
        taught = (teacher(inputs) / temperature).log_softmax(1)
    student = (outputs / temperature).log_softmax(1)
    each = functional.kl_div(student, taught, log_target=True, reduction="batchmean")
    return temperature**2 * each


@pytest.mark.parametrize("batchnorm", ["frozen", "update"])
class TestAgainstALoop:
    def check(self, ground, method, steps, objective, **changes):
        told = {"rate": method.rate, "batchnorm": method.batchnorm} | changes
        expected = written_out(ground, steps, objective, **told)
        result = method(ground.full.model(0), ground.task, ground.forget)
        assert largest_difference(result.model.state, expected) < 2e-5
        assert largest_difference(expected, ground.full.model(0).state) > 1e-3
        return result

    def test_neggrad_plus(self, normalised_ground, batchnorm):
        ground = normalised_ground
        method = NegGradPlus(0.7, 2, 0.03, 8, 3, batchnorm)
        steps = beside(ground.forget, 2, (3, 8))
        assert len(steps) == 9

        def objective(forget, retain):
            return 0.7 * mean_loss(retain) - 0.3 * mean_loss(forget)

        result = self.check(ground, method, steps, objective)
        assert result.gradient_evaluations == 9 * 11

    def test_ascent_descent(self, normalised_ground, batchnorm):
        ground = normalised_ground
        method = AscentDescent(3, 2, 0.03, 0.01, 8, 3, batchnorm)
        steps = turns(ground.forget, 2, 3, (3, 8))
        assert len(steps) == 19

        def objective(forget, retain):
            return mean_loss(retain) - 0.01 / 0.03 * mean_loss(forget)

        result = self.check(ground, method, steps, objective)
        assert result.gradient_evaluations == 2 * 5 + 3 * 36

    def test_scrub(self, normalised_ground, batchnorm):
        ground = normalised_ground
        method = Scrub(3, 2, 0.01, 8, 3, 0.5, 0.8, 2.0, False, batchnorm)
        steps = turns(ground.forget, 2, 3, (3, 8), before=1)
        teacher = partial(mean_divergence, taught_by(ground.full.model(0)), 2.0)

        def objective(forget, retain):
            return 0.5 * teacher(retain) + 0.8 * mean_loss(retain) - teacher(forget)

        self.check(ground, method, steps, objective, momentum=0.9)

    def test_saliency_unlearning(self, normalised_ground, batchnorm):
        ground = normalised_ground
        method = SaliencyUnlearning(0.3, 2.0, 2, 0.03, 8, 3, batchnorm)
        inputs, labels = ground.task.rows("train", ground.forget.rows)
        module = taught_by(ground.full.model(0))
        loss = functional.cross_entropy(module(inputs), labels)
        sizes = [g.abs() for g in torch.autograd.grad(loss, list(module.parameters()))]
        threshold = torch.cat([size.ravel() for size in sizes]).quantile(0.7)
        random = generator(0, "random labels", 0)
        drawn = (labels + torch.from_numpy(random.integers(1, 3, size=5))) % 3
        assert (drawn != labels).all()
        where = {tuple(row): label for row, label in zip(inputs.tolist(), drawn, strict=True)}

        def objective(forget, retain):
            told = torch.stack([where[tuple(row)] for row in forget[2].tolist()])
            return functional.cross_entropy(forget[0], told) + 2 * mean_loss(retain)

        masks = [size > threshold for size in sizes]
        steps = beside(ground.forget, 2, (3, 8))
        result = self.check(ground, method, steps, objective, masks=masks)
        assert result.gradient_evaluations == 5 + 9 * 11

    def test_bad_teacher(self, normalised_ground, batchnorm):
        ground = normalised_ground
        method = BadTeacher(3, 0.03, 8, 0.5, 2.0, batchnorm)
        random = generator(0, "retain rows")
        rows = np.concatenate([ground.forget.rows, random.permutation(ground.forget.retained)[:18]])
        bad = ground.task.new_model(derive_seed(0, "bad teacher")).eval()
        good = taught_by(ground.full.model(0))
        forgotten = ground.task.rows("train", ground.forget.rows)[0].tolist()
        orders = epochs_of(np.arange(23), "unlearning order", 3, 8)
        steps = [(NOBODY, rows[batch]) for epoch in orders for batch in epoch]

        def objective(_, retain):
            outputs, labels, inputs = retain
            chosen = torch.tensor([row in forgotten for row in inputs.tolist()])
            taught = torch.where(chosen[:, None], bad(inputs), good(inputs)).detach()
            return mean_divergence(lambda _: taught, 2.0, (outputs, labels, inputs))

        result = self.check(ground, method, steps, objective, momentum=0.9)
        assert result.gradient_evaluations == 3 * 23


def taught_by(model):
    module = model.task.new_model(0).eval()
    module.load_state_dict(model.state)
    return module


def numbers(forget, retain):
    """A task of one number: every row's output is the bias; forget rows come first."""
    labels = torch.tensor([*forget, *retain])
    data = TensorDataset(torch.zeros(len(labels), 1), labels)
    task = Task("numbers", data, data, lambda: nn.Linear(1, 1), loss=SquaredError(),
                test_ids=[f"t{i}" for i in range(len(labels))])  # fmt: skip
    return task, ForgetSet.at(task, range(len(forget)))


def bias_after(method, task, forget, bias):
    model = Model(task, {"weight": torch.zeros(1, 1), "bias": torch.tensor([bias])})
    return float(method(model, task, forget).model.state["bias"])


class TestOneNumber:
    """The mean of the forget rows' labels is 2, of the retain rows' 5."""

    task, forget = numbers([1.0, 3.0], [4.0, 5.0, 6.0])

    def test_neggrad_plus_ends_where_both_pulls_balance(self):
        method = NegGradPlus(alpha=0.8, epochs=99, rate=0.2, batch_size=3, forget_batch_size=2)
        expected = (0.8 * 5 - 0.2 * 2) / (0.8 - 0.2)
        assert bias_after(method, self.task, self.forget, 4.5) == pytest.approx(expected, rel=1e-5)

    def test_ascent_descent_goes_up_and_then_down(self):
        method = AscentDescent(2, 1, rate=0.1, forget_rate=0.3)
        b = 4.5 + 0.3 * (4.5 - 2)
        for _ in range(2):
            b -= 0.1 * (b - 5)
        assert bias_after(method, self.task, self.forget, 4.5) == pytest.approx(b, rel=1e-6)

    def test_scrub_leaves_its_teacher_on_the_forget_rows(self):
        method = Scrub(2, 1, rate=0.1, alpha=0.5, gamma=0.8, temperature=3.0, rewind=False)
        b, velocity = 4.5, 0.0
        for slope in (
            lambda b: 0.5 * (b - 4.5) + 0.8 * (b - 5),
            lambda b: -(b - 4.5),
            lambda b: 0.5 * (b - 4.5) + 0.8 * (b - 5),
        ):
            velocity = 0.9 * velocity + slope(b)
            b -= 0.1 * velocity
        assert bias_after(method, self.task, self.forget, 4.5) == pytest.approx(b, rel=1e-6)

    def test_bad_teacher_ends_at_the_mean_of_its_teachers(self):
        method = BadTeacher(epochs=300, rate=0.05, retain_share=1.0)
        bad = float(self.task.new_model(derive_seed(0, "bad teacher")).bias.detach())
        expected = (2 * bad + 3 * 4.5) / 5
        assert bias_after(method, self.task, self.forget, 4.5) == pytest.approx(expected, rel=1e-5)


class TestWeightsOfTheirOwn:
    task = apart()
    forget = ForgetSet.at(task, [0])
    model = Model(task, {"weight": torch.tensor([[1.0, 0.5], [-1.0, 0.7]])})

    def weight(self, method):
        return method(self.model, self.task, self.forget).model.state["weight"]

    @pytest.mark.parametrize(
        ("selection", "dampening", "factor"),
        [(3.0, 1.0, 0.25), (3.0, 0.5, 0.125), (5.0, 1.0, 1.0), (3.0, 8.0, 1.0)],
    )
    def test_dampening_shrinks_the_forget_rows_weights(self, selection, dampening, factor):
        """One of four rows: the importance to it is 4 times that to all."""
        method = SelectiveSynapticDampening(selection, dampening)
        found = self.weight(method)
        torch.testing.assert_close(found[:, 0], factor * self.model.state["weight"][:, 0])
        assert torch.equal(found[:, 1], self.model.state["weight"][:, 1])
        assert method(self.model, self.task, self.forget).gradient_evaluations == 4

    def test_dampening_keeps_shared_weights_shared(self):
        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
                self.second.weight = self.first.weight

            def forward(self, inputs):
                return self.second(self.first(inputs).tanh())

        task = replace(self.task, model=Shared)
        before = task.new_model(0).state_dict()
        method = SelectiveSynapticDampening(1.5)
        after = method(Model(task, before), task, self.forget).model.state
        assert torch.equal(after["first.weight"], after["second.weight"])
        assert not torch.equal(after["first.weight"], before["first.weight"])

    def test_saliency_relabels_on_the_forget_rows_weights(self):
        found = self.weight(SaliencyUnlearning(0.5, 1.0, 40, 0.1, 3, 1))
        assert torch.equal(found[:, 1], self.model.state["weight"][:, 1])
        assert found[1, 0] > found[0, 0]


class TestRefusals:
    task, forget = numbers([1.0, 3.0], [4.0, 5.0, 6.0])

    def test_random_labels_of_a_regression(self):
        with pytest.raises(ValueError, match=r"SalUn's random labels need classes; the task's los"):
            bias_after(SaliencyUnlearning(), self.task, self.forget, 4.0)

    @pytest.mark.parametrize("rewind", [True, False])
    def test_rewinding_without_test_rows(self, rewind):
        empty = TensorDataset(torch.zeros(0, 1), torch.zeros(0))
        task = replace(self.task, test_data=empty, test_ids=())
        if rewind:
            with pytest.raises(ValueError, match=r"'numbers' has none: set rewind to false"):
                bias_after(Scrub(), task, self.forget, 4.0)
        else:
            assert bias_after(Scrub(rewind=False), task, self.forget, 4.0) != 4.0

    @pytest.mark.parametrize(
        ("kind", "field", "value", "message"),
        [
            (NegGradPlus, "alpha", 1.0, "NegGradPlus.alpha must lie between 0 and 1, got 1.0"),
            (NegGradPlus, "alpha", 0.0, "NegGradPlus.alpha must lie between 0 and 1, got 0.0"),
            (NegGradPlus, "epochs", 0, "NegGradPlus.epochs must be above 0"),
            (NegGradPlus, "rate", -1.0, "NegGradPlus.rate must be above 0"),
            (NegGradPlus, "forget_batch_size", 0, "NegGradPlus.forget_batch_size must be above"),
            (NegGradPlus, "batchnorm", "no", "batchnorm must be 'frozen' or 'update', got 'no'"),
            (AscentDescent, "forget_rate", 0.0, "AscentDescent.forget_rate must be above 0"),
            (AscentDescent, "forget_epochs", 4, "forget_epochs must not exceed epochs = 3, got 4"),
            (AscentDescent, "batch_size", 0, "AscentDescent.batch_size must be above 0"),
            (AscentDescent, "batchnorm", "no", "batchnorm must be 'frozen' or 'update', got 'no'"),
            (Scrub, "forget_epochs", 3, "Scrub.forget_epochs must be below epochs = 3, got 3"),
            (Scrub, "rate", 0.0, "Scrub.rate must be above 0"),
            (Scrub, "temperature", 0.0, "Scrub.temperature must be above 0"),
            (Scrub, "batchnorm", "no", "batchnorm must be 'frozen' or 'update', got 'no'"),
            (SelectiveSynapticDampening, "selection", 0.0, "Dampening.selection must be above 0"),
            (SelectiveSynapticDampening, "dampening", 0.0, "Dampening.dampening must be above 0"),
            (SaliencyUnlearning, "share", 1.0, "SaliencyUnlearning.share must lie between 0 and"),
            (SaliencyUnlearning, "alpha", 0.0, "SaliencyUnlearning.alpha must be above 0"),
            (SaliencyUnlearning, "batchnorm", "no", "batchnorm must be 'frozen' or 'update', got"),
            (BadTeacher, "retain_share", 1.5, "BadTeacher.retain_share must be at most 1, got 1.5"),
            (BadTeacher, "retain_share", 0.0, "BadTeacher.retain_share must be above 0"),
            (BadTeacher, "batchnorm", "no", "batchnorm must be 'frozen' or 'update', got 'no'"),
        ],
    )
    def test_a_setting_outside_its_range(self, kind, field, value, message):
        with pytest.raises(ValueError, match=message):
            kind(**{field: value})


@pytest.mark.parametrize(
    "method",
    [
        NegGradPlus(),
        AscentDescent(),
        Scrub(),
        SelectiveSynapticDampening(1.01),
        SaliencyUnlearning(),
        BadTeacher(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_one_logit_of_two_classes_can_be_unlearned(method):
    data = three_blobs().train_data.tensors
    labelled = TensorDataset(data[0], (data[1] > 0).float())
    task = Task("two", labelled, labelled, lambda: nn.Linear(5, 1), loss=BinaryCrossEntropy(),
                test_ids=[f"t{i}" for i in range(41)])  # fmt: skip
    model = Model(task, task.new_model(3).state_dict())
    result = method(model, task, ForgetSet.at(task, [3, 10, 17]))
    assert largest_difference(result.model.state, model.state) > 1e-5
