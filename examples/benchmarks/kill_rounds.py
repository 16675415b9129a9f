"""Rounds of kill -9, each followed by the same call: is a block ever lost, half or falsely marked?

python examples/benchmarks/kill_rounds.py runs 50 rounds, prints how many of each kind there were
and how many hit a write, and fails at the first wrong bit. A round starts a driver with two
workers in an empty folder, kills at a moment drawn uniformly over the wall time of an
uninterrupted run, whatever happens then, and makes the same call again where the driver was
killed. It kills the driver alone, the workers alone or both, in turn; a round whose moment comes
before there are workers, or after the driver has ended, kills nobody and is counted as such.
Blocks are large, quickly computed and written durably, so that writing takes much of the time.
Linux only: processes are looked up in /proc.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stores import ArraySpec, Provenance, Store, StoreSpec, in_turns, run_blocks, versions

COLUMNS, ROWS = 64, 32_000  # a block of "scores" is 64 objects of 128 kB
KINDS = ("driver", "workers", "both")
PATIENCE = 120.0  # seconds after which a run counts as hanging


def layout(blocks: int) -> StoreSpec:
    """A store of so many blocks of two arrays."""
    arrays = {
        "scores": ArraySpec(("train", "target"), (ROWS, blocks * COLUMNS), "float32", rows=500),
        "bias": ArraySpec(("target",), (blocks * COLUMNS,), "float64"),
    }
    return StoreSpec("scores", "target", COLUMNS, arrays)


def drive(folder: Path, blocks: int, workers: int) -> None:
    """The driver: fills the store, or what is left of it."""
    spec = layout(blocks)
    store = Store.open_or_create(folder / "store", spec, Provenance({"seed": 0}))

    def work(block: int) -> None:
        random = np.random.default_rng([0, block])
        shapes = {name: spec.block_shape(name, block) for name in spec.arrays}
        types = {name: spec.arrays[name].dtype for name in spec.arrays}
        arrays = {name: random.random(shape, types[name]) for name, shape in shapes.items()}
        store.write_block(block, arrays)

    run_blocks(in_turns(work, store), store.pending(), title="filling", workers=workers)
    store.finalize()


@dataclass(frozen=True)
class Round:
    """What a round did.

    Args:
        kind: Who was to be killed.
        hit: Whether somebody was: there were no workers yet, or the driver had ended, otherwise.
        done: Blocks that were done at that moment.
        inside: Whether somebody was killed while a block was being written.
    """

    kind: str
    hit: bool
    done: int
    inside: bool


def one_round(folder: Path, kind: str, moment: float, blocks: int) -> Round:
    """Kills once and lets the same call finish.

    Args:
        folder: An empty folder.
        kind: Whom to kill.
        moment: When, in seconds after the start.
        blocks: Of the store.

    Returns:
        What was hit. Whatever is wrong afterwards is raised as a RuntimeError.
    """
    driver = _start(folder, blocks)
    try:
        with suppress(subprocess.TimeoutExpired):
            driver.wait(moment)
        killed = _processes(driver.pid, kind) if driver.poll() is None else []
        for process in killed:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        inside, marks = _inside(folder), _marks(folder)
        hit = bool(killed)
        if kind != "workers":
            # It may have ended by itself at the last moment.
            hit = driver.wait() == -signal.SIGKILL
            _wait_for_all(killed)
            _check_marks(folder)
            driver = _start(folder, blocks) if hit else driver
        _require(driver.wait(PATIENCE) == 0, "the run failed")
    finally:
        driver.kill()
        driver.wait()
    now = _marks(folder)
    _require(all(now.get(block) == at for block, at in marks.items()), "a done block was redone")
    return Round(kind, hit, len(marks), hit and inside)


def compare(folder: Path, whole: Path) -> None:
    """Raises a RuntimeError unless a store is sound and holds the bits of another."""
    store, reference = (Store.open(path / "store") for path in (folder, whole))
    _require(store.pending() == [], f"pending blocks {store.pending()}")
    _require(store.verify() == [], f"damaged blocks {store.verify()}")
    for name in store.spec.arrays:
        same = store.numpy(name).tobytes() == reference.numpy(name).tobytes()
        _require(same, f"other bits in {name}")
    left = list(Path(store.path).rglob("*.partial"))
    _require(not left, f"left over: {left}")


def rounds(count: int, blocks: int, seed: int, folder: Path) -> tuple[float, list[Round]]:
    """Runs an uninterrupted reference and then the rounds.

    Args:
        count: Number of rounds.
        blocks: Of each store.
        seed: Seed of the moments.
        folder: Where to.

    Returns:
        Wall time of the reference in seconds, and what the rounds did.
    """
    whole = folder / "whole"
    whole.mkdir()
    start = time.monotonic()
    _require(_start(whole, blocks).wait(PATIENCE) == 0, "the uninterrupted run failed")
    wall = time.monotonic() - start
    found, random = [], np.random.default_rng(seed)
    for number in range(count):
        here = folder / str(number)
        here.mkdir()
        kind, moment = KINDS[number % len(KINDS)], random.uniform(0, wall)
        found.append(one_round(here, kind, moment, blocks))
        compare(here, whole)
        print(f"round {number} at {moment:.2f} s: {found[-1]}", file=sys.stderr, flush=True)
        for path in sorted(here.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    return wall, found


def main() -> None:
    """Prints the rounds, by kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", type=Path, help="be the driver of a round in this folder")
    options = parser.parse_args()
    if options.drive is not None:
        drive(options.drive, options.blocks, workers=2)
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        wall, found = rounds(options.rounds, options.blocks, options.seed, Path(folder))
    seconds = time.monotonic() - start
    print(f"{os.cpu_count()} cores; {versions('zarr', 'numpy', 'distributed')}")
    print(f"{len(found)} rounds, {options.blocks} blocks; uninterrupted run {wall:.1f} s")
    for kind, number in Counter(round.kind for round in found if round.hit).items():
        hit = sum(round.inside for round in found if round.kind == kind)
        print(f"{kind} killed: {number} rounds, {hit} of them inside a write")
    print(f"nobody there to kill: {sum(not round.hit for round in found)} rounds")
    done = [round.done for round in found if round.hit]
    print(f"inside a write: {sum(round.inside for round in found)}")
    print(f"blocks done when killed: {min(done)} to {max(done)}, mean {np.mean(done):.1f}")
    print(f"seconds a round: mean {seconds / len(found):.1f}")
    print("no block lost, half-written or falsely marked; all bits equal")


