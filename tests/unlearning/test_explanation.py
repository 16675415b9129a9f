import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attribution.gradients import featurize
from attribution.run import Run
from attribution.trak import TrakScores, fit_trak, margin_effects
from stores import place
from tests.small_runs import TRAIN_ROWS, copied, finished_run
from tests.tasks import blobs, line
from unlearning.cli import main
from unlearning.explanation import (
    MarginEffects,
    explain,
    explained_rows,
    explanation_table,
    render_explanation,
    run_scores,
)


@pytest.fixture
def path(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture
def gradients(path, tmp_path):
    """A run of which only features and, in `trak`, scores are there."""
    run = Run.open(path)
    features = featurize(run.task, [run.full.model(i) for i in (0, 1)], tmp_path / "features")
    settings = SimpleNamespace(subsets="none")
    return SimpleNamespace(
        path=place(tmp_path),
        trak_path=place(tmp_path / "trak-2"),
        task=run.task,
        features=features,
        trak_damping=None,
        settings=settings,
    )


def by_hand(values, predictor="by hand"):
    return MarginEffects(predictor, lambda target: np.asarray(values, dtype=np.float64))


EFFECTS = np.where(np.arange(37) < 4, [0.5, -2.0, 3.0, -0.25] + [0] * 33, 0)


class TestExplain:
    def test_the_strongest_rows_of_each_sign_come_first(self):
        found = explain(by_hand(EFFECTS), blobs(), "test-2", top=3)
        told = [(row.id, row.value, row.direction, row.label) for row in found.rows]
        assert told == [
            ("train-2", 3.0, "pushed up", "0"),
            ("train-0", 0.5, "pushed up", "0"),
            ("train-1", -2.0, "pushed down", "1"),
            ("train-3", -0.25, "pushed down", "1"),
        ]
        assert (found.task, found.target, found.label) == ("blobs", "test-2", "0")

    def test_no_more_rows_are_told_than_asked_for(self):
        found = explain(by_hand(EFFECTS), blobs(), "train-5", top=1)
        assert [row.id for row in found.rows] == ["train-2", "train-1"]

    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_rows_that_were_kept_are_told_unless_more_are_asked_for(self, count):
        whole = by_hand(EFFECTS)
        kept = lambda target: whole.strongest(target, count)  # noqa: E731
        for top in (1, 2, 3):
            found = MarginEffects("by hand", whole.of, kept)
            if top <= count:
                found = MarginEffects("by hand", lambda _: pytest.fail("no need to"), kept)
            assert explain(found, blobs(), "test-0", top) == explain(whole, blobs(), "test-0", top)

    def test_labels_may_be_numbers(self):
        found = explain(by_hand(EFFECTS), line(), "test-0")
        assert float(found.label) == pytest.approx(line().targets([37])[1].item())

    @pytest.mark.parametrize(
        ("target", "top", "message"),
        [
            ("nobody", 3, "unknown target 'nobody' of task 'blobs'"),
            ("test-0", 0, "expected at least 1 row, got top=0"),
        ],
    )
    def test_what_cannot_be_explained_is_refused(self, target, top, message):
        with pytest.raises(ValueError, match=message):
            explain(by_hand(EFFECTS), blobs(), target, top)


class TestRunScores:
    def test_the_datamodel_tells_the_change_of_the_margin(self, path):
        run = Run.open(path)
        for target in (3, TRAIN_ROWS + 2):
            mean = torch.from_numpy(run.full.outputs[:, target].mean(0)).requires_grad_()
            run.task.loss.margin(mean, run.task.targets([target])[1][0]).backward()
            expected = run.datamodel.effects(target) @ mean.grad.numpy()
            found = run_scores(run, "datamodel").of(target)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)

    def test_the_rows_kept_are_those_of_the_column(self, path):
        found = run_scores(Run.open(path), "datamodel")
        whole = MarginEffects("whole", found.of)
        for target in (3, TRAIN_ROWS + 2):
            some, all_rows = (scores.strongest(target, 20) for scores in (found, whole))
            assert found.kept(target)[0].shape == (2, 20)
            np.testing.assert_array_equal(some[0], all_rows[0])
            np.testing.assert_allclose(some[1], all_rows[1], rtol=0, atol=1e-6)
            more = found.strongest(target, 21)
            np.testing.assert_array_equal(more[0], whole.strongest(target, 21)[0])

    def test_trak_scores_are_read_where_they_are_stored(self, gradients):
        fit_trak(gradients.features, gradients.trak_path, damping=0.5)
        stored = TrakScores.open(gradients.trak_path)
        found = run_scores(gradients)
        assert found.predictor == "trak"
        np.testing.assert_array_equal(found.of(4), stored.margins(4))
        rows, values = found.strongest(4, 3)
        np.testing.assert_array_equal(values, stored.margins(4)[rows])
        np.testing.assert_array_equal(rows, MarginEffects("", found.of).strongest(4, 3)[0])

    def test_else_they_are_computed_from_the_features(self, gradients):
        found = run_scores(gradients, "trak").of(4)
        np.testing.assert_array_equal(found, margin_effects(gradients.features, 4))

    def test_lambda_is_that_of_the_run(self, gradients):
        gradients.trak_damping = 0.7
        found = run_scores(gradients).of(4)
        expected = margin_effects(gradients.features, 4, damping=0.7)
        np.testing.assert_array_equal(found, expected)

    def test_what_a_run_has_not_is_refused(self, gradients):
        with pytest.raises(ValueError, match="unknown predictor 'newton': choose from datamodel"):
            run_scores(gradients, "newton")
        with pytest.raises(ValueError, match="has no datamodel: run dmm precompute"):
            run_scores(gradients, "datamodel")


