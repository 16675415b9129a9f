"""Images in class folders, and the tasks made of them; the real images where CIFAR10 names them."""

import os
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import examples.cifar
from attribution import ForgetSet, draw_subsets, train_models
from attribution.ensemble_training import why_not_many
from attribution.forget import cluster_rows
from attribution.outputs import evaluate
from attribution.task_file import load_task
from attribution.training import train_many
from examples.cifar import MEAN, STD, cat_dog_from, cifar10_from, flip, image_folder, resnet9

CPU = torch.device("cpu")
ROWS = {"train": 7, "test": 3}  # of each class

real_images = pytest.mark.skipif(
    not examples.cifar.images().exists(),
    reason="no images of CIFAR-10 where the environment variable CIFAR10 says, or in data/",
)


def write_image(file, seed, size=(32, 32)):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def folder(tmp_path):
    """Class folders of random images, with files beside them that are none."""
    for split, rows in ROWS.items():
        for seed, name in enumerate(("cat", "dog", "airplane")):
            for row in range(rows):
                write_image(tmp_path / "images" / split / name / f"{row:04d}.jpg", 100 * seed + row)
    (tmp_path / "images" / "read.me").touch()
    (tmp_path / "images" / "train" / "dog" / ".hidden.jpg").touch()
    (tmp_path / "images" / "train" / "dog" / "notes.txt").touch()
    return tmp_path / "images"


@pytest.fixture
def archive(folder):
    """The same in a zip, its files in another order."""
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as file:
        for name in sorted(folder.rglob("*"), reverse=True):
            file.write(name, name.relative_to(folder))
    return folder.with_suffix(".zip")


@pytest.fixture
def cat_dog(folder):
    """Cat or dog with seven images each, and a recipe of a few steps."""
    task = cat_dog_from(folder, ROWS["train"], ROWS["test"])
    return replace(task, recipe=replace(task.recipe, epochs=2, batch_size=4))


# -- reading ---------------------------------------------------------------------------------


def test_rows_are_normalised_pixels_in_sorted_order(folder):
    data, ids = image_folder(folder, "train", ("dog", "cat"), per_class=2)
    assert ids == (
        "train/dog/0000.jpg",
        "train/dog/0001.jpg",
        "train/cat/0000.jpg",
        "train/cat/0001.jpg",
    )
    inputs, labels = data.tensors
    assert (inputs.shape, inputs.dtype) == ((4, 3, 32, 32), torch.float32)
    assert (labels.tolist(), labels.dtype) == ([0, 0, 1, 1], torch.int64)
    pixels = np.asarray(Image.open(folder / ids[1]), dtype=np.float64)
    expected = ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(inputs[1].numpy(), expected, atol=1e-6)


def test_a_zip_reads_as_its_folder(folder, archive):
    for split in ("train", "test"):
        (data, ids), (zipped, names) = image_folder(folder, split), image_folder(archive, split)
        assert ids == names
        assert len(ids) == 3 * ROWS[split]
        for a, b in zip(data.tensors, zipped.tensors, strict=True):
            assert torch.equal(a, b)


def test_classes_are_those_of_train_by_name(folder):
    data, ids = image_folder(folder, "train")
    classes = [row.split("/")[1] for row in ids[:: ROWS["train"]]]
    assert classes == ["airplane", "cat", "dog"]
    assert data.tensors[1][:: ROWS["train"]].tolist() == [0, 1, 2]


def test_grey_images_are_read_in_colour(folder):
    Image.new("L", (32, 32), 51).save(folder / "train" / "cat" / "0000.jpg")
    data, _ = image_folder(folder, "train", ("cat",), per_class=1)
    pixels = data.tensors[0][0] * torch.tensor(STD)[:, None, None]
    assert torch.allclose(pixels + torch.tensor(MEAN)[:, None, None], torch.tensor(0.2), atol=1e-6)


