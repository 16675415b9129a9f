import cloudpickle
import pytest

from attribution import Task
from attribution.task_file import load_task, task_place
from stores import run_blocks
from stores.workers import stop_local_workers
from tests.small_runs import TASK, write_task


def test_a_file_gives_its_task(tmp_path):
    task = load_task(write_task(tmp_path))
    assert isinstance(task, Task)
    assert (task.name, len(task.train_ids), len(task.test_ids)) == ("small", 37, 11)


def test_a_module_gives_its_task(tmp_path, monkeypatch):
    (tmp_path / "package_of_tasks").mkdir()
    (tmp_path / "package_of_tasks" / "__init__.py").touch()
    write_task(tmp_path / "package_of_tasks", name="module_of_tasks.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    task = load_task("package_of_tasks.module_of_tasks:task")
    assert task.name == "small"


def test_the_recorded_place_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path)
    for spec in (
        "small.py:task",
        "./small.py:task",
        "linked/small.py:task",
        f"{tmp_path}/small.py:task",
    ):
        assert task_place(spec) == f"{tmp_path}/small.py:task"
    assert task_place("examples.digits:task") == "examples.digits:task"


def test_a_name_with_a_colon_before_it_is_split_at_the_last(tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    assert load_task(write_task(folder)).name == "small"


def test_a_file_is_read_again_when_it_changed(tmp_path):
    load_task(write_task(tmp_path))
    spec = write_task(tmp_path, TASK.replace('"small"', '"another"'))
    assert load_task(spec).name == "another"


USES = """
from sibling_of_a_task import rows_of_sibling

import sibling_of_a_task
from attribution import Recipe, Task


def place(block):
    return f"{sibling_of_a_task.FOLDER}/{block}-{rows_of_sibling()}"


def touch(block):
    open(place(block), "w").close()
"""


@pytest.fixture
def with_sibling(tmp_path):
    """A task file that imports the file beside it."""
    (tmp_path / "sibling_of_a_task.py").write_text(
        f"FOLDER = {str(tmp_path)!r}\n\n\ndef rows_of_sibling():\n    return 37\n"
    )
    text = USES + TASK.replace("blobs(37, 1)", "blobs(rows_of_sibling(), 1)")
    return write_task(tmp_path, text, "uses_sibling.py")


def test_a_file_may_import_its_sibling_in_workers_too(with_sibling, tmp_path):
    try:
        # These processes started before the file's folder was one to import from.
        run_blocks(abs, [0], title="starting", workers=1)
        task = load_task(with_sibling)
        assert len(task.train_ids) == 37
        touch = task.model.__globals__["touch"]
        run_blocks(touch, [0, 1], title="touching", workers=1)
    finally:
        stop_local_workers()
    assert {path.name for path in tmp_path.glob("*-37")} == {"0-37", "1-37"}


def test_a_tasks_functions_are_sent_by_value(tmp_path):
    task = load_task(write_task(tmp_path, name="sent_by_value.py"))
    sent = cloudpickle.dumps(task)
    assert b"blobs" in cloudpickle.dumps(task.model.__globals__["blobs"])
    received = cloudpickle.loads(sent)
    assert received.model is not task.model
    assert str(received.new_model(3)) == str(task.new_model(3))


@pytest.mark.parametrize("spec", ["small.py", "small.py:", ":task", "", "small"])
def test_a_spec_without_both_parts_is_refused(spec):
    text = f"^expected a task as file.py:name or module:name, got '{spec}'$"
    with pytest.raises(ValueError, match=text):
        load_task(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", r"^cannot load a task from FILE: SyntaxError: '\(' was never closed"),
        ("import nix_da", "^cannot load a task from FILE: ModuleNotFoundError: No module named"),
        (
            "from .small import task",
            "^cannot load a task from FILE: ImportError: attempted relative",
        ),
        ("1 / 0", "^cannot load a task from FILE: ZeroDivisionError: division by zero$"),
        ("import sys; sys.exit()", "^cannot load a task from FILE: SystemExit: $"),
        ("raise ValueError('so it says itself')", "^so it says itself$"),
        ("tusk = 3", "^FILE has nothing called 'task'$"),
        ("task = print", "^'FILE:task' is a builtin_function_or_method, not a Task: make one with"),
        (TASK + "\ntask = lambda: task", "^'FILE:task' is a function, not a Task: make one with"),
    ],
)
def test_a_file_that_gives_no_task_is_refused(tmp_path, text, message):
    spec = write_task(tmp_path, text, "other.py")
    with pytest.raises(ValueError, match=message.replace("FILE", f"{tmp_path}/other.py")):
        load_task(spec)


def test_a_file_or_module_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "folder.py").mkdir()
    for place in ("nix.py", "folder.py"):
        with pytest.raises(ValueError, match=f"^there is no file '{tmp_path}/{place}' to load a"):
            load_task(f"{tmp_path}/{place}:task")
    with pytest.raises(ValueError, match=r"^there is no module 'nix_da' to load a task from$"):
        load_task("nix_da:task")
    with pytest.raises(
        ValueError, match=r"^cannot load a task from nix\.da: ModuleNotFoundError: "
    ):
        load_task("nix.da:task")
    with pytest.raises(ValueError, match=r"^json has nothing called 'task'$"):
        load_task("json:task")


class TestOutside:
    def test_a_file_inside_is_never_run(self, tmp_path):
        run = tmp_path / "run"
        (run / "deep").mkdir(parents=True)
        (tmp_path / "link").symlink_to(run)
        write_task(run / "deep", "raise AssertionError('it was run')")
        for spec in (f"{run}/deep/small.py:task", f"{tmp_path}/link/deep/small.py:task"):
            with pytest.raises(
                ValueError, match="lies in the run's own folder: code is not loaded"
            ):
                load_task(spec, outside=run)

    def test_a_module_inside_is_never_run(self, tmp_path, monkeypatch):
        write_task(tmp_path, "raise AssertionError('it was run')", "module_in_a_run.py")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", [])
        with pytest.raises(ValueError, match="lies in the run's own folder: code is not loaded"):
            load_task("module_in_a_run:task", outside=tmp_path)

    def test_a_link_that_leads_inside_is_refused_and_a_neighbour_is_not(self, tmp_path):
        run = tmp_path / "run"
        run.mkdir()
        (tmp_path / "run-2").mkdir()
        assert load_task(write_task(tmp_path / "run-2"), outside=run).name == "small"
        write_task(run)
        (tmp_path / "linked.py").symlink_to(run / "small.py")
        with pytest.raises(ValueError, match="lies in the run's own folder: code is not loaded"):
            load_task(f"{tmp_path}/linked.py:task", outside=run)
