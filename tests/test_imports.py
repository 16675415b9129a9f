"""The public doors: what they export, and what they do not drag in."""

import importlib
import subprocess
import sys
from types import ModuleType

import pytest


def test_stores_load_no_torch():
    code = "import sys, stores; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("package", ["stores", "attribution", "unlearning"])
def test_a_door_exports_what_it_announces(package):
    door = importlib.import_module(package)
    announced = [name for name in door.__all__ if not name.startswith("_")]
    for name in door.__all__:
        getattr(door, name)
    # Modules do not count: a function like `unlearning.klom` must hide its module of that name.
    exported = {
        name
        for name, value in vars(door).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert sorted(announced) == sorted(exported - {"annotations"})
