"""Tuning: what is tried, what is kept, and where it may be used."""

import json
import shutil

import numpy as np
import pytest

from attribution import ForgetSet, Run, parse_forget
from tests.small_runs import finished_run
from unlearning import FineTune, tuning
from unlearning.evaluation import evaluate_methods
from unlearning.klom import gaussian_kl
from unlearning.methods import METHODS, build_method
from unlearning.runner import margins
from unlearning.tuning import TUNED, drawn_settings, tune_methods, tuned_settings
from unlearning.tuning_spaces import SPACES, Among, Between

SETS = ["random:4:100", "random:6:101"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of its own, whose banks are trained once."""
    folder = tmp_path_factory.mktemp("tuning") / "run"
    shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), folder)
    return Run.open(folder)


@pytest.fixture
def run(trained, monkeypatch):
    """The run, not tuned yet, whose best predictor is the one that is tuned with."""
    if trained.path.exists(TUNED):
        trained.path.remove(TUNED)
    monkeypatch.setattr(Run, "best", "datamodel")
    return trained


def tuned(run, methods, **changes):
    options = {"specs": SETS, "trials": 3, "n_models": 4, "workers": 0, "predictor": "datamodel"}
    return tune_methods(run, methods, **(options | changes))


def test_every_method_has_a_space_of_settings_that_it_takes():
    assert set(SPACES) == set(METHODS)
    for name, space in SPACES.items():
        for setting in space.values():
            assert isinstance(setting, Between | Among)
        if name not in ("do_nothing",):
            assert space


@pytest.mark.parametrize("name", METHODS)
def test_what_is_drawn_is_taken(name, ground):
    for settings in drawn_settings(name, 60, 0):
        build_method(name, ground.evidence(), settings)


def test_numbers_keep_to_their_bounds_and_the_seed_reproduces():
    drawn = drawn_settings("pgu", 200, 3)
    assert drawn == drawn_settings("pgu", 200, 3)
    assert drawn[:5] == drawn_settings("pgu", 5, 3)
    assert drawn[1:] != drawn_settings("pgu", 200, 4)[1:]
    rates = np.array([float(settings["rate"]) for settings in drawn[1:]])
    assert rates.min() >= 0.03
    assert rates.max() <= 3
    assert np.median(np.log(rates)) == pytest.approx(np.log(0.03 * 3) / 2, abs=0.3)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_near_the_best_is_taken(name, ground):
    start, random = build_method(name, ground.evidence(), {}), np.random.default_rng(0)
    values = {field: tuning._told(start, field) for field in SPACES[name]}
    for _ in range(20):
        values = {field: s.near(values[field], random) for field, s in SPACES[name].items()}
        build_method(name, ground.evidence(), values)


def test_the_second_half_of_the_trials_stays_near_the_best():
    asked = []

    def score(settings):
        asked.append(settings)
        return abs(np.log(float(settings.get("rate", 0.001)) / 0.03))

    tried = tuning._tried("fine_tune", score, FineTune(), 200, 0, {})
    assert [trial["settings"] for trial in tried] == asked
    assert asked[:101] == drawn_settings("fine_tune", 200, 0)[:101]
    far, near = (
        np.log([float(s["rate"]) / 0.03 for s in part]) for part in (asked[1:101], asked[101:])
    )
    assert near.std() < 1 < far.std()
    assert tuning._best(tried)["score"] < 0.02


def test_what_is_held_is_in_every_trial_and_in_what_is_chosen(run, monkeypatch):
    asked = []

    def score(audit, method, *_):
        del audit
        asked.append((method.epochs, method.rate))
        return float(len(asked))

    monkeypatch.setattr(tuning, "_score", score)
    held = {"fine_tune": {"epochs": "4"}}
    told = tuned(run, ["fine_tune"], held=held, trials=5)["fine_tune"]
    assert told["held"] == {"epochs": "4"}
    assert [epochs for epochs, _ in asked] == [4] * 5 * len(SETS)
    assert len({rate for _, rate in asked}) == 5
    audited = [parse_forget(run.task, "random:5:0")]
    assert tuned_settings(run, ["fine_tune"], audited) == {"fine_tune": {"epochs": "4"}}
    count = len(asked)
    assert tuned(run, ["fine_tune"], held=held, trials=5)["fine_tune"] == told
    assert len(asked) == count
    tuned(run, ["fine_tune"], trials=5)
    assert len(asked) == count + 5 * len(SETS)


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ({"scrub": {"rate": "1"}}, "settings of 'scrub' are held, but it is not tuned: name"),
        ({"fine_tune": {"passes": "1"}}, "method 'fine_tune' has no setting 'passes'; it has"),
        ({"om": {"passes": "few"}}, "setting 'passes' of method 'dmm' takes float values, got"),
    ],
)
def test_what_cannot_be_held_is_refused_before_oracles_are_trained(run, monkeypatch, held, reason):
    monkeypatch.setattr(Run, "bank", None)
    with pytest.raises(ValueError, match=reason):
        tuned(run, ["fine_tune", "om"], held=held)


def test_a_method_of_which_all_is_held_has_one_trial():
    held = {"rate": "0.1", "epochs": "2"}
    assert drawn_settings("fine_tune", 5, 0, held) == [held]


def test_a_tuning_of_before_holding_is_not_done_again(run, monkeypatch):
    found = tuned(run, ["fine_tune"])
    told = json.loads(run.path.read(TUNED))
    del told["methods"]["fine_tune"]["held"]
    run.path.write(TUNED, json.dumps(told).encode())
    monkeypatch.setattr(tuning, "_score", None)
    assert tuned(run, ["fine_tune"])["fine_tune"]["score"] == found["fine_tune"]["score"]


def test_the_best_score_is_kept_and_told(run):
    found = tuned(run, ["do_nothing", "fine_tune"])
    assert found["do_nothing"]["settings"] == {}
    assert len(found["do_nothing"]["trials"]) == 1
    told = found["fine_tune"]
    scores = [trial["score"] for trial in told["trials"]]
    assert len(scores) == 3
    assert told["score"] == min(scores) <= told["default_score"] == scores[0]
    stored = json.loads(run.path.read(TUNED))
    assert stored == {"schema": 1, "methods": found}


def test_the_score_is_the_mean_distance_over_sets_and_splits(run):
    score = tuned(run, ["do_nothing"])["do_nothing"]["score"]
    parts = []
    for spec in SETS:
        forget = parse_forget(run.task, spec)
        oracles = run.bank(forget, 0, 4, workers=0)
        after = margins(run.full, run.task)[:4]
        values = gaussian_kl(after, margins(oracles, run.task))
        splits = forget.rows, forget.retained, np.arange(forget.total, values.size)
        parts += [values[rows].mean() for rows in splits]
    assert score == pytest.approx(np.mean(parts), rel=1e-5)


def test_settings_chosen_before_stay_when_another_method_is_tuned(run):
    first = tuned(run, ["fine_tune"])
    second = tuned(run, ["gradient_ascent"], trials=2)
    stored = json.loads(run.path.read(TUNED))["methods"]
    assert stored == first | second


def test_an_interrupted_tuning_goes_on_after_the_methods_that_are_done(run, monkeypatch):
    scored = []

    def score(audit, method, *_):
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.append(method)
        return float(len(scored))

    monkeypatch.setattr(tuning, "_score", score)
    names = ["do_nothing", "fine_tune"]
    with pytest.raises(KeyboardInterrupt):
        tuned(run, names)
    kept = json.loads(run.path.read(TUNED))["methods"]
    assert list(kept) == ["do_nothing"]
    scored.clear()
    monkeypatch.setattr(tuning, "_score", lambda *_: scored.append(1) or 2.0)
    found = tuned(run, names)
    assert found["do_nothing"] == kept["do_nothing"]
    assert len(scored) == 3 * len(SETS)
    assert tuned(run, names) == found
    assert len(scored) == 3 * len(SETS)
    tuned(run, ["fine_tune"], trials=2)
    assert len(scored) == 5 * len(SETS)


def test_an_audit_takes_them_on_other_sets_alone(run):
    found = tuned(run, ["fine_tune", "do_nothing"])
    audited = parse_forget(run.task, "random:5:0")
    settings = tuned_settings(run, ["do_nothing", "fine_tune"], [audited])
    assert settings == {"do_nothing": {}, "fine_tune": found["fine_tune"]["settings"]}
    told = evaluate_methods(run, [audited], ["fine_tune"], n_models=4, workers=0, settings=settings)
    used = told["forget_sets"][audited.name]["methods"]["fine_tune"]["settings"]
    for name, text in found["fine_tune"]["settings"].items():
        assert float(used[name]) == float(text)
    with pytest.raises(ValueError, match="tuned with predictor 'datamodel', got 'newton': give"):
        tuned_settings(run, ["fine_tune"], [audited], predictor="newton")


@pytest.mark.parametrize(
    ("shared", "others", "refused"), [(6, 0, True), (4, 0, True), (4, 9, True), (3, 9, False)]
)
def test_a_set_that_methods_were_tuned_on_is_refused_in_part_and_whole(
    run, shared, others, refused
):
    tuned(run, ["fine_tune"])
    known = parse_forget(run.task, SETS[1])
    apart = [p for p in known.retained if p not in parse_forget(run.task, SETS[0]).positions]
    audited = ForgetSet.at(run.task, [*known.positions[:shared], *apart[:others]], name="mine")
    if not refused:
        assert set(tuned_settings(run, ["fine_tune"], [audited])) == {"fine_tune"}
        return
    wanted = f"'mine' shares {shared} of its {shared + others} rows with random:6:101, 6 rows that"
    with pytest.raises(ValueError, match=wanted):
        tuned_settings(run, ["fine_tune"], [audited])


def test_settings_of_other_training_rows_are_refused(run):
    tuned(run, ["fine_tune"])
    told = json.loads(run.path.read(TUNED))
    told["methods"]["fine_tune"]["data"] = "another"
    run.path.write(TUNED, json.dumps(told).encode())
    audited = parse_forget(run.task, "random:5:0")
    with pytest.raises(ValueError, match="'fine_tune' was tuned with other training rows"):
        tuned_settings(run, ["fine_tune"], [audited])
    assert tuned(run, ["fine_tune"])["fine_tune"]["data"] == run.task.digests["train"]


def test_a_method_that_was_not_tuned_is_refused(run):
    tuned(run, ["do_nothing"])
    audited = [parse_forget(run.task, "random:5:0")]
    assert tuned_settings(run, ["do_nothing"], audited) == {"do_nothing": {}}
    with pytest.raises(ValueError, match=r"'dmm' has no tuned settings .*: run dmm tune --methods"):
        tuned_settings(run, ["do_nothing", "dmm"], audited)


def test_settings_that_diverge_lose(run, monkeypatch):
    monkeypatch.setitem(SPACES, "fine_tune", {"rate": Among(("1e30",))})
    found = tuned(run, ["fine_tune"])["fine_tune"]
    assert found["settings"] == {}
    assert [trial["score"] for trial in found["trials"][1:]] == [None, None]


def test_a_method_that_cannot_serve_is_named_once_the_others_are_kept(run, monkeypatch):
    def refuse(*_):
        raise ValueError("no classes here")

    monkeypatch.setattr(FineTune, "plan", refuse)
    with pytest.raises(ValueError, match=r"cannot tune fine_tune here .*no classes here.*is kept"):
        tuned(run, ["fine_tune", "gradient_ascent"])
    assert set(json.loads(run.path.read(TUNED))["methods"]) == {"gradient_ascent"}


def test_nonsense_is_refused(run):
    with pytest.raises(ValueError, match="expected 1 trial or more and 2 to"):
        tuned(run, ["dmm"], trials=0)
    with pytest.raises(ValueError, match="unknown method 'none'"):
        tuned(run, ["none"])
    run.path.write(TUNED, b'{"schema": 9}')
    with pytest.raises(ValueError, match="its schema is 9, this version reads 1; remove it"):
        tuned(run, ["do_nothing"])
