"""The evaluation and the report of a run, beside its stores in a folder or a bucket."""

import json
from typing import Any

from stores import place, write_file

EVALUATION, REPORT = "evaluation.json", "report.html"
PREVIOUS = "evaluation.previous.json"


def beside(run: str, name: str) -> str:
    """The path or address of a file of a run.

    Args:
        run: folder of the run, or its prefix in a bucket.
        name: of the file.

    Returns:
        Where it lies.

    Example:
        >>> beside("s3://bucket/digits/", "evaluation.json")
        's3://bucket/digits/evaluation.json'
    """
    return f"{run.rstrip('/')}/{name}"


def read_evaluation(run: str) -> dict[str, Any]:
    """The evaluation of a run.

    Args:
        run: folder of the run, or its prefix in a bucket.

    Returns:
        What `dmm evaluate` wrote there.

    Raises:
        ValueError: there is none, or something else.

    Example:
        >>> read_evaluation("nowhere")
        Traceback (most recent call last):
            ...
        ValueError: cannot read 'nowhere/evaluation.json': run dmm evaluate --run nowhere first
    """
    where, source = place(run), beside(run, EVALUATION)
    try:
        evaluation = json.loads(where.read(EVALUATION))
    except ConnectionError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {source!r}: run dmm evaluate --run {run} first") from error
    if not isinstance(evaluation, dict):
        raise ValueError(f"{source!r} holds no evaluation: run dmm evaluate again")
    return evaluation


def keep_evaluation(run: str) -> str:
    """Keeps a copy of the evaluation of a run that is about to be replaced.

    Args:
        run: folder of the run, or its prefix in a bucket.

    Returns:
        Where the copy lies, in place of an earlier one; empty where there is no evaluation yet.

    Raises:
        ValueError: it cannot be written.
        ConnectionError: the service of the bucket does not answer.

    Example:
        >>> keep_evaluation("nowhere")
        ''
    """
    where = place(run)
    if not where.exists(EVALUATION):
        return ""
    write_text(beside(run, PREVIOUS), where.read(EVALUATION).decode())
    return beside(run, PREVIOUS)


def write_text(out: str, text: str) -> None:
    """Writes a file as a whole.

    Args:
        out: its path or address.
        text: what to write.

    Raises:
        ValueError: it cannot be written.
        ConnectionError: the service of the bucket does not answer.
    """
    try:
        write_file(out, text.encode())
    except ConnectionError:
        raise
    except OSError as error:
        raise ValueError(f"cannot write {out!r}: {error.strerror}") from error
