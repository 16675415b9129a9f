"""Sparse datamodels from outputs that depend on few rows."""

import numpy as np
import pytest

from attribution import ForgetSet, Lasso, LinearDatamodel, datamodels, fit_datamodels
from attribution.seeds import generator
from tests.attribution.test_lasso import fitted as effects_of
from tests.attribution.test_lasso import gradients
from tests.tasks import blobs, write_ensemble

TRAIN, TARGETS, OUTPUTS, MODELS, ANCHORS = 13, 17, 2, 60, 4
LASSO = Lasso(fractions=(0.6, 0.3, 0.1), tolerance=1e-12)


@pytest.fixture(scope="module")
def task():
    return blobs(rows=TRAIN, test_rows=TARGETS - TRAIN)


def true_effects():
    """Of a few rows on each target."""
    random = np.random.default_rng(7)
    few = random.random((TRAIN, TARGETS, 1)) < 0.2
    return random.normal(size=(TRAIN, TARGETS, OUTPUTS)) * few


@pytest.fixture(scope="module")
def pair(task, tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("sparse"), np.random.default_rng(2)
    masks = random.random((MODELS, TRAIN)).argsort(1).argsort(1) < TRAIN // 2
    masks = np.concatenate([masks, np.ones((ANCHORS, TRAIN), bool)])
    noise = 0.3 * random.normal(size=(len(masks), TARGETS, OUTPUTS))
    outputs = np.tensordot(masks, true_effects(), 1) + noise
    parts = ("subsets", slice(0, MODELS)), ("full", slice(MODELS, None))
    return [write_ensemble(folder / name, task, masks[part], outputs[part]) for name, part in parts]


@pytest.fixture(scope="module")
def fitted(pair, tmp_path_factory):
    ensemble, anchor = pair
    to = tmp_path_factory.mktemp("fitted") / "datamodel"
    return fit_datamodels(ensemble, anchor=anchor, to=to, method=LASSO, dtype="float64")


def everything(pair):
    ensemble, anchor = pair
    masks = np.concatenate([ensemble.masks, np.ones((1, TRAIN))]).astype(float)
    outputs = np.concatenate([ensemble.outputs, anchor.outputs.mean(0)[None]])
    return masks, np.append(np.ones(MODELS), ANCHORS), outputs


def test_effects_meet_the_optimality_conditions(pair, fitted):
    masks, weights, outputs = everything(pair)
    effects, penalties = fitted.store.numpy("effects"), fitted.store.numpy("penalty")
    for target in range(TARGETS):
        for output in range(OUTPUTS):
            found, penalty = effects[:, target, output], penalties[target, output]
            gradient = gradients(masks, weights, outputs[:, target, output], found)
            others = np.arange(TRAIN) != target
            zero = others & (found == 0)
            assert (np.abs(gradient[zero]) <= penalty + 1e-4).all()
            rest = others & (found != 0)
            np.testing.assert_allclose(gradient[rest], penalty * np.sign(found[rest]), atol=1e-4)
            if target < TRAIN:
                assert abs(gradient[target]) < 1e-4
                assert fitted.store.numpy("own")[target, output] == found[target]
    assert (effects == 0).mean() > 0.3


def test_the_lambda_of_a_target_predicts_its_held_out_models_best(pair, fitted):
    masks, weights, outputs = everything(pair)
    order = generator(0, "held-out models").permutation(MODELS)
    held = np.sort(order[: MODELS // 5])
    kept = np.setdiff1d(np.arange(MODELS + 1), held)
    share = weights[kept].sum() / weights.sum()
    target, errors = 15, []
    penalties = fitted.store.numpy("penalty")[target]
    chosen = None
    smallest = [largest_gradient(masks, weights, outputs[:, target, c]) for c in range(OUTPUTS)]
    for number, fraction in enumerate(LASSO.fractions):
        error = 0
        for output in range(OUTPUTS):
            data = masks[kept], weights[kept], outputs[kept, target, output]
            penalty = fraction * smallest[output] * share
            effects = effects_of(*data, None, np.array([penalty]))[0]
            shift = np.average(data[2] - data[0] @ effects, 0, data[1])
            error += np.square(outputs[held, target, output] - shift - masks[held] @ effects).sum()
            if np.isclose(penalties[output], fraction * smallest[output]):
                chosen = number
        errors.append(error)
    assert chosen == np.argmin(errors)


def largest_gradient(masks, weights, outputs):
    return np.abs(gradients(masks, weights, outputs, np.zeros(TRAIN))).max()


def test_it_is_a_linear_datamodel_with_error_bars(task, fitted):
    opened = LinearDatamodel.open(fitted.store.path)
    few, more = ForgetSet.at(task, [3]), ForgetSet.at(task, [3, 8, 9])
    small, large = opened.change(few), opened.change(more)
    assert np.isfinite(large.std).all()
    assert (small.std > 0).all()
    np.testing.assert_allclose(large.std[TRAIN:] ** 2, 3 * small.std[TRAIN:] ** 2, rtol=1e-5)
    own, other = opened.shrink
    effects = opened.store.numpy("effects")
    expected = -(own * effects[3, 3] + other * effects[[8, 9], 3].sum(0))
    np.testing.assert_allclose(large.mean[3], expected, rtol=1e-5)
    assert not opened.change(few, few).std.any()


def test_error_bars_cover_the_true_effects(task, fitted):
    forget = ForgetSet.at(task, [0, 2, 5, 7, 9, 11])
    change = fitted.change(forget)
    off = np.abs(change.mean + true_effects()[forget.rows].sum(0))
    bars = 2 * np.hypot(change.std, change.noise / ANCHORS**0.5)
    assert (off < bars).mean() > 0.9


@pytest.mark.parametrize("sizes", [(5, 17), (17, 4), (7, 1)])
def test_blocks_and_little_memory_change_nothing(pair, fitted, tmp_path, monkeypatch, sizes):
    block, step = sizes
    monkeypatch.setattr(datamodels, "score_block", lambda *_: block)
    monkeypatch.setattr(datamodels, "STEP_BYTES", step * (MODELS + 1 + TRAIN) * OUTPUTS * 8)
    monkeypatch.setattr(datamodels, "KEPT_BYTES", 0)
    ensemble, anchor = pair
    options = {"anchor": anchor, "to": tmp_path / "x", "method": LASSO, "dtype": "float64"}
    found = fit_datamodels(ensemble, **options)
    assert found.store.spec.block == block
    for name in found.store.spec.arrays:
        np.testing.assert_array_equal(found.store.numpy(name), fitted.store.numpy(name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fractions": ()}, r"fractions must fall and lie between 0 and 1, got \(\)"),
        ({"fractions": (0.1, 0.5)}, "fractions must fall"),
        ({"fractions": (1.5, 0.5)}, "fractions must fall and lie between 0 and 1"),
        ({"tolerance": 0.0}, "tolerance and iterations must be above 0, got 0.0 and 10000"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Lasso(**settings)