def _start(folder: Path, blocks: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--drive", str(folder), "--blocks", str(blocks)]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "DATAMODEL_MATCHING_DURABLE": "1"}
    return subprocess.Popen(command, env=os.environ | environment)


def _processes(driver: int, kind: str) -> list[int]:
    # Below the driver each worker has a guard, which restarts it, and the worker itself.
    guards = _children(driver)
    workers = [child for guard in guards for child in _children(guard) if _computes(child)]
    return {"driver": [driver], "workers": workers, "both": [driver, *guards, *workers]}[kind]


def _children(process: int) -> list[int]:
    try:
        text = "".join(p.read_text() for p in Path(f"/proc/{process}/task").glob("*/children"))
    except OSError:
        return []
    return [int(child) for child in text.split()]


def _computes(process: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def _wait_for_all(processes: list[int]) -> None:
    end = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{process}/cmdline").exists() for process in processes):
        _require(time.monotonic() < end, "processes are left")
        time.sleep(0.01)


def _marks(folder: Path) -> dict[int, int]:
    """When each mark was written, by block."""
    found = (folder / "store/done/c").glob("*")
    return {int(path.name): path.stat().st_mtime_ns for path in found if path.name.isdecimal()}


def _inside(folder: Path) -> bool:
    """Whether a block has objects and no mark, or an object is half-written."""
    arrays = [folder / "store/bias/c", folder / "store/scores/c/0"]
    blocks = {path.name.split(".")[0] for array in arrays for path in array.glob("*")}
    return bool({int(block) for block in blocks} - _marks(folder).keys())


def _check_marks(folder: Path) -> None:
    if (folder / "store").exists():
        damaged = Store.open(folder / "store").verify()
        _require(not damaged, f"falsely marked blocks {damaged}")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(what)


if __name__ == "__main__":
    main()
