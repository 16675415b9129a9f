"""The examples run, with few models."""

from pathlib import Path

import pytest

import examples.depoisoning
import examples.own_training_loop
import examples.whole_road
from attribution import draw_subsets, train_models

FEWER = 25  # times


@pytest.fixture
def few_models(monkeypatch, tmp_path):
    """Examples in an empty folder, with a few of their models, in this process."""
    monkeypatch.chdir(tmp_path)

    def few(task, *, models, **settings):
        return draw_subsets(task, models=max(2, models // FEWER), **settings)

    def here(task, subsets, to, **settings):
        return train_models(task, subsets, to, workers=0, **settings)

    for example in (examples.whole_road, examples.own_training_loop):
        monkeypatch.setattr(example, "draw_subsets", few)
        monkeypatch.setattr(example, "train_models", here)


def test_the_whole_road(few_models, capsys):
    examples.whole_road.main()
    told = capsys.readouterr().out
    for part in ("train-17: logit of", "unlearned in", "doing nothing: KLOM", "measured change"):
        assert part in told
    assert len(Path(examples.whole_road.__file__).read_text().splitlines()) < 60


def test_a_training_loop_of_ones_own(few_models, capsys):
    examples.own_training_loop.main()
    told = capsys.readouterr().out
    assert "20 rows unlearned in" in told
    assert "correlation of predicted and measured changes" in told


def test_depoisoning_brings_the_class_back(tmp_path, capsys):
    found = examples.depoisoning.main(models=2, checkpoints=1, to=str(tmp_path), workers=0)
    assert "dmm_pgu: " in capsys.readouterr().out
    told = examples.depoisoning.page(found, 2)
    assert "# 90 rows of class 4 filed as 9" in told
    assert f"| poisoned | {found['poisoned']['class']:.1%} |" in told
    clean, poison = found["trained without"], found["poisoned"]
    assert poison["class"] < clean["class"] - 0.2
    assert poison["wrong label"] > 0.5
    for name in ("dmm", "dmm_pgu", "pgu"):
        regained = found[name]["class"] - poison["class"]
        assert regained > 0.8 * (clean["class"] - poison["class"])
        assert found[name]["others"] > clean["others"] - 0.02
        assert found[name]["wrong label"] < 0.1