@pytest.mark.parametrize("name", ["nowhere.zip", "text.zip"])
def test_a_path_without_images_is_refused(tmp_path, name):
    (tmp_path / "text.zip").write_text("no zip")
    expected = rf"no folder or zip '.*{name}' \(.*CIFAR10 to one that holds train/CLASS/\*\.jpg"
    with pytest.raises(ValueError, match=expected):
        image_folder(tmp_path / name, "train")


def test_a_split_without_images_is_refused(folder):
    with pytest.raises(ValueError, match=r"no images in valid/ of .*expected \.jpg"):
        image_folder(folder, "valid")


@pytest.mark.parametrize(
    ("classes", "per_class", "match"),
    [
        (("cat", "wolf"), None, "some images of class 'wolf' in train/ of .*airplane, cat, dog"),
        (("cat",), 8, "expected 8 images of class 'cat' .* found 7"),
        (("cat",), 0, "per_class must be above 0, got 0"),
    ],
)
def test_classes_with_too_few_images_are_refused(folder, classes, per_class, match):
    with pytest.raises(ValueError, match=match):
        image_folder(folder, "train", classes, per_class)


def test_a_class_of_the_test_split_alone_is_refused(folder):
    write_image(folder / "test" / "wolf" / "0.jpg", seed=0)
    with pytest.raises(ValueError, match=r"class 'wolf' has images in test/ of .*, not in train/"):
        image_folder(folder, "test")


def test_an_image_that_cannot_be_read_is_named(folder):
    file = folder / "train" / "cat" / "0003.jpg"
    for content in (b"no image", file.read_bytes()[:400]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"train/cat/0003\.jpg in .* is no image that can be"):
            image_folder(folder, "train")


def test_images_of_different_sizes_are_named(folder):
    write_image(folder / "train" / "dog" / "0002.jpg", seed=0, size=(40, 30))
    expected = r"train/cat/0000\.jpg is 32 x 32, train/dog/0002\.jpg is 40 x 30"
    with pytest.raises(ValueError, match=expected):
        image_folder(folder, "train", ("cat", "dog"))


# -- the tasks by name -----------------------------------------------------------------------


