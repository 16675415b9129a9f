"""Projectors against dense ones, and steps that leave what the retain rows compute alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from attribution import ForgetSet, Model, Task
from tests.gradient_references import group_patches
from tests.references import dense_projector
from tests.unlearning.cases import HeldMoments, copied, fresh_models, request_of
from unlearning import GradientAscent, GradientProjection, Matching, ProjectedGradient
from unlearning.execution import execute
from unlearning.projection import core_projector, retain_moments


@pytest.fixture
def random():
    return torch.Generator().manual_seed(3)


def moment_of(singular, random):
    """A moment with these singular values in a random basis, and the basis, largest first."""
    width = len(singular)
    square = torch.randn(width, width, generator=random, dtype=torch.float64)
    basis = torch.linalg.qr(square).Q
    return basis @ torch.diag(torch.tensor(singular).double() ** 2) @ basis.T, basis


class TestCoreProjector:
    @pytest.mark.parametrize("gamma", [0.3, 0.77, 0.99])
    def test_it_is_a_projector(self, random, gamma):
        rows = torch.randn(3, 17, 7, generator=random, dtype=torch.float64)
        found = core_projector(rows.mT @ rows, gamma)
        torch.testing.assert_close(found @ found, found)
        torch.testing.assert_close(found.mT, found)

    # Shares of the sum of S: .4 .7 .9 1; of S squared they would be .53 .83 .97 1.
    @pytest.mark.parametrize(
        ("gamma", "rank"), [(0.1, 1), (0.39, 1), (0.4, 1), (0.6, 1), (0.7, 2), (0.85, 2), (0.9, 3)]
    )
    def test_its_rank_follows_the_share_of_singular_values(self, random, gamma, rank):
        moment, basis = moment_of([4.0, 3.0, 2.0, 1.0], random)
        expected = basis[:, :rank] @ basis[:, :rank].T
        torch.testing.assert_close(core_projector(moment, gamma), expected, rtol=0, atol=1e-12)

    # Shares of the sum of S squared: 16/30, 25/30, 29/30, 1.
    @pytest.mark.parametrize(
        ("gamma", "rank"), [(0.1, 1), (0.54, 1), (0.82, 1), (0.84, 2), (0.96, 2), (0.97, 3), (1, 4)]
    )
    def test_its_rank_may_follow_the_share_of_squares(self, random, gamma, rank):
        moment, basis = moment_of([4.0, 3.0, 2.0, 1.0], random)
        expected = basis[:, :rank] @ basis[:, :rank].T
        found = core_projector(moment, gamma, "squares")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    def test_gamma_one_keeps_even_directions_without_inputs(self, random):
        moment, _ = moment_of([4.0, 3.0, 0.0, 0.0], random)
        expected = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(core_projector(moment, 1.0), expected, rtol=0, atol=1e-12)

    def test_each_moment_of_a_stack_has_its_own_rank(self, random):
        spectra = [[4.0, 3.0, 2.0, 1.0], [9.0, 0.1, 0.1, 0.1]]
        stacked = torch.stack([moment_of(spectrum, random)[0] for spectrum in spectra])
        found = core_projector(stacked, 0.7)
        assert [round(float(p.trace())) for p in found] == [2, 1]
        for projector, moment in zip(found, stacked, strict=True):
            torch.testing.assert_close(projector, core_projector(moment, 0.7))

    def test_negative_directions_are_dropped_with_a_warning(self, random):
        moment, basis = moment_of([4.0, 3.0, 0.0], random)
        downdated = moment - 5 * basis[:, 2:] @ basis[:, 2:].T
        with pytest.warns(UserWarning, match="the downdated second moments are indefinite"):
            found = core_projector(downdated, 0.99)
        expected = basis[:, :1] @ basis[:, :1].T
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    def test_rounding_below_zero_is_no_reason_to_warn(self, random):
        moment, basis = moment_of([4.0, 3.0, 0.0], random)
        core_projector(moment - 1e-7 * basis[:, 2:] @ basis[:, 2:].T, 0.9)  # a warning would fail


@pytest.mark.parametrize("gamma", [0, -0.1, 1.01, float("nan")])
def test_a_gamma_outside_its_range_is_refused(gamma):
    with pytest.raises(ValueError, match=r"gamma must lie in \(0, 1\], got"):
        GradientProjection(None, gamma)
    with pytest.raises(ValueError, match=r"gamma of layer '3' must lie in \(0, 1\], got"):
        GradientProjection(None, 0.5, layer_gammas={"0": 0.5, "3": gamma})


def test_an_unknown_threshold_is_refused():
    with pytest.raises(ValueError, match="threshold must be 'values' or 'squares', got 'S'"):
        GradientProjection(None, 0.5, "S")


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (2, 1)},
    "grouped": {"kernel_size": (3, 2), "groups": 2, "dilation": (1, 2), "padding": 1},
}


def small_network(settings):
    return nn.Sequential(
        nn.Conv2d(2, 4, **settings), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3, bias=False)
    ).double()


def images_task(settings):
    """Networks in float64 for 13 small images."""

    def model():
        made = small_network(settings)
        made(torch.zeros(1, 2, 5, 6, dtype=torch.float64))
        return made

    random = torch.Generator().manual_seed(4)
    images = torch.randn(13, 2, 5, 6, generator=random, dtype=torch.float64)
    data = TensorDataset(images, torch.arange(13) % 3)
    return Task("images", data, data, model, test_ids=list("abcdefghijklm"))


def two_models(task):
    models = fresh_models(task, 2)
    return models, HeldMoments(task, models, [1.0, 1.0])


def dense_inputs(task, settings, state, rows):
    """Input vectors of both layers for some rows, gathered one by one."""
    images, _ = task.rows("train", rows)
    module = small_network(settings)
    first = group_patches(module[0], images)
    hidden = functional.conv2d(
        images,
        state["0.weight"],
        state["0.bias"],
        module[0].stride,
        module[0].padding,
        module[0].dilation,
        module[0].groups,
    )
    return {"0": first, "3": hidden.relu().flatten(1)}


@pytest.mark.parametrize(
    ("kind", "threshold", "gammas"),
    [(kind, "values", (0.83, 0.83)) for kind in CONVOLUTIONS]
    + [("uneven", "squares", (0.9, 0.9)), ("grouped", "squares", (0.9, 0.6))],
)
def test_downdated_projectors_equal_those_of_the_retain_rows(kind, threshold, gammas):
    settings, power = CONVOLUTIONS[kind], {"values": 1, "squares": 2}[threshold]
    task = images_task(settings)
    models, moments = two_models(task)
    forget = ForgetSet.at(task, [1, 4, 11])
    request = request_of(task, models, forget)
    projection = GradientProjection(moments, gammas[0], threshold, {"3": gammas[1]})
    bound = projection.bind(request).projectors
    downdated = retain_moments(moments, request)
    for i, model in enumerate(models):
        stacked = dense_inputs(task, settings, model.state, forget.retained)
        for (name, vectors), gamma in zip(stacked.items(), gammas, strict=True):
            torch.testing.assert_close(downdated[name][i], vectors.mT @ vectors)
            groups = vectors.reshape(-1, *vectors.shape[-2:]).numpy()
            found = bound[f"{name}.weight"][i].numpy().reshape(len(groups), *vectors.shape[-1:] * 2)
            for own, projector in zip(groups, found, strict=True):
                expected = dense_projector(own, gamma, power)
                np.testing.assert_allclose(projector, expected, rtol=0, atol=1e-8)
                assert 0 < np.trace(expected) < len(expected)


def test_a_gamma_of_an_unknown_layer_is_refused():
    task = images_task(CONVOLUTIONS["plain"])
    models, moments = two_models(task)
    projection = GradientProjection(moments, 0.9, layer_gammas={"2": 0.5})
    with pytest.raises(ValueError, match="layer_gammas names '2'; the layers are: 0, 3"):
        projection.bind(request_of(task, models, ForgetSet.at(task, [1])))


class Tied(nn.Module):
    """Two layers of one weight, which see different inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(self.first(inputs).relu())


