import base64
import copy
import io
import re
from typing import Any
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest

from tests.unlearning.evaluations import (
    METHODS,
    SETS,
    SPLITS,
    distances,
    figures_of,
    made_evaluation,
    page_of,
    text_of,
    text_of_page,
)
from unlearning.figures import SPREAD_BAND, method_colours, thumbnail
from unlearning.tables import evaluation_table


@pytest.fixture
def evaluation() -> dict[str, Any]:
    return made_evaluation(["rand10", "rand50"])


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return made_evaluation(list(SETS))


@pytest.fixture(scope="module")
def page(whole: dict[str, Any]) -> str:
    return page_of(whole)


def _mean(evaluation: dict[str, Any], name: str, method: str, split: str = "forget") -> str:
    mean = evaluation["forget_sets"][name]["methods"][method]["klom"][split]["mean"]
    return f"{mean:.2f}"


def _verb(evaluation: dict[str, Any], name: str) -> str:
    before, after = (float(_mean(evaluation, name, method)) for method in ("do_nothing", "dmm"))
    return "falls" if after < before else "rises"


def test_the_first_sentence_states_the_result(whole: dict[str, Any], page: str) -> None:
    sentence = (
        "Forgetting rand10 (10 of 1,437 rows) by datamodel matching (dmm) costs 7 % of "
        "retraining; on the forgotten rows the distance to really retrained models "
        f"{_verb(whole, 'rand10')} from {_mean(whole, 'rand10', 'do_nothing')} to "
        f"{_mean(whole, 'rand10', 'dmm')}, where 0.35 is what two sets of retrained models "
        "differ by."
    )
    assert sentence in text_of(page)


@pytest.mark.parametrize("name", ["rand50", "rand140", "coherent60"])
def test_each_further_forget_set_has_its_sentence(
    whole: dict[str, Any], page: str, name: str
) -> None:
    sentence = (
        f"For {name} ({SETS[name]} rows) it costs 7 % and the distance {_verb(whole, name)} "
        f"from {_mean(whole, name, 'do_nothing')} to {_mean(whole, name, 'dmm')}, "
        "against 0.35."
    )
    assert sentence in text_of(page)


def test_a_distance_equal_as_printed_stays(evaluation: dict[str, Any]) -> None:
    methods = evaluation["forget_sets"]["rand10"]["methods"]
    methods["do_nothing"]["klom"]["forget"]["mean"] = 0.731
    methods["dmm"]["klom"]["forget"]["mean"] = 0.729
    assert "retrained models stays at 0.73, where" in text_of_page(evaluation)


def test_harm_to_other_rows_is_said(evaluation: dict[str, Any]) -> None:
    evaluation["forget_sets"]["rand50"]["methods"]["dmm"]["klom"]["test"]["mean"] = 1.5
    assert (
        "the test rows of rand50 suffer most: there the distance rises from 0.37 to 1.50."
        in text_of_page(evaluation)
    )


def test_no_harm_to_other_rows_is_said(page: str) -> None:
    assert "it is nowhere larger than for doing nothing." in text_of(page)


def test_findings_name_the_right_numbers(whole: dict[str, Any], page: str) -> None:
    text = text_of(page)
    r2 = [
        block["predictions"]["datamodel"]["margins"]["forget"]["r2"]
        for block in whole["forget_sets"].values()
    ]
    assert f"on the forgotten rows is {min(r2):.2f} to {max(r2):.2f}." in text
    low, high = (80 + 10 * edge for edge in (min(r2), max(r2)))
    bars = "bars that are equally wide on all rows would have to be wider to hold as many"
    sentence = f"Those of datamodel hold {low:.0f} % to {high:.0f} % on the forgotten rows; on 4"
    assert f"{sentence} of 4 forget sets, {bars}." in text
    candidates = [name for name in METHODS if name != "om"]
    best = min(candidates, key=lambda name: float(_mean(whole, "rand50", name)))
    assert f"rand50 ({_mean(whole, 'rand50', best)})" in text


def test_panels_print_what_predictions_are_worth(page: str) -> None:
    panel = next(figure for figure in figures_of(page) if "rand50, pred" in figure)
    for words in ("slope 1.25", "R² 0.85 (ceiling 0.98)", "corr 0.95"):
        assert words in panel


def test_panels_draw_every_forgotten_row_twice(evaluation: dict[str, Any]) -> None:
    rows = evaluation["forget_sets"]["rand10"]["rows"]["datamodel"]
    rows["predicted"][3] = None  # one is not known, so 9 are drawn: before and predicted
    rows["split"] = ["forget"] * 10 + ["retain"] * 70
    panel = next(figure for figure in figures_of(page_of(evaluation)) if "rand10, pred" in figure)
    assert len(re.findall(r"<use [^>]*fill: #1f2328", panel)) == 9
    assert len(re.findall(r"<use [^>]*fill: #ffffff", panel)) == 9


