import copy
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from attribution import ForgetSet, Oracle, fit_datamodels, train_models
from attribution.agreement import Comparison, pooled_agreement
from attribution.moments import compute_moments
from attribution.outputs import target_margins
from attribution.run import Run, RunSettings
from attribution.subsets import draw_subsets
from stores import place
from tests.small_runs import FULL_MODELS, TRAIN_ROWS, finished_run
from tests.tasks import ridge_task
from tests.unlearning.audits import by_split, klom_summary, places
from unlearning import (
    Matching,
    evaluate_methods,
    gaussian_kl,
    klom,
    shift,
    spread,
    unlearn_models,
)
from unlearning.cost import hardware
from unlearning.evaluation import plain
from unlearning.methods import METHODS as ALL_METHODS
from unlearning.report import render_report
from unlearning.tables import evaluation_table

METHODS = ["do_nothing", "dmm", "om"]
FEW_MODELS = 5


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return Run.open(finished_run(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="session")
def forget(run):
    return ForgetSet.at(run.task, [3, 8, 13, 21, 30], name="few")


@pytest.fixture(scope="session")
def told(run, forget):
    """An audit with models enough for KLOM; a forget set of fewer than 20 rows."""
    options = {"n_models": FULL_MODELS, "workers": 0, "predictor": "datamodel"}
    return evaluate_methods(run, [forget], METHODS, **options)


@pytest.fixture(scope="session")
def told_of_few(run, forget):
    """An audit with too few models for KLOM."""
    return evaluate_methods(run, [forget], METHODS, n_models=FEW_MODELS, workers=0)


def test_a_method_that_fails_has_an_error_and_the_others_their_numbers(run, forget, told_of_few):
    told = evaluate_methods(
        run,
        [forget],
        ["do_nothing", "fine_tune"],
        n_models=FEW_MODELS,
        workers=0,
        settings={"fine_tune": {"rate": "1e30"}},
    )
    methods, before = told["forget_sets"]["few"]["methods"], told_of_few["forget_sets"]["few"]
    timed = {"seconds", "cost_over_retrain"}
    for key in set(methods["do_nothing"]) - timed:
        assert methods["do_nothing"][key] == before["methods"]["do_nothing"][key], key
    failed = methods["fine_tune"]
    assert "unlearning diverged" in failed["error"]
    assert failed["status"] == {"failed": FEW_MODELS}
    assert set(failed) == set(methods["do_nothing"]) | {"error"}
    for key in ("klom", "gaussian_kl", "shift", "spread", "accuracy", "attacks"):
        assert leaves(failed[key]) == {None}
    assert failed["cost_over_retrain"] is None
    assert "\nfine_tune failed: unlearning diverged" in evaluation_table(told)
    assert "unlearning diverged" in render_report(told, title="Few")


def test_where_all_methods_fail_the_first_error_is_raised(run, forget):
    options = {"n_models": FEW_MODELS, "workers": 0, "settings": {"fine_tune": {"rate": "1e30"}}}
    with pytest.raises(ValueError, match="unlearning diverged: non-finite weights in"):
        evaluate_methods(run, [forget], ["fine_tune"], **options)


def leaves(told):
    """All values of nested mappings."""
    found = set()
    for part in told.values():
        found |= leaves(part) if isinstance(part, dict) else {part}
    return found


@pytest.fixture(scope="session")
def banks(run, forget):
    return [run.bank(forget, which, FULL_MODELS, workers=0) for which in (0, 1)]


def test_every_promised_key_is_there(told):
    assert told["schema"] == 1
    assert (told["n_models"], told["seed"]) == (FULL_MODELS, 0)
    assert {"python", "torch", "numpy"} <= set(told["versions"])
    assert told["hardware"] == hardware()
    assert told["klom"] == {"direction": "KL(unlearned||oracle)", "bins": 20}
    assert told["retrain"]["gradient_evaluations"] == 2 * TRAIN_ROWS
    block = told["forget_sets"]["few"]
    assert (block["size"], block["kind"]) == (5, "rows")
    assert block["retrain"]["gradient_evaluations"] == 2 * (TRAIN_ROWS - 5)
    assert block["retrain"]["repeats"] == block["methods"]["dmm"]["repeats"] == 5
    splits = {"forget", "retain", "test"}
    for found in [block["null"], *block["methods"].values()]:
        for measure in ("klom", "gaussian_kl", "shift", "spread", "klom_corrected"):
            assert set(found[measure]) == splits
        assert set(found["attacks"]) == {"ulira", "loss", "rmia", "epsilon"}
        assert {"tow", "logit_distance", "harmed"} <= set(found)
        assert "relearning" not in found
    assert set(block["methods"]) == set(METHODS)
    for found in block["methods"].values():
        assert set(found["accuracy"]) == splits
        assert found["seconds"] > 0
        ratio = found["seconds"] / block["retrain"]["seconds"]
        assert found["cost_over_retrain"] == pytest.approx(ratio)
    assert block["methods"]["do_nothing"]["gradient_evaluations"] == 0
    assert block["methods"]["dmm"]["gradient_evaluations"] > 0
    for kind in ("margins", "logits"):
        for split in splits:
            found = block["predictions"]["datamodel"][kind][split]
            by_level = {"coverage", "width", "interval_score", "constant_width"}
            numbers = {"slope", "r2", "corr", "ceiling", "retrained_models", "most_models"}
            assert set(found) == numbers | by_level
            assert all(set(found[name]) == {"80", "95"} for name in by_level)


def test_the_table_says_what_was_timed_fewer_times(told):
    assert "timed fewer" not in evaluation_table(told)
    few = copy.deepcopy(told)
    block = few["forget_sets"]["few"]
    block["methods"]["dmm"]["repeats"], block["retrain"]["repeats"] = 2, 1
    line = "timed fewer than 5 times, as it takes long: retraining 1, dmm 2"
    assert line in evaluation_table(few).splitlines()


def test_it_survives_json_without_a_number_that_is_none(told, told_of_few):
    for found in (told, told_of_few):
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_measures_are_those_of_klom_called_directly(told, run, forget, banks):
    full, audit = run.full.margins, banks[0].margins
    found = told["forget_sets"]["few"]["methods"]["do_nothing"]
    assert found["klom"] == klom_summary(klom(full, audit), forget)
    assert found["gaussian_kl"] == klom_summary(gaussian_kl(full, audit), forget)
    assert found["shift"] == by_split(shift(full, audit), forget)
    assert found["spread"] == by_split(spread(full, audit), forget)


def test_the_null_compares_two_disjoint_banks(told, run, forget, banks):
    audit, targets = banks
    null = told["forget_sets"]["few"]["null"]
    assert null["klom"] == klom_summary(klom(targets.margins, audit.margins), forget)
    assert null["spread"] == by_split(spread(targets.margins, audit.margins), forget)
    assert audit.seed != targets.seed
    assert not any(np.array_equal(a, b) for a in audit.outputs for b in targets.outputs)
    for bank in banks:
        assert not bank.masks[:, forget.rows].any()
        assert bank.masks[:, forget.retained].all()
        assert not any(np.array_equal(a, b) for a in bank.outputs for b in run.full.outputs)


def test_oracle_matching_takes_its_targets_from_the_bank_that_does_not_judge(
    told, run, forget, banks
):
    audit, targets = banks
    found = told["forget_sets"]["few"]["methods"]["om"]["klom"]["forget"]["mean"]

    def score(bank):
        method = Matching(Oracle(run.full, bank))
        unlearned = unlearn_models(method, run.full, run.task, forget)
        return klom(unlearned.margins, audit.margins)[forget.rows].mean()

    assert found == pytest.approx(score(targets))
    assert found != pytest.approx(score(audit))


def test_accuracy_counts_the_right_answers(told, run, forget, banks):
    _, labels = run.task.targets()
    block = told["forget_sets"]["few"]
    untouched = block["methods"]["do_nothing"]["accuracy"]
    for found, models in ((block["oracle_accuracy"], banks[0]), (untouched, run.full)):
        right = (models.outputs.argmax(-1) == labels.numpy()).mean(0)
        assert found == by_split(right, forget)


def test_predictions_are_compared_with_measured_changes(told, run, forget, banks):
    full, audit = run.full.outputs, banks[0].outputs
    change = run.datamodel.change(forget)
    error = np.sqrt(full.var(0, ddof=1) / FULL_MODELS + audit.var(0, ddof=1) / FULL_MODELS)
    found = told["forget_sets"]["few"]["predictions"]["datamodel"]
    measured = audit.mean(0) - full.mean(0)
    for split, rows in places(forget).items():
        arrays = (change.mean, measured, change.std, error, audit.std(0, ddof=1))
        expected = asdict(pooled_agreement([Comparison(*(values[rows] for values in arrays))]))
        assert set(found["logits"][split]) == set(expected)
        for name, value in expected.items():
            assert found["logits"][split][name] == pytest.approx(value, rel=1e-5), name
    before = run.full.margins
    after = target_margins(run.task, full + change.mean)
    moved, measured = after.mean(0) - before.mean(0), banks[0].margins.mean(0) - before.mean(0)
    rows = forget.retained
    slope = moved[rows] @ measured[rows] / (moved[rows] @ moved[rows])
    assert found["margins"]["retain"]["slope"] == pytest.approx(slope, rel=1e-4)
    error = before.var(0, ddof=1) / FULL_MODELS + banks[0].margins.var(0, ddof=1) / FULL_MODELS
    off = np.square(moved[rows] - measured[rows]).sum() - error[rows].sum()
    number = banks[0].margins.var(0, ddof=1)[rows].sum() / max(off, error[rows].sum())
    assert found["margins"]["retain"]["retrained_models"] == pytest.approx(number, rel=1e-3)


def test_below_80_models_klom_is_null_and_the_rest_is_there(told_of_few, run, forget):
    block = told_of_few["forget_sets"]["few"]
    full = run.full.margins[:FEW_MODELS]
    audit = run.bank(forget, 0, FEW_MODELS, workers=0).margins
    for found in [block["null"], *block["methods"].values()]:
        assert set(found["klom"]) == {"forget", "retain", "test"}
        assert all(pair == {"mean": None, "p95": None} for pair in found["klom"].values())
        assert found["gaussian_kl"]["forget"]["mean"] > 0
        assert found["gaussian_kl"]["retain"]["p95"] > 0
        assert found["gaussian_kl"]["test"]["p95"] is None
    found = block["methods"]["do_nothing"]
    assert found["gaussian_kl"] == klom_summary(gaussian_kl(full, audit), forget)
    assert found["shift"] == by_split(shift(full, audit), forget)


def test_p95_needs_20_rows(run):
    sets = [ForgetSet.at(run.task, range(count), name=str(count)) for count in (19, 20)]
    told = evaluate_methods(run, sets, ["do_nothing"], n_models=2, workers=0)
    for name, size in (("19", 18), ("20", 17)):
        found = told["forget_sets"][name]["methods"]["do_nothing"]["gaussian_kl"]
        assert (found["forget"]["p95"] is None) == (name == "19")
        assert (found["retain"]["p95"] is None) == (size < 20)


def test_rows_for_the_plots(told, run, forget, banks):
    block = told["forget_sets"]["few"]
    rows = block["rows"]["datamodel"]
    ids, after = list(run.task.target_ids), banks[0].margins.mean(0)
    assert sorted(rows["id"]) == sorted(ids)
    for i, split, before, measured in zip(
        rows["id"], rows["split"], rows["before"], rows["retrained"], strict=True
    ):
        place = ids.index(i)
        assert place in places(forget)[split]
        assert before == pytest.approx(run.full.margins[:, place].mean(), abs=1e-4)
        assert measured == pytest.approx(after[place], abs=1e-4)
    moved = np.abs(after - run.full.margins.mean(0))
    assert [row["id"] for row in block["affected"]] == [ids[i] for i in np.argsort(-moved)[:12]]
    unlearned = unlearn_models(Matching(run.datamodel), run.full, run.task, forget).margins.mean(0)
    for row in block["affected"]:
        assert row["unlearned"] == pytest.approx(unlearned[ids.index(row["id"])], abs=1e-4)


def test_settings_of_single_methods_can_be_changed(run, forget):
    settings = {"gradient_ascent": {"epochs": "3", "rate": "0.01"}}
    names = ["gradient_ascent", "fine_tune"]
    told = evaluate_methods(run, [forget], names, n_models=2, workers=0, settings=settings)
    found = told["forget_sets"]["few"]["methods"]
    assert found["gradient_ascent"]["gradient_evaluations"] == 15
    changed = {"epochs": 3, "rate": 0.01, "batch_size": 64, "batchnorm": "frozen"}
    assert found["gradient_ascent"]["settings"] == changed
    assert found["fine_tune"]["settings"]["rate"] == 0.1


def test_settings_and_names_of_ensembles_hold_no_row_and_no_address(run, forget):
    told = evaluate_methods(run, [forget], list(ALL_METHODS), n_models=2, workers=0)
    found = told["forget_sets"]["few"]["methods"]
    assert list(found) == list(ALL_METHODS)
    texts = [json.dumps(method["settings"]) for method in found.values()]
    assert "0x" not in "".join(texts)
    banks = [run.bank(forget, which, 2, workers=0) for which in (0, 1)]
    texts += [repr(ensemble) for ensemble in (run.full, *banks)]
    texts += [repr(Oracle(run.full, banks[1])), repr(run.datamodel), repr(run.moments)]
    assert not [row for row in run.task.target_ids if row in "".join(texts)]


@pytest.mark.parametrize("methods", [["do_nothing", "om", "dmm_pgu"], ["om", "dmm"]])
def test_only_dmm_fills_in_what_the_unlearned_models_say(run, forget, methods):
    options = {"n_models": 2, "workers": 0, "predictor": "datamodel"}
    told = evaluate_methods(run, [forget], methods, **options)
    rows = told["forget_sets"]["few"]["affected"]
    assert len(rows) == 12
    assert {"unlearned" in row for row in rows} == {"dmm" in methods}
    if "dmm" in methods:
        method = Matching(run.datamodel)
        means = unlearn_models(method, run.full, run.task, forget, count=2).margins.mean(0)
        places = [run.task.positions[row["id"]] for row in rows]
        assert [row["unlearned"] for row in rows] == pytest.approx(means[places], abs=1e-4)


def test_the_seed_of_unlearning_decides_nothing_about_the_banks(run, forget):
    stores = {store.path for store in run.stores()}
    first, second = (
        evaluate_methods(run, [forget], ["do_nothing", "dmm"], n_models=2, workers=0, seed=seed)
        for seed in (0, 1)
    )
    blocks = [told["forget_sets"]["few"] for told in (first, second)]
    assert (first["seed"], second["seed"]) == (0, 1)
    assert blocks[0]["null"] == blocks[1]["null"]
    assert blocks[0]["methods"]["dmm"]["shift"] != blocks[1]["methods"]["dmm"]["shift"]
    assert len({store.path for store in run.stores()} - stores) in (0, 2)


@pytest.mark.parametrize("count", [-1, 0, 1, FULL_MODELS + 1])
def test_a_number_of_models_that_the_run_does_not_have_is_refused(run, forget, count):
    text = f"the run has 80 full models: n_models must lie between 2 and that, got {count}"
    with pytest.raises(ValueError, match=f"^{text}$"):
        evaluate_methods(run, [forget], ["dmm"], n_models=count)


def test_unknown_methods_and_repeated_names_are_refused(run, forget):
    with pytest.raises(ValueError, match=r"^unknown method 'nix': choose from do_nothing, dmm, "):
        evaluate_methods(run, [forget], ["dmm", "nix"])
    with pytest.raises(ValueError, match=r"^method 'dmm' is named twice$"):
        evaluate_methods(run, [forget], ["dmm", "om", "dmm"], n_models=2)
    text = r"^two forget sets are called 'few': name them, as in a=SPEC b=SPEC$"
    with pytest.raises(ValueError, match=text):
        evaluate_methods(run, [forget, forget], ["dmm"], n_models=2)


def test_models_that_are_all_the_same_give_null_and_no_nan(tmp_path):
    """A training without chance: retrained models have no spread to divide by."""
    train = ridge_task().train

    def rounded(*given):
        return {name: tensor.round(decimals=3) for name, tensor in train(*given).items()}

    task = ridge_task(train=rounded)
    subsets = draw_subsets(task, models=2, design="full", seed=1)
    full = train_models(task, subsets, tmp_path / "full", keep="weights", workers=0)
    settings = RunSettings("by hand", 2, 20, "half", 0)
    subsets = draw_subsets(task, models=20, design="half")
    ensemble = train_models(task, subsets, tmp_path / "ensemble", workers=0)
    fit_datamodels(ensemble, anchor=full, to=tmp_path / f"datamodel-{settings.subsets}")
    compute_moments(full, tmp_path / "moments")
    run = Run(place(tmp_path), settings, task)
    forget = ForgetSet.at(task, [1, 2, 3])
    told = evaluate_methods(run, [forget], ["do_nothing"], n_models=2, workers=0)
    json.dumps(told, allow_nan=False)
    found = told["forget_sets"]["forget"]["methods"]["do_nothing"]
    assert found["shift"]["forget"] is None
    assert found["gaussian_kl"]["forget"] == {"mean": None, "p95": None}
    assert found["tow"] is None  # the quality of a regression is no accuracy
    assert told["retrain"]["gradient_evaluations"] is None
    assert "do_nothing" in evaluation_table(told)


def test_plain_values():
    value = {
        1: np.float32(0.5), "a": math.nan, "b": [np.float64("inf"), -math.inf, 2.0],
        "c": (np.int64(3), True, None, "text"), "d": {"e": np.bool_(False)},
    }  # fmt: skip
    expected = {
        "1": 0.5, "a": None, "b": [None, None, 2.0], "c": [3, True, None, "text"],
        "d": {"e": False},
    }  # fmt: skip
    assert plain(value) == expected
    assert json.dumps(plain(value), allow_nan=False)


def test_the_full_models_are_left_as_they_were(told, run):
    assert told["n_models"] == len(run.full)
    assert all(store.verify() == [] for store in run.stores())
    assert all(torch.isfinite(tensor).all() for tensor in run.full.states().values())