class Sequences(nn.Module):
    """A layer that no projection is known for, and one after it."""

    def __init__(self):
        super().__init__()
        self.filters, self.head = nn.Conv1d(1, 2, 2).double(), nn.Linear(4, 3).double()

    def forward(self, inputs):
        return self.head(self.filters(inputs.unsqueeze(1)).relu().flatten(1))


def bound_to(model):
    random = torch.Generator().manual_seed(5)
    rows = torch.randn(9, 3, generator=random, dtype=torch.float64)
    data = TensorDataset(rows, torch.arange(9) % 3)
    task = Task("rows", data, data, model, test_ids=list("abcdefghi"))
    models = fresh_models(task, 1)
    request = request_of(task, models, ForgetSet.at(task, [1]))
    return GradientProjection(HeldMoments(task, models, [1.0]), 0.9).bind(request)


def test_layers_that_share_a_weight_are_refused():
    with pytest.raises(ValueError, match=r"'first.weight' and 'second.weight' are one tensor"):
        bound_to(Tied)


def test_weights_that_no_projection_is_known_for_are_named():
    with pytest.warns(UserWarning, match=r"only: filters.weight will stay as they are"):
        bound = bound_to(Sequences)
    assert set(bound.projectors) == {"head.weight"}


@pytest.mark.parametrize("kind", ["strided", "grouped"])
@pytest.mark.parametrize("many", [True, False])
def test_an_update_loses_its_part_inside_the_core_space(many, kind, random):
    task = images_task(CONVOLUTIONS[kind])
    models, moments = two_models(task)
    request = request_of(task, models, ForgetSet.at(task, [1, 4]))
    bound = GradientProjection(moments, 0.9).bind(request)
    states = request.states
    updates = {
        name: torch.randn(value.shape, generator=random, dtype=value.dtype)
        for name, value in states.items()
    }
    for i in range(2):
        one = {name: update[i] for name, update in updates.items()}
        found = {k: v[i] for k, v in bound(None)(updates).items()} if many else bound(i)(one)
        assert not found["0.bias"].any()
        for name in ("0.weight", "3.weight"):
            inside = bound.projectors[name][i].reshape(-1, *bound.projectors[name].shape[-2:])
            kernels = [update[name].flatten(1).chunk(len(inside)) for update in (one, found)]
            for projector, given, left in zip(inside, *kernels, strict=True):
                outside = torch.eye(len(projector), dtype=projector.dtype) - projector
                torch.testing.assert_close(left, given @ outside)


