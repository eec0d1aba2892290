"""Packing and writing back rows: against plain indexing, by finite differences, and bit by bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipmega.kernels.rows import add_rows, gather_rows

WIDTH = 3
# rows 1, 4 and 5 of six have the slots 0, 3 and 1; slots 2 and 4 are padding that names row 5, which has a
# slot, and row 0, which has none
ROWS = torch.tensor([1, 5, 5, 4, 0])
SLOTS = torch.tensor([-1, 0, -1, -1, 3, 1])
PADDING = [2, 4]
SKIPPED = [0, 2, 3]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@st.composite
def moves(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rows and slots of a random injection, padding slots naming any row."""
    full = draw(st.integers(1, 6))
    packed = draw(st.integers(1, 8))
    chosen = draw(st.lists(st.integers(0, full - 1), unique=True, max_size=min(full, packed)))
    places = draw(st.permutations(range(packed)))[: len(chosen)]
    rows = torch.tensor(draw(st.lists(st.integers(0, full - 1), min_size=packed, max_size=packed)))
    slots = torch.full((full,), -1)
    for row, place in zip(chosen, places, strict=True):
        rows[place], slots[row] = row, place
    return rows, slots


@settings(deadline=None, max_examples=60)
@given(moves())
def test_forward_is_plain_indexing(move: tuple[Tensor, Tensor]) -> None:
    rows, slots = move
    full, update = random(len(slots), WIDTH), random(len(rows), WIDTH)
    assert torch.equal(gather_rows(full, rows, slots), full[rows])
    expected = full.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[row] += update[slot]
    assert torch.equal(add_rows(full, update, rows, slots), expected)


@settings(deadline=None, max_examples=40)
@given(moves())
def test_backward_is_the_derivative(move: tuple[Tensor, Tensor]) -> None:
    """Of packing, of what the real slots hold: a padding slot is a copy whose gradient is never wanted."""
    rows, slots = move
    real = slots[slots >= 0]
    full = random(len(slots), WIDTH).requires_grad_()
    update = random(len(rows), WIDTH).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, rows, slots)[real], full)
    assert torch.autograd.gradcheck(lambda x, u: add_rows(x, u, rows, slots), (full, update))


def test_padding_contributes_no_gradient_either_way() -> None:
    full, update = random(6, WIDTH).requires_grad_(), random(5, WIDTH).requires_grad_()
    cotangent = torch.zeros(5, WIDTH, dtype=torch.float64)
    cotangent[[0, *PADDING]] = float("nan")
    gather_rows(full, ROWS, SLOTS).backward(cotangent)
    assert full.grad is not None
    expected = torch.zeros_like(full)
    expected[1] = float("nan")
    torch.testing.assert_close(full.grad, expected, rtol=0, atol=0, equal_nan=True)

    add_rows(full.detach(), update, ROWS, SLOTS).backward(torch.ones(6, WIDTH, dtype=torch.float64))
    assert update.grad is not None
    expected = torch.ones(5, WIDTH, dtype=torch.float64)
    expected[PADDING] = 0
    assert torch.equal(update.grad, expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_padding_slots_hold_is_never_written(poison: float) -> None:
    full, update = random(6, WIDTH), random(5, WIDTH)
    clean = add_rows(full, update, ROWS, SLOTS)
    update[PADDING] = poison
    assert torch.equal(add_rows(full, update, ROWS, SLOTS), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skipped_rows_are_bit_identical(dtype: torch.dtype) -> None:
    """Also where adding zero would not be: minus zero, and a NaN or infinity in slot 0."""
    full, update = random(6, WIDTH, dtype=dtype), random(5, WIDTH, dtype=dtype)
    full[0], full[2] = -0.0, 1e-42
    update[0] = float("nan")
    out = add_rows(full, update, ROWS, SLOTS)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert out.dtype == dtype
    assert torch.equal(out[SKIPPED].view(bits), full[SKIPPED].view(bits))
    assert torch.equal(out[[4, 5]], full[[4, 5]] + update[[3, 1]])
    assert not torch.equal(out[[4, 5]], full[[4, 5]])


def test_the_input_is_left_alone() -> None:
    full, update = random(6, WIDTH), random(5, WIDTH)
    before = full.clone()
    add_rows(full, update, ROWS, SLOTS)
    gather_rows(full, ROWS, SLOTS)
    assert torch.equal(full, before)
