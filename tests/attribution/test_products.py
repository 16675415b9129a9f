import pytest
import torch

from attribution.products import can_multiply, multiply, multiply_narrow

MODELS, ROWS, INNER, COLUMNS = 3, 7, 5, 17


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


LEFT = {
    "many rows": draw(MODELS, 19, INNER),
    "plain": draw(MODELS, ROWS, INNER),
    "transposed": draw(MODELS, INNER, ROWS).mT,
    "part": draw(MODELS, ROWS + 1, INNER + 2)[:, 1:, 2:],
    "every other column": draw(MODELS, ROWS, 2 * INNER)[..., ::2],
    "one for all": draw(1, ROWS, INNER).expand(MODELS, ROWS, INNER),
}
RIGHT = {
    "plain": draw(MODELS, INNER, COLUMNS),
    "transposed": draw(MODELS, COLUMNS, INNER).mT,
    "transposed, few columns": draw(MODELS, 2, INNER).mT,
    "part, transposed": draw(MODELS, COLUMNS, INNER + 1)[..., 1:].mT,
    "one column": draw(MODELS, INNER, 1),
}


@pytest.mark.parametrize("a", LEFT.values(), ids=LEFT.keys())
@pytest.mark.parametrize("b", RIGHT.values(), ids=RIGHT.keys())
def test_products_equal_those_in_double_precision(a, b):
    expected = (a.double() @ b.double()).float()
    torch.testing.assert_close(multiply(a, b), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("a", LEFT.values(), ids=LEFT.keys())
@pytest.mark.parametrize("b", RIGHT.values(), ids=RIGHT.keys())
def test_narrow_products_lie_transposed(a, b):
    found, expected = multiply_narrow(a, b), (a.double() @ b.double()).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.mT.is_contiguous()


def test_a_model_gets_the_same_bits_in_any_company():
    a, b = LEFT["plain"], RIGHT["transposed"]
    assert torch.equal(multiply(a, b)[1:2], multiply(a[1:2], b[1:2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_are_left_to_torch(dtype):
    assert not can_multiply(LEFT["plain"].to(dtype), RIGHT["plain"].to(dtype))


def test_empty_matrices_are_left_to_torch():
    assert not can_multiply(torch.zeros(MODELS, ROWS, 0), torch.zeros(MODELS, 0, COLUMNS))
