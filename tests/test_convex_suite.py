"""The convex suite at half size: the project's methods do what closed forms say."""

import json
import re
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from attribution import ForgetSet
from examples.convex import __main__ as command
from examples.convex import methods as grids
from examples.convex.methods import (
    RowByRow,
    counterfactuals,
    descent,
    matching,
    matching_as_shipped,
    noise_deviation,
    oracle,
)
from examples.convex.page import html, markdown
from examples.convex.problems import Problem, shapes
from examples.convex.suite import EARLY, GRADIENT, GROUP, marks_until, run
from examples.convex.theory import TARGETS, Theory
from examples.convex.words import findings

STEPS = 400
CASES = [(shape, kind) for shape in ("flat", "few features") for kind in ("random", "coherent")]


def _theory(shape: str = "flat", penalty: float = 1.0, kind: str = "coherent") -> Theory:
    chosen = next(one for one in shapes(2) if one.name == shape)
    problem = Problem(chosen, penalty, seed=3)
    return Theory(problem, problem.forget_sets[kind])


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:  # one point of each grid
        patch.setattr(grids, "ASCENT_EPOCHS", (1,))
        patch.setattr(grids, "ASCENT_RATES", (1.0,))
        patch.setattr(grids, "ADAM_RATES", (0.01,))
        return run([0], steps=STEPS, penalties=(0.01, 100.0), scale=2, names=dict(CASES))


def _case(results, shape, penalty, kind):
    key = shape, penalty, kind
    return next(one for one in results if (one.shape, one.penalty, one.forget) == key)


@pytest.mark.parametrize("shape", [one.name for one in shapes(2)])
def test_closed_forms_agree_with_training_again(shape):
    theory = _theory(shape)
    problem, rows = theory.problem, np.arange(len(theory.problem.x))
    x, y = problem.x[theory.forget.retained], problem.y[theory.forget.retained]
    gradient = x.T @ (x @ theory.retrained - y) + problem.penalty * theory.retrained
    assert np.abs(gradient).max() < 1e-10
    alone = [problem.solution(np.delete(rows, i)) - problem.full for i in theory.forget.rows]
    leverage = problem.full + np.sum(alone, axis=0)
    np.testing.assert_allclose(theory.predicted("leverage"), leverage, atol=1e-10)
    np.testing.assert_allclose(theory.predicted("group"), theory.retrained, atol=1e-10)
    # Influence: the derivative as the rows' weights begin to fall from 1.
    first, e = np.zeros(len(problem.full)), 1e-6
    kept = np.ones(len(rows))
    kept[theory.forget.rows] -= e
    weighted = problem.x * np.sqrt(kept)[:, None]
    h = weighted.T @ weighted + problem.penalty * np.eye(len(first))
    first = (np.linalg.solve(h, weighted.T @ (np.sqrt(kept) * problem.y)) - problem.full) / e
    np.testing.assert_allclose(theory.predicted("first-order"), problem.full + first, atol=1e-4)


def test_the_project_predicts_what_closed_forms_do(tmp_path):
    theory = _theory()
    problem = theory.problem
    inputs = np.concatenate([problem.x, problem.x_test])
    found = counterfactuals(problem, str(tmp_path))
    for kind in TARGETS:
        want = inputs @ (theory.predicted(kind) - problem.full)
        # Linear datamodels round their sums to float32.
        exact = 1e-6 if kind == "first-order" else 1e-10
        change = found[kind].change(theory.forget).mean[:, 0]
        np.testing.assert_allclose(change, want, atol=exact * np.abs(want).max())
    change = oracle(problem, theory.forget, str(tmp_path)).change(theory.forget).mean[:, 0]
    np.testing.assert_allclose(change, inputs @ (theory.retrained - problem.full), atol=1e-10)


def test_rows_are_taken_out_of_the_full_model_only(tmp_path):
    theory = _theory()
    found = counterfactuals(theory.problem, str(tmp_path))["leverage"]
    assert isinstance(found, RowByRow)
    gone = ForgetSet.at(theory.problem.task, [9])
    with pytest.raises(ValueError, match="out of a model trained on all rows only"):
        found.change(theory.forget, gone)


@pytest.mark.parametrize("kind", ["random", "coherent"])
@pytest.mark.parametrize("shape", [one.name for one in shapes(2)])
def test_the_project_takes_the_steps_of_closed_forms(shape, kind, tmp_path):
    theory, marks = _theory(shape, 1.0, kind), marks_until(60)
    found = counterfactuals(theory.problem, str(tmp_path))
    np.testing.assert_allclose(descent(theory, marks), theory.descended(marks), atol=1e-10)
    for target in TARGETS:
        path = matching(found[target], theory, marks)
        np.testing.assert_allclose(path, theory.matched(target, marks), atol=1e-6)
    np.testing.assert_allclose(
        matching(found["group"], theory, marks), theory.matched("group", marks), atol=1e-10
    )


@pytest.mark.parametrize("penalty", [0.01, 100.0])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_group_targets_reach_the_retrained_solution_and_others_their_floor(
    results, shape, kind, penalty
):
    case = _case(results, shape, penalty, kind)
    for name in (GROUP, "matching, oracle"):
        assert case.errors[name].weights[:, -1].max() < 1e-6
        assert max(values[:, -1].max() for values in case.errors[name].outputs.values()) < 1e-6
    assert case.floors["group"].max() < 1e-9
    for target in ("first-order", "leverage"):
        ends = case.errors[f"matching, {target}"].weights[:, -1]
        np.testing.assert_allclose(ends, case.floors[target], rtol=1e-4)
        assert ends.min() > 0.01
    assert (case.floors["leverage"] < case.floors["first-order"]).all()


