"""Recipes: settings of methods that others found, and what an audit with them should read."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unlearning.methods import check_method

Json = dict[str, Any]

COMPARED = ("task", "n_models", "predictor")  # ranges hold for these


def recipe_of(evaluation: Json, settings: Mapping[str, Any], specs: Sequence[str]) -> Json:
    """What others need to repeat an evaluation, and the ranges that theirs should fall in.

    The range of a method on a forget set is that of its KLOM without bias on the forget rows: the
    ends of its 95 % interval over models, moved sqrt(2) times as far from the mean, since the
    difference of two runs has twice the variance of one.

    Args:
        evaluation: of `evaluate_methods`, as plain values.
        settings: changed settings by method name and field.
        specs: the forget sets as they are written on the command line.

    Returns:
        `task`, `seed`, `n_models`, `predictor`, `run` (what to precompute), `forget`, `settings`
        and `expected`, by forget set and method; plain values.

    Example:
        >>> told = {"klom_corrected": {"forget": {"mean": 0.2, "low": 0.1, "high": 0.3}}}
        >>> header = {"task": "digits", "seed": 0, "n_models": 100, "predictor": "residual"}
        >>> sets = {"few": {"methods": {"dmm": told}}}
        >>> found = recipe_of(header | {"run": {}, "forget_sets": sets}, {}, ["few=random:5:0"])
        >>> found["expected"]
        {'few': {'dmm': [0.059, 0.341]}}
    """
    kept = ("task", "seed", "n_models", "predictor", "run")
    expected = {
        name: {
            method: _range(told["klom_corrected"]["forget"])
            for method, told in block["methods"].items()
            if told["klom_corrected"]["forget"]["mean"] is not None
        }
        for name, block in evaluation["forget_sets"].items()
    }
    chosen = {name: dict(values) for name, values in settings.items() if values}
    return {key: evaluation[key] for key in kept} | {
        "forget": list(specs),
        "settings": chosen,
        "expected": expected,
    }


def _range(told: Mapping[str, float]) -> list[float]:
    mean, low, high = (told[name] for name in ("mean", "low", "high"))
    wider = float(np.sqrt(2))
    return [round(mean + wider * (low - mean), 3), round(mean + wider * (high - mean), 3)]


def read_recipe(path: str | os.PathLike[str]) -> Json:
    """Reads a recipe, or a file that has settings alone.

    Args:
        path: a JSON file whose `settings` map method names to their fields and values.

    Returns:
        The file's content; `settings` and `expected` are always there.

    Raises:
        ValueError: it cannot be read, or holds something else.

    Example:
        >>> read_recipe("nowhere.json")
        Traceback (most recent call last):
            ...
        ValueError: cannot read the recipe 'nowhere.json': there is no such file
    """
    try:
        told = json.loads(Path(path).read_text())
        settings = {
            name: {field: str(value) for field, value in values.items()}
            for name, values in told["settings"].items()
        }
        expected = {
            name: {method: (float(low), float(high)) for method, (low, high) in ranges.items()}
            for name, ranges in told.get("expected", {}).items()
        }
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"cannot read the recipe {str(path)!r}: {reason}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"cannot read the recipe {str(path)!r} ({error}): expected JSON with settings by method"
            ' name, as in {"settings": {"pgu": {"gamma": "0.9"}}}'
        ) from error
    for name in settings:
        check_method(name)
    return dict(told) | {"settings": settings, "expected": expected}


def unexpected(recipe: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    """Which results lie outside the ranges of a recipe.

    Args:
        recipe: of `read_recipe`.
        evaluation: with forget sets of the same names; others are not looked at.

    Returns:
        A line for each method and forget set outside its range; where the recipe was made for
        another task, with another predictor or number of models, one line that says so instead.

    Example:
        >>> told = {"klom_corrected": {"forget": {"mean": 0.5}}}
        >>> sets = {"few": {"methods": {"dmm": told}}}
        >>> unexpected({"expected": {"few": {"dmm": (0.1, 0.3)}}}, {"forget_sets": sets})
        ['dmm on few: KLOM without bias 0.50, the recipe expects 0.10 to 0.30']
    """
    unlike = [
        f"{field} {recipe[field]} and not {evaluation.get(field)}"
        for field in COMPARED
        if recipe.get(field, evaluation.get(field)) != evaluation.get(field)
    ]
    if unlike:
        return [f"the recipe's ranges are not compared: it was made with {', '.join(unlike)}"]
    found = []
    for name, ranges in recipe["expected"].items():
        methods = evaluation["forget_sets"].get(name, {}).get("methods", {})
        for method, (low, high) in ranges.items():
            mean = methods[method]["klom_corrected"]["forget"]["mean"] if method in methods else low
            if mean is None or not low <= mean <= high:
                read = "none" if mean is None else f"{mean:.2f}"
                found.append(
                    f"{method} on {name}: KLOM without bias {read}, the recipe expects"
                    f" {low:.2f} to {high:.2f}"
                )
    return found
