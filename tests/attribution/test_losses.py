import math

import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.nn import functional

from attribution.losses import BinaryCrossEntropy, CrossEntropy, SquaredError, one_hot, softmax

ROWS, OUTPUTS = 7, 5
CLASSES = torch.tensor([0, 4, 2, 2, 1, 3, 0])
BITS = torch.tensor([0, 1, 1, 0, 1, 0, 0])
CASES = {
    "classes": (CrossEntropy(), CLASSES, OUTPUTS),
    "one logit": (BinaryCrossEntropy(), BITS, 1),
    "one logit, labels as floats": (BinaryCrossEntropy(), BITS.float(), 1),
    "one number": (SquaredError(), torch.linspace(-1, 2, ROWS).double(), 1),
    "numbers": (
        SquaredError(),
        torch.linspace(-1, 2, ROWS * OUTPUTS).double().reshape(ROWS, -1),
        OUTPUTS,
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    loss, labels, width = request.param
    return loss, 3 * torch.randn(ROWS, width, dtype=torch.float64), labels


def test_gradients_equal_autodiff(case):
    loss, outputs, labels = case
    expected = vmap(grad(loss.value))(outputs, labels)
    torch.testing.assert_close(loss.gradient(outputs, labels), expected, rtol=0, atol=1e-12)


def test_hessians_equal_autodiff(case):
    loss, outputs, labels = case
    expected = vmap(jacrev(grad(loss.value)))(outputs, labels)
    torch.testing.assert_close(loss.hessian(outputs), expected, rtol=0, atol=1e-12)


def test_a_leading_model_axis_changes_nothing(case):
    loss, outputs, labels = case
    models = torch.stack([outputs, 2 * outputs, -outputs])
    many = labels.expand(3, *labels.shape)
    for name in ("value", "gradient", "margin", "quality"):
        expected = torch.stack([getattr(loss, name)(one, labels) for one in models])
        torch.testing.assert_close(getattr(loss, name)(models, many), expected)
    expected = torch.stack([loss.hessian(one) for one in models])
    torch.testing.assert_close(loss.hessian(models), expected)


def test_cross_entropy_equals_torch():
    outputs = torch.randn(ROWS, OUTPUTS, dtype=torch.float64)
    expected = functional.cross_entropy(outputs, CLASSES, reduction="none")
    torch.testing.assert_close(CrossEntropy().value(outputs, CLASSES), expected)


def test_binary_cross_entropy_equals_torch():
    outputs = 3 * torch.randn(ROWS, 1, dtype=torch.float64)
    expected = functional.binary_cross_entropy_with_logits(
        outputs[:, 0], BITS.double(), reduction="none"
    )
    torch.testing.assert_close(BinaryCrossEntropy().value(outputs, BITS), expected)


@pytest.mark.parametrize("labels", [BITS, BITS.bool(), BITS.to(torch.uint8), BITS.float()])
def test_one_logit_is_the_difference_of_two(labels):
    logit = 3 * torch.randn(ROWS, 1, dtype=torch.float64)
    pair = torch.cat([torch.zeros_like(logit), logit], 1)
    one, two = BinaryCrossEntropy(), CrossEntropy()
    for name in ("value", "margin", "quality"):
        expected = getattr(two, name)(pair, BITS)
        torch.testing.assert_close(getattr(one, name)(logit, labels), expected)
    torch.testing.assert_close(one.gradient(logit, labels)[:, 0], two.gradient(pair, BITS)[:, 1])
    torch.testing.assert_close(one.hessian(logit)[:, 0, 0], two.hessian(pair)[:, 1, 1])


@pytest.mark.parametrize("size", [50.0, 1e4])
def test_large_logits_stay_finite(size):
    loss, logits, labels = BinaryCrossEntropy(), torch.tensor([[size], [-size]]), BITS[:2]
    assert loss.value(logits, labels).tolist() == [size, size]
    assert loss.gradient(logits, labels).tolist() == [[1.0], [-1.0]]
    assert 0 <= float(loss.hessian(logits).max()) < 1e-20
    right = loss.value(logits, 1 - labels)
    assert bool((right >= 0).all())
    assert float(right.max()) < 1e-20


def test_squared_error_is_half_the_squared_distance():
    values = SquaredError().value(
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [1.0, -1.0]])
    )
    torch.testing.assert_close(values, torch.tensor([2.0, 1.0]))