def test_importing_reads_no_image(monkeypatch, tmp_path):
    monkeypatch.setenv("CIFAR10", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has nothing called 'task'"):
        load_task(f"{examples.cifar.__file__}:task")
    with pytest.raises(ValueError, match=r"no folder or zip .*nowhere.* variable CIFAR10"):
        load_task(f"{examples.cifar.__file__}:cat_dog")


def test_images_lie_in_data_unless_the_variable_says_otherwise(monkeypatch):
    monkeypatch.setenv("CIFAR10", "elsewhere")
    assert str(examples.cifar.images()) == "elsewhere"
    monkeypatch.delenv("CIFAR10")
    assert str(examples.cifar.images()) == os.path.join("data", "cifar10-jpeg.zip")


def test_the_variable_gives_both_tasks_their_images(monkeypatch, archive):
    monkeypatch.setenv("CIFAR10", str(archive))
    task = load_task("examples.cifar:cifar10")
    assert task.target_ids[-1] == "test/dog/0002.jpg"
    assert load_task("examples.cifar:cifar10") is task
    with pytest.raises(ValueError, match="expected 1000 images of class 'cat'"):
        load_task("examples.cifar:cat_dog")


# -- training --------------------------------------------------------------------------------


def test_cat_dog_is_small_and_trains_many_at_once(cat_dog):
    cat_dog.check()
    assert sum(p.numel() for p in cat_dog.new_model(0).parameters()) == 106_434
    assert why_not_many(cat_dog) is None
    subsets = [np.arange(14), np.arange(9)]
    many = train_many(cat_dog, subsets, 0, [0, 1], CPU)
    alone = train_many(cat_dog, subsets, 0, [0, 1], CPU, many=False)
    for a, b in zip(many, alone, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_workers_train_a_task_that_came_from_a_file(monkeypatch, archive, tmp_path):
    monkeypatch.setenv("CIFAR10", str(archive))
    loaded = load_task(f"{examples.cifar.__file__}:cifar10")
    # No worker can import the loaded file, where the model and the flips are functions.
    task = sys.modules[loaded.model.__module__].cat_dog_from(archive, ROWS["train"], ROWS["test"])
    task = replace(task, recipe=replace(task.recipe, epochs=1, batch_size=4))
    subsets = draw_subsets(task, models=2, design="half", seed=0)
    here = train_models(task, subsets, tmp_path / "here", workers=0)
    there = train_models(task, subsets, tmp_path / "there", workers=2)
    np.testing.assert_array_equal(there.outputs, here.outputs)
    assert there.outputs.shape == (2, 20, 2)


def test_flips_depend_on_the_row_alone():
    inputs = torch.arange(24.0).reshape(4, 3, 1, 2)
    rows = torch.tensor([5, 0, 3, -1])
    both = flip(inputs, 7, 0, rows)
    for i in range(3):
        assert torch.equal(both[i], flip(inputs[i : i + 1], 7, 0, rows[i : i + 1])[0])
    many = torch.zeros(1000, 1, 1, 2)
    many[..., 0] = 1
    flipped = [flip(many, 7, epoch, torch.arange(1000))[:, 0, 0, 1] for epoch in (0, 1)]
    assert 0.45 < flipped[0].mean() < 0.55
    assert not torch.equal(*flipped)


def test_near_rows_look_alike(cat_dog):
    inputs = cat_dog.train_data.tensors[0]
    inputs[4] = inputs[2] + 0.01 * torch.randn(3, 32, 32)
    assert cat_dog.embed(inputs).shape == (14, 192)
    first = next(s for s in range(100) if cluster_rows(cat_dog, 1, seed=s)[0] == 2)
    assert cluster_rows(cat_dog, 2, seed=first).tolist() == [2, 4]
    assert ForgetSet.at(cat_dog, [2]).ids == ("train/cat/0002.jpg",)


def test_resnet9_takes_a_step():
    model = resnet9()
    assert sum(p.numel() for p in model.parameters()) == 6_573_130
    inputs, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert losses[1] < losses[0]


def test_cifar10_trains_one_by_one(folder, tmp_path):
    task = cifar10_from(folder)
    task.check()
    assert task.recipe.steps(50_000) == 24 * 98
    short = replace(task, recipe=replace(task.recipe, epochs=1, batch_size=16))
    subsets = draw_subsets(short, models=1, design="full", seed=0)
    with pytest.warns(UserWarning, match="one by one: its buffers"):
        full = train_models(short, subsets, tmp_path / "full", keep="weights", workers=0)
    assert full.outputs.shape == (1, 30, 10)
    assert int(full.model(0).state["1.num_batches_tracked"]) == 2


# -- the real images -------------------------------------------------------------------------


@real_images
def test_cat_dog_learns():
    task = examples.cifar.cat_dog
    assert (len(task.train_ids), len(task.test_ids)) == (2000, 500)
    assert task.train_ids[1000] == "train/dog/0000.jpg"
    (state,) = train_many(task, [np.arange(2000)], 0, [0], CPU, many=False)
    inputs, labels = task.rows("test", range(500))
    outputs = evaluate(task.new_model(0), state, inputs)
    assert task.loss.quality(outputs, labels).mean() > 0.64


@real_images
def test_all_classes_are_there():
    data, ids = image_folder(examples.cifar.images(), "test", per_class=100)
    assert len(ids) == 1000
    assert data.tensors[1].unique().tolist() == list(range(10))
    # The whole of CIFAR-10 has mean 0 and variance 1 by channel.
    assert data.tensors[0].mean((0, 2, 3)).abs().max() < 0.1
    assert (data.tensors[0].std((0, 2, 3)) - 1).abs().max() < 0.1
