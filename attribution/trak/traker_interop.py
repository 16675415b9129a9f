"""The `trak` package (traker): its gradients and projections into our feature stores."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from trak.gradient_computers import FunctionalGradientComputer
from trak.projectors import BasicProjector, CudaProjector, ProjectionType

from attribution.gradients import Features
from attribution.gradients.feature_store import KIND, Layout, stored_model
from attribution.model import Model, check_state
from attribution.task import Rows, Task
from attribution.training import threads
from stores import (
    Place,
    Provenance,
    Store,
    Where,
    digest,
    in_turns,
    place,
    run_blocks,
    versions,
)

GRADIENT_BYTES = 2**26  # of the gradients that are projected at once
CUDA_BATCH = 32  # rows that fast_jl takes at once

Numbers = np.ndarray[Any, Any]


@final
@dataclass(frozen=True)
class _OneOutput:
    """One output of a model as the package wants it: a number from one row without a batch axis."""

    output: int

    def get_output(self, model: nn.Module, weights: Any, buffers: Any, inputs: Tensor) -> Tensor:
        """The output of one row."""
        outputs: Tensor = functional_call(model, (weights, buffers), (inputs[None],))
        return outputs[0, self.output]


def featurize_with_trak(
    task: Task,
    checkpoints: Sequence[Model],
    to: Where,
    *,
    proj_dim: int | None = 2048,
    seed: int = 0,
    block: int | None = None,
    device: str = "cpu",
    workers: int | None = 0,
    scheduler: str | None = None,
) -> Features:
    """Features of every output by the `trak` package's gradient computer and projector.

    They are P grad / sqrt(proj_dim), of every output o and so one pass for each, and can stand
    wherever other `Features` do as long as no new ones are asked of their projector. On a GPU the
    projection is by fast_jl where that is installed, as in the package; it is slow on CPUs.

    Args:
        task: the data; its targets are the training rows, then the test rows.
        checkpoints: trained models of the task.
        to: folder; the features of each checkpoint are a store in it.
        proj_dim: features of an output; None for the gradients themselves, without a projection.
            fast_jl takes multiples of 512.
        seed: of the package's projection.
        block: targets of a block; None: as many as make about 16 MiB.
        device: where to compute.
        workers: processes; None for one per core, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        The features.

    Raises:
        ValueError: no checkpoints, a size below 1, a checkpoint that does not fit, or a store made
            from something else.

    Example:
        >>> import tempfile
        >>> from examples.digits import mlp, task
        >>> few = Task("few", *(torch.utils.data.Subset(task.test_data, range(8)),) * 2, mlp)
        >>> models, folder = [Model(few, mlp().state_dict())], tempfile.mkdtemp() + "/features"
        >>> featurize_with_trak(few, models, folder, proj_dim=16).gather(0, np.array([3])).shape
        (1, 10, 16)

    Source: TRAK (arXiv 2303.14186); package traker.
    """
    if not checkpoints:
        raise ValueError("featurize_with_trak needs at least one checkpoint, got none")
    if proj_dim is not None and proj_dim < 1:
        raise ValueError(f"proj_dim must be 1 or more, or None, got {proj_dim}")
    task.check()
    for number, model in enumerate(checkpoints):
        check_state(task, model.state, f"checkpoint {number}")
    chosen = _Chosen(proj_dim, seed, torch.device(device).type == "cuda" and _has_fast_jl())
    stores = tuple(
        _create_store(place(to) / f"checkpoint-{number}", task, model, number, chosen,
                      block=block, device=device)
        for number, model in enumerate(checkpoints)
    )  # fmt: skip
    blocks = stores[0].spec.blocks
    missing = [number * blocks + b for number, store in enumerate(stores) for b in store.pending()]
    work = _TrakBlock(task, tuple(store.path for store in stores))
    at = None if scheduler else workers
    title = f"features of {task.name} by trak"
    turns = in_turns(work, *stores)
    run_blocks(turns, missing, title=title, workers=at, scheduler=scheduler)
    return Features(task, tuple(store.finalize() for store in stores))


def _has_fast_jl() -> bool:
    return importlib.util.find_spec("fast_jl") is not None


@dataclass(frozen=True)
class _Chosen:
    proj_dim: int | None
    seed: int
    fast: bool

    def settings(self) -> dict[str, Any]:
        name = "none" if self.proj_dim is None else "fast_jl" if self.fast else "basic"
        return {"proj_dim": self.proj_dim, "seed": self.seed, "projector": name}

    def projector(self, size: int, device: torch.device) -> Callable[[Tensor, int], Tensor]:
        """Projects gradients [row, size] of a checkpoint of a number."""
        if self.proj_dim is None:
            return lambda gradients, checkpoint: gradients
        normal = device.type == "cpu"  # as TRAKer chooses
        kind = CudaProjector if self.fast else BasicProjector
        made = kind(
            grad_dim=size,
            proj_dim=self.proj_dim,
            seed=self.seed,
            proj_type=ProjectionType.normal if normal else ProjectionType.rademacher,
            device=device,
            dtype=torch.float32,
            max_batch_size=CUDA_BATCH,
        )
        scale = self.proj_dim**-0.5
        return lambda gradients, checkpoint: scale * made.project(gradients, checkpoint)


def _create_store(
    path: Place,
    task: Task,
    model: Model,
    checkpoint: int,
    chosen: _Chosen,
    *,
    block: int | None,
    device: str,
) -> Store:
    trained = [p for p in task.new_model(0).parameters() if p.requires_grad]
    width = chosen.proj_dim or sum(p.numel() for p in trained)
    outputs = model.outputs([0])
    layout = Layout(len(task.target_ids), outputs.shape[1], width, "float32", outputs.dtype.name)
    forgotten = list(model.forgotten.ids) if model.forgotten else []
    settings = task.settings() | {
        "checkpoint": checkpoint,
        "weights": model.digest(),
        "forgotten": digest(*forgotten),
        "trak": chosen.settings(),
        "device": torch.device(device).type,
    }
    recorded = {"versions": versions("torch", "numpy", "traker", "datamodel-matching")}
    return Store.open_or_create(
        path,
        layout.spec(block),
        Provenance(settings, recorded | {"sources": task.sources()}),
        constants={f"weights_{i}": value.numpy() for i, value in enumerate(model.state.values())},
        ids={"train": task.train_ids, "target": task.target_ids},
        attributes={
            "keys": list(model.state),
            "forgotten": forgotten,
            "provenance": dict(model.provenance),
            "device": device,
        },
    )


@dataclass(frozen=True)
class _TrakBlock:
    task: Task
    paths: tuple[str, ...]

    def __call__(self, number: int) -> None:
        blocks = Store.open(self.paths[0], KIND).spec.blocks
        checkpoint, block = divmod(number, blocks)
        store = Store.open(self.paths[checkpoint], KIND)
        span = store.spec.span(block)
        with threads(1):
            arrays = self._computed(store, np.arange(span.start, span.stop))
        store.write_block(block, arrays)

    def _computed(self, store: Store, targets: Rows) -> dict[str, Numbers]:
        model, device = stored_model(self.task, store), torch.device(store.attributes["device"])
        module = self.task.new_model(0)
        module.load_state_dict(model.state)
        module.eval().to(device)
        trained = [name for name, p in module.named_parameters() if p.requires_grad]
        size = sum(p.numel() for p in module.parameters() if p.requires_grad)
        told = store.provenance.settings["trak"]
        chosen = _Chosen(told["proj_dim"], told["seed"], told["projector"] == "fast_jl")
        project = chosen.projector(size, device)
        outputs = model.outputs(targets)
        computers = [
            FunctionalGradientComputer(
                module, _OneOutput(o), size, torch.float32, device, grad_wrt=trained
            )
            for o in range(outputs.shape[1])
        ]
        inputs, checkpoint = self.task.targets(targets)[0], store.provenance.settings["checkpoint"]
        rows = max(1, GRADIENT_BYTES // (4 * size * len(computers)))
        parts = [
            _features(computers, part.to(device), lambda g: project(g, checkpoint))
            for part in inputs.split(rows)
        ]
        return {"features": torch.cat(parts).numpy(), "outputs": outputs}


def _features(
    computers: Sequence[FunctionalGradientComputer],
    inputs: Tensor,
    project: Callable[[Tensor], Tensor],
) -> Tensor:
    found = [_flat(computer.compute_per_sample_grad((inputs,))) for computer in computers]
    gradients = torch.stack(found, 1)
    # All outputs in one call: the package draws its matrix anew in each.
    return project(gradients.flatten(0, 1)).reshape(*gradients.shape[:2], -1).cpu()


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    # With reshape(len, -1), unlike the package's own, which fails on parameters without axes.
    return torch.cat([part.detach().reshape(len(part), -1) for part in gradients.values()], 1)
