"""Commands that fill a run and those that purge it keep out of each other's way."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from attribution.precompute import compute_moments, precompute
from attribution.purging.purge import purge
from attribution.purging.turns import writers_turn
from stores import Store, place
from stores.folder import Folder
from tests.attribution.purging.runs import PLAIN, SIZES, SPEC, copied, opened
from tests.small_runs import contents
from unlearning.cli import main

MODULE = sys.modules["attribution.precompute"]  # the package has a function of this name


@pytest.fixture
def spared(plain):
    """The folder of a run that no test may spoil."""
    return Path(plain.path.url)


@pytest.fixture
def run(spared, tmp_path):
    return copied(spared, tmp_path)


@pytest.fixture
def spec(run):
    return f"{run.parent}/small.py:task"


@pytest.mark.parametrize(
    "words",
    [
        ("predict", "--forget", "person-001"),
        ("explain", "--target", "test-2"),
        ("unlearn", "--forget", "person-001", "--method", "dmm", "--out", "a.safetensors"),
        ("evaluate", "--forget", "person-001", "--methods", "dmm"),
        ("status", "--discard"),
        ("report",),
        ("precompute", "{spec}"),
    ],
)
def test_writers_are_refused_while_rows_are_purged(spared, capsys, words):
    before, spec = contents(spared), f"{spared.parent}/small.py:task"
    with place(spared).locked(alone=True):
        assert main([*(word.format(spec=spec) for word in words), "--run", str(spared)]) == 2
    told = f"rows are purged from {spared}, or were meanwhile: wait for it, then call this again"
    assert capsys.readouterr() == ("", f"dmm: {told}\n")
    assert contents(spared) == before


@pytest.mark.parametrize("alone", [False, True], ids=["a writer", "a purge"])
def test_a_purge_is_refused_while_others_change_the_run(spared, capsys, alone):
    before = contents(spared)
    with place(spared).locked(alone=alone):
        assert main(["purge", "--run", str(spared), "--forget", SPEC]) == 2
    told = f"another command writes to {spared}: wait until it has ended, then purge"
    assert capsys.readouterr() == ("", f"dmm: {told}\n")
    assert contents(spared) == before


def meanwhile(monkeypatch, act):
    """Something happens in another thread, as in another process, while precompute runs."""

    def compute(*arguments, **where):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(act).result()
        return compute_moments(*arguments, **where)

    monkeypatch.setattr(MODULE, "compute_moments", compute)


def test_precompute_holds_the_run_until_it_ends(run, spec, monkeypatch):
    def try_to_purge():
        with pytest.raises(ValueError, match="another command writes to"):
            purge(run, SPEC)

    meanwhile(monkeypatch, try_to_purge)
    precompute(spec, run, **PLAIN)
    assert purge(run, SPEC).rows == 4


def test_a_new_run_is_held_too(spec, tmp_path, monkeypatch):
    path = tmp_path / "new"

    def try_to_purge():
        with pytest.raises(ValueError, match="another command writes to"):
            purge(path, SPEC)
        raise InterruptedError

    monkeypatch.setattr(MODULE, "train_models", lambda *arguments, **named: try_to_purge())
    with pytest.raises(InterruptedError):
        precompute(spec, path, **PLAIN)


@pytest.fixture
def _without_locks(monkeypatch):
    """As in a bucket."""
    monkeypatch.setattr(Folder, "locked", lambda self, *, alone: nullcontext())


@pytest.mark.usefixtures("_without_locks")
def test_where_nothing_is_locked_a_writer_that_was_overtaken_writes_no_block(
    run, spec, monkeypatch
):
    Store.open(run / "moments").discard(0)
    meanwhile(monkeypatch, lambda: purge(run, SPEC))
    with pytest.raises(ValueError, match=r"or were meanwhile|was rewritten since it was"):
        precompute(spec, run, **PLAIN)
    assert not any("person-003" in store.ids("train") for store in rowed(opened(run)))


@pytest.mark.usefixtures("_without_locks")
def test_a_writer_of_a_run_with_gradients_that_was_overtaken_is_refused(
    whole, tmp_path, monkeypatch
):
    run = copied(whole.path.url, tmp_path)
    Store.open(run / "features/checkpoint-1").discard(0)
    meanwhile(monkeypatch, lambda: purge(run, SPEC))
    with pytest.raises(ValueError, match=r"or were meanwhile|was rewritten since it was"):
        precompute(f"{tmp_path}/small.py:task", run, **SIZES)
    assert not any("person-003" in store.ids("train") for store in rowed(opened(run)))


def rowed(run):
    return [store for store in run.stores() if store.spec.kind in ("ensemble", "datamodel")]


@pytest.mark.usefixtures("_without_locks")
def test_where_nothing_is_locked_a_writer_is_refused_at_its_end(run):
    with (
        ThreadPoolExecutor(1) as thread,
        pytest.raises(ValueError, match="or were meanwhile"),
        writers_turn(run),
    ):
        thread.submit(purge, run, SPEC).result()


def test_rows_purged_between_the_two_looks_of_a_new_run_are_found(run, spec, monkeypatch):
    # A folder that is not there cannot be locked; the one that is made may be purged at once.
    monkeypatch.setattr(MODULE, "task_left", lambda task, path: task)
    purge(run, SPEC)
    with pytest.raises(ValueError, match=r"rows were purged from .* meanwhile: call this again"):
        precompute(spec, run, **PLAIN)
