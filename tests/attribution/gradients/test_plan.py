import pytest
import torch
from torch import nn

from attribution.gradients import Projection, gradient_projector
from attribution.gradients.layers import LinearBlock
from tests.attribution.gradients.models import CASES, mlp

SMALL = Projection(inputs=5, outputs=3, features=4)


def plan(module, projection=SMALL, checkpoint=0):
    return gradient_projector(module, projection, checkpoint).plan


class Doubled(nn.Linear):
    """Computes something else from the parameters of a Linear."""

    def forward(self, x):
        return 2 * super().forward(x) + self.weight.sum()


def test_every_trainable_parameter_is_covered_once():
    for module, _ in CASES.values():
        found = plan(module)
        names = [name for block in found.blocks for name in block.names]
        names += [other.name for other in found.others]
        expected = [name for name, value in module.named_parameters() if value.requires_grad]
        assert sorted(names) == sorted(expected)


def test_layers_that_share_all_parameters_share_a_block():
    found = plan(CASES["tied layers"][0])
    assert found.layers == {"a": 0, "b": 0, "head": 1}
    assert found.blocks[0].names == ("a.weight", "a.bias")
    assert found.aliases["a.bias"] == ("a.bias", "b.bias")


def test_parameters_shared_in_another_way_stand_alone():
    found = plan(CASES["tied weight"][0])
    assert [block.names for block in found.blocks] == [
        ("a.bias",),
        ("b.bias",),
        ("head.weight", "head.bias"),
    ]
    assert [other.name for other in found.others] == ["a.weight"]
    assert [other.name for other in plan(CASES["tied embedding"][0]).others] == ["words.weight"]


def test_frozen_parameters_are_left_out():
    found = plan(CASES["frozen weight"][0])
    assert [block.names for block in found.blocks] == [("0.bias",), ("3.weight",)]
    assert list(found.aliases) == ["0.bias", "3.weight"]


def test_subclasses_of_known_layers_are_not_taken_for_them():
    module = nn.Sequential(Doubled(4, 3), nn.Linear(3, 2))
    found = plan(module)
    assert [type(block) for block in found.blocks] == [LinearBlock]
    assert [other.name for other in found.others] == ["0.weight", "0.bias"]


def test_the_digest_tells_matrices_apart():
    known = plan(mlp()).digest()
    assert plan(mlp()).digest() == known
    assert plan(mlp(), checkpoint=1).digest() != known
    assert plan(mlp(), Projection(inputs=5, outputs=3, features=4, seed=1)).digest() != known
    raw = CASES["Embedding and a raw parameter"][0]
    assert plan(raw, checkpoint=1).digest() != plan(raw).digest()


def test_initial_weights_do_not_matter():
    torch.manual_seed(1)
    first = mlp()
    torch.manual_seed(2)
    assert plan(first).digest() == plan(mlp()).digest()


REFUSED = {
    "'1' has no running statistics": nn.BatchNorm1d(4, track_running_stats=False),
    "'1' has no running statistics, so in eval": nn.BatchNorm1d(
        4, affine=False, track_running_stats=False
    ),
    "'1' has max_norm=1.0": nn.Embedding(3, 4, max_norm=1.0),
    "'1' has scale_grad_by_freq=True": nn.Embedding(3, 4, scale_grad_by_freq=True),
}


@pytest.mark.parametrize(("text", "layer"), REFUSED.items(), ids=REFUSED.keys())
def test_layers_without_gradients_of_one_row_are_refused(text, layer):
    with pytest.raises(ValueError, match=f"layer {text}"):
        plan(nn.Sequential(nn.Linear(2, 2), layer))


def test_settings_of_other_layers_are_their_own():
    module = mlp()
    module[1].max_norm = 1.0
    assert plan(module).sizes == plan(mlp()).sizes


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter: none requires a gradient"):
        plan(nn.ReLU())
    with pytest.raises(ValueError, match="no trainable parameter"):
        plan(mlp().requires_grad_(False))
