"""A block of a run that is damaged after rows were purged: made again, or what must be done."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from attribution import Ensemble, fit_datamodels
from attribution.precompute import precompute
from stores import Store
from tests.attribution.purging.runs import SIZES, copied, opened
from unlearning.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:4 rows of task 'small' were purged")


@pytest.fixture
def run(done, tmp_path):
    return copied(done[0], tmp_path)


@pytest.fixture
def spec(run):
    return f"{run.parent}/small.py:task"


def damage(store, array):
    chunk = next(path for path in sorted((store / array / "c").rglob("*")) if path.is_file())
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)


def discarded(run, name, array, capsys):
    """Damages a block, and has it found and made pending."""
    damage(run / name, array)
    assert main(["status", "--run", str(run), "--verify"]) == 1
    assert f"damaged: {name} blocks [0]" in capsys.readouterr().err
    assert main(["status", "--run", str(run), "--discard"]) == 0
    assert Store.open(run / name).pending() == [0]
    capsys.readouterr()


def test_trak_scores_are_made_again_from_the_rows_that_were_solved(run, capsys):
    before = {n: Store.open(run / "trak-3/scores").numpy(n) for n in ("effects", "margins", "own")}
    discarded(run, "trak-3/scores", "effects", capsys)
    words = ["predict", "--run", str(run), "--forget", "person-001", "--predictor", "trak"]
    assert main(words) == 0
    after = Store.open(run / "trak-3/scores")
    assert after.verify() == []
    for name, values in before.items():
        np.testing.assert_allclose(after.numpy(name), values, rtol=1e-5, atol=1e-6)


def test_trak_scores_whose_solved_rows_are_gone_too_have_to_be_made_anew(run, capsys):
    discarded(run, "trak-3/rows-1", "rows", capsys)
    Store.open(run / "trak-3/scores").discard(0)
    words = ["predict", "--run", str(run), "--forget", "person-001", "--predictor", "trak"]
    assert main(words) == 2
    told = f"block 0 of {run}/trak-3/scores cannot be computed again, as rows were purged: remove"
    assert told in capsys.readouterr().err
    shutil.rmtree(run / "trak-3")
    assert main(words) == 0
    assert Store.open(run / "trak-3/scores").complete


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("datamodel-mixed-24", "effects"),
        ("residual-mixed-24", "effects"),
        ("calibration/newton-3/changes", "mean"),
        ("calibration/newton-3/choices-round-1", "errors"),
    ],
)
def test_what_was_fitted_together_is_refused_and_made_anew(run, spec, capsys, name, array):
    discarded(run, name, array, capsys)
    words = ["precompute", spec, "--run", str(run), "--full-models", "6", "--subset-models", "24"]
    words += ["--newton-checkpoints", "3", "--workers", "0"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert f"block 0 of {run / name} cannot be computed alone, as rows were purged" in err
    told = err.split(": remove ")[1].split(", and the same command")[0]
    for path in map(Path, told.split(", ")):
        assert path.is_relative_to(run)
        path.unlink() if path.is_file() else shutil.rmtree(path)
    precompute(spec, run, **SIZES)
    left = opened(run)
    assert all(store.complete for store in left.stores())
    assert left.predictors == ("datamodel", "newton", "combined", "residual", "linear", "trak")


def test_a_datamodel_of_a_purged_run_is_not_fitted_in_part(run, capsys):
    discarded(run, "datamodel-mixed-24", "effects", capsys)
    left, to = opened(run), run / "datamodel-mixed-24"
    models = Ensemble.open(run / "ensemble-mixed-24", left.task)
    told = "block 0 of .*datamodel-mixed-24 cannot be fitted alone, as rows were purged"
    with pytest.raises(ValueError, match=told):
        fit_datamodels(models, anchor=left.full, to=to, seed=left.settings.seed, workers=0)
