import numpy as np
import pytest
import torch

from attribution import ForgetSet, parse_forget
from attribution.forget import cluster_rows, nearest_rows, random_rows, row_vectors
from tests.tasks import binary, blobs, line


@pytest.fixture(scope="module")
def task():
    return blobs()


def test_rows_stand_in_the_order_of_the_data(task):
    forget = ForgetSet.of(task, ["train-30", "train-4", "train-11"], "few")
    assert forget.ids == ("train-4", "train-11", "train-30")
    assert forget.positions == (4, 11, 30)
    assert (len(forget), forget.total, forget.name, forget.kind) == (3, 37, "few", "ids")
    assert forget == ForgetSet.at(task, np.array([11, 30, 4]), "few", "ids")


def test_mask_rows_and_retained_agree(task):
    forget = ForgetSet.at(task, [36, 0, 5])
    np.testing.assert_array_equal(forget.rows, [0, 5, 36])
    np.testing.assert_array_equal(np.flatnonzero(forget.mask), [0, 5, 36])
    np.testing.assert_array_equal(forget.retained, np.setdiff1d(np.arange(37), [0, 5, 36]))


def test_union_keeps_the_name_and_every_row_once(task):
    one, two = ForgetSet.at(task, [1, 2, 3], "one"), ForgetSet.at(task, [3, 9], "two")
    both = one.union(task, two)
    assert (both.positions, both.name) == ((1, 2, 3, 9), "one")
    assert one.union(task, None) is one


def test_minus_leaves_the_rows_of_this_set_alone(task):
    one, two = ForgetSet.at(task, [1, 2, 3], "one"), ForgetSet.at(task, [3, 9], "two")
    assert one.minus(task, two).positions == (1, 2)
    assert one.minus(task, None).positions == (1, 2, 3)
    assert one.minus(task, one) is None


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["train-3", "train-99"], r"unknown id 'train-99' \(1 of 2 ids are no training rows"),
        (["trian-12"], "did you mean 'train-12'"),
        (["", "q"], r"unknown id '' \(2 of 2 ids .* of task 'blobs'\)$"),
        ([], "forget set 'mine' is empty: name at least one training row"),
        (["train-3", "train-1", "train-3"], "forget set 'mine' names 'train-3' more than once"),
        (["train-3", "test-4"], "forget set 'mine': 'test-4' is none of the 37 training rows"),
        ([f"train-{i}" for i in range(37)], "holds all 37 training rows: nothing is left"),
    ],
)
def test_unusable_ids_are_refused(task, ids, message):
    with pytest.raises(ValueError, match=message):
        ForgetSet.of(task, ids, "mine")


def test_a_single_string_is_refused(task):
    with pytest.raises(TypeError, match=r"expected a sequence of ids.*write \['train-3'\]"):
        ForgetSet.of(task, "train-3")


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([-1, 3], "-1 is none of the 37 training rows"),
        ([3, 37], "'test-0' is none of the 37 training rows"),
        ([3, 99], "99 is none of the 37 training rows"),
        ([5, 5], "names 'train-5' more than once"),
        ([], "is empty"),
        (range(37), "holds all 37"),
    ],
)
def test_unusable_positions_are_refused(task, positions, message):
    with pytest.raises(ValueError, match=message):
        ForgetSet.at(task, positions)


@pytest.mark.parametrize(
    ("spec", "positions", "kind"),
    [
        ("train-7", (7,), "ids"),
        ("train-7, train-3,", (3, 7), "ids"),
        ("rows:10:13", (10, 11, 12), "rows"),
        ("rows:30:", (30, 31, 32, 33, 34, 35, 36), "rows"),
        ("rows::2", (0, 1), "rows"),
        ("rows:0:20:7", (0, 7, 14), "rows"),
        ("rows:-2:", (35, 36), "rows"),
        ("rows:4", (4,), "rows"),
        ("rows:-1", (36,), "rows"),
    ],
)
@pytest.mark.parametrize("name", [None, "a.b_c-1"])
def test_specs_name_rows(task, spec, positions, kind, name):
    forget = parse_forget(task, f"{name}={spec}" if name else spec)
    assert forget.positions == positions
    assert (forget.name, forget.kind) == (name or spec, kind)


