"""The paper's objective notation and the loss of one width, against an oracle in numpy."""

import numpy as np
import pytest
import torch

from cases import each
from matquant.methods.parts import objective
from matquant.methods.parts.objective import width_loss
from matquant.options.objective import FLOAT, parse_objective
from matquant.system.errors import InputError

# objective -> (bits, ground truth, teachers) widest first; paper Table 4 and section 3.
FORMS = {
    "8,4,2": [(8, True, ()), (4, True, ()), (2, True, ())],
    "8,4,8->2": [(8, True, ()), (4, True, ()), (2, False, (8,))],
    "8,4,2,8->2": [(8, True, ()), (4, True, ()), (2, True, (8,))],
    "8,4,2,8->4;2": [(8, True, ()), (4, True, (8,)), (2, True, (8,))],
    "8, 4, 2, fp->2": [(8, True, ()), (4, True, ()), (2, True, (FLOAT,))],
    "fp->8;4;2": [(8, False, (FLOAT,)), (4, False, (FLOAT,)), (2, False, (FLOAT,))],
    "2": [(2, True, ())],
    "fp->2": [(2, False, (FLOAT,))],
    "2,4,8": [(8, True, ()), (4, True, ()), (2, True, ())],
    "8,4,2,8->2,4->2": [(8, True, ()), (4, True, ()), (2, True, (8, 4))],
}
HINT = 'give widths and distillation terms such as "8,4,2" or "8,4,2,8->4;2" or "8,4,2,fp->2"'
BROKEN = {
    "": ("cannot read ''", 0),
    "8,,2": ("cannot read ''", 2),
    "8,x": ("cannot read 'x'", 2),
    "8->": ("cannot read '8->'", 0),
    "8,4;2": ("'4;2' names no teacher, or names it twice", 2),
    "8,4,4": ("'4' names no teacher, or names it twice", 4),
    "9": ("width 9 is outside 1..8", 0),
    "8,0": ("width 0 is outside 1..8", 2),
    "8,2->4": ("width 4 cannot learn from width 2", 2),
    "8,2,8->2,8->2": ("width 2 learns from this teacher twice", 9),
    "8,8->8": ("width 8 cannot learn from width 8", 2),
}


@each("text", FORMS)
def test_every_form_of_the_paper_parses(text: str) -> None:
    assert [(width.bits, width.truth, width.teachers) for width in parse_objective(text)] == FORMS[text]


@each("text", BROKEN)
def test_an_objective_that_does_not_parse_points_at_the_place(text: str) -> None:
    problem, place = BROKEN[text]
    with pytest.raises(InputError) as caught:
        parse_objective(text)
    assert str(caught.value) == f"objective does not parse: {problem}\n    {text}\n    {' ' * place}^\n{HINT}"


def test_several_widths_without_8_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        parse_objective("4,2")
    assert str(caught.value) == (
        "objective '4,2' trains widths 4, 2 but not 8, which the checkpoint stores; "
        "add 8, or name a single width for single precision (S.P.)"
    )


def test_a_teacher_must_be_trained() -> None:
    with pytest.raises(InputError) as caught:
        parse_objective("8->2")
    assert str(caught.value) == "objective '8->2' distils from width 8, which it does not train; add 8"


def test_default_lambdas_are_the_papers() -> None:
    assert [width.weight for width in parse_objective("8,4,2")] == [0.1, 0.1, 1.0]
    assert [width.weight for width in parse_objective("2")] == [1.0]
    assert [width.weight for width in parse_objective("fp->8;4;2")] == [1.0, 1.0, 1.0]


def test_lambdas_follow_the_order_of_first_mention() -> None:
    assert [width.weight for width in parse_objective("2,8->4,8", [3.0, 2.0, 1.0])] == [1.0, 2.0, 3.0]


@each(
    ("weights", "message"),
    [
        ([1.0], "1 weights for the 3 widths 8, 4, 2; give one per width, in that order"),
        ([1.0, -1.0, 1.0], "weights 1.0, -1.0, 1.0 are not valid; use numbers of at least 0, not all 0"),
        ([0.0, 0.0, 0.0], "weights 0.0, 0.0, 0.0 are not valid; use numbers of at least 0, not all 0"),
    ],
)
def test_wrong_lambdas_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_objective("8,4,2", weights)
    assert str(caught.value) == message


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("truth", [True, False])
@pytest.mark.parametrize("teachers", [0, 1, 2])
@pytest.mark.parametrize("piece", [11, 4 * 11, 2**20])  # one token of six at once, four, all
def test_the_loss_of_a_width_is_the_mean_of_its_terms(
    truth: bool, teachers: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not truth and not teachers:
        pytest.skip("no loss")
    monkeypatch.setattr(objective, "PIECE", {"cpu": piece})
    rng = np.random.default_rng(0)
    student, targets = rng.normal(size=(2, 3, 11)), rng.integers(0, 11, size=(2, 3))
    sources = [rng.normal(size=(2, 3, 11)) for _ in range(teachers)]
    terms, gradients = [], []
    if truth:
        terms.append(-np.mean(np.take_along_axis(log_softmax(student), targets[..., None], -1)))
        gradients.append(np.exp(log_softmax(student)) - np.eye(11)[targets])
    for source in sources:
        probability = np.exp(log_softmax(source))
        terms.append(np.mean((probability * (log_softmax(source) - log_softmax(student))).sum(-1)))
        gradients.append(np.exp(log_softmax(student)) - probability)
    logits = torch.from_numpy(student).requires_grad_()
    found = width_loss(logits, torch.from_numpy(targets), [torch.from_numpy(s) for s in sources], truth=truth)
    assert found.item() == pytest.approx(np.mean(terms), rel=1e-5)
    (3 * found).backward()
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), 3 * np.mean(gradients, axis=0) / 6, rtol=1e-4, atol=1e-7)


def test_no_gradient_reaches_the_teacher() -> None:
    student = torch.randn(4, 7, requires_grad=True)
    teacher = torch.randn(4, 7, requires_grad=True)
    width_loss(student, torch.zeros(4, dtype=torch.long), [teacher], truth=True).backward()
    assert teacher.grad is None
    assert student.grad is not None
