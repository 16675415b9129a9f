"""CIFAR-10 as JPEGs in class folders: cat or dog for a CPU, all ten classes for a GPU.

The images, train/CLASS/*.jpg and test/CLASS/*.jpg, lie in the folder or zip that the environment
variable CIFAR10 names, by default data/cifar10-jpeg.zip. Versions of Pillow may decode a JPEG
differently in the last bit; stores made with one are then refused with another.

A model takes far longer to train than one of the digits, so ask for fewer of them:

    dmm precompute examples/cifar.py:cat_dog --run runs/cat_dog --full-models 20 --subset-models 200
"""

import io
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from attribution import Recipe, Task
from attribution.seeds import generator

DEFAULT = "data/cifar10-jpeg.zip"
SUFFIXES = (".jpg", ".jpeg", ".png")
# Of the training images of CIFAR-10 by channel, pixels from 0 to 1.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Read = Callable[[str], bytes]
Images = tuple[TensorDataset, tuple[str, ...]]  # rows and their ids

# -- images ----------------------------------------------------------------------------------


def image_folder(
    path: str | os.PathLike[str],
    split: str,
    classes: Sequence[str] | None = None,
    per_class: int | None = None,
) -> Images:
    """Reads the images of one split, x = (pixel / 255 - MEAN) / STD in each channel.

    Args:
        path: folder or zip with SPLIT/CLASS/IMAGE; files that are no images do not count.
        split: train or test.
        classes: class folders, numbered in this order; none given: all of train, by name.
        per_class: the first so many images of each class, by name; None: all.

    Returns:
        Rows of (float32 [3, height, width], class number) and their ids, SPLIT/CLASS/IMAGE.

    Raises:
        ValueError: no such folder or zip, a class without images or with too few, an image that
            cannot be read, or images of different sizes.
    """
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class must be above 0, got {per_class}")
    with _opened(Path(path)) as (names, read):
        files = _by_class(names, split)
        wanted = classes or sorted(_by_class(names, "train"))
        _check_classes(files, wanted, per_class, f"{split}/ of {path}")
        unknown = set() if classes else set(files) - set(wanted)
        if unknown:
            raise ValueError(
                f"class {min(unknown)!r} has images in {split}/ of {path}, not in train/"
            )
        chosen = [files[name][:per_class] for name in wanted]
        ids = tuple(name for names in chosen for name in names)
        inputs = _normalised(_stacked(ids, read, path))
    labels = np.repeat(np.arange(len(chosen)), [len(names) for names in chosen])
    return TensorDataset(inputs, torch.from_numpy(labels)), ids


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Read]]:
    """Names of the files three levels deep, with "/" between the levels, and how to read one."""
    if path.is_dir():
        files = [file.relative_to(path).as_posix() for file in path.glob("*/*/*")]
        yield files, lambda name: (path / name).read_bytes()
        return
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"there is no folder or zip {str(path)!r} ({error}): set the environment variable"
            " CIFAR10 to one that holds train/CLASS/*.jpg and test/CLASS/*.jpg"
        ) from error
    with archive:
        yield archive.namelist(), archive.read


def _by_class(names: Sequence[str], split: str) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        parts = name.split("/")
        hidden = parts[-1].startswith(".")
        if len(parts) == 3 and parts[0] == split and name.lower().endswith(SUFFIXES) and not hidden:
            files.setdefault(parts[1], []).append(name)
    return files


def _check_classes(
    files: Mapping[str, Sequence[str]], wanted: Sequence[str], per_class: int | None, where: str
) -> None:
    if not files:
        raise ValueError(f"no images in {where}: expected {' '.join(SUFFIXES)} in class folders")
    for name in wanted:
        found = len(files.get(name, ()))
        if found < (per_class or 1):
            raise ValueError(
                f"expected {per_class or 'some'} images of class {name!r} in {where}, found"
                f" {found}; its classes are {', '.join(sorted(files))}"
            )


def _stacked(names: Sequence[str], read: Read, path: str | os.PathLike[str]) -> Pixels:
    """Pixels of all images, [row, height, width, 3]."""
    first = _decoded(names[0], read, path)
    pixels = np.empty((len(names), *first.shape), dtype=np.uint8)
    for row, name in enumerate(names):
        image = _decoded(name, read, path)
        if image.shape != first.shape:
            a, b = (f"{width} x {height}" for height, width, _ in (first.shape, image.shape))
            raise ValueError(
                f"images of different sizes in {path}: {names[0]} is {a}, {name} is {b} pixels"
                " wide and high; bring all to one size"
            )
        pixels[row] = image
    return pixels


def _decoded(name: str, read: Read, path: str | os.PathLike[str]) -> Pixels:
    try:
        with Image.open(io.BytesIO(read(name))) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # a damaged file raises one of many kinds
        kind = type(error).__name__
        raise ValueError(f"{name} in {path} is no image that can be read ({kind})") from error