def test_specs_name_files(task, tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("train-9\n\n  train-2 \n")
    for spec, name in ((f"@{path}", f"@{path}"), (f"mine=@{path}", "mine")):
        forget = parse_forget(task, spec)
        assert (forget.positions, forget.name, forget.kind) == ((2, 9), name, "file")


def test_random_specs_are_seeded(task):
    forget = parse_forget(task, "some=random:6:3")
    assert (len(forget), forget.kind) == (6, "random")
    assert forget == parse_forget(task, "some=random:6:3")
    assert forget.positions == tuple(sorted(random_rows(task, 6, 3)))
    assert forget.positions != parse_forget(task, "random:6:4").positions
    assert parse_forget(task, "random:6").positions == parse_forget(task, "random:6:0").positions


def test_random_draws_of_two_sizes_are_not_nested(task):
    for seed in range(3):
        small, large = (set(random_rows(task, size, seed)) for size in (10, 20))
        assert not small <= large
    digits = blobs(rows=300)
    small, large = (parse_forget(digits, f"random:{size}:0") for size in (10, 50))
    assert len(set(small.ids) & set(large.ids)) < 6


def nearest_by_loop(task, first, size):
    inputs, labels = task.rows("train", range(37))
    distances = {
        row: float((inputs[row] - inputs[first]).square().sum())
        for row in range(37)
        if labels[row] == labels[first]
    }
    return tuple(sorted(sorted(distances, key=distances.get)[:size]))


def test_cluster_specs_take_the_nearest_rows_of_the_class(task):
    first = int(cluster_rows(task, 6, 3)[0])
    forget = parse_forget(task, "cluster:6:3")
    assert (forget.positions, forget.kind) == (nearest_by_loop(task, first, 6), "cluster")
    firsts = {int(cluster_rows(task, 1, seed)[0]) for seed in range(9)}
    assert len(firsts) > 3


def test_clusters_use_the_embedding():
    task = blobs(embed=lambda inputs: inputs[:, :1])
    vectors, _ = row_vectors(task)
    torch.testing.assert_close(
        torch.from_numpy(vectors), task.rows("train", range(37))[0][:, :1].double()
    )


def test_a_regression_has_one_class():
    task = line()
    assert set(row_vectors(task)[1]) == {0}
    assert len(parse_forget(task, "cluster:36:0")) == 36


def test_one_logit_has_two_classes_whatever_the_dtype_of_its_labels():
    task = binary()
    labels = task.rows("train", range(37))[1]
    assert labels.is_floating_point()
    for seed in range(5):
        assert len(labels[cluster_rows(task, 9, seed)].unique()) == 1
    np.testing.assert_array_equal(row_vectors(task)[1], labels.numpy())


def test_a_row_leads_its_copies():
    vectors = np.array([[1.0], [1.0], [1.0], [0.5]])
    np.testing.assert_array_equal(nearest_rows(vectors, np.zeros(4, int), 2), [2, 0, 1, 3])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rows:a:b", "expected rows:START:STOP, a Python slice, got 'rows:a:b'"),
        ("rows:-", "expected rows:START:STOP, a Python slice, got 'rows:-'"),
        ("rows:1:-", "expected rows:START:STOP, a Python slice, got 'rows:1:-'"),
        ("rows:1:2:0", "the step of a slice cannot be 0, got 'rows:1:2:0'"),
        ("rows:5:5", "forget set 'rows:5:5' is empty"),
        ("rows::", "holds all 37 training rows"),
        ("rows:", "holds all 37 training rows"),
        ("rows:99", "is empty"),
        ("random:x", "expected random:SIZE:SEED or cluster:SIZE:SEED, got 'random:x'"),
        ("random:5:-1", "expected random:SIZE:SEED"),
        ("random:0:1", "'random:0:1' asks for 0 of 37 training rows: take 1 to 36"),
        ("cluster:37:1", "'cluster:37:1' asks for 37 of 37 training rows: take 1 to 36"),
        (
            "cluster:30:1",
            "cluster:30:1 asks for 30 rows of the class of 'train-.*', which has 1[89]",
        ),
        ("@nowhere.txt", "cannot read the file of ids 'nowhere.txt': No such file"),
        ("", "is empty"),
        (",", "is empty"),
        ("mine=train-99", "unknown id 'train-99'"),
    ],
)
def test_unusable_specs_are_refused(task, spec, message):
    with pytest.raises(ValueError, match=message):
        parse_forget(task, spec)


def test_a_file_that_is_no_text_is_refused(task, tmp_path):
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="cannot read the file of ids"):
        parse_forget(task, f"@{tmp_path / 'image'}")
