"""The section of the report that asks whether an attacker can tell, and its terminal columns."""

import copy

import pytest

from tests.unlearning.evaluations import METHODS, made_evaluation, page_of, text_of, with_attacks
from unlearning.tables import evaluation_table


@pytest.fixture
def evaluation():
    return with_attacks(made_evaluation(["rand10", "rand50"]))


def section_of(page):
    return text_of(page).split("Can an attacker tell? ")[1].split(" Cost against quality ")[0]


def test_every_method_and_the_null_have_their_lines_in_every_forget_set(evaluation):
    section = section_of(page_of(evaluation))
    for name in ("rand10", "rand50"):
        part = section.split(f"{name} U-LiRA")[1]
        assert "dmm 52 % 0.52 0.55 1 % 0.62 3 % 3.61 0.17 " in part
        assert "retrained (null) 50 % 0.50 0.55 1 % 0.60 3 % 1.61 0.17 " in part
        assert "dmm 0.20 0.17 to 0.24 0.20 0.17 to 0.24 0.40 0.998 −3.5 train-2 " in part
        assert "retrained (null) 0.00 −0.03 to 0.04 0.00 −0.03 to 0.04 0.00 1.000 " in part
    assert "100 models show no finite epsilon above 4.6" in section
    assert section.count("retrained (null)") == 4


def test_every_number_has_a_sentence(evaluation):
    section = section_of(page_of(evaluation))
    for word in ("U-LiRA:", "Loss:", "RMIA:", "Competition:", "KLOM, corrected:", "Logits:"):
        assert section.count(word) == 1
    assert "Relearning" not in section


def test_relearning_is_told_where_it_was_asked_for():
    asked = with_attacks(made_evaluation(["rand10"]), relearning=True)
    section = section_of(page_of(asked))
    assert "dmm 52 % 0.52 0.55 1 % 0.62 3 % 3.61 0.17 38 60 % " in section
    assert "Relearning: steps of plain training" in section


def test_numbers_that_are_missing_are_dashes(evaluation):
    for told in evaluation["forget_sets"]["rand10"]["methods"].values():
        told |= {"tow": None, "harmed": [], "klom_corrected": {}}
        told["attacks"]["ulira"]["accuracy"]["forget"] = {"mean": None, "p95": None}
    section = section_of(page_of(evaluation))
    assert "dmm – 0.52 0.55" in section
    assert "dmm – – – – 0.40 – – – " in section


def test_an_evaluation_without_attacks_has_no_such_section():
    page = page_of(made_evaluation(["rand10"]))
    assert "Can an attacker tell?" not in text_of(page)
    assert "attack_cells" not in page


def test_the_terminal_table_has_three_columns_of_it(evaluation):
    table = copy.deepcopy(evaluation)
    for block in table["forget_sets"].values():
        block["null"] |= {"shift": {"forget": 0.1}, "spread": {"forget": 1.0}}
    table |= {"pooled": []}
    for block in table["forget_sets"].values():
        block["predictions"] = {}
    lines = evaluation_table(table).splitlines()
    header = next(line for line in lines if line.startswith("rand10 (10 rows)")).split("  ")
    titles = [title.strip() for title in header if title.strip()]
    assert titles[-6:] == ["U-LiRA", "RMIA", "ToW", "accuracy", "seconds", "of a retrain"]
    dmm = next(line.split() for line in lines if line.startswith("dmm "))
    assert dmm[-8:-3] == ["52.0", "%", "0.62", "0.998", "0.95"]
    null = next(line.split() for line in lines if line.startswith("two oracle banks"))
    assert null[-4:] == ["50.0", "%", "0.60", "1.000"]
    # Two forget sets, and the table of both.
    assert len([line for line in lines if line.split() and line.split()[0] in METHODS]) == 3 * 7
