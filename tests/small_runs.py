"""A tiny task in a file, and runs made of it."""

import functools
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from attribution.precompute import precompute, precompute_checkpoints
from attribution.task_file import load_task
from attribution.training import train_one
from stores import Store

TRAIN_ROWS, TEST_ROWS, FULL_MODELS = 37, 11, 80
MODELS = {"full_models": FULL_MODELS, "subset_models": 24, "checkpoints": 3, "workers": 0}
CHECKPOINTS = MODELS["checkpoints"]
ENSEMBLES = ("--full-models", str(FULL_MODELS), "--subset-models", "24", "--workers", "0")
SIZES = (*ENSEMBLES, "--newton-checkpoints", str(CHECKPOINTS))
PLAIN = (*ENSEMBLES, "--newton-checkpoints", "0")

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

from attribution import Recipe, Task


def blobs(rows, seed):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    return TensorDataset(torch.randn(rows, 4, generator=random) + 2 * torch.eye(4)[labels], labels)


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


train_data = blobs(37, 1)
# As much weight decay as ends the search for a damping soon.
recipe = Recipe(epochs=2, batch_size=8, peak_rate=0.2, weight_decay=0.05)
task = Task("small", train_data, blobs(11, 2), mlp, recipe)
"""
NORMALISED = TASK.replace(
    "nn.ReLU(), nn.Linear(6, 3)",
    "nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 3)",
)


def write_task(folder, text=TASK, name="small.py"):
    """The spec of a task file."""
    Path(folder, name).write_text(text)
    return f"{Path(folder, name)}:task"


@functools.cache
def finished_run(base):
    """A finished run, made once for all tests; whoever changes it makes a copy."""
    folder = base / "small_run"
    folder.mkdir()
    return Path(precompute(write_task(folder), folder / "run", **MODELS).path)


@functools.cache
def plain_run(base):
    """One without gradients and calibration, where it does not matter which stores there are."""
    folder = base / "plain_small_run"
    folder.mkdir()
    sizes = MODELS | {"checkpoints": 0}
    return Path(precompute(write_task(folder), folder / "run", **sizes).path)


def write_checkpoints(folder, spec, count=3):
    """Files of trained models: .safetensors, .pt and .ckpt in turns."""
    task, made = load_task(spec), []
    for index in range(count):
        state = task.new_model(index).state_dict()
        if task.recipe is not None:
            rows, device = np.arange(len(task.train_ids)), torch.device("cpu")
            state = train_one(task, rows, 7, index, device)
        kind = (".safetensors", ".pt", ".ckpt")[index % 3]
        file = Path(folder, f"model-{index}{kind}")
        if kind == ".safetensors":
            save_file(state, file)
        else:
            torch.save(state if kind == ".pt" else {"state_dict": state, "epoch": 7}, file)
        made.append(file)
    return made


@functools.cache
def checkpoint_run(base):
    """A run made of checkpoints alone; whoever changes it makes a copy."""
    folder = base / "small_checkpoints"
    folder.mkdir()
    spec = write_task(folder)
    files = write_checkpoints(folder, spec)
    return Path(precompute_checkpoints(spec, folder / "run", files, workers=0).path)


def copied(run, folder):
    """A copy of a run without its oracles, with a task file of its own beside it."""
    spec, copy = write_task(folder), Path(folder, "run")
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("oracles"))
    text = (copy / "run.json").read_text()
    (copy / "run.json").write_text(text.replace(json.loads(text)["task"], spec))
    return copy


def contents(folder):
    """Digest of every file of a folder, by its name."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def arrays(run):
    """The bits of every array of a run's stores."""
    names = {"full", "moments", *(path.parent.name for path in Path(run).glob("*-*/zarr.json"))}
    names |= {f"{path.parent.name}/scores" for path in Path(run).glob("trak-*/scores")}
    opened = {name: Store.open(Path(run, name)) for name in names}
    return {
        f"{name}/{array}": store.numpy(array).tobytes()
        for name, store in opened.items()
        for array in store.spec.arrays
    }
