import pytest
import torch

from attribution.gradients.jacobian import Dense
from attribution.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from attribution.newton import linearised
from attribution.newton.inverse import Inverse
from attribution.newton.linearised import Linearised, retrain

ROWS, WIDTH = 30, 7
LOSSES = {
    "softmax": (CrossEntropy(), torch.arange(ROWS) % 3, 3),
    "one logit": (BinaryCrossEntropy(), torch.arange(ROWS) % 2, 1),
    "regression": (SquaredError(), torch.linspace(-2, 1, ROWS), 1),
}
DAMPING = 0.4


@pytest.fixture(params=LOSSES.values(), ids=LOSSES.keys())
def drawn(request):
    """Loss, labels, and J [row, output, feature], outputs z [row, output] of some rows."""
    loss, labels, width = request.param
    j = torch.randn(ROWS, width, WIDTH, dtype=torch.float64)
    return loss, labels, j, 2 * torch.randn(ROWS, width, dtype=torch.float64)


def problem_of(drawn, temperature=1.0, block=7):
    loss, labels, j, z = drawn

    def blocks():
        for start in range(0, ROWS, block):
            span = slice(start, min(start + block, ROWS))
            yield span, Dense(j[span])

    return Linearised(blocks, z, labels, loss, temperature)


def weights_of(before=1.0, after=0.0, removed=9):
    ones = torch.ones(ROWS, dtype=torch.float64)
    first, second = ones.clone(), ones.clone()
    first[:removed], second[:removed] = before, after
    return first, second


def objective(drawn, weights, temperature=1.0):
    """What the step minimises: weighted losses of the linearised model, its own slope put right."""
    loss, labels, j, z = drawn
    before, after = weights
    slope = torch.einsum("r,roi,ro->i", before, j, loss.gradient(z / temperature, labels))

    def value(step):
        outputs = (z + j @ step) / temperature
        parts = after * loss.value(outputs, labels) * temperature
        return parts.sum() - slope @ step + DAMPING / 2 * step @ step

    return value


def pull_of(drawn, weights, temperature=1.0):
    loss, labels, j, z = drawn
    before, after = weights
    gradients = loss.gradient(z / temperature, labels)
    return torch.einsum("r,roi,ro->i", before - after, j, gradients)


def inverse_of(drawn, weights, temperature=1.0):
    loss, _, j, z = drawn
    hessians = loss.hessian(z / temperature) / temperature
    matrix = torch.einsum("r,rai,rab,rbj->ij", weights[1], j, hessians, j)
    matrix = matrix + DAMPING * torch.eye(WIDTH)
    return both(lambda v: torch.linalg.solve(matrix, v))


def both(apply):
    return Inverse(apply, apply)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("removal", [(1.0, 0.0), (0.7, 0.2)])
def test_the_residual_is_the_gradient_of_the_objective(drawn, temperature, removal):
    weights, step = weights_of(*removal), torch.randn(WIDTH, dtype=torch.float64)
    found, curvatures = problem_of(drawn, temperature).residual(weights, DAMPING, step)
    value = objective(drawn, weights, temperature)
    torch.testing.assert_close(found, torch.func.grad(value)(step))
    at_rest, _ = problem_of(drawn, temperature).residual(weights, DAMPING, 0 * step)
    torch.testing.assert_close(at_rest, -pull_of(drawn, weights, temperature))
    hessian = torch.func.jacrev(torch.func.grad(value))(step)
    product = problem_of(drawn, temperature).curved(curvatures, DAMPING, step)
    torch.testing.assert_close(product, hessian @ step)


@pytest.mark.parametrize("block", [1, 7, 29, 30])
def test_blocks_of_any_size_agree(drawn, block):
    weights, step = weights_of(), torch.randn(WIDTH, dtype=torch.float64)
    found, curvatures = problem_of(drawn, block=block).residual(weights, DAMPING, step)
    expected, others = problem_of(drawn, block=11).residual(weights, DAMPING, step)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(curvatures, others)


