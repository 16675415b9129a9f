import io
import sys

from stores import run_blocks
from stores.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_blocks_shares_rate_and_time_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("training", 4) as progress:
        progress.finish(2)
        progress.add(0, 0.5)
        progress.add(0, 0.25)
        progress.add(2, 0.5)  # came late
        progress._show()
        under_way = sys.stderr.getvalue().split("\r")[-1]
        progress.begin(0)
        assert progress.done == 1
    assert under_way.startswith("training:  45%")
    assert " 1.8/4 [00:00<00:0" in under_way
    assert "block" in under_way


def test_a_long_block_shows_life(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("stores.progress._EVERY", 0.01)

    def work(block):
        seen = len(sys.stderr.getvalue())
        while len(sys.stderr.getvalue()) == seen:
            pass

    run_blocks(work, [0, 1], title="training", workers=0)
    assert "2/2" in sys.stderr.getvalue()


def test_without_a_terminal_it_is_silent(capsys):
    run_blocks(lambda _: None, range(3), title="training", workers=0)
    assert capsys.readouterr() == ("", "")
