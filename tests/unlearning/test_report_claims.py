"""What a report says in words, where the evaluation gives no ground for it."""

import html
import re

import numpy as np
import pytest

from tests.unlearning.evaluations import made_evaluation
from unlearning import render_report

SCORES = {"om": 0.2, "om_absolute": 0.1, "do_nothing": 3.0, "dmm": 0.7, "pgu": 0.5}


def text(methods, **block):
    """What a person reads of an evaluation of these methods."""
    scored = {m: {"klom": {"forget": {"mean": SCORES[m]}}} for m in methods}
    told = {"schema": 1, "forget_sets": {"few": {"methods": scored} | block}}
    page = render_report(told, title="Few")
    body = re.sub(r"<style.*?</style>|<svg.*?</svg>|</t[dh]>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", body)).split())


@pytest.mark.parametrize(
    ("methods", "nearest"),
    [
        (["om", "om_absolute", "do_nothing", "dmm", "pgu"], "PGU with its own loss on few (0.50)."),
        (["om", "om_absolute", "do_nothing", "dmm"], "datamodel matching (dmm) on few (0.70)."),
        (["om_absolute", "dmm"], "datamodel matching (dmm) on few (0.70)."),
    ],
)
def test_methods_that_are_given_the_answer_are_not_nearest(methods, nearest):
    sentence = r"Nearest to retraining on the forgotten rows[^:]*: " + re.escape(nearest)
    assert re.search(sentence, text(methods))


def test_with_oracle_matching_alone_nothing_is_nearest():
    assert "Nearest to retraining" not in text(["om", "om_absolute"])


@pytest.mark.parametrize("methods", [["dmm", "om"], ["om", "do_nothing"]])
def test_rows_after_unlearning_are_claimed_only_with_dmm(methods):
    row = {"id": "train-3", "split": "forget", "label": "1"}
    row |= {"before": 2.0, "predicted": 1.0, "retrained": 0.5}
    row |= {"unlearned": 0.8} if "dmm" in methods else {}
    found = text(methods, affected=[row])
    assert "train-3 forget 1 2.0 1.0 0.5 " in found
    claim = "what the model says after unlearning with datamodel matching (dmm)"
    assert (claim in found) == ("dmm" in methods)


def test_explained_rows_are_shown_with_their_images_only_when_given():
    rows = [
        {"id": "train-9", "value": 0.5, "direction": "pushed up", "label": "7"},
        {"id": "train-<b>", "value": -0.25, "direction": "pushed down", "label": "3"},
    ]
    told = {"forget_set": "rand50", "target": "test-4", "label": "7", "predictor": "datamodel"}
    evaluation = made_evaluation(["rand50"]) | {"explained": [told | {"rows": rows}]}
    page = render_report(evaluation, title="x")
    assert "Which data made it say this?" in page
    assert "train-&lt;b&gt;" in page
    assert "−0.250" in page
    assert 'alt="train-9"' not in page
    images = {"train-9": np.zeros((8, 8)), "test-4": np.ones((8, 8))}
    shown = render_report(evaluation, title="x", thumbnails=images)
    assert 'alt="train-9"' in shown
    assert 'alt="test-4"' in shown
    assert "Which data made it say this?" not in render_report(
        made_evaluation(["rand50"]), title="x"
    )
