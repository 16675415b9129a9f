"""Which GPUs the processes that compute on a device get."""

import os

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
