import shutil
from functools import partial

import numpy as np
import pytest

from attribution import ForgetSet, calibrating, precompute
from attribution.cases import KINDS, cases_of, row_kinds, rows_together
from attribution.combined import weighed_sum
from attribution.linear_datamodel import LinearDatamodel
from attribution.run import Run, RunSettings, read_settings
from attribution.run_calibration import RunCalibration
from attribution.subsets import DESIGNS
from stores import Store, place
from tests.old_stores import forget_scales
from tests.references import grown_weights
from tests.small_runs import (
    MODELS,
    NORMALISED,
    TASK,
    contents,
    copied,
    finished_run,
    write_task,
)

FEW = {"full_models": 3, "subset_models": 12, "workers": 0}
MOODY = TASK.replace(
    "def mlp():",
    """class Moody(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        found = self.mix(x)
        return self.head(self.mix(found) if float(x[:, 0].max()) > 2 else found)


def mlp():
    return Moody()


def other_mlp():""",
)


def weighed_by(chosen, cases, means, together=None):
    """The sum of some predictions of each set, with weights fitted to some of the sets."""
    together = np.zeros(len(cases)) if together is None else np.array(together)
    known = together[list(chosen)]
    found = [np.zeros(mean.shape) for mean in means[0]]
    for kind in range(len(KINDS)):
        columns, wanted = [], []
        for number in chosen:
            case = cases[number]
            rows, root = case.kinds[kind], np.sqrt(case.weight(kind))
            columns.append(root * np.stack([mean[number][rows].ravel() for mean in means], 1))
            wanted.append(root * case.change[rows].ravel())
        weights, growth = grown_weights(columns, wanted, known)
        for number, case in enumerate(cases):
            rows, each = case.kinds[kind], [mean[number] for mean in means]
            weighed = sum(w * mean[rows] for w, mean in zip(weights, each, strict=True))
            found[number][rows] = (1 + growth * min(together[number], known.max())) * weighed
    return found


def left_out(cases, means_by, together):
    """Each set's change as weights that were fitted to the others predict it."""
    found = []
    for left in range(len(cases)):
        others = [number for number in range(len(cases)) if number != left]
        found.append(weighed_by(others, cases, means_by(others), together)[left])
    return found


def kinds_that_grow(cases, means_by, together):
    """Whether rows of each kind are predicted better, by weights of other sets, with growth."""
    errors = [
        [
            sum(
                c.weight(kind) * np.square(c.change - mean)[c.kinds[kind]].sum()
                for c, mean in zip(cases, left_out(cases, means_by, given), strict=True)
            )
            for kind in range(len(KINDS))
        ]
        for given in (None, together)
    ]
    return [grown < plain for plain, grown in zip(*errors, strict=True)]


def left_out_error(cases, means_by, together=None, grows=(False, False, False)):
    found = left_out(cases, means_by, None)
    if together is not None:
        grown = left_out(cases, means_by, together)
        found = [
            np.where(np.array(grows)[case.kind_numbers, None], more, mean)
            for case, more, mean in zip(cases, grown, found, strict=True)
        ]
    return np.mean([case.error(mean) for case, mean in zip(cases, found, strict=True)])


def growing(weights):
    return [weights[kind].growth > 0 for kind in KINDS]


def rows_together_of(cases, means):
    return [rows_together(mean[c.forget.rows]) for c, mean in zip(cases, means, strict=True)]


@pytest.fixture
def run(tmp_path_factory):
    return Run.open(finished_run(tmp_path_factory.getbasetemp()))


def test_the_place_of_the_task_is_recorded_as_absolute(tmp_path, monkeypatch):
    write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    precompute("small.py:task", "run", **FEW, checkpoints=0)
    assert read_settings(tmp_path / "run").task == f"{tmp_path}/small.py:task"
    monkeypatch.chdir("/")
    assert Run.open(tmp_path / "run").task.name == "small"


def test_the_same_call_computes_nothing_again(run, tmp_path):
    copy = copied(run.path, tmp_path)
    before = contents(copy)
    precompute(f"{tmp_path}/small.py:task", copy, **MODELS)
    assert contents(copy) == before


