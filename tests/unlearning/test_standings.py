"""Methods sorted over all forget sets: what is subtracted, averaged, left out and shown."""

import pytest

from tests.unlearning.evaluations import SETS, made_evaluation
from unlearning.report import render_report
from unlearning.standings import distance_of, standings
from unlearning.tables import evaluation_table


def told(forget, p95=None, other=0.5, cost=None, measure="klom"):
    splits = {"forget": {"mean": forget, "p95": p95}}
    splits |= {split: {"mean": other, "p95": None} for split in ("retain", "test")}
    return {measure: splits, "cost_over_retrain": cost}


def block(null, **methods):
    return {"null": null, "methods": methods}


def test_excess_is_taken_set_by_set_and_then_averaged():
    sets = {
        "small": block(told(0.4), dmm=told(0.5, None, 0.6, 0.1), stay=told(1.4, None, 0.5, 0.0)),
        "large": block(told(0.2, 0.5), dmm=told(0.5, 0.9, 0.6, 0.3), stay=told(2.2, 3.5, 0.5, 0.0)),
    }
    dmm, stay = standings({"forget_sets": sets}, "klom")
    assert (dmm.method, stay.method) == ("dmm", "stay")
    assert dmm.forget == pytest.approx((0.1 + 0.3) / 2)
    assert dmm.forget_p95 == pytest.approx(0.4)  # of the one set that has it
    assert dmm.retain == dmm.test == pytest.approx(0.1)
    assert dmm.cost == pytest.approx(0.2)
    assert stay.forget == pytest.approx(1.5)


def test_ends_of_intervals_are_averaged_and_no_interval_gets_narrower():
    def corrected(*ends):
        named = dict(zip(("mean", "low", "high"), ends, strict=True))
        return told(0.5) | {"klom_corrected": {"forget": named}}

    both = [corrected(0.1, 0.0, 0.4), corrected(0.3, 0.2, 0.4)]
    sets = {name: block(told(0.4), dmm=one) for name, one in zip("ab", both, strict=True)}
    (dmm,) = standings({"forget_sets": sets}, "klom")
    assert dmm.unbiased == pytest.approx((0.2, 0.1, 0.4))
    sets["b"] = block(told(0.4), dmm=told(0.5))
    (dmm,) = standings({"forget_sets": sets}, "klom")
    assert dmm.unbiased is None


def test_a_method_without_a_distance_on_one_of_its_sets_is_left_out():
    sets = {
        "a": block(told(0.4), dmm=told(0.5), failed=told(None)),
        "b": block(told(0.4), dmm=told(0.5), failed=told(0.1)),
        "c": block(None, other=told(0.1)),
    }
    assert [found.method for found in standings({"forget_sets": sets}, "klom")] == ["dmm"]
    assert standings({}, "klom") == []


def test_the_distance_is_klom_wherever_it_was_counted():
    few = block(told(0.1, measure="gaussian_kl"), dmm=told(0.1, measure="gaussian_kl"))
    assert distance_of({"forget_sets": {"a": few}}) == "gaussian_kl"
    many = block(told(0.1), dmm=told(0.1))
    assert distance_of({"forget_sets": {"a": few, "b": many}}) == "klom"
    assert distance_of({}) == "klom"


def test_table_and_page_show_the_nearest_first():
    made = made_evaluation(list(SETS))
    for one in made["forget_sets"].values():
        one["null"] |= {"shift": {"forget": 0.1}, "spread": {"forget": 1.0}}
        one["predictions"] = {}
    order = [found.method for found in standings(made, "klom")]
    text = evaluation_table(made).split("excess KLOM forget")[1]
    places = [text.index(f"\n{name} ") for name in order]
    assert places == sorted(places)
    page = render_report(made, title="Digits").split("excess KLOM, mean of ")[1]
    assert page.startswith(f"{len(made['forget_sets'])} forget set")
