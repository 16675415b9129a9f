"""How work is done on a device: which GPUs its processes get, and how exactly GPUs convolve."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def repeatable(*, tf32: bool = False) -> Iterator[None]:
    """Runs the body with convolutions on GPUs that give the same bits every time.

    A GPU rounds what it convolves to TF32, 10 bits, unless told otherwise: too rough for gradients
    that are held against those of a CPU, enough for training.

    Args:
        tf32: whether inputs of convolutions may be rounded to TF32, as torch is set.

    Example:
        >>> with repeatable():
        ...     torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
        (True, False)
    """
    library = torch.backends.cudnn
    rounded = tf32 and library.allow_tf32
    with library.flags(
        enabled=library.enabled, benchmark=False, deterministic=True, allow_tf32=rounded
    ):
        yield