def test_a_moved_task_file_is_recorded_only_if_it_is_the_same_task(run, tmp_path):
    copy = copied(run.path, tmp_path)
    assert read_settings(copy).task == f"{tmp_path}/small.py:task"
    other = write_task(tmp_path, TASK.replace("peak_rate=0.2", "peak_rate=0.25"), "other.py")
    with pytest.raises(ValueError, match=r"recipe.peak_rate: stored 0.2, wanted 0.25"):
        precompute(other, copy, **MODELS)
    assert read_settings(copy).task == f"{tmp_path}/small.py:task"


@pytest.mark.parametrize("design", [name for name in DESIGNS if name != "full"])
def test_every_design_serves_a_run(tmp_path, design):
    spec = write_task(tmp_path)
    made = precompute(spec, tmp_path / "run", design=design, seed=4, checkpoints=0, **FEW)
    assert read_settings(made.path).design == design
    one = ForgetSet.at(made.task, [0])
    assert (made.full.seed, made.datamodel.change(one).mean.shape) == (5, (48, 3))


def test_datamodels_may_be_sparse(tmp_path):
    spec = write_task(tmp_path, TASK.replace("weight_decay=0.05", "weight_decay=5e-4"))
    made = precompute(spec, tmp_path / "run", datamodel="lasso", checkpoints=0, **FEW)
    assert made.settings.datamodel == "lasso"
    assert (made.datamodel.store.numpy("effects") == 0).mean() > 0.2
    assert np.isfinite(made.datamodel.change(ForgetSet.at(made.task, [0])).std).all()