def test_tables_hold_the_numbers(page: str) -> None:
    text = text_of(page)
    assert "43,110 gradient evaluations" in text
    assert "98 matched, 2 diverged" in text
    assert "train-17 forget 8 9.1 4.2 −3.9 –" in text


def test_what_a_stopping_rule_reached_is_told(evaluation: dict[str, Any]) -> None:
    told = {"models": 100, "steps": 18.2, "kept": 17.1, "reached": 0.98, "reference": 0.975}
    evaluation["forget_sets"]["rand10"]["methods"]["pgu"] |= {
        "status": {"crossed": 100}, "endings": {"crossed": told},
    }  # fmt: skip
    assert "100 crossed (kept after 17 steps, 0.980 reached)" in text_of_page(evaluation)
    for block in evaluation["forget_sets"].values():
        block["null"] |= {"shift": {"forget": 0.1}, "spread": {"forget": 1.0}}
    line = "pgu stopped: 100 crossed (kept after 17 of 18 steps, 0.980 reached, 0.975 wanted)"
    assert line in evaluation_table(evaluation).splitlines()


def test_every_figure_is_well_formed_and_its_ids_are_its_own(page: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(figures_of(page)) == 4 + 4 + 2 + 1
    for figure in figures:
        ElementTree.fromstring(figure.replace("<svg", '<svg xmlns:xlink="x"', 1))
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_a_method_keeps_its_colour_in_every_figure(evaluation: dict[str, Any]) -> None:
    evaluation["forget_sets"]["rand10"]["methods"] = {
        "mine": evaluation["forget_sets"]["rand10"]["methods"]["dmm"]
    }
    page = page_of(evaluation)
    colour = method_colours([*METHODS, "mine"])["mine"]
    assert f'style="background:{colour}"></span>mine' in page
    with_colour = [figure for figure in figures_of(page) if colour in figure]
    assert len(with_colour) == 4  # its distance panel, spread, shift, cost
    assert len(set(method_colours([*METHODS, "mine", "yours"]).values())) == len(METHODS) + 2


def test_equal_arguments_give_equal_bytes(evaluation: dict[str, Any]) -> None:
    images = {"train-17": np.arange(64.0).reshape(8, 8)}
    first = page_of(evaluation, thumbnails=images)
    assert first == page_of(copy.deepcopy(evaluation), thumbnails=images)


def test_the_page_loads_nothing(evaluation: dict[str, Any]) -> None:
    page = page_of(evaluation, thumbnails={"train-17": np.zeros((2, 2))})
    assert "://" not in page
    assert "<script" not in page
    assert "<link" not in page
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)', page))


def test_thumbnails_only_of_forgotten_rows(evaluation: dict[str, Any]) -> None:
    image = np.zeros((2, 2), np.uint8)
    page = page_of(evaluation, thumbnails={"train-17": image, "test-4": image, "train-1": image})
    assert page.count("<img") == 2
    assert page.count('alt="train-17"') == 2
    assert "--thumbnails" not in page


def test_no_thumbnails_unless_given(page: str) -> None:
    assert "<img" not in page
    assert "can be shown with --thumbnails." in text_of(page)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.array([[0, 255], [51, 102]], np.uint8), [[0, 255], [51, 102]]),
        (np.array([[0.0, 1.0], [0.2, 0.4]]), [[0, 255], [51, 102]]),
        (np.array([[-1.0, 4.0], [0.0, 1.0]]), [[0, 255], [51, 102]]),
        (np.full((2, 2), 7.0), [[0, 0], [0, 0]]),
    ],
)
def test_a_thumbnail_shows_the_pixels(image: np.ndarray, expected: list[list[int]]) -> None:
    data = base64.b64decode(thumbnail(image).removeprefix("data:image/png;base64,"))
    shown = np.round(255 * matplotlib.image.imread(io.BytesIO(data), format="png"))
    for channel in range(3):
        np.testing.assert_array_equal(shown[:, :, channel], expected)


def test_a_thumbnail_may_be_coloured() -> None:
    image = np.zeros((1, 2, 3))
    image[0, 1] = [0.2, 0.4, 1]
    data = base64.b64decode(thumbnail(image).removeprefix("data:image/png;base64,"))
    shown = np.round(255 * matplotlib.image.imread(io.BytesIO(data), format="png"))
    np.testing.assert_array_equal(shown[0, 1, :3], [51, 102, 255])