def _normalised(pixels: Pixels) -> Tensor:
    inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float()
    # In place: all of CIFAR-10 takes 740 MB.
    inputs.div_(255).sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))
    return inputs


# -- models ----------------------------------------------------------------------------------


def cnn() -> nn.Module:
    """Six convolutions for images of 32 x 32 pixels and two classes: 106,434 parameters.

    No BatchNorm, so that many models can be trained at once; He's initialisation, because the
    default one learns little in 12 epochs.
    """
    return nn.Sequential(
        *_convolution(3, 16),
        nn.MaxPool2d(2),
        *_convolution(16, 32),
        *_convolution(32, 48),
        nn.MaxPool2d(2),
        *_convolution(48, 48),
        *_convolution(48, 64),
        nn.MaxPool2d(2),
        *_convolution(64, 64),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 2),
    )


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    layer = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer, nn.ReLU()


def resnet9() -> nn.Module:
    """ResNet-9 with BatchNorm for images of 32 x 32 pixels and ten classes: 6,573,130 parameters.

    Source: layout of D. Page, How to Train Your ResNet (2018), the logits scaled by 1/8.
    """
    return nn.Sequential(
        *_normalised_convolution(3, 64),
        *_normalised_convolution(64, 128),
        nn.MaxPool2d(2),
        Residual(128),
        *_normalised_convolution(128, 256),
        nn.MaxPool2d(2),
        *_normalised_convolution(256, 512),
        nn.MaxPool2d(2),
        Residual(512),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 10),
        Scale(0.125),
    )


def _normalised_convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


class Residual(nn.Module):
    """x + f(x), where f is two convolutions, each with BatchNorm and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        pair = (_normalised_convolution(channels, channels) for _ in range(2))
        self.body = nn.Sequential(*(layer for layers in pair for layer in layers))

    def forward(self, inputs: Tensor) -> Tensor:
        """The inputs plus what the two convolutions make of them."""
        outputs: Tensor = inputs + self.body(inputs)
        return outputs


class Scale(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        """The inputs times the factor."""
        return self.factor * inputs


# -- tasks -----------------------------------------------------------------------------------


def flip(inputs: Tensor, seed: int, epoch: int, rows: Tensor) -> Tensor:
    """Mirrors each image in half of the epochs, drawn from (seed, epoch, row) alone."""
    # A generator's first numbers stay the same however many are drawn.
    coins = generator(seed, "flips", epoch).random(int(rows.max()) + 1) < 0.5
    mirrored = torch.from_numpy(coins).to(inputs.device)[rows]
    return torch.where(mirrored.view(-1, 1, 1, 1), inputs.flip(-1), inputs)


def coarse_colours(inputs: Tensor) -> Tensor:
    """Means of 4 x 4 pixels by channel, [row, 192]: rows are near that look alike from afar.

    Features of a trained network would group by content, but tie forget sets to that network.
    """
    return nn.functional.avg_pool2d(inputs, 4).flatten(1)


PETS = ("cat", "dog")
SMALL_RECIPE = Recipe(epochs=12, batch_size=32, peak_rate=0.03, augment=flip, version="flip 1")
# The rate peaks in the fifth epoch, as is usual for ResNet-9 on CIFAR-10.
FULL_RECIPE = Recipe(epochs=24, batch_size=512, peak_rate=0.4, peak_at=5 / 24)


@cache
def cat_dog_from(path: Path, train: int = 1000, test: int = 250) -> Task:
    """The task to tell cats from dogs, from so many images of each in a folder or zip."""
    train_rows = image_folder(path, "train", PETS, train)
    test_rows = image_folder(path, "test", PETS, test)
    return _task("cat-dog", train_rows, test_rows, cnn, SMALL_RECIPE)


@cache
def cifar10_from(path: Path) -> Task:
    """The task of all classes in a folder or zip; the images stay in memory, 740 MB of them."""
    train_rows, test_rows = image_folder(path, "train"), image_folder(path, "test")
    return _task("cifar10", train_rows, test_rows, resnet9, FULL_RECIPE)


def _task(
    name: str, train: Images, test: Images, model: Callable[[], nn.Module], recipe: Recipe
) -> Task:
    return Task(
        name,
        train_data=train[0],
        test_data=test[0],
        model=model,
        recipe=recipe,
        train_ids=train[1],
        test_ids=test[1],
        embed=coarse_colours,
    )


def images() -> Path:
    """Where the images lie."""
    return Path(os.environ.get("CIFAR10") or DEFAULT)


def __getattr__(name: str) -> Task:
    """Gives the tasks `cat_dog` and `cifar10`; images are read when a task is first asked for."""
    if name == "cat_dog":
        return cat_dog_from(images())
    if name == "cifar10":
        return cifar10_from(images())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
