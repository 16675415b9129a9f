import sys

import cloudpickle
import pytest

from attribution.task_file import load_task, task_place

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from beside import rows
from attribution import Task

def model():
    return nn.Linear(3, 2)

data = TensorDataset(torch.zeros(rows, 3), torch.zeros(rows, dtype=torch.long))
task = Task("mine", data, [], model=model)
number = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "beside.py").write_text("rows = 5\n")
    path = tmp_path / "my_task.py"
    path.write_text(TASK)
    return path


def test_files_are_loaded_with_what_lies_beside_them(file):
    task = load_task(f"{file}:task")
    assert (task.name, len(task.train_ids)) == ("mine", 5)


def test_workers_need_not_import_the_file(file):
    task = load_task(f"{file}:task")
    assert b"my_task" in cloudpickle.dumps(task.model)
    file.unlink()
    copy = cloudpickle.loads(cloudpickle.dumps(task))
    assert copy.digests == task.digests


def test_modules_are_loaded_by_name():
    assert load_task("examples.digits:task").name == "digits"


def test_files_are_recorded_by_their_whole_path(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert task_place("my_task.py:task") == f"{file.resolve()}:task"
    assert task_place("examples.digits:task") == "examples.digits:task"


def test_code_in_the_runs_own_folder_is_not_loaded(file):
    with pytest.raises(ValueError, match=r"my_task\.py lies in the run's own folder: code is not"):
        load_task(f"{file}:task", outside=file.parent)
    assert load_task(f"{file}:task", outside=file.parent / "run").name == "mine"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("task", "expected a task as file.py:name or module:name, got 'task'"),
        ("{file}", "expected a task as file.py:name|there is no file"),
        ("{file}:", "expected a task as file.py:name or module:name"),
        (":task", "expected a task as file.py:name or module:name"),
        ("{folder}/none.py:task", "there is no file '.*none.py' to load a task from"),
        ("{file}:nothing", "my_task.py has nothing called 'nothing'"),
        ("{file}:number", "is a int, not a Task: make one with attribution.Task"),
        ("no_such_module:task", "there is no module 'no_such_module' to load a task from"),
        ("no_such.module:task", "cannot load a task from no_such.module: ModuleNotFoundError"),
    ],
)
def test_what_is_no_task_is_refused(file, spec, message):
    with pytest.raises(ValueError, match=message):
        load_task(spec.format(file=file, folder=file.parent))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task = (", "cannot load a task from .*broken.py: SyntaxError"),
        ("import no_such_module", "cannot load a task from .*broken.py: ModuleNotFoundError"),
        ("task = 1 / 0", "cannot load a task from .*broken.py: ZeroDivisionError"),
        ("raise ValueError('my own words')", "^my own words$"),
    ],
)
def test_errors_of_the_file_are_told(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_task(f"{tmp_path / 'broken.py'}:task")
