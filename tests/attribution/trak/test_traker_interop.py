"""The `trak` package beside ours: its features in our stores, its results, its scores."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
import trak
from torch import nn
from trak.projectors import BasicProjector, NoOpProjector

from attribution import Model
from attribution.gradients import Features, output_cotangents
from attribution.lds import ranks
from attribution.trak import fit_trak, traker_interop
from attribution.trak.traker_interop import featurize_with_trak
from attribution.trak.traker_results import open_trak_results, store_trak_results
from tests.attribution.trak.cases import checkpoints, dense_scores, make_features
from tests.tasks import blobs, normalised_mlp

REGULARISATION = 0.02


def run_package(task, models, folder, *, projector, half=False):
    """What its own blueprint does: featurise, finalise, score the test rows as `test`."""
    module = task.new_model(0)
    traker = trak.TRAKer(
        model=module,
        task="image_classification",
        train_set_size=len(task.train_ids),
        save_dir=str(folder),
        device="cpu",
        projector=projector,
        use_half_precision=half,
        lambda_reg=REGULARISATION,
        logging_level=logging.ERROR,
    )
    train, test = (list(task.rows(s, np.arange(len(task.data(s))))) for s in ("train", "test"))
    for number, model in enumerate(models):
        traker.load_checkpoint(model.state, model_id=number)
        traker.featurize(batch=train, num_samples=len(train[0]))
    traker.finalize_features()
    for number, model in enumerate(models):
        traker.start_scoring_checkpoint("test", model.state, number, len(test[0]))
        traker.score(batch=test, num_samples=len(test[0]))
    return np.array(traker.finalize_scores("test"))


def basic_projector(task, width):
    size = sum(p.numel() for p in task.new_model(0).parameters())
    return BasicProjector(size, width, 5, "normal", torch.device("cpu"))


@pytest.fixture(scope="module")
def task():
    return blobs()


@pytest.fixture(scope="module")
def package(task, tmp_path_factory):
    """Its results for three checkpoints, gradients not projected."""
    folder = tmp_path_factory.mktemp("package") / "results"
    run_package(task, checkpoints(task, 3), folder, projector=NoOpProjector(device="cpu"))
    return open_trak_results(folder)


@pytest.fixture(scope="module")
def features(task, tmp_path_factory):
    return make_features(task, tmp_path_factory.mktemp("ours") / "features")


def parameters(task):
    return sum(p.numel() for p in task.new_model(0).parameters())


def margins_of(scores):
    return np.stack([scores.margins(t) for t in range(scores.store.spec.length)], 1)


class TestScores:
    def test_they_are_ours_up_to_scale_for_one_checkpoint(self, task, features, tmp_path):
        # The package divides its gradients by the root of the number of parameters.
        theirs = run_package(task, checkpoints(task, 1), tmp_path / "package",
                             projector=NoOpProjector(device="cpu"))  # fmt: skip
        ours = fit_trak(Features(task, features.stores[:1]), tmp_path / "ours", weighting=False,
                        damping=REGULARISATION * parameters(task))  # fmt: skip
        margins = margins_of(ours)[:, 37:]
        scale = (theirs * margins).sum() / np.square(margins).sum()
        assert scale > 0
        np.testing.assert_allclose(theirs, scale * margins, rtol=0, atol=1e-5 * theirs.max())

    def test_they_follow_from_ours_for_several_checkpoints(self, task, package):
        damping = REGULARISATION * parameters(task)
        kernels, pulls = [], []
        for number, model in enumerate(checkpoints(task, 3)):
            margins = dense_scores(task, [model], damping, weighting=False)[1][:, 37:]
            pull = package.out_to_loss(number)
            # features = gradients (X^T X + lambda)^-1 / mean |(X^T X + lambda)^-1|
            gradients = package.gradients(number).astype(np.float64)
            gram = gradients.T @ gradients + REGULARISATION * np.eye(gradients.shape[1])
            size = np.abs(np.linalg.inv(gram)).mean()
            kernels.append(margins / pull[:, None] / size)
            pulls.append(pull)
        expected = np.mean(kernels, axis=0) * np.mean(pulls, axis=0)[:, None]
        found = package.scores("test")
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * found.max())

    def test_ranks_agree_at_equal_lambda(self, task, features, package, tmp_path):
        ours = fit_trak(features, tmp_path / "trak", weighting=False,
                        damping=REGULARISATION * parameters(task))  # fmt: skip
        margins, theirs = margins_of(ours)[:, 37:], package.scores("test")
        agreement = [
            np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in zip(margins.T, theirs.T, strict=True)
        ]
        assert np.mean(agreement) > 0.99

    def test_pulls_are_minus_the_losses_derivatives(self, task, package):
        model = checkpoints(task, 2)[1]
        outputs, labels = torch.from_numpy(model.outputs(range(37))), task.targets(range(37))[1]
        expected = 1 - outputs.softmax(1)[torch.arange(37), labels]
        np.testing.assert_allclose(package.out_to_loss(1), expected, rtol=1e-4)


class TestFeatures:
    def test_they_are_the_gradients_themselves_without_a_projection(self, task, features, tmp_path):
        found = featurize_with_trak(task, checkpoints(task, 3), tmp_path / "f", proj_dim=None,
                                    block=7)  # fmt: skip
        assert (len(found), found.width) == (3, parameters(task))
        for checkpoint in (0, 2):
            rows = np.array([3, 40])
            a, b = (f.gather(checkpoint, rows).reshape(4, -1) for f in (found, features))
            np.testing.assert_allclose(a @ a.T, b @ b.T, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(
                found.outputs(checkpoint), features.outputs(checkpoint), rtol=1e-5, atol=1e-6
            )

    def test_the_projection_is_that_of_the_package(self, task, tmp_path):
        models, width = checkpoints(task, 2), 24
        run_package(task, models, tmp_path / "package", projector=basic_projector(task, width))
        theirs = open_trak_results(tmp_path / "package")
        found = featurize_with_trak(task, models, tmp_path / "f", proj_dim=width, seed=5, block=7)
        for checkpoint in (0, 1):
            rows = np.arange(48)
            outputs = torch.from_numpy(found.outputs(checkpoint, rows))
            slopes = output_cotangents(task.loss, outputs, task.targets(rows)[1], "margin")
            margins = slopes.numpy() @ found.gather(checkpoint, rows)
            scaled = margins[:, 0] * np.sqrt(width / parameters(task))
            for values, expected in (
                (scaled[:37], theirs.gradients(checkpoint)),
                (scaled[37:], theirs.target_gradients(checkpoint, "test")),
            ):
                np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5)

    def test_our_scores_come_from_its_features(self, task, tmp_path):
        models = checkpoints(task, 2)
        found = featurize_with_trak(task, models, tmp_path / "f", proj_dim=None)
        scores = fit_trak(Features.open(tmp_path / "f", task), tmp_path / "t", damping=0.3)
        assert len(found) == scores.checkpoints == 2
        expected = dense_scores(task, models, 0.3)[0]
        np.testing.assert_allclose(scores.store.numpy("effects"), expected, rtol=0, atol=1e-5)

    def test_pieces_and_interruptions_do_not_show(self, task, tmp_path, monkeypatch):
        settings = {"proj_dim": 24, "block": 7}
        models = checkpoints(task, 2)
        first = featurize_with_trak(task, models, tmp_path / "f", **settings)
        bits = [store.numpy("features").tobytes() for store in first.stores]
        first.stores[1].discard(3)
        again = featurize_with_trak(task, models, tmp_path / "f", **settings)
        assert [store.numpy("features").tobytes() for store in again.stores] == bits
        monkeypatch.setattr(traker_interop, "GRADIENT_BYTES", 3 * 2 * 32 * 4)
        pieces = featurize_with_trak(task, models, tmp_path / "g", **settings)
        np.testing.assert_allclose(
            pieces.gather(1, np.arange(48)), again.gather(1, np.arange(48)), rtol=1e-4, atol=1e-6
        )

    def test_frozen_parameters_are_left_out_and_buffers_stay(self, tmp_path):
        def half_frozen():
            module = normalised_mlp()
            module[0].requires_grad_(False)
            return module

        task = blobs(model=half_frozen)
        model = Model(task, half_frozen().state_dict())
        before = {name: value.clone() for name, value in model.state.items()}
        found = featurize_with_trak(task, [model], tmp_path / "f", proj_dim=None)
        assert found.width == 10 + 12
        assert all(torch.equal(before[name], value) for name, value in model.state.items())
        np.testing.assert_allclose(
            found.outputs(0, np.array([2, 45])), model.outputs([2, 45]), rtol=1e-6
        )

    @pytest.mark.parametrize(
        ("models", "width", "message"),
        [(0, 8, "at least one checkpoint"), (1, 0, "proj_dim must be 1 or more, or None, got 0")],
    )
    def test_unusable_settings_are_refused(self, task, tmp_path, models, width, message):
        with pytest.raises(ValueError, match=message):
            featurize_with_trak(task, checkpoints(task, models), tmp_path / "f", proj_dim=width)

    def test_other_settings_are_refused(self, task, tmp_path):
        models = checkpoints(task, 1)
        featurize_with_trak(task, models, tmp_path / "f", proj_dim=8)
        with pytest.raises(ValueError, match="trak"):
            featurize_with_trak(task, models, tmp_path / "f", proj_dim=8, seed=1)

    def test_a_model_of_another_task_is_refused(self, task, tmp_path):
        other = Model(task, nn.Linear(2, 2).state_dict())
        with pytest.raises(ValueError, match="checkpoint 0"):
            featurize_with_trak(task, [other], tmp_path / "f")


class TestResults:
    def test_a_folder_tells_what_it_holds(self, package):
        assert (package.train, package.width, package.models) == (37, 32, (0, 1, 2))
        assert package.targets == {"test": 11}
        assert package.features(2).shape == (37, 32)
        assert not package.scores("test").flags.writeable

    def test_half_precision_is_opened_as_it_is(self, task, tmp_path):
        scores = run_package(task, checkpoints(task, 1), tmp_path / "half", half=True,
                             projector=NoOpProjector(device="cpu"))  # fmt: skip
        found = open_trak_results(tmp_path / "half").scores("test")
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, scores)

    def test_scores_become_a_store(self, task, package, tmp_path):
        store = store_trak_results(package, "test", tmp_path / "s", task=task, top=3)
        np.testing.assert_array_equal(store.numpy("scores"), package.scores("test"))
        assert store.ids("target") == list(task.test_ids)
        assert "scale is arbitrary" in store.attributes["meaning"]
        column = package.scores("test")[:, 4]
        np.testing.assert_array_equal(
            store.numpy("top_values")[4], [np.sort(column)[::-1][:3], np.sort(column)[:3]]
        )
        again = store_trak_results(package, "test", tmp_path / "s", task=task, top=3)
        assert again.path == store.path

    @pytest.mark.parametrize(
        ("targets", "message"),
        [(["test-0"], "37 training rows and 11 targets, the task has 37 and 1 were named"),
         (["nobody"] * 11, "unknown target 'nobody'")],
    )  # fmt: skip
    def test_other_targets_are_refused(self, task, package, tmp_path, targets, message):
        with pytest.raises(ValueError, match=message):
            store_trak_results(package, "test", tmp_path / "s", task=task, targets=targets)

    def test_unknown_parts_are_refused(self, package):
        with pytest.raises(ValueError, match="has the experiments test, not 'train'"):
            package.scores("train")
        with pytest.raises(ValueError, match=r"one of the models \(0, 1, 2\)"):
            package.gradients(3)

    def test_unfinished_scores_are_refused(self, task, package, tmp_path):
        folder = self.copied(package, tmp_path)
        told = json.loads((folder / "experiments.json").read_text())
        told["test"]["scores_finalized"] = 0
        (folder / "experiments.json").write_text(json.dumps(told))
        with pytest.raises(ValueError, match="are not finished: call finalize_scores"):
            open_trak_results(folder).scores("test")

    @pytest.mark.parametrize("damage", ["cut", "missing", "other"])
    def test_damaged_arrays_are_refused(self, package, tmp_path, damage):
        folder = self.copied(package, tmp_path)
        file = folder / "scores" / "test.mmap"
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-10])
        elif damage == "missing":
            file.unlink()
        else:
            with file.open("wb") as handle:
                np.save(handle, np.zeros((2, 2)))
        with pytest.raises(ValueError, match=r"cannot read .*test.mmap|to have shape \(37, 11\)"):
            open_trak_results(folder).scores("test")

    def test_other_folders_are_refused(self, tmp_path):
        (tmp_path / "metadata.json").write_text('{"JL dimension": "many"}')
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(ValueError, match="expected results of the trak package in"):
                open_trak_results(folder)

    @staticmethod
    def copied(package, tmp_path):
        shutil.copytree(package.folder, tmp_path / "copy")
        return tmp_path / "copy"
