"""Three overlapping classes in five dimensions, models of them, and what unlearning needs."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution import (
    Change,
    Counterfactual,
    Ensemble,
    ForgetSet,
    LinearDatamodel,
    Model,
    Oracle,
    Recipe,
    Task,
    draw_subsets,
    fit_datamodels,
    train_models,
)
from attribution.descent import stack
from attribution.moments import Moments, compute_moments, input_moments
from unlearning.method import Request
from unlearning.methods import Evidence

RECIPE = Recipe(epochs=20, batch_size=8, peak_rate=0.2)
FORGET = ["train-3", "train-10", "train-17", "train-24", "train-31"]
MORE = ["train-5", "train-20"]


def mlp():
    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))


def normalised():
    return nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))


def branching():
    """A model that asks for the values of its outputs and so cannot be run for many at once."""
    return Branching()


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, inputs):
        outputs = self.layers(inputs)
        return outputs if float(outputs.detach().sum()) < 1e9 else -outputs


def blob_data(rows, seed):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    centres = 2.0 * torch.eye(5)[labels]
    return TensorDataset(torch.randn(rows, 5, generator=random) + centres, labels)


def three_blobs(model=mlp, **changes):
    fields = {"recipe": RECIPE} if model is mlp else {"train": by_hand(model)}
    return Task("three blobs", blob_data(41, 11), blob_data(13, 12), model, **(fields | changes))


def by_hand(model):
    """A user's own training: full batches, so that BatchNorm sees the rows and nothing else."""

    def train(indices, seed, device):
        del device
        torch.manual_seed(seed)
        made = model().train()
        inputs, labels = (tensor[indices] for tensor in blob_data(41, 11).tensors)
        optimizer = torch.optim.Adam(made.parameters(), lr=0.03)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(made(inputs), labels).backward()
            optimizer.step()
        return made.state_dict()

    return train


class Guarded(torch.utils.data.Dataset):
    """Data of which only some rows may be read; none if no rows are named."""

    def __init__(self, data, allowed=()):
        self.data, self.allowed = data, set(allowed)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index not in self.allowed:
            raise AssertionError(f"row {index} was read")
        return self.data[index]


def guarded(task, forget):
    """The task, its data closed but for the forget set."""
    closed = Guarded(task.train_data, forget.positions), Guarded(task.test_data)
    return replace(task, train_data=closed[0], test_data=closed[1])


def apart():
    """Forget rows see the first feature alone, retain rows the second one; two classes."""
    inputs = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 2.0]])
    data = TensorDataset(inputs, torch.tensor([0, 1, 0, 1]))
    return Task("apart", data, data, lambda: nn.Linear(2, 2, bias=False),
                test_ids=list("abcd"))  # fmt: skip


@dataclass(frozen=True)
class Fixed(Counterfactual):
    """Adds the same numbers to the outputs of every target, whatever is forgotten."""

    mean: np.ndarray

    def check_task(self, task):
        del task

    def change(self, forget, already=None, targets=None):
        chosen = self.mean if targets is None else self.mean[targets]
        return Change(chosen, np.zeros_like(chosen), np.zeros_like(chosen))


class HeldMoments:
    """Moments of a few models in memory, with the test accuracies that a test wants."""

    def __init__(self, task, models, accuracies):
        everything, _ = task.rows("train", np.arange(len(task.train_ids)))
        module = task.new_model(0)
        self.digests = [model.digest() for model in models]
        self.held = stack([input_moments(module, model.state, everything) for model in models])
        self.accuracies = torch.tensor(accuracies, dtype=torch.float64)

    def find_digest(self, digest):
        return self.digests.index(digest)

    def layers(self, models):
        return {name: moment[list(models)] for name, moment in self.held.items()}

    def accuracy(self, models):
        return self.accuracies[list(models)]


@dataclass(frozen=True)
class Ground:
    """A task with everything that any method may need."""

    task: Task
    full: Ensemble
    banks: dict[str, Ensemble]
    moments: Moments
    datamodel: LinearDatamodel

    @property
    def forget(self):
        return ForgetSet.of(self.task, FORGET)

    @property
    def both(self):
        return ForgetSet.of(self.task, FORGET + MORE)

    def evidence(self, *, again=False):
        """For the first request, or for the second one of a model that has forgotten before."""
        bank = self.banks["both" if again else "forget"]
        return Evidence(
            predictor=lambda _: self.datamodel,
            oracle=lambda: Oracle(self.full, bank, absolute=again),
            moments=lambda: self.moments,
            full=lambda: self.full,
        )


def lay_ground(task, folder):
    forget, both = ForgetSet.of(task, FORGET), ForgetSet.of(task, FORGET + MORE)

    def trained(name, models, design, **more):
        subsets = draw_subsets(task, models=models, design=design, seed=len(name), **more)
        return train_models(task, subsets, f"{folder}/{name}", keep="weights", workers=0)

    full = trained("full", 3, "full")
    banks = {
        "forget": trained("forget", 4, "full", without=forget),
        "both": trained("both", 4, "full", without=both),
    }
    halves = trained("half", 23, "half")
    datamodel = fit_datamodels(halves, anchor=full, to=f"{folder}/datamodel")
    return Ground(task, full, banks, compute_moments(full, f"{folder}/moments"), datamodel)


def request_of(task, models, forget, *, seed=0, many=True, already=None):
    """A request about given models, as the runner would make it."""
    return Request(
        task=task,
        forget=forget,
        already=already,
        states=stack([model.state for model in models]),
        numbers=tuple(range(len(models))),
        digests=tuple(model.digest() for model in models),
        moments=tuple(model.moments for model in models),
        seed=seed,
        device=torch.device("cpu"),
        many=many,
    )


def fresh_models(task, count):
    """Untrained models, for what does not need trained ones."""
    return [Model(task, task.new_model(seed).state_dict()) for seed in range(count)]


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same_bits(state, other):
    assert list(state) == list(other)
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name


def largest_difference(state, other):
    return max(float((state[name].double() - other[name].double()).abs().max()) for name in state)
