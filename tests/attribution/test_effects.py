"""Effects of fitted datamodels as they lie on disk."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attribution import ForgetSet, LinearDatamodel, Ridge, datamodels, effects, fit_datamodels
from attribution.effects import half_scale
from attribution.regression import Problem
from attribution.strongest import Strongest, strongest
from stores import total
from tests.tasks import blobs, write_ensemble

TRAIN, TARGETS, OUTPUTS, MODELS, ANCHORS = 33, 40, 3, 50, 3
METHOD = Ridge(lambdas=(0.1, 1.0))


@pytest.fixture(scope="module")
def task():
    return blobs(rows=TRAIN, test_rows=TARGETS - TRAIN)


@pytest.fixture(scope="module")
def pair(task, tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("models"), np.random.default_rng(4)
    masks = random.random((MODELS + ANCHORS, TRAIN)) < 0.5
    masks[MODELS:] = True
    true = random.normal(size=(TRAIN, TARGETS, OUTPUTS))
    outputs = np.tensordot(masks, true, 1) + random.normal(size=(len(masks), TARGETS, OUTPUTS))
    outputs = outputs.astype(np.float32)
    parts = ("subsets", slice(0, MODELS)), ("full", slice(MODELS, None))
    return [write_ensemble(folder / name, task, masks[part], outputs[part]) for name, part in parts]


def fitted(pair, to, **options):
    ensemble, anchor = pair
    settings = {"method": METHOD, "top": 4} | options
    return fit_datamodels(ensemble, anchor=anchor, to=to, **settings)


@pytest.fixture(scope="module")
def plain(pair, tmp_path_factory):
    return fitted(pair, tmp_path_factory.mktemp("plain") / "datamodel")


@pytest.fixture
def small(monkeypatch):
    """Blocks of 7 targets, objects of 5 rows, pieces of 2; none divides what there is."""
    monkeypatch.setattr(datamodels, "score_block", lambda *_: 7)
    monkeypatch.setattr(effects, "OBJECT_BYTES", 5 * 7 * OUTPUTS * 4)
    monkeypatch.setattr(effects, "PIECE_BYTES", 2 * 7 * OUTPUTS * 4)


def test_pieces_change_nothing(pair, plain, tmp_path, small):
    found = fitted(pair, tmp_path / "datamodel")
    assert found.store.spec.chunks("effects") == (5, 7, OUTPUTS)
    for name in found.store.spec.arrays:
        expected = plain.store.numpy(name)
        np.testing.assert_allclose(found.store.numpy(name), expected, rtol=1e-4, atol=1e-5)


def test_workers_end_with_the_same_bits(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(datamodels, "score_block", lambda *_: 7)
    alone, many = fitted(pair, tmp_path / "alone"), fitted(pair, tmp_path / "many", workers=2)
    for name in alone.store.spec.arrays:
        np.testing.assert_array_equal(alone.store.numpy(name), many.store.numpy(name))


def test_half_precision_is_close_and_half_as_large(task, pair, plain, tmp_path, small):
    found = fitted(pair, tmp_path / "datamodel", dtype="float16")
    assert found.store.spec.array("effects").dtype == "float16"
    for target in (2, 35):
        np.testing.assert_allclose(found.effects(target), plain.effects(target), atol=5e-3)
    forget = ForgetSet.at(task, [1, 2, 30])
    for name in ("mean", "std", "noise"):
        expected = getattr(plain.change(forget), name)
        np.testing.assert_allclose(getattr(found.change(forget), name), expected, atol=1e-2)


def test_scales_are_powers_of_two_that_bound_the_effects(pair, tmp_path):
    found = fitted(pair, tmp_path / "datamodel", dtype="float16").store
    scale, stored = found.numpy("scale"), np.abs(found.numpy("effects"))
    assert (np.frexp(scale)[0] == 0.5).all()
    assert stored.max() < 2**15
    assert (stored.max(0) > 2**8).all()


def test_scales_bound_the_effects_of_a_row_that_pulls_alone(pair, tmp_path, monkeypatch):
    pulls = torch.zeros(TRAIN, dtype=torch.float64)
    pulls[3] = 1
    monkeypatch.setattr(Problem, "pulls", lambda self: pulls)
    wide = fitted(pair, tmp_path / "wide").store
    lengths = wide.constant("scales") * np.linalg.norm(wide.constant("masks"), axis=0)
    assert (lengths.argmax(), lengths[3] > 3 * np.delete(lengths, 3).max()) == (3, True)
    assert wide.constant("longest") == pytest.approx(lengths[3], rel=1e-5)
    found = fitted(pair, tmp_path / "half", dtype="float16").store
    stored = found.numpy("effects") * found.numpy("scale")
    np.testing.assert_allclose(stored, wide.numpy("effects"), atol=5e-3)


def test_sums_stand_beside_the_effects(plain):
    whole = plain.store.numpy("effects").sum(0)
    np.testing.assert_allclose(plain.store.numpy("sum"), whole, rtol=1e-4, atol=1e-5)
    found = total(plain.store, "effects", np.arange(TRAIN - 1))
    expected = plain.store.numpy("effects")[:-1].sum(0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", [3, 32, 38])
def test_the_strongest_rows_are_kept(task, pair, plain, target):
    mean = torch.from_numpy(pair[1].outputs.mean(0)[target]).requires_grad_()
    task.loss.margin(mean[None], task.targets([target])[1]).sum().backward()
    margins = plain.effects(target) @ mean.grad.numpy()
    order = np.argsort(margins, kind="stable")
    rows, values = plain.strongest(target)
    np.testing.assert_array_equal(rows, [order[::-1][:4], order[:4]])
    np.testing.assert_allclose(values, margins[rows], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shrink", [(4.0, 0.1), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
def test_the_strongest_rows_bear_their_factors(pair, plain, tmp_path, monkeypatch, shrink):
    """An own row that was not among the strongest may be so with a factor of its own."""
    found = LinearDatamodel(plain.store)
    monkeypatch.setitem(vars(found), "_uncertainty", SimpleNamespace(shrink=shrink))
    slopes = found.store.numpy("slopes")
    for target in range(TARGETS):
        margins = found.effects(target) @ slopes[target]
        highest, lowest = np.sort(margins)[::-1][:4], np.sort(margins)[:4]
        rows, values = found.strongest(target)
        np.testing.assert_allclose(values, [highest, lowest], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(margins[rows], values, rtol=1e-4, atol=1e-6)
        assert [len(set(kind)) for kind in rows.tolist()] == [4, 4]


def test_few_rows_are_all_kept(pair, tmp_path):
    rows, _ = fitted(pair, tmp_path / "datamodel", top=100).strongest(0)
    assert [sorted(kind) for kind in rows.tolist()] == [list(range(TRAIN))] * 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_view_is_lazy_and_in_full(pair, plain, tmp_path, small, dtype):
    found = LinearDatamodel.open(fitted(pair, tmp_path / "datamodel", dtype=dtype).store.path)
    view = found.effects_view()
    assert view.shape == (TRAIN, TARGETS, OUTPUTS)
    assert {len(axis) > 1 for axis in view.chunks[:2]} == {True}
    expected = plain.store.numpy("effects").mean(1)
    np.testing.assert_allclose(view.mean(1).compute(), expected, atol=5e-3)


@pytest.mark.parametrize(("rows", "step", "count"), [(50, 8, 5), (50, 13, 50), (700, 90, 20)])
def test_the_strongest_of_a_stream_are_those_of_a_stable_sort(rows, step, count):
    random = np.random.default_rng(rows + step)
    values = random.integers(-6, 7, (rows, 9)).astype(np.float32)  # many are equal
    found = Strongest.empty(9, count, torch.float32)
    for start in range(0, rows, step):
        found.add(start, torch.from_numpy(values[start : start + step]))
    ends = [np.argsort(sign * values, axis=0, kind="stable")[:count] for sign in (-1, 1)]
    for places, kept in (found.found(), strongest(values, count)):
        np.testing.assert_array_equal(places, np.stack(ends).transpose(2, 0, 1))
        np.testing.assert_array_equal(kept, np.take_along_axis(values.T[:, None], places, 2))


def test_a_half_scale_leaves_room_below_the_largest_half():
    bounds = torch.tensor([3.0, 1e-20, 65504.0, 2.0**15, 0.0])
    scaled = bounds / half_scale(bounds)
    assert ((scaled[:4] >= 2**14) & (scaled[:4] < 2**15)).all()
    assert scaled[4] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_half_scale_of_the_least_numbers_divides_to_finite_halves(dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bounds = smallest * torch.tensor(2.0, dtype=dtype) ** torch.arange(60)
    scale = half_scale(bounds)
    halves = (bounds / scale).half()
    assert (scale > 0).all()
    assert (1 / scale).isfinite().all()
    assert halves.isfinite().all()
    assert ((halves.to(dtype) * scale - bounds).abs() <= scale * 2.0**-25).all()