def test_what_wins_is_decided_by_the_condition_number(results):
    for kind in ("random", "coherent"):
        assert _case(results, "flat", 0.01, kind).winner == GROUP
        assert _case(results, "flat", 100.0, kind).winner == GRADIENT
        assert _case(results, "few features", 100.0, kind).winner == GRADIENT
    for case in results:
        faster, slower = (case.conditions[name] for name in (GRADIENT, GROUP))
        if case.winner == GROUP:
            faster, slower = slower, faster
        assert case.winner == "both" or np.median(faster) < np.median(slower)


def test_ascent_noise_and_descent_stay_away_where_the_problem_is_ill_conditioned(results):
    case = _case(results, "flat", 0.01, "random")
    for name in (GRADIENT, "noisy descent", "ascent-descent"):
        assert case.errors[name].weights[:, -1].min() > 0.9


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_noise_has_the_size_of_theory(results, shape, kind):
    case = _case(results, shape, 100.0, kind)
    ratio = case.errors["noisy descent"].weights[:, -1] / case.noise
    assert (ratio > 0.5).all()
    assert (ratio < 1.6).all()


def test_noise_from_theory_is_the_spread_of_a_random_walk():
    theory = _theory()
    random, steps, s = np.random.default_rng(0), 40, noise_deviation(theory.problem)
    away = np.zeros((150, len(theory.problem.full)))
    for _ in range(steps):
        along = (
            away @ theory.descent.directions.T * (1 - theory.descent.rate * theory.descent.values)
        )
        away = along @ theory.descent.directions + s * random.standard_normal(away.shape)
    measured = np.sqrt((away**2).sum(1).mean()) / theory.step
    assert measured == pytest.approx(theory.noise(s, steps), rel=0.03)


def test_adam_matches_outputs_but_leaves_the_span_of_the_rows(results):
    found = _case(results, "flat", 0.01, "random").errors["matching, group, Adam"]
    assert found.outputs["forget"][:, -1].max() < 1e-3
    assert found.outputs["test"][:, -1].min() > 0.1
    few = _case(results, "few features", 0.01, "random").errors["matching, group, Adam"]
    assert few.weights[:, -1].max() < 1e-6


def test_only_gradient_descent_keeps_to_the_span_of_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "ADAM_RATES", (0.01,))
    theory = _theory()
    group = counterfactuals(theory.problem, str(tmp_path))["group"]
    rows = np.linalg.svd(theory.problem.x, full_matrices=False)[2]

    def outside(method):
        moved = method(group, theory, marks_until(60))[-1] - theory.problem.full
        return np.linalg.norm(moved - rows.T @ (rows @ moved)) / np.linalg.norm(moved)

    assert outside(matching) < 1e-10
    assert outside(matching_as_shipped) > 0.3


def test_words_say_who_wins(results):
    told = findings(results)
    assert told[0] == f"8 cases (spectrum, penalty, forget set), 1 seed each, {STEPS} steps."
    (matched,) = [line for line in told if line.startswith("Matching group targets wins")]
    assert "flat at penalty 0.01" in matched
    (plain,) = [line for line in told if line.startswith("Plain gradient descent on the retain")]
    assert "flat at penalty 100; few features at penalty 100" in plain
    ours = [one for one in results if one.winner == GROUP]
    assert not any(line.startswith("Plain") for line in findings(ours))


def test_words_say_where_none_wins(results):
    case = _case(results, "flat", 0.01, "random")
    slow = case.errors[GRADIENT]
    none = replace(case, errors={**case.errors, GROUP: slow})
    assert none.winner == "none"
    (told,) = [line for line in findings([none]) if line.startswith("None arrives in 1")]
    assert f"gradient descent ends {slow.weights[0, -1]:.2f} away" in told
    both = replace(case, errors={**case.errors, GRADIENT: case.errors[GROUP]})
    assert both.winner == "both"
    assert any(line.startswith("They arrive about together in 1") for line in findings([both]))


def test_the_page_needs_nothing_and_has_a_figure_a_case(results):
    page = html(results, "Made here.")
    figures = re.findall(r"<figure>.*?</figure>", page, flags=re.DOTALL)
    assert len(figures) == len(results)
    assert not re.search(r'(src|href)="(?!#)', page)
    for figure in figures:
        ElementTree.fromstring(figure.replace("<figure", '<figure xmlns:xlink="x"', 1))
    assert "flat, penalty 0.01" in figures[0]
    assert "<li>Group targets are exact" in page


def test_markdown_has_a_line_a_case(results):
    text = markdown(results, "Made here.")
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + len(results)
    assert "Made here." in text


def test_the_command_prints_and_writes(results, monkeypatch, tmp_path, capsys):
    asked = {}

    def few(seeds, steps):
        asked.update(seeds=len(seeds), steps=steps)
        return results

    monkeypatch.setattr(command, "run", few)
    page, text = tmp_path / "convex.html", tmp_path / "convex.md"
    arguments = ["--seeds", "2", "--steps", f"{STEPS}", "--out", str(page), "--markdown", str(text)]
    monkeypatch.setattr(sys, "argv", ["convex", *arguments])
    command.main()
    told = capsys.readouterr().out
    assert asked == {"seeds": 2, "steps": STEPS}
    assert f"weights @{EARLY}" in told
    assert page.read_text().startswith("<!doctype html>")
    assert text.read_text().startswith("# ")
    monkeypatch.setattr(sys, "argv", ["convex", "--json"])
    command.main()
    found = json.loads(capsys.readouterr().out)["results"]
    assert found[0]["errors"][GROUP]["weights"][0][-1] < 1e-6
