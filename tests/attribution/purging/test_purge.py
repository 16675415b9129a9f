import secrets
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from attribution import Ensemble, ForgetSet, GroupNewton, featurize
from attribution.forget import parse_forget
from attribution.gradients.curvature import train_curvature
from attribution.moments import input_moments
from attribution.precompute import precompute
from attribution.prediction_files import write_prediction
from attribution.purging.journal import read_journal, write_journal
from attribution.purging.plan import plan_purge
from attribution.purging.purge import purge
from attribution.purging.tombstones import read_tombstones
from attribution.retained import retained_task
from attribution.run import Run
from attribution.strongest import strongest
from stores import Store, place
from stores.folder import Folder
from tests.attribution.purging.runs import (
    CLEARED,
    GONE,
    LEFT,
    NAMED,
    SIZES,
    SPEC,
    TARGETS_LEFT,
    copied,
    opened,
    whole_run,
)
from tests.interruptions import Killed, kill_after
from tests.small_runs import contents, write_task

FEW = ["person-001", "person-012", "person-029"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Run.open(whole_run(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def done(whole, tmp_path_factory):
    path = copied(whole.path.url, tmp_path_factory.mktemp("purged"))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    told = purge(path, SPEC)
    assert told.bytes_before == size
    return path, told


@pytest.fixture(scope="module")
def left(done):
    return opened(done[0])


def change(run, name, ids=FEW):
    return run.predictor(name).change(ForgetSet.of(run.task, ids))


# -- predictions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["mean", "std", "noise"])
def test_a_datamodel_predicts_the_remaining_rows_bit_for_bit(whole, left, part):
    before, after = (getattr(change(run, "datamodel"), part) for run in (whole, left))
    np.testing.assert_array_equal(after, before[TARGETS_LEFT])
    assert np.abs(before).max() > 0.01
    assert whole.datamodel.shrink == left.datamodel.shrink


@pytest.mark.parametrize("part", ["mean", "noise"])
def test_trak_predicts_the_remaining_rows_bit_for_bit(whole, left, part):
    before, after = (getattr(change(run, "trak"), part) for run in (whole, left))
    np.testing.assert_array_equal(after, before[TARGETS_LEFT])


def test_group_newton_predicts_as_if_its_features_had_never_held_the_rows(whole, left, tmp_path):
    task = retained_task(whole.task, ForgetSet.at(whole.task, GONE))
    models = [whole.full.model(i) for i in range(3)]
    models = [replace(model, task=task) for model in models]
    never = GroupNewton(
        task, featurize(task, models, tmp_path / "f"), calibration=left.calibration.newton
    )
    expected, found = never.change(ForgetSet.of(task, FEW)), change(left, "newton")
    for part in ("mean", "std", "noise"):
        wanted = getattr(expected, part)
        np.testing.assert_allclose(
            getattr(found, part), wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=part
        )


def test_the_calibration_stays(whole, left):
    assert left.calibration == whole.calibration
    assert left.predictors == whole.predictors
    assert left.best == whole.best


# -- sums and lists --------------------------------------------------------------------------------


def test_curvatures_lose_the_rows(left):
    for number, store in enumerate(left.features.stores):
        for kept in Path(left.path.url).glob(f"features/curvature-{number}*"):
            temperature = Store.open(kept).provenance.settings["temperature"]
            anew = train_curvature(left.task, store, temperature)
            found = left.features.curvature(number, temperature)
            np.testing.assert_allclose(found, anew, atol=1e-6 * np.abs(anew).max())


def test_input_moments_lose_the_rows(whole, left):
    inputs, _ = left.task.rows("train", np.arange(len(LEFT)))
    assert len(inputs) == 33
    for index in (0, 5):
        model = left.full.model(index)
        anew = input_moments(left.task.new_model(0), model.state, inputs)
        number = left.moments.find_digest(model.digest())
        for name, values in left.moments.layers([number]).items():
            torch.testing.assert_close(values[0], anew[name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(whole.moments.layers([0])["0"], left.moments.layers([0])["0"])


def test_the_strongest_rows_are_those_of_the_rows_that_are_left(whole, left):
    before, after = (Store.open(run.trak_path / "scores") for run in (whole, left))
    margins = after.numpy("margins")
    np.testing.assert_array_equal(margins, before.numpy("margins")[LEFT][:, TARGETS_LEFT])
    rows, values = strongest(margins, 20)
    np.testing.assert_array_equal(after.numpy("top_rows"), rows)
    np.testing.assert_array_equal(after.numpy("top_values"), values)
    assert np.isin(before.numpy("top_rows"), GONE).any()


def test_the_strongest_rows_of_a_datamodel_are_those_that_are_left(whole, left):
    before, after = whole.datamodel.store, left.datamodel.store
    effects = after.numpy("effects")
    np.testing.assert_array_equal(effects, before.numpy("effects")[LEFT][:, TARGETS_LEFT])
    np.testing.assert_allclose(after.numpy("sum"), effects.sum(0), rtol=1e-4, atol=1e-5)
    margins = (effects * after.numpy("slopes")).sum(2)
    rows, values = strongest(margins, after.numpy("top_rows").shape[2])
    np.testing.assert_array_equal(after.numpy("top_rows"), rows)
    np.testing.assert_allclose(after.numpy("top_values"), values, rtol=1e-6)
    assert np.isin(before.numpy("top_rows"), GONE).any()


def test_the_spread_of_trak_over_checkpoints_is_that_of_the_rows_that_are_left(whole, left):
    j = [whole.features.gather(c, np.array(TARGETS_LEFT)) for c in range(3)]
    solved = [Store.open(whole.trak_path / f"rows-{c}").numpy("rows")[LEFT] for c in range(3)]
    scores = -np.stack(
        [np.einsum("rk,tok->rto", r.astype(float), one) for r, one in zip(solved, j, strict=True)]
    )
    for row in range(len(LEFT)):  # training rows come first among the targets too
        scores[:, row, row] = 0
    store = Store.open(left.trak_path / "scores")
    expected = {
        "row_variance": scores.var(0, ddof=1).sum(0),
        "sum_variance": scores.sum(1).var(0, ddof=1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(
            store.numpy(name), values, rtol=1e-4, atol=1e-5 * values.max(), err_msg=name
        )


def test_the_factor_of_a_curvature_with_the_rows_goes(left):
    with pytest.raises(ValueError, match="'factor'"):
        Store.open(left.trak_path / "rows-0").constant("factor")


# -- stores ----------------------------------------------------------------------------------------


def test_every_store_is_one_of_the_smaller_task(whole, left):
    assert left.task.train_ids == tuple(whole.task.train_ids[i] for i in LEFT)
    for store in left.stores():
        assert store.complete
        assert store.verify() == []
        for axis in ("train", "target"):
            lengths = {
                length
                for array in store.spec.arrays.values()
                for name, length in zip(array.axes, array.shape, strict=True)
                if name == axis
            }
            few = {"in-run": 2, "few.zarr": 2}.get(store.place.name)
            assert lengths <= {few or {"train": 33, "target": 44}[axis], 33}


def test_ensembles_lose_columns_of_outputs_and_masks(whole, left):
    for name in ("full", "ensemble-mixed-24", "calibration/bank"):
        before = Ensemble.open(whole.path / name, whole.task)
        after = Ensemble.open(left.path / name, left.task)
        np.testing.assert_array_equal(after.outputs, before.outputs[:, TARGETS_LEFT])
        np.testing.assert_array_equal(after.masks, before.masks[:, LEFT])
    assert after.keeps_weights is False
    states = whole.full.states(), left.full.states()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_features_lose_rows_and_nothing_else(whole, left):
    for c in range(3):
        before = whole.features.gather(c, np.array(TARGETS_LEFT))
        np.testing.assert_array_equal(left.features.gather(c, np.arange(44)), before)


def test_values_recorded_in_a_run_lose_rows_and_targets(whole, left):
    before, after = (Store.open(run.path / "in-run") for run in (whole, left))
    assert after.ids("target") == ["person-001", "person-004"]
    assert after.attributes["targets"] == after.ids("target")
    np.testing.assert_array_equal(after.constant("positions"), [1, 3])
    np.testing.assert_array_equal(after.numpy("scores"), before.numpy("scores")[LEFT][:, [0, 2]])


def test_the_plan_and_the_answer_agree_with_what_is_there(whole, done, left):
    path, told = done
    banks = {bank.name for bank in Path(whole.path.url, "oracles").iterdir()}
    (bank,) = (path / "oracles").iterdir()
    gone = {f"oracles/{name}" for name in banks - {bank.name}}
    assert set(told.removed) == CLEARED | gone
    assert set(told.rewritten) == {s.path.removeprefix(f"{path}/") for s in left.stores()}
    assert (told.rows, told.already, told.finished, told.tombstones) == (4, 0, False, 4)
    assert told.bytes_after == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert (path / "pages" / "other.html").exists()
    kept = Ensemble.open(bank / "audit", left.task)
    assert kept.without.ids == ("person-001", "person-005")


# -- evidence --------------------------------------------------------------------------------------

WINDOW = 12  # bytes: the outputs of a row
HELD = (
    "full/outputs",
    "calibration/bank/outputs",
    "calibration/newton-3/changes/mean",
    "datamodel-mixed-24/effects",
    "features/checkpoint-0/features",
    "few.zarr/mean",
    "in-run/scores",
    "trak/rows-0/rows",
    "trak/scores/margins",
)
NAMES = {f"person-{i:03d}" for i in GONE}


def windows(values):
    content, step = np.ascontiguousarray(values).tobytes(), values.dtype.itemsize
    return {content[i : i + WINDOW] for i in range(0, len(content) - WINDOW + 1, step)}


def apart(run):
    """Bytes of the purged rows, by array, and of all other rows."""
    inputs = run.task.train_data.tensors[0].numpy()
    gone = {"inputs": set().union(*(windows(inputs[i]) for i in GONE))}
    others = windows(np.delete(inputs, GONE, 0)) | windows(np.zeros(9, np.float32))
    for store in run.stores():
        for name, array in store.spec.arrays.items():
            values = store.numpy(name)
            if values.dtype.kind != "f":
                continue  # positions and masks: small numbers, alike in any run
            for axis, label in enumerate(array.axes):
                if label in ("train", "target"):
                    rows = rows_in(store, label)
                    found = [windows(values.take(i, axis)) for i in rows]
                    gone.setdefault(f"{store.place.name}/{name}", set()).update(*found)
            for axis, label in reversed(list(enumerate(array.axes))):
                if label in ("train", "target"):
                    values = np.delete(values, rows_in(store, label), axis)
            others |= windows(values)
    return {name: found - others for name, found in gone.items()}


def rows_in(store, axis):
    """Positions of the purged rows along an axis."""
    try:
        return [i for i, row in enumerate(store.ids(axis)) if row in NAMES]
    except ValueError:
        return list(GONE)


def holding(path, hidden):
    """Files, as they are and decoded, that hold some of the hidden bytes."""
    found = {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for file in path.rglob("zarr.json"):
        array = zarr.open(file.parent, mode="r")
        if isinstance(array, zarr.Array) and file.parent.name[-3:] != "_id":
            found[f"{file.parent} decoded"] = np.asarray(array[...]).tobytes()
    return {
        name.removeprefix(f"{path}/")
        for name, content in found.items()
        if any(content[i : i + WINDOW] in hidden for i in range(len(content) - WINDOW + 1))
    }


def test_no_file_holds_a_byte_of_the_rows(whole, done):
    hidden = apart(whole)
    everything = set().union(*hidden.values())
    before = holding(Path(whole.path.url), everything)
    for name in HELD:
        assert any(file.startswith(f"{name}/c/") for file in before), name
        assert f"{name} decoded" in before
        assert hidden["/".join(name.split("/")[-2:])]
    assert hidden["inputs"]
    assert holding(done[0], everything) == set()
    (done[0] / "leak").write_bytes(
        b"x" + whole.task.train_data.tensors[0][GONE[0]].numpy().tobytes()
    )
    assert holding(done[0], everything) == {"leak"}
    (done[0] / "leak").unlink()


@pytest.mark.parametrize("row", GONE)
def test_no_file_holds_an_id_of_the_rows(whole, done, row):
    def naming(path):
        files = [f for f in path.rglob("*") if f.is_file()]
        text = f"person-{row:03d}".encode()
        return [f for f in files if text in f.read_bytes() and f.name != "other.html"]

    assert len(naming(Path(whole.path.url))) > 10
    assert naming(done[0]) == []
    assert f"person-{row:03d}" in read_tombstones(done[0])


# -- what goes on working --------------------------------------------------------------------------


def test_the_same_precompute_changes_nothing(done, left):
    path, _ = done
    before = contents(path)
    with pytest.warns(UserWarning, match="4 rows of task 'small' were purged"):
        precompute(left.settings.task, path, **SIZES)
    assert contents(path) == before


def test_a_task_that_no_longer_holds_the_rows_opens_without_a_word(done, tmp_path):
    path = shutil.copytree(done[0], tmp_path / "run")
    fewer = NAMED.replace(
        "train_data = blobs(37, 1)",
        f"kept = {LEFT}\ntrain_data = TensorDataset(*(t[kept] for t in blobs(37, 1).tensors))",
    ).replace("for i in range(37)]", "for i in kept]")
    spec = write_task(tmp_path, fewer)
    (path / "run.json").write_text(
        (path / "run.json").read_text().replace(f"{done[0].parent}/small.py:task", spec)
    )
    assert len(Run.open(path).task.train_ids) == 33
    before = contents(path)
    precompute(spec, path, **SIZES)
    assert contents(path) == before


def test_more_checkpoints_join_a_purged_run(done, tmp_path):
    path = copied(done[0], tmp_path)
    with pytest.warns(UserWarning, match="4 rows"):
        run = precompute(f"{tmp_path}/small.py:task", path, **SIZES | {"checkpoints": 4})
    assert len(run.features) == 4
    assert change(run, "newton").mean.shape == (44, 3)


def test_a_run_that_is_not_finished_is_purged_and_then_finished(whole, tmp_path):
    path = copied(whole.path.url, tmp_path)
    for name in ("ensemble-mixed-24", "moments", "datamodel-mixed-24", "trak/scores"):
        Store.open(path / name).discard(0)
    for name in ("calibration.json",):
        (path / name).unlink()
    told = purge(path, SPEC)
    gone = {"moments", "datamodel-mixed-24", "trak/scores", "trak/rows-1"}
    assert gone <= set(told.removed)
    with pytest.warns(UserWarning, match="4 rows"):
        run = precompute(f"{tmp_path}/small.py:task", path, **SIZES)
    assert run.predictors == whole.predictors
    assert all(store.complete for store in run.stores())
    assert change(run, "trak").mean.shape == (44, 3)


def test_a_second_purge_takes_further_rows(whole, done, tmp_path):
    path = copied(done[0], tmp_path)
    with pytest.warns(UserWarning, match="4 rows"):
        told = purge(path, f"{SPEC},person-020")
    assert (told.rows, told.already, told.tombstones) == (1, 4, 5)
    with pytest.warns(UserWarning, match="5 rows"):
        run = Run.open(path)
    rows = [i for i in TARGETS_LEFT if i != 20]
    before, after = change(whole, "datamodel"), change(run, "datamodel")
    np.testing.assert_array_equal(after.mean, before.mean[rows])
    assert all(store.verify() == [] for store in run.stores())


def test_rows_that_are_purged_already_are_told_of(done):
    path, _ = done
    before = contents(path)
    with pytest.warns(UserWarning, match="4 rows"):
        told = purge(path, "old=person-008,person-030")
    assert (told.rows, told.already, told.rewritten, told.tombstones) == (0, 2, (), 4)
    assert contents(path) == before


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("person-999", "unknown id 'person-999'"),
        ("person-001,test-3", "'test-3' is none of the 37 training rows"),
        ("rows:0:37", "holds all 37 training rows: nothing is left"),
        (None, "no purge of .* was interrupted: name the rows with --forget"),
    ],
)
def test_rows_that_cannot_be_purged_are_refused(whole, spec, text):
    before = contents(whole.path.url)
    with pytest.raises(ValueError, match=text):
        purge(whole.path, spec)
    assert contents(whole.path.url) == before


def test_a_damaged_block_is_refused_before_anything_changes(whole, tmp_path):
    path = copied(whole.path.url, tmp_path)
    chunk = path / "full/outputs/c/0/0/0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    before = contents(path)
    with pytest.raises(RuntimeError, match=r"damaged: full blocks \[0\]; nothing was purged"):
        purge(path, SPEC)
    assert contents(path) == before


def test_a_store_of_an_unknown_kind_is_refused_before_anything_changes(whole, tmp_path):
    path = copied(whole.path.url, tmp_path)
    root = path / "few.zarr" / "zarr.json"
    text = root.read_text()
    root.write_text(
        text.replace("datamodel-matching.prediction", "datamodel-matching.other").replace(
            '"kind": "prediction"', '"kind": "other"'
        )
    )
    before = contents(path)
    with pytest.raises(ValueError, match=r"few\.zarr is a store of kind 'other', which purge does"):
        purge(path, SPEC)
    assert contents(path) == before


# -- interruptions ---------------------------------------------------------------------------------


def test_killed_again_and_again_it_finishes_with_the_same_bytes(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda size: "5a" * size)
    one, other = (copied(whole.path.url, tmp_path / n) for n in made(tmp_path, "a", "b"))
    purge(one, SPEC)
    random, kills = np.random.default_rng(0), 0
    for changes in random.integers(1, 100, 99):
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
def half(whole, tmp_path_factory):
    """A run whose purge was killed half-way."""
    path = copied(whole.path.url, tmp_path_factory.mktemp("half"))
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 200)
        with pytest.raises(Killed):
            purge(path, SPEC)
    return path


@pytest.fixture
def killed(half, tmp_path):
    return copied(half, tmp_path)


def test_the_journal_holds_no_id(killed):
    content = (killed / "purge.json").read_text()
    assert "person" not in content
    assert read_journal(killed).positions == GONE
    assert len(read_journal(killed).own) == 4


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
def test_a_store_that_came_meanwhile_and_names_the_rows_is_refused(whole, killed, spec, targets):
    forget = parse_forget(whole.task, spec)
    predicted = whole.datamodel.predict(whole.model(0), forget, targets)
    write_prediction(predicted, str(killed / "late.zarr"), forget)
    with pytest.raises(RuntimeError, match=rf"late\.zarr in {killed} came while rows were purged"):
        purge(killed)
    assert not (killed / "tombstones.json").exists()
    shutil.rmtree(killed / "late.zarr")
    assert purge(killed).finished


def test_rows_purged_before_may_be_named_again_by_the_call_that_finishes(whole, tmp_path):
    path = copied(whole.path.url, tmp_path)
    purge(path, "person-003,person-008")
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 100)
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


def test_of_two_purges_at_once_the_second_to_plan_waits(whole, tmp_path, monkeypatch):
    path = copied(whole.path.url, tmp_path)

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
        precompute(f"{tmp_path}/small.py:task", killed, **SIZES)
    assert (killed / name).exists()


@pytest.mark.parametrize("killed_too", [False, True])
def test_a_plan_made_before_another_purge_ended_is_refused(
    whole, tmp_path, monkeypatch, killed_too
):
    path = copied(whole.path.url, tmp_path)

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
