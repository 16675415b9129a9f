"""Rounds of kill -9, each followed by the same call: is a block ever lost, half or falsely marked?

python examples/benchmarks/kill_rounds.py runs 50 rounds, prints how many of each kind there were
and how many hit a write, and fails at the first wrong bit. A round starts a driver with two
workers in an empty folder, kills at a moment drawn uniformly over the wall time of an
uninterrupted run, and makes the same call again where the driver was killed. It kills the driver
alone, the workers alone or both, in turn; every other round waits from its moment on until it
sees a block that is being written. Linux only: processes are looked up in /proc.
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

COLUMNS, ROWS = 64, 16_000  # a block of "scores" is 8 objects of 512 kB
DRAWS = 3  # random draws added up for a block: more work
KINDS = ("driver", "workers", "both")
PATIENCE = 120.0  # seconds after which a run counts as hanging


def layout(blocks: int) -> StoreSpec:
    """A store of so many blocks of two arrays."""
    arrays = {
        "scores": ArraySpec(("train", "target"), (ROWS, blocks * COLUMNS), "float32", rows=2_000),
        "bias": ArraySpec(("target",), (blocks * COLUMNS,), "float64"),
    }
    return StoreSpec("scores", "target", COLUMNS, arrays)


def drive(folder: Path, blocks: int, workers: int) -> None:
    """The driver: fills the store, or what is left of it."""
    spec = layout(blocks)
    store = Store.open_or_create(folder / "store", spec, Provenance({"seed": 0}))

    def work(block: int) -> None:
        random = np.random.default_rng([0, block])
        arrays = {
            name: random.normal(size=(DRAWS, *spec.block_shape(name, block))).sum(0)
            for name in spec.arrays
        }
        arrays = {name: value.astype(spec.arrays[name].dtype) for name, value in arrays.items()}
        store.write_block(block, arrays)

    run_blocks(in_turns(work, store), store.pending(), title="filling", workers=workers)
    store.finalize()


@dataclass(frozen=True)
class Round:
    """What a round did.

    Args:
        kind: Who was killed.
        done: Blocks that were done at that moment.
        inside: Whether a block was being written.
    """

    kind: str
    done: int
    inside: bool


def one_round(folder: Path, kind: str, moment: float, blocks: int, *, aimed: bool) -> Round:
    """Kills once and lets the same call finish.

    Args:
        folder: An empty folder.
        kind: Whom to kill.
        moment: When, in seconds after the start.
        blocks: Of the store.
        aimed: Wait from then on for a block that is being written.

    Returns:
        What was hit. Whatever is wrong afterwards is raised as a RuntimeError.
    """
    driver = _start(folder, blocks)
    try:
        end = time.monotonic() + moment
        while driver.poll() is None and not _due(folder, driver.pid, kind, end, aimed=aimed):
            time.sleep(0.0005)
        killed = _processes(driver.pid, kind)
        for process in killed:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        inside, marks = _inside(folder), _marks(folder)
        _require(kind != "workers" or driver.poll() is not None or bool(killed), "none was killed")
        if kind != "workers":
            driver.wait()
            _wait_for_all(killed)
            _check_marks(folder)
            driver = _start(folder, blocks)
        _require(driver.wait(PATIENCE) == 0, "the run failed")
    finally:
        driver.kill()
        driver.wait()
    now = _marks(folder)
    _require(all(now.get(block) == at for block, at in marks.items()), "a done block was redone")
    return Round(kind, len(marks), inside)


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
        found.append(one_round(here, kind, moment, blocks, aimed=number % 2 == 1))
        compare(here, whole)
        print(f"round {number} at {moment:.2f} s: {found[-1]}", file=sys.stderr, flush=True)
        for path in sorted(here.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    return wall, found


def main() -> None:
    """Prints the rounds, by kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", type=Path, help="be the driver of a round in this folder")
    options = parser.parse_args()
    if options.drive is not None:
        drive(options.drive, options.blocks, workers=2)
        return
    with tempfile.TemporaryDirectory() as folder:
        wall, found = rounds(options.rounds, options.blocks, options.seed, Path(folder))
    print(f"{os.cpu_count()} cores; {versions('zarr', 'numpy', 'distributed')}")
    print(f"{len(found)} rounds, {options.blocks} blocks; uninterrupted run {wall:.1f} s")
    for kind, number in Counter(round.kind for round in found).items():
        hit = sum(round.inside for round in found if round.kind == kind)
        print(f"{kind} killed: {number} rounds, {hit} of them inside a write")
    done = [round.done for round in found]
    print(f"inside a write: {sum(round.inside for round in found)}")
    print(f"blocks done when killed: {min(done)} to {max(done)}, mean {np.mean(done):.1f}")
    print("no block lost, half-written or falsely marked; all bits equal")


def _start(folder: Path, blocks: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--drive", str(folder), "--blocks", str(blocks)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def _due(folder: Path, driver: int, kind: str, end: float, *, aimed: bool) -> bool:
    if time.monotonic() < end or (aimed and not _inside(folder)):
        return False
    return kind != "workers" or bool(_processes(driver, kind))


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
