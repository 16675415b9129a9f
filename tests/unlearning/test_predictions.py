"""Several predictors, and several forget sets of a kind, against really retrained models."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from attribution import Counterfactual, ForgetSet, LinearDatamodel
from attribution.agreement import Comparison, pooled_agreement
from attribution.run import Run
from tests.small_runs import finished_run
from unlearning import evaluate_methods
from unlearning.tables import evaluation_table

FEW_MODELS, SOME_MODELS = 5, 40


class TwoPredictors(Run):
    """A run with a second predictor, which thinks that half as much changes."""

    predictors = ("datamodel", "half")
    best = "datamodel"

    def predictor(self, name):
        return Half(self.datamodel) if name == "half" else super().predictor(name)


@dataclass(frozen=True)
class Half(Counterfactual):
    whole: LinearDatamodel

    def check_task(self, task):
        self.whole.check_task(task)

    def change(self, forget, already=None, targets=None):
        change = self.whole.change(forget, already, targets)
        return replace(change, mean=change.mean / 2)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return Run.open(finished_run(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="session")
def forget(run):
    return ForgetSet.at(run.task, [3, 8, 13, 21, 30], name="few")


def test_predictors_stand_side_by_side(run, forget):
    own, other = _two_evaluations(run, forget)
    for found, first in ((own, "datamodel"), (other, "half")):
        block = found["forget_sets"]["few"]
        assert found["predictor"] == first
        assert list(block["predictions"]) == list(block["rows"])
        assert set(block["predictions"]) == {"datamodel", "half"}
        assert next(iter(block["predictions"])) == first
        slopes = {name: told["logits"]["test"]["slope"] for name, told in
                  block["predictions"].items()}  # fmt: skip
        assert slopes["half"] == pytest.approx(2 * slopes["datamodel"], rel=1e-5)
        margins = dict(zip(block["rows"][first]["id"], block["rows"][first]["predicted"],
                           strict=True))  # fmt: skip
        for row in block["affected"]:
            assert row["predicted"] == pytest.approx(margins[row["id"]], abs=1e-4)
    blocks = [found["forget_sets"]["few"] for found in (own, other)]
    assert blocks[0]["predictions"] == blocks[1]["predictions"]
    # Matching follows its predictor, not the others.
    shifts = [block["methods"]["dmm"]["shift"]["forget"] for block in blocks]
    assert shifts[0] != shifts[1]
    options = {"n_models": FEW_MODELS, "workers": 0, "predictor": "datamodel"}
    alone = evaluate_methods(run, [forget], ["dmm"], predictors=[], **options)
    assert alone["forget_sets"]["few"]["methods"]["dmm"]["shift"]["forget"] == shifts[0]


def _two_evaluations(run, forget):
    two = TwoPredictors(run.path, run.settings, run.task)
    options = {"n_models": FEW_MODELS, "workers": 0}
    yield evaluate_methods(two, [forget], ["dmm"], **options)
    yield evaluate_methods(two, [forget], ["dmm"], predictor="half", **options)


def test_the_best_predictor_is_used_and_all_are_compared(run, forget):
    told = evaluate_methods(run, [forget], ["do_nothing"], n_models=2, workers=0)
    assert told["predictor"] == run.best
    assert set(told["forget_sets"]["few"]["predictions"]) == set(run.predictors)


def test_predictors_may_be_chosen(run, forget):
    two = TwoPredictors(run.path, run.settings, run.task)
    for chosen in ([], ["half"], ["datamodel", "half", "half"]):
        options = {"n_models": 2, "workers": 0, "predictor": "half", "predictors": chosen}
        told = evaluate_methods(two, [forget], ["do_nothing"], **options)
        names = list(told["forget_sets"]["few"]["predictions"])
        assert names == (["half", "datamodel"] if len(chosen) > 1 else ["half"])


def test_an_unknown_predictor_is_refused_before_anything_is_trained(run):
    forget = ForgetSet.at(run.task, [2, 4], name="never")
    stores = {store.path for store in run.stores()}
    for options in ({"predictor": "nix"}, {"predictors": ["datamodel", "nix"]}):
        with pytest.raises(ValueError, match=r"^unknown predictor 'nix': choose from datamodel"):
            evaluate_methods(run, [forget], ["dmm"], n_models=2, workers=0, **options)
    assert {store.path for store in run.stores()} == stores


def test_forget_sets_of_one_kind_and_size_are_pooled(run):
    sets = [ForgetSet.at(run.task, rows, name, kind) for name, kind, rows in (
        ("a", "random", range(0, 24, 3)), ("b", "random", range(1, 25, 3)),
        ("c", "cluster", [3, 4]), ("d", "random", range(2, 37, 3)))]  # fmt: skip
    options = {"n_models": SOME_MODELS, "workers": 0, "predictor": "datamodel"}
    told = evaluate_methods(run, sets, ["do_nothing"], predictors=[], **options)
    groups = {(group["kind"], group["size"]): group for group in told["pooled"]}
    assert {key: group["sets"] for key, group in groups.items()} == {
        ("random", 8): ["a", "b"], ("random", None): ["a", "b", "d"],
    }  # fmt: skip
    for chosen, key in (((0, 1), ("random", 8)), ((0, 1, 3), ("random", None))):
        _check_pooled(run, [sets[i] for i in chosen], groups[key]["predictions"]["datamodel"])
        blocks = [told["forget_sets"][sets[i].name] for i in chosen]
        _check_averages(blocks, groups[key]["predictions"]["datamodel"])
    assert "3 sets, random" in evaluation_table(told)


def _check_pooled(run, sets, found):
    """Logits of the forget rows of all sets, compared at once."""
    full = run.full.outputs[:SOME_MODELS]
    parts = []
    for forget in sets:
        oracles = run.bank(forget, 0, SOME_MODELS, workers=0).outputs
        change = run.datamodel.change(forget)
        spread = full.var(0, ddof=1) / SOME_MODELS + oracles.var(0, ddof=1) / SOME_MODELS
        values = [change.mean, oracles.mean(0) - full.mean(0), change.std, np.sqrt(spread)]
        values.append(oracles.std(0, ddof=1))
        parts.append([value[forget.rows] for value in values])
    rows = (np.concatenate(values) for values in zip(*parts, strict=True))
    together = pooled_agreement([Comparison(*rows)])
    told = found["logits"]["forget"]
    for name in (
        "slope",
        "r2",
        "corr",
        "ceiling",
        "coverage",
        "width",
        "interval_score",
        "retrained_models",
    ):
        assert told[name] == pytest.approx(getattr(together, name), rel=1e-5), name


def _check_averages(blocks, found):
    """Each forget set counts once; noise that leaves no ceiling leaves no share of it."""
    finite = 0
    for kind in ("margins", "logits"):
        for split in ("forget", "retain", "test"):
            each = [block["predictions"]["datamodel"][kind][split] for block in blocks]
            told = found[kind][split]["over_sets"]
            for name in ("slope", "r2"):
                assert told[name] == pytest.approx(np.mean([one[name] for one in each]))
            if min(one["ceiling"] for one in each) > 0:
                shares = [one["r2"] / one["ceiling"] for one in each]
                assert told["share_of_ceiling"] == pytest.approx(np.mean(shares))
                assert told["lowest_share_of_ceiling"] == pytest.approx(min(shares))
                finite += 1
            else:
                assert told["share_of_ceiling"] is told["lowest_share_of_ceiling"] is None
    assert finite


def test_the_table_shows_every_predictor_of_every_set(run, forget):
    own, _ = _two_evaluations(run, forget)
    lines = evaluation_table(own).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("predictions, forget rows"))
    found = [line.split()[:3] for line in lines[start + 2 :]]
    expected = [["few", name, of] for name in ("datamodel", "half") for of in ("margins", "logits")]
    assert found == expected
    told = own["forget_sets"]["few"]["predictions"]["half"]["logits"]["forget"]
    numbers = [told["r2"], told["ceiling"], told["slope"]]
    numbers += [100 * told["coverage"]["80"]]
    words = lines[-1].split()
    assert ("≥" in words) == (told["retrained_models"] == told["most_models"])
    shown = [float(word) for word in words[3:-1] if word not in "%≥"]
    assert words[-1] == f"{told['retrained_models']:,.1f}"
    told |= {"retrained_models": 47.0, "most_models": 47.0}
    assert evaluation_table(own).splitlines()[-1].endswith("≥ 47.0")
    assert shown[:4] == pytest.approx(numbers, abs=0.051)
    assert shown[4:] == pytest.approx([told["width"]["80"], told["constant_width"]["80"]], abs=0.01)
