"""Purges that are killed, overtaken or resumed."""

import secrets
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from attribution.forget import parse_forget
from attribution.precompute import precompute
from attribution.prediction_files import write_prediction
from attribution.purging.journal import read_journal, write_journal
from attribution.purging.plan import plan_purge
from attribution.purging.purge import purge
from attribution.run import Run
from stores import place, taken_out
from stores.folder import Folder
from tests.attribution.purging.runs import (
    GONE,
    NAMED,
    PLAIN,
    SPEC,
    copied,
    opened,
)
from tests.interruptions import Killed, kill_after
from tests.small_runs import contents, write_task


def test_killed_again_and_again_it_finishes_with_the_same_bytes(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda size: "5a" * size)
    one, other = (copied(whole.path.url, tmp_path / n) for n in made(tmp_path, "a", "b"))
    purge(one, SPEC)
    random, kills = np.random.default_rng(0), 0
    for changes in random.integers(1, 130, 99):
        with monkeypatch.context() as patch:
            kill_after(patch, int(changes))
            try:
                told = purge(other, SPEC)
                break
            except Killed:
                kills += 1
        if (other / "purge.json").exists():
            with pytest.raises(ValueError, match=rf"finish it with dmm purge --run {other}$"):
                Run.open(other)
    assert kills > 2
    assert told.finished
    assert named(other) == named(one)


def made(folder, *names):
    for name in names:
        (folder / name).mkdir()
    return names


def named(path):
    """Digests by name; where the task file lies is another matter."""
    found = {n.removeprefix(str(path)): told for n, told in contents(path).items()}
    return {name: told for name, told in found.items() if name != "/run.json"}


@pytest.fixture(scope="module")
def half(plain, tmp_path_factory):
    """A run whose purge was killed half-way."""
    path = copied(plain.path.url, tmp_path_factory.mktemp("half"))
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 22)
        with pytest.raises(Killed):
            purge(path, SPEC)
    assert taken_out(path / "moments")
    assert not taken_out(path / "full")
    return path


@pytest.fixture
def killed(half, tmp_path):
    return copied(half, tmp_path)


def test_the_journal_holds_no_id(whole, tmp_path, monkeypatch):
    path = copied(whole.path.url, tmp_path)
    kill_after(monkeypatch, 1)
    with pytest.raises(Killed):
        purge(path, SPEC)
    content = (path / "purge.json").read_text()
    assert "person" not in content
    assert read_journal(path).positions == GONE
    assert len(read_journal(path).own) == 4


def test_other_rows_wait_until_an_interrupted_purge_is_finished(killed):
    with pytest.raises(ValueError, match=r"a purge of 4 other rows from .* was interrupted"):
        purge(killed, "person-001")
    told = purge(killed)
    assert (told.rows, told.finished) == (4, True)
    assert not place(killed).exists("purge.json")
    assert len(opened(killed).task.train_ids) == 33


@pytest.mark.parametrize(
    ("spec", "targets"), [("person-008", ["person-001"]), ("few=rows:1:3", ["person-008"])]
)
def test_a_store_that_came_meanwhile_and_names_the_rows_is_refused(plain, killed, spec, targets):
    forget = parse_forget(plain.task, spec)
    predicted = plain.datamodel.predict(plain.model(0), forget, targets)
    write_prediction(predicted, str(killed / "late.zarr"), forget)
    with pytest.raises(RuntimeError, match=rf"late\.zarr in {killed} came while rows were purged"):
        purge(killed)
    assert not (killed / "tombstones.json").exists()
    shutil.rmtree(killed / "late.zarr")
    assert purge(killed).finished


def test_rows_purged_before_may_be_named_again_by_the_call_that_finishes(plain, tmp_path):
    path = copied(plain.path.url, tmp_path)
    purge(path, "person-003,person-008")
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 22)
        with pytest.raises(Killed), pytest.warns(UserWarning, match="2 rows"):
            purge(path, "person-008,person-020")
    with pytest.raises(ValueError, match="a purge of 1 other rows"):
        purge(path, "person-003,person-008")
    told = purge(path, "person-008,person-020")
    assert (told.rows, told.already, told.finished, told.tombstones) == (1, 1, True, 3)


def purging_meanwhile(monkeypatch, act):
    """Something happens when a purge has made its plan and not yet written its journal.

    Nothing is locked, as in a bucket.
    """

    def planned(*arguments):
        monkeypatch.setattr("attribution.purging.purge.plan_purge", plan_purge)
        made = plan_purge(*arguments)
        act(made[1])
        return made

    monkeypatch.setattr(Folder, "locked", lambda self, *, alone: nullcontext())
    monkeypatch.setattr("attribution.purging.purge.plan_purge", planned)


def test_of_two_purges_at_once_the_second_to_plan_waits(plain, tmp_path, monkeypatch):
    path = copied(plain.path.url, tmp_path)

    def begin(journal):
        write_journal(path, replace(journal, positions=(3,)))

    purging_meanwhile(monkeypatch, begin)
    with pytest.raises(ValueError, match=rf"finish it with dmm purge --run {path}$"):
        purge(path, SPEC)
    assert read_journal(path).positions == (3,)


def test_a_block_damaged_since_the_kill_is_refused_until_it_is_restored(killed):
    name = next(n for n in read_journal(killed).rewrite if n.startswith("ensemble"))
    chunk = killed / name / "outputs/c/0/0/0"
    content = chunk.read_bytes()
    chunk.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(RuntimeError, match=rf"blocks \[0\] of .*{name} are damaged"):
        purge(killed)
    chunk.write_bytes(content)
    assert purge(killed).weights


def test_a_store_damaged_since_the_kill_may_be_removed_and_is_made_again(killed, tmp_path):
    name = next(n for n in read_journal(killed).rewrite if n.startswith("ensemble"))
    shutil.rmtree(killed / name)
    assert purge(killed).finished
    assert not (killed / name).exists()
    with pytest.warns(UserWarning, match="4 rows"):
        precompute(f"{tmp_path}/small.py:task", killed, **PLAIN)
    assert (killed / name).exists()


@pytest.mark.parametrize("killed_too", [False, True])
def test_a_plan_made_before_another_purge_ended_is_refused(
    plain, tmp_path, monkeypatch, killed_too
):
    path = copied(plain.path.url, tmp_path)

    def overtake(journal):
        purge(path, "person-020")
        if killed_too:
            write_journal(path, journal)
            raise Killed

    purging_meanwhile(monkeypatch, overtake)
    words = "other rows were purged from .* meanwhile, and none of these: call it again"
    if killed_too:
        with pytest.raises(Killed):
            purge(path, SPEC)
    with pytest.raises(ValueError, match=words):
        purge(path, SPEC)
    assert not (path / "purge.json").exists()
    with pytest.warns(UserWarning, match="1 rows"):
        told = purge(path, SPEC)
    assert (told.rows, told.tombstones) == (4, 5)


def test_changed_data_do_not_finish_a_purge(killed, tmp_path):
    write_task(tmp_path, NAMED.replace("recipe = ", "train_data.tensors[1][4] += 1\nrecipe = "))
    with pytest.raises(ValueError, match="holds other rows now: finish it with the data that it"):
        purge(killed)
    write_task(tmp_path, NAMED)
    assert purge(killed).rows == 4