def spied(plan):
    """The plan, and a list that fills with every update it makes."""
    made = []

    def project(index):
        inner = plan.project(index)

        def noted(updates):
            made.append(inner(updates))
            return made[-1]

        return noted

    return replace(plan, project=project), made


def projecting(ground, kind):
    settings = {"rate": 0.02, "batch_size": 3}
    if kind == "pgu":
        return ProjectedGradient(ground.moments, gamma=0.85, epochs=5, **settings)
    backend = GradientProjection(ground.moments, gamma=0.85)
    return Matching(ground.datamodel, backend=backend, passes=3, **settings)


@pytest.mark.parametrize("kind", ["pgu", "matching with Adam"])
@pytest.mark.parametrize("many", [True, False])
def test_every_step_and_the_whole_way_are_outside_the_retained_space(normalised_ground, kind, many):
    ground = normalised_ground
    request = request_of(ground.task, ground.full.checkpoints(3), ground.forget, many=many)
    plan, made = spied(projecting(ground, kind).plan(request))
    ended = execute(plan, request)
    projectors = GradientProjection(ground.moments, gamma=0.85).bind(request).projectors
    assert set(projectors) == {"0.weight", "3.weight"}
    for name in projectors:
        assert len(made) > 5
        for step in made if many else []:
            inside = (step[name] @ projectors[name]).norm()
            assert inside <= 1e-5 * step[name].norm()
        moved = ended.states[name] - request.states[name]
        assert moved.norm() > 1e-3
        assert (moved @ projectors[name]).norm() <= 1e-4 * moved.norm()


@pytest.mark.parametrize("kind", ["pgu", "matching with Adam"])
def test_biases_and_normalisation_do_not_move(normalised_ground, kind):
    ground = normalised_ground
    model = ground.full.model(0)
    after = projecting(ground, kind)(model, ground.task, ground.forget).model.state
    moved = [name for name in after if not torch.equal(after[name], model.state[name])]
    assert moved == ["0.weight", "3.weight"]


def test_gamma_one_freezes_every_layer(ground):
    model = ground.full.model(0)
    method = Matching(ground.datamodel, backend=GradientProjection(ground.moments, gamma=1))
    after = method(model, ground.task, ground.forget).model.state
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, model.state[name], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def linear():
    """One linear layer in float64, fitted by plain gradient descent."""
    random = torch.Generator().manual_seed(6)
    inputs = torch.randn(29, 6, generator=random, dtype=torch.float64)
    inputs *= torch.tensor([5.0, 3.0, 1.0, 0.3, 0.1, 0.1])
    data = TensorDataset(inputs, torch.arange(29) % 3)

    def model():
        return nn.Linear(6, 3, dtype=torch.float64)

    task = Task("linear", data, data, model, test_ids=[f"again-{i}" for i in range(29)])
    module = task.new_model(0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        functional.cross_entropy(module(inputs), data.tensors[1]).backward()
        optimizer.step()
    fitted = Model(task, copied(module.state_dict()))
    return task, fitted, HeldMoments(task, [fitted], [1.0])


def test_outputs_on_retained_directions_of_a_linear_model_do_not_change(linear, random):
    task, model, moments = linear
    forget = ForgetSet.at(task, [2, 3, 13, 20])
    method = ProjectedGradient(moments, gamma=0.95, epochs=7, rate=0.5)
    request = request_of(task, [model], forget)
    after = execute(replace(method.plan(request), stopping=None), request).states
    projector = GradientProjection(moments, 0.95).bind(request).projectors["weight"][0]
    anywhere = torch.randn(11, 6, generator=random, dtype=torch.float64)

    def change(inputs):
        old, new = request.states, after
        moved = inputs @ (new["weight"] - old["weight"])[0].T
        return (moved + (new["bias"] - old["bias"])[0]).abs().max()

    assert change(anywhere @ projector) < 1e-12
    assert change(anywhere) > 1e-3


def test_free_steps_do_change_outputs_on_retained_directions(linear):
    task, model, moments = linear
    request = request_of(task, [model], ForgetSet.at(task, [2, 3, 13, 20]))
    projector = GradientProjection(moments, 0.95).bind(request).projectors["weight"][0]
    ended = execute(GradientAscent(rate=0.5).plan(request), request)
    moved = (ended.states["weight"] - request.states["weight"])[0]
    assert (moved @ projector).abs().max() > 1e-3