class TestNewton:
    @pytest.mark.parametrize(
        ("checkpoints", "predictors"),
        [(0, ("datamodel",)), (1, ("datamodel", "newton", "trak"))],
    )
    def test_checkpoints_decide_what_a_run_predicts_with(self, tmp_path, checkpoints, predictors):
        spec = write_task(tmp_path)
        made = precompute(spec, tmp_path / "run", checkpoints=checkpoints, **FEW)
        assert made.predictors == predictors
        assert not made.path.exists("calibration.json")
        assert read_settings(made.path).checkpoints == checkpoints
        if checkpoints:
            for index in range(checkpoints):
                assert made.features.model(index).digest() == made.full.model(index).digest()

    def test_projections_depend_on_the_seed(self, run, tmp_path):
        made = precompute(write_task(tmp_path), tmp_path / "run", seed=5, checkpoints=1, **FEW)
        seeds = [one.features.projector(0).projection.seed for one in (run, made)]
        assert seeds == [0, 5]

    def test_the_bank_is_of_other_models_than_the_rest(self, run):
        bank = next(s for s in run.stores() if s.path.endswith("calibration/bank"))
        masks, outputs = bank.constant("mask"), bank.numpy("outputs")
        assert outputs.shape == (80, 48, 3)
        assert not masks.all(1).any()
        both = np.concatenate([outputs, run.full.outputs]).reshape(160, -1)
        assert len(np.unique(both, axis=0)) == 160

    def test_the_errors_are_those_on_sets_that_no_weight_was_fitted_to(self, run):
        told = run.calibration
        assert told == RunCalibration.load(run.path / "calibration.json")
        assert set(told.weights) == set(told.newton.scale) == set(KINDS)
        bank = type(run.full).open(run.path / "calibration" / "bank", run.task)
        cases = cases_of(bank, run.full.outputs)
        newton, linear, scored, lacking = (
            [predictor.change(case.forget).mean for case in cases]
            for predictor in (
                run.newton,
                run.datamodel,
                run.trak,
                LinearDatamodel.open(run.residual_path),
            )
        )
        sources = {
            "newton": [newton],
            "residual": [newton, lacking],
            "linear": [linear, scored],
        }
        assert set(told.errors) == {"datamodel", "combined", *sources}
        each = [case.error(mean) for case, mean in zip(cases, linear, strict=True)]
        assert told.errors["datamodel"] == pytest.approx(np.mean(each), rel=1e-5)
        for name, means in sources.items():
            error = left_out_error(cases, lambda _, m=means: m)
            assert told.errors[name] == pytest.approx(error, rel=1e-4)
        residual = [newton, lacking]
        first = weighed_by(range(len(cases)), cases, residual)
        together = rows_together_of(cases, first)
        assert growing(told.weights) == kinds_that_grow(cases, lambda _: [first, linear], together)
        error = left_out_error(
            cases,
            lambda others: [weighed_by(others, cases, residual), linear],
            together,
            growing(told.weights),
        )
        assert told.errors["combined"] == pytest.approx(error, rel=1e-4)

    def test_the_combination_is_of_the_residual_and_the_datamodel(self, run):
        forget = ForgetSet.at(run.task, [3, 5, 8])
        told, kinds = run.calibration, row_kinds(forget, np.arange(48))
        first = weighed_sum(
            told.residual,
            run.newton.change(forget),
            LinearDatamodel.open(run.residual_path).change(forget),
            kinds,
            run.newton.change(forget).mean[forget.rows],
        )
        assert all(weights.growth == 0 for weights in told.residual.values())
        second = run.datamodel.change(forget)
        expected = weighed_sum(told.weights, first, second, kinds, first.mean[forget.rows])
        found = run.combined.change(forget)
        for name in ("mean", "std", "noise"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))

    def test_the_linear_predictor_is_of_the_datamodel_and_trak_scores(self, run):
        forget = ForgetSet.at(run.task, [3, 5, 8])
        told, kinds = run.calibration.linear, row_kinds(forget, np.arange(48))
        changes = run.datamodel.change(forget), run.trak.change(forget)
        expected = weighed_sum(told, *changes, kinds, changes[0].mean[forget.rows])
        found = run.linear.change(forget)
        for name in ("mean", "std", "noise"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        bank = type(run.full).open(run.path / "calibration" / "bank", run.task)
        cases, both = cases_of(bank, run.full.outputs), (run.datamodel, run.trak)
        means = [[one.change(case.forget).mean for case in cases] for one in both]
        weighed = weighed_by(range(len(cases)), cases, means)
        for case, mean in zip(cases, weighed, strict=True):
            np.testing.assert_allclose(run.linear.change(case.forget).mean, mean, atol=1e-5)
        factors = {(one.growth, one.shared, one.noise, one.second_spread) for one in told.values()}
        assert factors == {(0, 0, 1, 0)}

    def test_a_lost_calibration_is_made_again_from_what_is_there(self, run, tmp_path):
        copy = copied(run.path, tmp_path)
        before = contents(copy)
        (copy / "calibration.json").unlink()
        precompute(f"{tmp_path}/small.py:task", copy, **MODELS)
        assert contents(copy) == before

    @pytest.mark.parametrize("name", ["datamodel-mixed-24", "residual-mixed-24"])
    def test_datamodels_of_an_older_version_are_named(self, run, tmp_path, name):
        copy = copied(run.path, tmp_path)
        before = contents(copy)
        forget_scales(copy / name)
        call = partial(precompute, f"{tmp_path}/small.py:task", copy, **MODELS)
        with pytest.raises(ValueError, match="fitted by an older version") as refusal:
            call()
        told = str(refusal.value).partition(": remove ")[2].partition(", and the same")[0]
        for folder in told.split(", "):
            shutil.rmtree(folder)
        call()
        assert contents(copy) == before

    def test_a_bank_that_is_there_keeps_its_size(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(calibrating, "FEWEST_EACH", 9)
        copy = copied(run.path, tmp_path)
        before = contents(copy)
        (copy / "calibration.json").unlink()
        precompute(f"{tmp_path}/small.py:task", copy, **MODELS)
        assert contents(copy) == before

    def test_a_new_bank_has_as_many_models_as_the_run_asks_for(self, tmp_path, monkeypatch):
        monkeypatch.setattr(calibrating, "FEWEST_EACH", 5)
        made = precompute(write_task(tmp_path), tmp_path / "run", **FEW)
        bank = type(made.full).open(made.path / "calibration" / "bank", made.task)
        assert bank.outputs.shape == (100, 48, 3)
        np.testing.assert_array_equal(bank.masks[::5], bank.masks[4::5])

    @pytest.mark.parametrize(
        ("full", "subsets", "each"), [(10, 40, 4), (100, 2000, 8), (100, 4000, 16), (100, 9000, 16)]
    )
    def test_the_bank_grows_with_the_run(self, tmp_path, full, subsets, each):
        settings = RunSettings("small.py:task", full, subsets, "mixed", 0, 8)
        assert calibrating._models_each(settings, place(tmp_path / "bank")) == each

    def test_an_interrupted_call_ends_with_the_same_bits(self, tmp_path, monkeypatch):
        spec = write_task(tmp_path)
        whole = precompute(spec, tmp_path / "whole", **FEW)
        # Too few models lack few rows for a residual.
        assert whole.predictors == ("datamodel", "newton", "combined", "linear", "trak")
        # Of fewer models than there would be checkpoints, all are.
        assert (len(whole.features), read_settings(whole.path).checkpoints) == (3, 3)
        write = Store.write_block

        def stop(store, block, arrays):
            if store.spec.kind == "calibration-changes" and block == 3:
                raise KeyboardInterrupt
            write(store, block, arrays)

        monkeypatch.setattr(Store, "write_block", stop)
        with pytest.raises(KeyboardInterrupt):
            precompute(spec, tmp_path / "run", **FEW)
        monkeypatch.undo()
        again = precompute(spec, tmp_path / "run", **FEW)
        assert again.calibration == whole.calibration

    @pytest.mark.filterwarnings("ignore:models of task 'small' are trained one by one")
    def test_a_model_that_changes_its_mind_is_cured_by_what_its_refusal_says(self, tmp_path):
        spec, run = write_task(tmp_path, MOODY), tmp_path / "run"
        sizes = FEW | {"checkpoints": 2}
        with pytest.raises(ValueError, match="factors=False, or dmm precompute --no-factors"):
            precompute(spec, run, **sizes)
        shutil.rmtree(run / "features")
        made = precompute(spec, run, factors=False, **sizes)
        assert "newton" in made.predictors
        assert [s for s in made.features.stores if "factors" in s.spec.arrays] == []
        assert precompute(spec, run, **sizes).predictors == made.predictors

    def test_a_model_without_gradients_of_rows_is_refused_before_anything_is_trained(
        self, tmp_path
    ):
        spec = write_task(tmp_path, NORMALISED)
        text = (
            "group Newton cannot take the model of task 'small': layer '1' has no running"
            " statistics, .*; --newton-checkpoints 0 makes a run without it"
        )
        with pytest.raises(ValueError, match=text):
            precompute(spec, tmp_path / "run", **FEW)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"full_models": 1}, "a run needs at least 2 full models, got 1"),
        ({"subset_models": 9}, "datamodels need at least 10 models, got 9"),
        ({"design": "full"}, "datamodels need models on different subsets: choose another design"),
        ({"design": "nix"}, "unknown design 'nix': choose one of full, half, bernoulli, clusters,"),
        ({"datamodel": "nix"}, "unknown regression 'nix': choose from ridge, lasso"),
        ({"seed": -1}, "a seed must not be negative, got -1"),
        ({"checkpoints": -1}, "group Newton takes 0 to 80 of the full models as .*, got -1"),
        ({"checkpoints": 81}, "group Newton takes 0 to 80 of the full models as .*, got 81"),
    ],
)
def test_settings_that_no_run_can_have_are_refused_before_a_folder_is_made(tmp_path, changes, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        precompute(write_task(tmp_path), tmp_path / "run", **(MODELS | changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"full_models": 81}, "full_models = 80, this call asks for 81"),
        ({"subset_models": 25}, "subset_models = 24, this call asks for 25"),
        ({"design": "half"}, "design = mixed, this call asks for half"),
        ({"datamodel": "lasso"}, "datamodel = ridge, this call asks for lasso"),
        ({"seed": 1}, "seed = 0, this call asks for 1"),
        ({"checkpoints": 2}, "checkpoints = 3, this call asks for 2"),
    ],
)
def test_a_run_made_with_other_settings_is_refused(run, changes, text):
    before = contents(run.path)
    with pytest.raises(ValueError, match=f"was made with {text}: use another --run folder, or"):
        precompute(run.settings.task, run.path, **(MODELS | changes))
    assert contents(run.path) == before


def test_gradients_of_more_checkpoints_are_added_to_a_run(tmp_path):
    spec, path = write_task(tmp_path), tmp_path / "run"
    sizes = {"full_models": 3, "subset_models": 12, "workers": 0}
    two = precompute(spec, path, checkpoints=2, **sizes)
    three = precompute(spec, path, checkpoints=3, **sizes)
    assert (len(two.features), len(three.features)) == (2, 3)
    with pytest.raises(ValueError, match="made with checkpoints = 3, this call asks for 2"):
        precompute(spec, path, checkpoints=2, **sizes)
