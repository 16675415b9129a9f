import shutil

import numpy as np
import pytest

from attribution import purge
from attribution.lds import lds_bank, linear_datamodeling_score
from attribution.run import Run
from tests.small_runs import TEST_ROWS, TRAIN_ROWS, finished_run
from tests.unlearning.evaluations import made_evaluation
from unlearning import evaluate_methods
from unlearning.explanation import run_scores
from unlearning.rankings import rank_subsets
from unlearning.report import render_report
from unlearning.tables import evaluation_table

MODELS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = finished_run(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("rankings") / "run"
    return Run.open(shutil.copytree(made, folder))


@pytest.fixture(scope="module")
def ranked(run):
    return rank_subsets(run, MODELS, workers=0)


def test_scores_are_those_of_the_margins_effects(run, ranked):
    bank = lds_bank(run.task, run.path / f"subsets-{MODELS}", models=MODELS, workers=0)
    targets = np.arange(TRAIN_ROWS, TRAIN_ROWS + TEST_ROWS)
    assert sorted(ranked.scores) == ["datamodel", "trak"]
    for name, found in ranked.scores.items():
        effects = np.array([run_scores(run, name).of(target) for target in targets]).T
        expected = linear_datamodeling_score(effects, bank, targets=targets)
        np.testing.assert_allclose(found.values, expected.values)
        assert ranked.told()["predictors"][name] == {
            "mean": expected.mean,
            "low": expected.interval[0],
            "high": expected.interval[1],
        }


def test_the_evaluation_the_table_and_the_report_tell_them(run, ranked):
    told = evaluate_methods(run, [], [], n_models=5, lds_models=MODELS, workers=0)
    assert told["lds"] == ranked.told()
    assert told["lds"]["models"] == MODELS
    assert told["lds"]["targets"] == TEST_ROWS
    text = evaluation_table(told)
    assert f"LDS, {MODELS} models, {TEST_ROWS} test rows" in text
    page = render_report(made_evaluation(["rand50"]) | {"lds": told["lds"]}, title="x")
    assert "linear datamodeling score" in page
    assert "linear datamodeling score" not in render_report(made_evaluation(["rand50"]), title="x")


@pytest.mark.parametrize("models", [2, 7, -2])
def test_numbers_of_models_that_give_no_score_are_refused(run, models):
    with pytest.raises(ValueError, match=f"an even number of models from 4 on .* got {models}"):
        rank_subsets(run, models, workers=0)


def test_a_run_without_effects_of_single_rows_is_refused(tmp_path, run):
    copy = Run.open(shutil.copytree(str(run.path), tmp_path / "run"))
    for name in ("datamodel-mixed-24", "features", "calibration.json"):
        path = tmp_path / "run" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(ValueError, match="has no effects of single rows"):
        rank_subsets(copy, MODELS, workers=0)


@pytest.mark.filterwarnings("ignore:2 rows of task 'small' were purged")
def test_a_bank_from_which_rows_were_purged_is_used_as_it_is(run, ranked, tmp_path):
    copy = shutil.copytree(str(run.path), tmp_path / "run")
    purge(copy, "rows:3:5")
    again = rank_subsets(Run.open(copy), MODELS, workers=0)
    assert again.scores["datamodel"].values.shape == (TEST_ROWS,)
    assert np.isfinite(again.scores["datamodel"].mean)