@pytest.mark.parametrize("shape", [(3, 8, 8), (8,), (8, 8, 1), (0, 8)])
def test_other_shapes_are_no_thumbnails(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a thumbnail .* got \[.*; move the colour axis"):
        thumbnail(np.zeros(shape))


def test_text_is_escaped(evaluation: dict[str, Any]) -> None:
    bad = '<img src=x onerror="alert(1)">'
    block = evaluation["forget_sets"].pop("rand50")
    block["affected"][0] |= {"id": bad, "label": bad}
    block["methods"][bad] = block["methods"]["dmm"]
    block["kind"] = bad
    block["predictions"][bad] = block["predictions"]["datamodel"]
    block["rows"][bad] = block["rows"]["datamodel"]
    evaluation["forget_sets"][bad] = block
    evaluation |= {"hardware": bad, "task": bad, "versions": {bad: bad}}
    page = page_of(evaluation, title=bad, missing=[bad])
    assert "<img" not in page
    assert "&lt;img src=x" in page


def test_dollar_signs_are_no_formulas(evaluation: dict[str, Any]) -> None:
    methods = evaluation["forget_sets"]["rand10"]["methods"]
    methods["$x^2$"] = methods["dmm"]
    assert ">$x^2$</text>" in page_of(evaluation)


def test_without_klom_gaussian_kl_stands_in(evaluation: dict[str, Any]) -> None:
    evaluation["n_models"] = 20
    for block in evaluation["forget_sets"].values():
        block["null"] = {"klom": dict.fromkeys(SPLITS), "gaussian_kl": distances(0.12, 50)}
        for results in block["methods"].values():
            results["klom"] = {split: {"mean": None, "p95": None} for split in SPLITS}
    page = page_of(evaluation)
    mean = evaluation["forget_sets"]["rand50"]["methods"]["dmm"]["gaussian_kl"]["forget"]["mean"]
    assert f"to {mean:.2f}, against 0.12." in text_of(page)
    assert "KLOM needs 80 models on both sides; with 20 it is not printed" in text_of(page)
    assert "Gaussian KL of the forgotten rows" in page
    assert "KLOM of the forgotten rows" not in page


@pytest.mark.parametrize("key", ["null", "predictions", "rows", "affected"])
@pytest.mark.parametrize("nothing", ["absent", "null"])
def test_an_absent_block_is_named(evaluation: dict[str, Any], key: str, nothing: str) -> None:
    for name in ("rand10", "rand50"):
        evaluation["forget_sets"][name][key] = None
        if nothing == "absent":
            del evaluation["forget_sets"][name][key]
    assert "missing for rand10 and rand50." in text_of(page_of(evaluation))


@pytest.mark.parametrize(
    "rest",
    [
        {},
        {"forget_sets": None},
        {"forget_sets": {"rand50": {}}},
        {"forget_sets": {"rand50": {"methods": {"mine": {}}, "rows": {"newton": {}}}}},
        {"forget_sets": {"rand50": {"methods": {"do_nothing": {"klom": None}}}}},
        {"forget_sets": {"rand50": {"methods": {"om": {"klom": {"forget": {"mean": 1}}}}}}},
    ],
)
def test_almost_nothing_still_renders(rest: dict[str, Any]) -> None:
    text = text_of(page_of({"schema": 1, **rest}))
    assert "What is missing" in text
    assert "None" not in text
    assert "nan" not in text


def test_any_number_may_be_null(evaluation: dict[str, Any]) -> None:
    def nulled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: nulled(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [nulled(entry) for entry in value]
        return None if isinstance(value, int | float) else value

    text = text_of(page_of({**nulled(evaluation), "schema": 1}))
    assert "has no measured cost; on the forgotten rows the distance to really" in text
    assert "None" not in text


def test_not_finite_numbers_are_dashes(evaluation: dict[str, Any]) -> None:
    evaluation["forget_sets"]["rand50"]["methods"]["pgu"]["klom"]["forget"]["mean"] = float("inf")
    assert not re.search(r"\b(inf|nan)\b", text_of(page_of(evaluation)))


def test_missing_evidence_is_listed(evaluation: dict[str, Any]) -> None:
    text = text_of_page(evaluation, missing=["Attacks were not run.", "No GPU was used."])
    assert "P95 needs at least 20 rows; rand10 has 10" in text
    assert text.endswith("Attacks were not run. No GPU was used.")


def test_a_complete_evaluation_misses_nothing(evaluation: dict[str, Any]) -> None:
    del evaluation["forget_sets"]["rand10"]
    assert "What is missing" not in page_of(evaluation)


def test_the_band_is_named(page: str) -> None:
    low, high = SPREAD_BAND
    assert f"the grey band is {low:.1f} to {high:.2f}" in text_of(page)


@pytest.mark.parametrize("schema", [{}, {"schema": 2}, {"schema": None}, {"schema": "1"}])
def test_another_schema_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected an evaluation of schema 1, got .*dmm evaluate"):
        page_of(schema)


def test_columns_of_different_lengths_are_refused(evaluation: dict[str, Any]) -> None:
    evaluation["forget_sets"]["rand50"]["rows"]["datamodel"]["before"].pop()
    with pytest.raises(
        ValueError, match=r"expected row columns of one length, got .*'before': 119"
    ):
        page_of(evaluation)