def test_the_first_step_is_the_inverse_of_the_pull(drawn):
    weights = weights_of()
    pull, inverse = pull_of(drawn, weights), inverse_of(drawn, weights)
    (found,) = retrain(problem_of(drawn), weights, DAMPING, pull, inverse, steps=1)
    torch.testing.assert_close(found, inverse.exact(pull))


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("removal", [(1.0, 0.0), (0.7, 0.2)])
def test_many_steps_end_at_the_minimum(drawn, monkeypatch, temperature, removal):
    monkeypatch.setattr(linearised, "ENOUGH", 1e-9)
    weights = weights_of(*removal)
    pull, inverse = (
        pull_of(drawn, weights, temperature),
        inverse_of(drawn, weights, temperature),
    )
    problem = problem_of(drawn, temperature)
    found = retrain(problem, weights, DAMPING, pull, inverse, steps=40)[-1]
    slope = torch.func.grad(objective(drawn, weights, temperature))(found)
    assert float(slope.norm()) <= 1e-8 * float(pull.norm())


def test_it_stops_when_it_is_near_enough(drawn):
    asked = []
    weights = weights_of()
    pull, inverse = pull_of(drawn, weights), inverse_of(drawn, weights)
    problem = problem_of(drawn)

    def blocks():
        asked.append(1)
        yield from problem.blocks()

    counted = Linearised(blocks, *drawn[3:], drawn[1], drawn[0])
    few = retrain(counted, weights, DAMPING, pull, inverse, steps=100)
    passes = len(asked)
    more = retrain(counted, weights, DAMPING, pull, inverse, steps=200)
    assert passes < 60
    assert len(few) == len(more)
    assert torch.equal(few[-1], more[-1])


def test_an_overshoot_is_taken_back():
    j = torch.randn(ROWS, 1, WIDTH, dtype=torch.float64)
    drawn = SquaredError(), torch.randn(ROWS), j, torch.randn(ROWS, 1, dtype=torch.float64)
    weights = weights_of()
    pull, exact = pull_of(drawn, weights), inverse_of(drawn, weights).exact
    far = both(lambda v: 3 * exact(v))
    path = retrain(problem_of(drawn), weights, DAMPING, pull, far, steps=3)
    for end, length in zip(path, (3, 1.5, 1), strict=True):
        torch.testing.assert_close(end, length * exact(pull))


def test_nothing_to_remove_moves_nothing(drawn):
    weights, nothing = weights_of(after=1.0), torch.zeros(WIDTH, dtype=torch.float64)
    found = retrain(problem_of(drawn), weights, DAMPING, nothing, both(torch.clone), steps=5)[-1]
    assert torch.equal(found, nothing)


def test_later_steps_are_solved_roughly(drawn, monkeypatch):
    """With the rough inverse as preconditioner, to a part of the residual, in few iterations."""
    asked, weights, true = [], weights_of(), linearised.conjugate

    def conjugate(apply, right, inverse, **given):
        asked.append((inverse, given))
        return true(apply, right, inverse, **given)

    monkeypatch.setattr(linearised, "conjugate", conjugate)
    monkeypatch.setattr(linearised, "ENOUGH", 1e-9)
    pull, exact = pull_of(drawn, weights), inverse_of(drawn, weights).exact
    rough = Inverse(lambda v: 0.9 * exact(v), lambda v: v / 50)
    problem = problem_of(drawn)
    path = retrain(problem, weights, DAMPING, pull, rough, steps=3)
    assert len(path) == 3
    assert asked == [(rough.rough, {"enough": 0.03, "most": 20})] * 2
    torch.testing.assert_close(path[0], 0.9 * exact(pull))
    sizes = [float(problem.residual(weights, DAMPING, d)[0].norm()) for d in path]
    assert sizes[0] > sizes[1] > sizes[2]


def test_fewer_steps_are_the_first_of_more(drawn, monkeypatch):
    monkeypatch.setattr(linearised, "ENOUGH", 0.0)
    weights = weights_of()
    given = problem_of(drawn), weights, DAMPING, pull_of(drawn, weights), inverse_of(drawn, weights)
    more = retrain(*given, steps=4)
    for steps in (1, 2, 3):
        for found, expected in zip(retrain(*given, steps=steps), more[:steps], strict=True):
            assert torch.equal(found, expected)
