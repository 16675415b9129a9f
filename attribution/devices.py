"""How work is done on a device: which GPUs its processes get, and how exactly GPUs convolve."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def visible_gpus(
    device: str | torch.device, workers: int | None, scheduler: str | None
) -> list[str] | None:
    """Names of the GPUs of this machine for `run_blocks`, one for each local worker.

    Args:
        device: where the work computes.
        workers: local processes; 0 for this process.
        scheduler: address of a scheduler whose workers compute instead.

    Returns:
        The names, as in CUDA_VISIBLE_DEVICES, or None where the work needs no GPU.

    Raises:
        ValueError: the device is one GPU by its number, and local workers are to share the GPUs.

    Example:
        >>> visible_gpus("cpu", 2, None)
    """
    wanted = torch.device(device)
    if wanted.type != "cuda":
        return None
    if wanted.index is not None and workers != 0 and scheduler is None:
        raise ValueError(
            f"each local worker sees one GPU alone, and no {device}: give the device cuda with"
            f" CUDA_VISIBLE_DEVICES={wanted.index}, or workers=0"
        )
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(count)])[:count]


def where_to_run(
    device: str | torch.device, workers: int | None, scheduler: str | None
) -> dict[str, Any]:
    """Arguments of `run_blocks` for work on a device; a scheduler takes the place of workers.

    Args:
        device: where the work computes.
        workers: local processes; None for one per core or GPU, 0 for this process.
        scheduler: address of an existing dask scheduler instead.

    Returns:
        Workers, scheduler and GPUs.

    Raises:
        ValueError: as for `visible_gpus`.

    Example:
        >>> where_to_run("cpu", 2, None)
        {'workers': 2, 'scheduler': None, 'gpus': None}
        >>> where_to_run("cpu", 0, "tcp://10.0.0.1:8786")["workers"]
    """
    at = None if scheduler else workers
    return {"workers": at, "scheduler": scheduler, "gpus": visible_gpus(device, at, scheduler)}


@contextmanager
def repeatable(device: str | torch.device, *, tf32: bool = False) -> Iterator[None]:
    """Runs the body with kernels that give the same bits every time, if it computes on a GPU.

    A GPU rounds what it convolves to TF32, 10 bits, unless told otherwise: too rough for gradients
    that are held against those of a CPU, enough for training.

    Args:
        device: where the body computes; on a CPU nothing is set.
        tf32: whether inputs of products may be rounded to TF32, as torch is set; False: never.

    Example:
        >>> with repeatable("cuda"):
        ...     torch.backends.cudnn.deterministic
        True
    """
    if torch.device(device).type != "cuda":
        yield
        return
    library = torch.backends.cudnn
    with ExitStack() as stack:
        _set(stack, library, deterministic=True, benchmark=False)
        if not tf32:
            # Since torch 2.9 each kind of product has a setting; the older ones cannot be read any
            # more where somebody has used these.
            if hasattr(library, "conv"):
                _set(stack, library.conv, fp32_precision="ieee")
                _set(stack, torch.backends.cuda.matmul, fp32_precision="ieee")
            else:
                _set(stack, library, allow_tf32=False)
                _set(stack, torch.backends.cuda.matmul, allow_tf32=False)
        yield


def _set(stack: ExitStack, holder: object, **values: object) -> None:
    for name, value in values.items():
        stack.callback(setattr, holder, name, getattr(holder, name))
        setattr(holder, name, value)