def test_margins_are_the_labels_logit_minus_the_log_sum_of_the_others():
    outputs = torch.tensor([[1.0, 2.0, 0.5], [100.0, -100.0, 0.0]], dtype=torch.float64)
    margins = CrossEntropy().margin(outputs, torch.tensor([1, 0]))
    assert margins.tolist() == pytest.approx([2 - math.log(math.e + math.exp(0.5)), 100])


def test_a_margin_is_the_log_odds_of_the_label():
    outputs = torch.randn(ROWS, OUTPUTS, dtype=torch.float64)
    chosen = outputs.softmax(-1).gather(1, CLASSES[:, None]).squeeze(1)
    expected = torch.log(chosen / (1 - chosen))
    torch.testing.assert_close(CrossEntropy().margin(outputs, CLASSES), expected)


def test_the_margin_of_a_regression_is_its_first_output():
    outputs = torch.randn(3, ROWS, 2)
    margins = SquaredError().margin(outputs, torch.zeros(ROWS))
    torch.testing.assert_close(margins, outputs[..., 0], rtol=0, atol=0)


def test_quality_counts_right_classes_and_squared_errors():
    outputs = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert CrossEntropy().quality(outputs, torch.tensor([1, 1])).tolist() == [1, 0]
    assert SquaredError().quality(outputs, torch.tensor([[0.0, 0.0], [2.0, 4.0]])).tolist() == [
        -1,
        -9,
    ]


@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
def test_softmax_equals_torch(scale):
    outputs = scale * torch.randn(3, ROWS, OUTPUTS, dtype=torch.float64)
    torch.testing.assert_close(softmax(outputs), torch.softmax(outputs, -1), rtol=1e-13, atol=1e-15)


def test_one_hot_equals_torch():
    outputs = torch.zeros(ROWS, OUTPUTS, dtype=torch.float64)
    expected = functional.one_hot(CLASSES, OUTPUTS).double()
    torch.testing.assert_close(one_hot(CLASSES, outputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("loss", "labels", "outputs"),
    [
        (CrossEntropy(), CLASSES, OUTPUTS),
        (BinaryCrossEntropy(), BITS, 1),
        (BinaryCrossEntropy(), BITS.bool(), 1),
        (BinaryCrossEntropy(), BITS.double(), 1),
        (SquaredError(), torch.randn(ROWS), 1),
        (SquaredError(), CLASSES, 1),
        (SquaredError(), torch.randn(ROWS, 3), 3),
    ],
)
def test_labels_that_fit_are_taken(loss, labels, outputs):
    loss.check_labels(labels, outputs)


@pytest.mark.parametrize(
    ("loss", "labels", "outputs", "text"),
    [
        (CrossEntropy(), BITS.float(), 2, r"dtype torch.float32 and shape \(7,\): cross-entropy"),
        (CrossEntropy(), CLASSES[:, None], OUTPUTS, r"shape \(7, 1\): cross-entropy takes class"),
        (CrossEntropy(), CLASSES, 4, "labels run from 0 to 4, the model has 4 outputs"),
        (BinaryCrossEntropy(), BITS, 2, "the model has 2 outputs: use CrossEntropy for one logit"),
        (BinaryCrossEntropy(), BITS[:, None], 1, r"shape \(7, 1\): binary cross-entropy takes one"),
        (BinaryCrossEntropy(), CLASSES, 1, "labels must be 0 or 1, got 4"),
        (BinaryCrossEntropy(), 2 * BITS - 1, 1, "labels must be 0 or 1, got -1"),
        (BinaryCrossEntropy(), 0.5 * BITS, 1, "labels must be 0 or 1, got 0.5"),
        (BinaryCrossEntropy(), BITS * torch.nan, 1, "labels must be 0 or 1, got nan"),
        (SquaredError(), torch.randn(ROWS), 2, r"shape \(7,\), the model has 2 outputs: squared e"),
        (SquaredError(), torch.randn(ROWS, 3), 1, r"shape \(7, 3\), the model has 1 outputs"),
        (SquaredError(), BITS / 0, 1, "labels must be finite"),
    ],
)
def test_labels_that_do_not_fit_are_refused(loss, labels, outputs, text):
    with pytest.raises(ValueError, match=text):
        loss.check_labels(labels, outputs)


def test_classes_are_the_labels_of_a_classification_only():
    assert torch.equal(CrossEntropy().classes(CLASSES), CLASSES)
    assert torch.equal(BinaryCrossEntropy().classes(BITS.float()), BITS)
    assert torch.equal(SquaredError().classes(torch.randn(ROWS, 2)), torch.zeros(ROWS).long())
