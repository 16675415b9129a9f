"""Recipes: an evaluation is repeated from a file, and results outside its ranges are named."""

import json
from pathlib import Path

import pytest

from unlearning.cli import main
from unlearning.evaluation import plain
from unlearning.methods import build_method
from unlearning.recipes import read_recipe, recipe_of, unexpected

RESULTS = Path(__file__).parents[2] / "examples/results"
FEW = ("--forget", "few=rows:3:8", "--methods", "do_nothing,fine_tune", "--n-models", "4")
SETTINGS = {"fine_tune": {"rate": "0.02", "epochs": "3"}}


def evaluated(told, copy, recipe):
    return told("evaluate", "--run", copy, *FEW, "--workers", "0", "--recipe", recipe)


def test_a_recipe_made_of_an_evaluation_repeats_it(told, copy, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"settings": SETTINGS}))
    first = evaluated(told, copy, file)
    assert first["unexpected"] == []
    assert first["forget_sets"]["few"]["methods"]["fine_tune"]["settings"]["epochs"] == 3
    file.write_text(json.dumps(recipe_of(first, SETTINGS, ["few=rows:3:8"])))
    recipe = read_recipe(file)
    assert recipe["settings"] == SETTINGS
    assert recipe["forget"] == ["few=rows:3:8"]
    assert set(recipe["expected"]["few"]) == {"do_nothing", "fine_tune"}
    again = evaluated(told, copy, file)
    distances = [
        found["forget_sets"]["few"]["methods"]["fine_tune"]["klom_corrected"]
        for found in (first, again)
    ]
    assert distances[0] == distances[1]
    assert again["unexpected"] == []


def test_a_result_outside_its_range_is_named(dmm, copy, tmp_path):
    file = tmp_path / "recipe.json"
    expected = {"few": {"do_nothing": [90, 91], "om": [0, 1]}, "other": {"dmm": [0, 1]}}
    file.write_text(json.dumps({"settings": {}, "expected": expected}))
    text = dmm("evaluate", "--run", copy, *FEW, "--workers", "0", "--recipe", file)
    assert "\ndo_nothing on few: KLOM without bias " in text
    assert "the recipe expects 90.00 to 91.00" in text
    assert "om on few" not in text


@pytest.mark.parametrize(
    ("field", "value"), [("task", "another"), ("n_models", 9), ("predictor", "trak")]
)
def test_ranges_of_another_evaluation_are_not_compared(field, value):
    told = {"klom_corrected": {"forget": {"mean": 5.0}}}
    evaluation = {"task": "t", "n_models": 4, "predictor": "newton"}
    ranges = {"expected": {"few": {"dmm": (0, 1)}}}
    few = {"forget_sets": {"few": {"methods": {"dmm": told}}}}
    assert len(unexpected(evaluation | ranges, evaluation | few)) == 1
    (line,) = unexpected(evaluation | ranges | {field: value}, evaluation | few)
    assert line == (
        "the recipe's ranges are not compared: it was made with"
        f" {field} {value} and not {evaluation[field]}"
    )


def test_a_method_without_a_number_is_outside_every_range():
    told = {"klom_corrected": {"forget": {"mean": None}}}
    found = unexpected(
        {"expected": {"few": {"dmm": (0, 1)}}}, {"forget_sets": {"few": {"methods": {"dmm": told}}}}
    )
    assert found == ["dmm on few: KLOM without bias none, the recipe expects 0.00 to 1.00"]


def test_ranges_are_those_of_the_difference_of_two_runs():
    told = {"klom_corrected": {"forget": {"mean": 1.0, "low": 0.9, "high": 1.3}}}
    failed = {"klom_corrected": {"forget": {"mean": None, "low": None, "high": None}}}
    evaluation = plain(
        {"task": "t", "seed": 0, "n_models": 4, "predictor": "newton", "run": {}}
        | {"forget_sets": {"few": {"methods": {"dmm": told, "pgu": failed}}}}
    )
    found = recipe_of(evaluation, {"dmm": {}, "pgu": {"rate": "1"}}, ["few=rows:3:8"])
    assert found["expected"] == {"few": {"dmm": [0.859, 1.424]}}
    assert found["settings"] == {"pgu": {"rate": "1"}}


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_settings_that_are_shipped_are_taken(file, ground):
    recipe = read_recipe(file)
    for name, settings in recipe["settings"].items():
        build_method(name, ground.evidence(), settings)
    assert recipe["expected"]
    assert len(recipe["expected"]) == len(recipe["forget"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected JSON with settings by method"),
        ("{}", "expected JSON with settings by method"),
        ('{"settings": {"pgu": 3}}', "expected JSON with settings by method"),
        ('{"settings": {}, "expected": {"few": {"dmm": [1]}}}', "expected JSON with settings"),
        ('{"settings": {"nothing": {}}}', "unknown method 'nothing'"),
    ],
)
def test_nonsense_is_refused(content, words, refused, copy, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(content)
    assert words in refused("evaluate", "--run", copy, *FEW, "--recipe", file)


def test_a_recipe_does_not_go_with_tuned_settings(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--run", "r", *FEW, "--tuned", "--recipe", "a.json"])
    assert "--recipe: not allowed with argument --tuned" in capsys.readouterr().err
