"""What an evaluation tells beside KLOM, against the measures called directly."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from attribution import ForgetSet
from attribution.run import Run
from tests.small_runs import FULL_MODELS, TRAIN_ROWS, finished_run
from tests.unlearning.audits import by_split, klom_summary, places
from unlearning import (
    corrected_mean,
    evaluate_methods,
    forgetting_epsilon,
    logit_distance,
    loss_attack,
    relearning_steps,
    rmia,
    shift,
    ulira,
)
from unlearning.evaluation import plain


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run.open(finished_run(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def forget(run):
    return ForgetSet.at(run.task, [3, 8, 13, 21, 30], name="few")


@pytest.fixture(scope="module")
def banks(run, forget):
    return [run.bank(forget, which, FULL_MODELS, workers=0) for which in (0, 1)]


@pytest.fixture(scope="module")
def evaluated(run, forget):
    return evaluate_methods(run, [forget], ["do_nothing"], n_models=FULL_MODELS, workers=0)


def losses_of(run, models):
    _, labels = run.task.targets()
    outputs = torch.from_numpy(models.outputs)
    return run.task.loss.value(outputs, labels.expand(len(outputs), -1)).numpy()


def test_the_attacks_are_those_called_directly_on_all_forgotten_rows(evaluated, run, forget, banks):
    audit, targets = banks
    block = evaluated["forget_sets"]["few"]
    rows, others = forget.rows, places(forget)["test"]
    for models, found in ((run.full, block["methods"]["do_nothing"]), (targets, block["null"])):
        attacks = found["attacks"]
        rates = ulira(models.margins, audit.margins)
        assert attacks["ulira"]["accuracy"] == klom_summary(rates.accuracy, forget)
        assert attacks["ulira"]["auc"] == klom_summary(rates.auc, forget)
        losses, references = losses_of(run, models), losses_of(run, audit)
        pair = losses[:, rows], losses[:, others]
        for name, attack in (
            ("loss", loss_attack(*pair)),
            ("rmia", rmia(*pair, references[:, rows], references[:, others])),
        ):
            expected = {"auc": attack.auc.mean(), "rate": attack.rate.mean()}
            assert attacks[name] == pytest.approx(expected)
        shown = forgetting_epsilon(models.margins[:, rows], audit.margins[:, rows])
        assert len(shown.epsilon) == len(forget)
        assert attacks["epsilon"]["quality"] == pytest.approx(shown.quality)
        assert attacks["epsilon"]["largest"] == pytest.approx(shown.largest)
        corrected = corrected_mean(models.margins[:, rows], audit.margins[:, rows])
        assert found["klom_corrected"]["forget"] == pytest.approx(asdict(corrected))
        apart = logit_distance(models.outputs, audit.outputs)
        assert found["logit_distance"] == by_split(apart, forget)


def test_the_tug_of_war_is_that_of_the_mean_accuracies(evaluated):
    block = evaluated["forget_sets"]["few"]
    for found in block["methods"].values():
        gaps = [
            1 - abs(found["accuracy"][split] - block["oracle_accuracy"][split])
            for split in ("forget", "retain", "test")
        ]
        assert found["tow"] == pytest.approx(np.prod(gaps))
    assert 0.9 < block["null"]["tow"] <= 1


def test_the_harmed_rows_are_retain_rows(evaluated, run, forget, banks):
    ids = list(run.task.train_ids)
    apart = shift(run.full.margins, banks[0].margins)
    rows = sorted(places(forget)["retain"], key=lambda row: -apart[row])[:10]
    found = evaluated["forget_sets"]["few"]["methods"]["do_nothing"]["harmed"]
    assert [row["id"] for row in found] == [ids[row] for row in rows]
    assert not {row["id"] for row in found} & set(forget.ids)


def test_a_forget_set_of_more_rows_than_models_is_audited_whole(run):
    """A published harness cuts the set at the number of models and trains on the rest."""
    large = ForgetSet.at(run.task, range(12), name="large")
    told = evaluate_methods(run, [large], ["do_nothing"], n_models=3, workers=0)
    block = told["forget_sets"]["large"]
    assert block["size"] == 12
    oracles = run.bank(large, 0, 3, workers=0)
    assert oracles.masks.sum() == 3 * (TRAIN_ROWS - 12)
    expected = shift(run.full.margins[:3], oracles.margins)[:12].mean()
    found = block["methods"]["do_nothing"]
    assert found["shift"]["forget"] == pytest.approx(expected)
    rates = ulira(run.full.margins[:3], oracles.margins).accuracy[:12]
    assert found["attacks"]["ulira"]["accuracy"]["forget"]["mean"] == pytest.approx(rates.mean())


def test_two_models_are_too_few_for_ulira_alone(run, forget):
    told = plain(evaluate_methods(run, [forget], ["do_nothing"], n_models=2, workers=0))
    attacks = told["forget_sets"]["few"]["methods"]["do_nothing"]["attacks"]
    assert attacks["ulira"]["accuracy"]["forget"] == {"mean": None, "p95": None}
    assert attacks["loss"]["auc"] > 0
    assert attacks["epsilon"]["largest"] == pytest.approx(0, abs=1e-4)


def test_relearning_is_counted_where_it_is_asked_for(run, forget):
    methods = ["do_nothing", "dmm"]
    told = evaluate_methods(run, [forget], methods, n_models=4, workers=0, relearning=True)
    block = told["forget_sets"]["few"]
    oracles = run.bank(forget, 0, 4, weights=True, workers=0)
    goal = float(losses_of(run, run.full)[:4, forget.rows].mean())
    steps = relearning_steps(run.task, oracles.states(), forget, goal)
    other = run.bank(forget, 1, 4, weights=True, workers=0)
    null = relearning_steps(run.task, other.states(), forget, goal)
    again = [(a < b) + (a == b) / 2 for a in null for b in steps]
    assert block["null"]["relearning"] == {
        "steps": np.median(null),
        "sooner": pytest.approx(np.mean(again)),
        "models": 4,
    }
    first = relearning_steps(run.task, run.full.states(range(4)), forget, goal)
    found = block["methods"]["do_nothing"]["relearning"]
    assert found["steps"] == np.median(first)
    pairs = [(a < b) + (a == b) / 2 for a in first for b in steps]
    assert found["sooner"] == pytest.approx(np.mean(pairs))
    assert {"steps", "sooner", "models"} == set(block["methods"]["dmm"]["relearning"])
