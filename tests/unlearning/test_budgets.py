"""Quality against cost: what is matched at each budget, and what the page shows of it."""

import pytest

from attribution import ForgetSet, Run
from tests.small_runs import finished_run
from tests.tasks import blobs
from tests.unlearning.evaluations import METHODS, made_evaluation, page_of
from unlearning import Matching
from unlearning.budgets import SHARES, budgeted
from unlearning.evaluation import evaluate_methods


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run.open(finished_run(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def forget(run):
    return ForgetSet.at(run.task, [3, 8, 13, 21, 30], name="few")


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_a_budget_is_a_share_of_the_gradients_of_a_retraining(run, forget, share):
    method = budgeted(Matching(run.datamodel, batch_size=1), run.task, share)
    result = method(run.full.model(0), run.task, forget)
    whole = run.task.recipe.epochs * len(run.task.train_ids)
    assert result.gradient_evaluations == max(1, int(share * whole))


def test_a_task_with_training_of_its_own_is_refused(run):
    task = blobs(recipe=None, train=lambda *_: None)
    with pytest.raises(ValueError, match=r"trains by a function of its own.*leave --budgets out"):
        budgeted(Matching(run.datamodel), task, 0.1)


def test_methods_of_matching_are_audited_at_every_budget(run, forget):
    names = ["do_nothing", "dmm_datamodel", "dmm_pgu"]
    told = evaluate_methods(run, [forget], names, n_models=4, workers=0, budgets=True)
    block = told["forget_sets"]["few"]
    assert set(block["budgets"]) == {"dmm_datamodel", "dmm_pgu"}
    for points in block["budgets"].values():
        assert all(point["cost_over_retrain"] > 0 for point in points)
        assert [point["share"] for point in points] == list(SHARES)
        assert all(point["gaussian_kl"]["forget"]["mean"] >= 0 for point in points)
        assert all(point["klom"]["forget"]["mean"] is None for point in points)


def test_a_method_that_fails_at_a_budget_leaves_the_others_their_numbers(run, forget):
    names, settings = ["do_nothing", "dmm_datamodel", "dmm"], {"dmm": {"rate": "1e30"}}
    more = {"settings": settings, "predictor": "datamodel", "budgets": True}
    told = evaluate_methods(run, [forget], names, n_models=4, workers=0, **more)
    found = told["forget_sets"]["few"]["budgets"]
    assert all("unlearning diverged" in point["error"] for point in found["dmm"])
    assert all(point["gaussian_kl"]["forget"]["mean"] >= 0 for point in found["dmm_datamodel"])


def with_budgets(evaluation):
    for block in evaluation["forget_sets"].values():
        block["budgets"] = {
            "dmm": [
                {"share": share, "klom": {"forget": {"mean": 1 / (1 + 10 * share)}}}
                for share in SHARES
            ]
        }
    return evaluation


def test_the_page_shows_a_curve_of_each_forget_set():
    page = page_of(with_budgets(made_evaluation(["rand10", "rand50"])))
    assert "What a smaller or larger budget gives" in page
    for name in ("rand10", "rand50"):
        assert f"KLOM of the forgotten rows of {name} by budget" in page


def test_a_page_without_budgets_has_no_such_section():
    assert "dmm" in METHODS
    assert "What a smaller or larger budget gives" not in page_of(made_evaluation(["rand10"]))
