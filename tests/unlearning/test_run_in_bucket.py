"""A run in a bucket: killed, resumed, and asked by every verb, against a real server."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from attribution import ForgetSet
from attribution.newton import Calibration
from attribution.precompute import precompute
from attribution.purging.purge import purge
from attribution.run import Run
from attribution.run_calibration import RunCalibration
from stores import place
from tests import s3_server
from tests.interruptions import Killed, kill_after
from tests.small_runs import write_task
from unlearning.cli import main

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"full_models": 6, "subset_models": 12, "checkpoints": 1}
SIZES = ("--full-models", "6", "--subset-models", "12", "--newton-checkpoints", "1")
FEW = ("--forget", "few=rows:3:8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bucket")


@pytest.fixture(scope="module")
def address(s3_endpoint, folder):
    """Address of a run whose driver and worker were killed on the way."""
    with pytest.MonkeyPatch.context() as patch:
        s3_server.use(s3_endpoint, patch)
        address = f"{s3_server.make_bucket(s3_endpoint)}/runs/small"
        spec = write_task(folder)
        killed_when(address, spec, "ensemble-mixed-12")
        precompute(spec, address, workers=0, **MODELS)
        yield address


def killed_when(address, spec, folder):
    """Precompute with a worker until it computes blocks of a store, then kill driver and worker."""
    command = [sys.executable, "-m", "unlearning.cli", "precompute", spec, "--run", address]
    driver = psutil.Popen(
        [*command, *SIZES, "--workers", "1"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    while not (place(address) / folder).taken():
        assert driver.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    for process in [*driver.children(recursive=True), driver]:
        process.kill()
    driver.wait()
    stores = Run(place(address), settings=None, task=None).stores()
    assert stores
    assert [store.verify() for store in stores] == [[]] * len(stores)
    assert not (place(address) / "features/checkpoint-0").taken(), "it was killed too late"


@pytest.fixture(scope="module")
def here(address, folder):
    """The same run on disk, never interrupted."""
    return precompute(f"{folder}/small.py:task", folder / "run", workers=0, **MODELS)


def test_a_resumed_run_has_the_bits_of_one_on_disk(address, here):
    there = Run.open(address)
    assert str(there.path) == address
    names = [store.path.removeprefix(f"{here.path}/") for store in here.stores()]
    assert [store.path.removeprefix(f"{address}/") for store in there.stores()] == names
    for one, two in zip(here.stores(), there.stores(), strict=True):
        assert two.complete
        for name in one.spec.arrays:
            np.testing.assert_array_equal(one.numpy(name), two.numpy(name), err_msg=one.path)


@pytest.mark.parametrize("name", ["datamodel", "newton", "trak"])
def test_predictions_are_those_of_a_run_on_disk(address, here, name):
    there = Run.open(address)
    forget = ForgetSet.of(here.task, ["train-3", "train-30"])
    one, two = (run.predictor(name).predict(run.model(), forget, None) for run in (here, there))
    for values in ("before", "mean", "std", "noise"):
        np.testing.assert_array_equal(getattr(one, values), getattr(two, values))


def say(capsys, *words):
    code = main([str(word) for word in words])
    told = capsys.readouterr()
    assert (code, told.err) == (0, "")
    return told.out


def test_every_verb_takes_an_address(address, folder, capsys):
    run = ("--run", address, "--workers", "0")
    assert f"dmm predict --run {address}" in say(
        capsys, "precompute", f"{folder}/small.py:task", *run, *SIZES
    )
    say(capsys, "predict", *run, *FEW, "--out", f"{address}/few.csv")
    say(capsys, "predict", *run, *FEW, "--predictor", "trak", "--out", folder / "few.csv")
    assert place(address).read("few.csv").startswith(b"target,output,before,mean")
    say(capsys, "explain", *run, "--target", "test-0", "--out", f"{address}/why.html")
    out = folder / "model.safetensors"
    assert "5 rows forgotten by dmm" in say(
        capsys, "unlearn", *run, *FEW, "--method", "dmm", "--out", out
    )
    say(capsys, "predict", *run, "--forget", "rows:9", "--checkpoint", out)
    said = say(capsys, "evaluate", *run, *FEW, "--methods", "dmm,do_nothing", "--n-models", "5")
    assert f"written to {address}/evaluation.json" in said
    assert f"{address}/report.html" in say(capsys, "report", *run)
    names = place(address).names()
    assert {"run.json", "evaluation.json", "report.html", "few.csv", "why.html"} <= set(names)
    rows = json.loads(say(capsys, "status", *run, "--verify", "--json"))["stores"]
    assert {"full", "moments", "features/checkpoint-0"} <= {row["store"] for row in rows}
    assert all(row["pending"] == 0 and row["bad"] == [] for row in rows)


def test_a_damaged_block_is_named_discarded_and_made_again(address, folder, capsys):
    where = place(address)
    file = next(name for name in where.walk() if name.startswith("full/outputs/c/"))
    where.write(file, b"\0" * where.size(file))
    assert main(["status", "--run", address, "--verify"]) == 1
    said = capsys.readouterr().err
    assert "damaged: full blocks [0]" in said
    assert f"dmm status --run {address} --discard" in said
    say(capsys, "status", "--run", address, "--discard")
    run = precompute(f"{folder}/small.py:task", address, workers=0, **MODELS)
    assert run.full.store.verify() == []


@pytest.mark.parametrize("verb", ["predict", "status", "report", "evaluate", "precompute"])
def test_a_bucket_out_of_reach_is_bad_input(address, folder, capsys, monkeypatch, verb):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    words = {
        "predict": FEW,
        "evaluate": (*FEW, "--methods", "dmm"),
        "precompute": (f"{folder}/small.py:task",),
    }
    assert main([verb, "--run", address, *words.get(verb, ())]) == 2
    assert "start the service, or correct AWS_ENDPOINT_URL" in capsys.readouterr().err


def test_models_are_written_to_files(address, capsys):
    words = (*FEW, "--method", "dmm", "--out", f"{address}/model.safetensors")
    assert main(["unlearn", "--run", address, *words]) == 2
    assert "models are written to files" in capsys.readouterr().err


def test_a_calibration_lies_in_a_bucket(bucket):
    factors = {"forget": 1.1, "retain": 0.8, "test": 0.9}
    newton = Calibration(0.72, 1.4, factors, factors, factors, forget_sets=20)
    found = RunCalibration(newton, {}, {"newton": 0.2})
    found.save(f"{bucket}/run/calibration.json")
    assert RunCalibration.load(place(bucket) / "run/calibration.json") == found


@pytest.mark.filterwarnings("ignore:2 rows of task 'small' were purged")
def test_a_purge_in_a_bucket_is_killed_and_finished(address, here):
    # Last in this file: the run is another one afterwards.
    on_disk = purge(here.path, "rows:3:5")
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 25, kind=type(place(address)))
        with pytest.raises(Killed):
            purge(address, "rows:3:5")
    with pytest.raises(ValueError, match="was interrupted: finish it with dmm purge --run s3://"):
        Run.open(address)
    told = purge(address)
    assert (told.finished, told.rewritten) == (True, on_disk.rewritten)
    one, two = Run.open(here.path), Run.open(address)
    assert one.task.train_ids == two.task.train_ids
    for mine, theirs in zip(one.stores(), two.stores(), strict=True):
        assert theirs.verify() == []
        for name in mine.spec.arrays:
            np.testing.assert_array_equal(mine.numpy(name), theirs.numpy(name))
