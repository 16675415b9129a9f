"""README.md holds: its Python runs, and the verbs it shows exist."""

import re
import sys
from pathlib import Path

from unlearning.cli import main

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```python[ \t]*(?P<note>[^\n]*)\n(?P<code>.*?)^```[ \t]*$", re.M | re.S)
VERB = re.compile(r"(?:^[ \t]*|`|\$ |bin/)dmm +([a-z][a-z-]*)", re.M)


def test_python_blocks_run(tmp_path, monkeypatch):
    """In order, in one namespace; ```python no-run REASON marks a block that cannot run here."""
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"}  # so that workers receive its functions by value
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("code"))
        if block["note"]:
            assert re.match(r"no-run\W+\w", block["note"]), f"README.md:{line}: give a reason"
            continue
        exec(compile("\n" * line + block["code"], README, "exec"), namespace)


def test_verbs_exist(monkeypatch, capsys):
    verbs = set(VERB.findall(README.read_text(encoding="utf-8")))
    assert verbs, "README.md shows no verb of dmm"
    unknown = set()
    for verb in sorted(verbs):
        monkeypatch.setattr(sys, "argv", ["dmm", verb, "--help"])
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
        if status:
            unknown.add(verb)
    assert not unknown, f"{unknown}: {capsys.readouterr().err}"
