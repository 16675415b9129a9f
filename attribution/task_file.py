"""Load a task that is named on the command line: `file.py:name` or `module:name`."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from attribution.task import Task
from stores import Where, pickle_by_value, place
from stores.folder import Folder


def load_task(spec: str, *, outside: Where | None = None) -> Task:
    """Loads a task.

    Args:
        spec: `file.py:name` or `module:name`.
        outside: a folder that the file must not lie in: code is never loaded from a run.

    Returns:
        The task.

    Raises:
        ValueError: no such file, module or name, an error in it, or something that is no Task.

    Example:
        >>> load_task("examples.digits:task").name
        'digits'
    """
    file, separator, name = spec.rpartition(":")
    if not separator or not file or not name:
        raise ValueError(f"expected a task as file.py:name or module:name, got {spec!r}")
    module = _from_file(Path(file), outside) if file.endswith(".py") else _by_name(file, outside)
    found = getattr(module, name, None)
    if found is None:
        raise ValueError(f"{file} has nothing called {name!r}")
    if not isinstance(found, Task):
        raise ValueError(
            f"{spec!r} is a {type(found).__name__}, not a Task: make one with attribution.Task(...)"
        )
    return found


def task_place(spec: str) -> str:
    """The spec with the file's absolute path, so that it can be found again from elsewhere.

    Args:
        spec: `file.py:name` or `module:name`.

    Returns:
        The spec to record.

    Example:
        >>> task_place("examples.digits:task")
        'examples.digits:task'
    """
    file, _, name = spec.rpartition(":")
    return f"{Path(file).resolve()}:{name}" if file.endswith(".py") else spec


def _refuse_inside(file: Path, outside: Where | None) -> None:
    run = None if outside is None else place(outside)
    # Nothing can be imported from a bucket.
    if isinstance(run, Folder) and file.resolve().is_relative_to(Path(run).resolve()):
        raise ValueError(
            f"the task file {file} lies in the run's own folder: code is not loaded there"
        )


def _by_name(module: str, outside: Where | None) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.util.find_spec(module)
        if found is None:
            raise ValueError(f"there is no module {module!r} to load a task from")
        if found.origin:
            _refuse_inside(Path(found.origin), outside)
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise _refusal(module, error) from error


def _from_file(file: Path, outside: Where | None) -> ModuleType:
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r} to load a task from")
    _refuse_inside(file, outside)
    name = f"task_file_{file.stem}"
    found = importlib.util.spec_from_file_location(name, file.resolve())
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    # Its own imports resolve as if the file were run as a script.
    if str(file.resolve().parent) not in sys.path:
        sys.path.append(str(file.resolve().parent))
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _refusal(str(file), error) from error
    pickle_by_value(module)
    return module


def _refusal(source: str, error: BaseException) -> ValueError:
    if isinstance(error, ValueError):
        return error
    return ValueError(f"cannot load a task from {source}: {type(error).__name__}: {error}")