class TestPage:
    @pytest.fixture
    def found(self):
        return explain(by_hand(EFFECTS, "<trak>"), blobs(), "test-2")

    def test_it_names_every_row_and_escapes_what_it_quotes(self, found):
        page = render_explanation(found)
        for text in ("train-2", "+3.0000", "−2.0000", "&lt;trak&gt;", "Pushed down"):
            assert text in page
        assert "<trak>" not in page
        assert "<img" not in page
        assert page == render_explanation(found)

    def test_it_shows_images_where_they_are_given(self, found):
        page = render_explanation(found, thumbnails={"train-2": np.eye(3), "test-2": np.eye(3)})
        assert page.count("<img") == 2

    def test_nothing_found_is_said(self):
        nothing = explain(by_hand(np.zeros(37)), blobs(), "test-2")
        assert render_explanation(nothing).count("No row.") == 2
        assert explanation_table(nothing).count(": none") == 2


class TestVerb:
    @pytest.mark.parametrize("predictor", ["datamodel", "trak"])
    def test_it_prints_the_rows(self, path, capsys, predictor):
        words = ["--target", "test-1", "--top", "2", "--predictor", predictor]
        assert main(["explain", "--run", str(path), *words]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"test-1 (label 1): rows that moved its margin most, by {predictor}")
        assert err == ""

    def test_it_prints_json_and_writes_a_page(self, path, tmp_path, capsys):
        page = tmp_path / "page.html"
        words = ["explain", "--run", path, "--target", "train-5", "--json", "--thumbnails",
                 "--out", page, "--predictor", "datamodel"]  # fmt: skip
        assert main([str(word) for word in words]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["target"], told["predictor"]) == ("train-5", "datamodel")
        assert {row["direction"] for row in told["rows"]} <= {"pushed up", "pushed down"}
        assert page.read_text().count("<img") == 1 + len(told["rows"])

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--target", "nobody"], "unknown target 'nobody'"),
            (["--target", "test-1", "--top", "0"], "expected at least 1 row"),
            (["--target", "test-1", "--thumbnails"], "name it with --out FILE.html"),
            (["--target", "test-1", "--out", "nowhere/page.html"], "nowhere"),
        ],
    )
    def test_bad_input_is_refused(self, path, capsys, words, message):
        assert main(["explain", "--run", str(path), *words]) == 2
        assert message in capsys.readouterr().err

    def test_damaged_datamodels_are_told(self, path, tmp_path, capsys):
        run = copied(path, tmp_path)
        datamodel = Run.open(run).datamodel.store
        datamodel.discard(0)
        assert main(["explain", "--run", str(run), "--target", "test-1"]) == 2
        assert "is not finished" in capsys.readouterr().err


def test_the_test_row_that_a_forget_set_moves_most_is_explained(tmp_path_factory):
    run = Run.open(finished_run(tmp_path_factory.getbasetemp()))
    affected = [
        {"id": "train-2", "split": "forget"},
        {"id": "test-3", "split": "test"},
        {"id": "test-4", "split": "test"},
    ]
    (found,) = explained_rows(run, {"few": {"affected": affected}, "none": {"affected": []}})
    expected = explain(run_scores(run), run.task, "test-3", 5)
    assert found == {"forget_set": "few"} | asdict(expected)
