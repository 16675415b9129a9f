import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from attribution import ForgetSet, Model, load_model
from attribution.model import check_state, with_forgotten
from tests.tasks import blobs, normalised_mlp


@pytest.fixture
def task():
    return blobs()


@pytest.fixture
def model(task):
    return Model(task, task.new_model(3).state_dict(), provenance={"method": "none", "seed": 3})


def assert_equal_states(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["datamodel-matching"])


def test_outputs_follow_the_targets(task, model):
    inputs, _ = task.targets()
    expected = task.new_model(3)(inputs).detach().numpy()
    np.testing.assert_allclose(model.outputs(), expected, atol=1e-6)
    np.testing.assert_allclose(model.outputs([40, 2]), expected[[40, 2]], atol=1e-6)


def test_digests_change_with_a_weight_or_its_name(model):
    def digest(state):
        return Model(model.task, state).digest()

    state = {name: tensor.clone() for name, tensor in model.state.items()}
    assert digest(dict(reversed(state.items()))) == model.digest()
    renamed = {("x" if name == "0.bias" else name): tensor for name, tensor in state.items()}
    assert digest(renamed) != model.digest()
    state["2.bias"][1] += 1
    assert digest(state) != model.digest()


def test_a_model_comes_back_as_it_was_saved(task, model, tmp_path):
    path = tmp_path / "model.safetensors"
    model.save(path)
    found = load_model(task, path)
    assert_equal_states(found.state, model.state)
    assert found.forgotten is None
    assert found.provenance == {"method": "none", "seed": 3, "file": "model.safetensors"}
    assert list(tmp_path.iterdir()) == [path]


def test_buffers_and_strided_tensors_are_saved_too(tmp_path):
    task = blobs(model=normalised_mlp)
    state = task.new_model(0).state_dict()
    state["0.weight"] = torch.randn(3, 5).T
    Model(task, state).save(tmp_path / "model.safetensors")
    assert_equal_states(load_model(task, tmp_path / "model.safetensors").state, dict(state))


def test_forgotten_rows_are_saved_as_salted_digests(task, model, tmp_path):
    task = blobs(train_ids=[f"person-{i}" for i in range(37)])
    forget = ForgetSet.of(task, ["person-17", "person-4"])
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in files:
        Model(task, model.state, forget).save(path)
        assert b"person" not in path.read_bytes()
        assert load_model(task, path).forgotten.ids == ("person-4", "person-17")
    one, two = (metadata(path)["forgotten"] for path in files)
    assert len(one) == len(two) == 2
    assert not set(one) & set(two)


def test_saving_again_keeps_what_is_forgotten(task, model, tmp_path):
    forget = ForgetSet.at(task, [5, 6])
    Model(task, model.state, forget).save(tmp_path / "one.safetensors")
    load_model(task, tmp_path / "one.safetensors").save(tmp_path / "two.safetensors")
    assert load_model(task, tmp_path / "two.safetensors").forgotten.positions == (5, 6)


def test_forgotten_rows_that_the_task_does_not_know_are_refused(task, model, tmp_path):
    Model(task, model.state, ForgetSet.at(task, [5, 36])).save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has forgotten 2 rows, of which task 'blobs' knows 1"):
        load_model(blobs(rows=36), tmp_path / "model.safetensors")


def test_files_of_others_are_taken_as_trained_on_all_rows(task, model, tmp_path):
    save_file(model.state, tmp_path / "plain.safetensors")
    found = load_model(task, tmp_path / "plain.safetensors")
    assert_equal_states(found.state, dict(model.state))
    assert found.forgotten is None


@pytest.mark.parametrize("wrapped", [False, True])
def test_torch_files_of_tensors_are_read(task, model, tmp_path, wrapped):
    content = {"state_dict": model.state, "epoch": 3} if wrapped else model.state
    torch.save(content, tmp_path / "model.pt")
    assert_equal_states(load_model(task, tmp_path / "model.pt").state, dict(model.state))


UNREADABLE = {
    "missing.safetensors": None,
    "missing.pt": None,
    "garbage.safetensors": b"no such thing",
    "garbage.pt": b"no such thing",
    "empty.pt": b"",
}


@pytest.mark.parametrize(("name", "content"), UNREADABLE.items(), ids=UNREADABLE)
def test_unreadable_files_are_refused(task, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read the checkpoint '.*{name}'"):
        load_model(task, tmp_path / name)


OTHER_THINGS = [torch.zeros(3), [1, 2], {"state_dict": 3}, {"state_dict": [1]}]


@pytest.mark.parametrize("content", OTHER_THINGS, ids=str)
def test_torch_files_of_other_things_are_refused(task, tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    kind = type(content["state_dict"] if isinstance(content, dict) else content).__name__
    with pytest.raises(ValueError, match=f"checkpoint .*: it holds a {kind}, not a state dict"):
        load_model(task, tmp_path / "model.pt")


def test_torch_files_of_more_than_tensors_are_refused(task, tmp_path):
    torch.save(nn.Linear(3, 2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*: .* more than tensors"):
        load_model(task, tmp_path / "model.pt")


def with_changes(state, **changes):
    changed = dict(state)
    for name, value in changes.items():
        key = name.replace("_", ".")
        if value is None:
            del changed[key]
        else:
            changed[key] = value
    return changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0_bias": None}, "x does not fit task 'blobs': key '0.bias' is missing"),
        ({"9_bias": torch.zeros(2)}, "x does not fit task 'blobs': unexpected key '9.bias'"),
        (
            {"2_weight": torch.zeros(2, 6)},
            r"key '2.weight' has shape \(2, 6\), the model's is \(2, 5\)",
        ),
        ({"2_bias": torch.tensor([0, torch.nan])}, "x has non-finite weights in key '2.bias'"),
        ({"2_bias": torch.tensor([0, torch.inf])}, "x has non-finite weights in key '2.bias'"),
        (
            {"2_bias": torch.zeros(2).double()},
            "key '2.bias' has dtype torch.float64, the model's is torch.float32",
        ),
        ({"2_bias": [0.0, 0.0]}, "key '2.bias' holds no tensor"),
    ],
)
def test_states_that_do_not_fit_are_refused(task, model, changes, message):
    with pytest.raises(ValueError, match=message):
        check_state(task, with_changes(model.state, **changes), "x")


def test_a_checkpoint_that_does_not_fit_is_named(task, model, tmp_path):
    save_file(with_changes(model.state, **{"0_bias": None}), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors does not fit.* '0.bias' is missing"):
        load_model(task, tmp_path / "model.safetensors")


def test_folders_that_cannot_be_written_are_refused(model, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "model.safetensors", tmp_path / "file" / "m.safetensors"):
        with pytest.raises(ValueError, match=r"cannot write '.*m.*\.safetensors'"):
            model.save(path)


def test_other_file_types_are_not_written(model, tmp_path):
    with pytest.raises(ValueError, match=r"models are written as \.safetensors, got '.*model.pt'"):
        model.save(tmp_path / "model.pt")


def test_forgetting_adds_up(task, model):
    once = with_forgotten(model, model.state, ForgetSet.at(task, [3, 4]), method="one")
    twice = with_forgotten(once, model.state, ForgetSet.at(task, [4, 9]), method="two")
    assert once.forgotten.positions == (3, 4)
    assert twice.forgotten.positions == (3, 4, 9)
    assert twice.provenance == {"method": "two", "seed": 3}
    assert model.forgotten is None
