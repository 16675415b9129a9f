"""A save that fails or is killed leaves one whole model, with the moments that it carries."""

import errno
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import attribution.carried
import attribution.model
from attribution import Model, load_model
from attribution.carried import carried_path, partial_path
from tests.tasks import blobs


class Killed(BaseException):
    """What no code of the save may catch."""


def model_of(task, seed, *, moments):
    """The same weights for all seeds, so that only the save itself tells the moments apart."""
    held = {"0": torch.full((3, 3), float(seed), dtype=torch.float64)} if moments else None
    return Model(task, task.new_model(0).state_dict(), provenance={"seed": seed}, moments=held)


def told(task, path):
    """The number of the model that lies there, twice: from its file and from its moments."""
    found = load_model(task, path)
    seed = found.provenance["seed"]
    return seed, seed if found.moments is None else int(found.moments["0"][0, 0])


def interrupted(monkeypatch, at, error):
    """Makes the step of that number fail halfway: steps are files written, replaced and removed."""
    steps = iter(range(100))

    def due():
        return next(steps) == at

    def half_written(write):
        def call(tensors, path, **more):
            write(tensors, path, **more)
            if due():
                Path(path).write_bytes(Path(path).read_bytes()[:-5])
                raise error

        return call

    def not_done(change):
        def call(path, *given, **more):
            if due():
                raise error
            return change(path, *given, **more)

        return call

    for module in (attribution.carried, attribution.model):
        monkeypatch.setattr(module, "save_file", half_written(module.save_file))
    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, not_done(getattr(Path, name)))


@pytest.fixture
def task():
    return blobs()


PAIRS = [(True, True), (True, False), (False, True)]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space left"), Killed()], ids=repr)
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("moments", PAIRS, ids=str)
def test_either_model_is_whole_after_a_save_that_stops_anywhere(
    tmp_path, monkeypatch, moments, at, error
):
    task, path, (before, after) = blobs(), tmp_path / "model.safetensors", moments
    model_of(task, 1, moments=before).save(path)
    with monkeypatch.context() as patch:
        interrupted(patch, at, error)
        # The last numbers lie behind the last step: nothing fails then.
        with suppress(ValueError, Killed):
            model_of(task, 2, moments=after).save(path)
    seen = told(task, path)
    assert seen in {(1, 1), (2, 2)}
    # And so after another save that fails before it has replaced anything.
    with monkeypatch.context() as patch:
        patch.setattr(attribution.model, "save_file", failing)
        with pytest.raises(ValueError, match="no space left"):
            model_of(task, 3, moments=True).save(path)
    assert told(task, path) == seen
    model_of(task, 4, moments=after).save(path)
    assert told(task, path) == (4, 4)
    assert {p.name for p in tmp_path.iterdir()} == (
        {path.name, carried_path(path).name} if after else {path.name}
    )


def failing(*_, **__):
    raise OSError(errno.ENOSPC, "no space left")


def test_a_model_killed_between_its_two_files_reads_the_moments_that_wait(task, tmp_path):
    path = tmp_path / "model.safetensors"
    model_of(task, 1, moments=True).save(path)
    carried_path(path).replace(partial_path(path))
    model_of(task, 2, moments=True).save(tmp_path / "other.safetensors")
    carried_path(tmp_path / "other.safetensors").replace(carried_path(path))
    assert told(task, path) == (1, 1)


def test_a_save_that_fails_leaves_no_files_of_its_own(task, tmp_path, monkeypatch):
    monkeypatch.setattr(attribution.model, "save_file", failing)
    with pytest.raises(ValueError, match=r"cannot write '.*model.safetensors': .*no space left"):
        model_of(task, 1, moments=True).save(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
