"""Tasks of other losses than softmax, from precompute to the report."""

import json

import numpy as np
import pytest

from attribution.run import PREDICTORS, Run
from tests.small_runs import TASK, write_task
from unlearning.cli import main

FEW = ("--forget", "near=cluster:5:1")
CHANGES = {
    "one logit": [
        ("labels)", "(labels == 1).float())"),
        ("nn.Linear(6, 3)", "nn.Linear(6, 1)"),
        ("mlp, recipe)", "mlp, recipe, loss=BinaryCrossEntropy())"),
        ("import Recipe", "import BinaryCrossEntropy, Recipe"),
    ],
    "regression": [
        ("labels)", "labels + 0.5)"),
        ("nn.Linear(6, 3)", "nn.Linear(6, 1)"),
        ("mlp, recipe)", "mlp, recipe, loss=SquaredError())"),
        ("import Recipe", "import Recipe, SquaredError"),
    ],
}


@pytest.fixture(scope="module", params=CHANGES)
def run(request, tmp_path_factory):
    folder, text = tmp_path_factory.mktemp("losses"), TASK
    for old, new in CHANGES[request.param]:
        text = text.replace(old, new)
    words = ["--full-models", "3", "--subset-models", "24", "--newton-checkpoints", "2"]
    spec = write_task(folder, text)
    assert main(["precompute", spec, "--run", f"{folder}/run", *words, "--workers", "0"]) == 0
    return Run.open(folder / "run")


@pytest.fixture
def told(run, capsys):
    """What a verb of the run prints as JSON, without a word on stderr."""

    def call(verb, *words):
        code = main([verb, "--run", str(run.path), *map(str, words), "--json"])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return json.loads(out, parse_constant=pytest.fail)

    return call


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_every_predictor_predicts(run, told, predictor):
    found = told("predict", *FEW, "--targets", "test", "--predictor", predictor)
    assert np.shape(found["mean"]) == np.shape(run.model(0).outputs()[37:])
    assert np.isfinite(found["mean"]).all()


def test_a_model_forgets_and_is_explained(run, told, tmp_path):
    out = tmp_path / "model.safetensors"
    assert told("unlearn", *FEW, "--method", "dmm", "--out", out)["forgotten"] == 5
    found = told("explain", "--target", "test-2", "--top", "3", "--predictor", "trak")
    assert len(found["rows"]) == 6


def test_an_evaluation_and_its_report_are_made(run, told):
    words = ("--methods", "do_nothing,dmm,om", "--n-models", "3", "--workers", "0")
    found = told("evaluate", *FEW, *words)
    for block in found["forget_sets"].values():
        assert set(block["predictions"]) == set(PREDICTORS)
        for method in block["methods"].values():
            assert np.isfinite(list(method["shift"].values())).all()
            assert np.isfinite(list(method["accuracy"].values())).all()
    told("report")
    assert run.path.size("report.html") > 1000
