"""A second request on the command line: what a model has forgotten counts before anything costs."""

import pytest

from attribution import Ensemble, ForgetSet, load_model
from attribution.run import Run
from tests.small_runs import copied, finished_run
from unlearning.cli import main

FEW, MORE = ("--forget", "few=rows:3:8"), ("--forget", "more=rows:6:11")


@pytest.fixture
def copy(tmp_path_factory, tmp_path):
    return copied(finished_run(tmp_path_factory.getbasetemp()), tmp_path)


@pytest.fixture
def once(dmm, copy, tmp_path):
    """The file of a model that has forgotten some rows."""
    file = tmp_path / "once.safetensors"
    dmm("unlearn", "--run", copy, *FEW, "--method", "fine_tune", "--out", file)
    return file


def again(once, method, forget=MORE):
    run, out = once.with_name("run"), once.with_name("twice.safetensors")
    return ("unlearn", "--run", str(run), *forget, "--method", method, "--workers", "0",
            "--checkpoint", str(once), "--out", str(out))  # fmt: skip


def test_matching_absolute_oracles_asks_for_those_without_all_rows_gone(dmm, copy, once):
    dmm(*again(once, "om_absolute"))
    run = Run.open(copy)
    both = ForgetSet.at(run.task, range(3, 11))
    assert load_model(run.task, once.with_name("twice.safetensors")).forgotten.ids == both.ids
    (bank,) = (copy / "oracles").iterdir()
    oracles = Ensemble.open(bank / "targets", run.task)
    assert (len(oracles), oracles.without.ids) == (len(run.full), both.ids)


@pytest.mark.parametrize(
    ("method", "forget", "line"),
    [
        (
            "om",
            MORE,
            "method 'om' adds the change from models trained on all rows; this model has forgotten"
            " 5 rows already: use om_absolute",
        ),
        (
            "om_absolute",
            ("--forget", "part=rows:4:6"),
            "the model has forgotten all 2 rows of 'part' already",
        ),
    ],
)
def test_what_no_oracle_can_serve_is_refused_before_one_is_trained(
    capsys, once, method, forget, line
):
    assert main(list(again(once, method, forget))) == 2
    assert capsys.readouterr() == ("", f"dmm: {line}\n")
    assert not once.with_name("run").joinpath("oracles").exists()
