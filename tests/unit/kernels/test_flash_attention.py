"""What FlashAttention-4 is given, by a stand-in that does what its interface says. On GPUs: tests/gpu."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from skipmega.kernels.attention import document_starts, has_flash, packed_attention
from support import flash_attention

pytestmark = pytest.mark.skipif(
    has_flash(), reason="flash-attn-4 itself is installed, and tested in tests/gpu"
)

# length, queries, query heads per key head, documents
CASES = [
    (300, 140, 1, False),
    (300, 140, 4, True),
    (257, 257, 2, True),
    (40, 3, 1, False),
    (130, 200, 1, True),
]


@pytest.fixture(scope="module", autouse=True)
def _stand_in() -> Iterator[None]:
    with flash_attention.installed():
        yield


def make(case: tuple[int, int, int, bool]) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Query, key, value; positions that end with padding if there are more slots than tokens."""
    length, queries, shared, documents = case
    generator = torch.Generator().manual_seed(length)
    inputs = [
        torch.randn(count, 2, heads, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for count, heads in ((queries, 2 * shared), (length, 2), (length, 2))
    ]
    positions = None
    if queries != length:
        chosen = [torch.randperm(length, generator=generator)[:queries].sort().values for _ in range(2)]
        last = torch.full((max(0, queries - length), 2), length - 1)
        positions = torch.cat([torch.stack(chosen, dim=1), last])
    ends = torch.rand(2, length, generator=generator) < 0.02
    return inputs, positions, document_starts(ends.long().cumsum(1)) if documents else None


@pytest.mark.parametrize("case", CASES)
def test_it_is_asked_for_the_masked_softmax_and_its_gradients(case: tuple[int, int, int, bool]) -> None:
    inputs, positions, since = make(case)
    results = [packed_attention(*inputs, positions, since, backend) for backend in ("flash", "sdpa")]
    upstream = torch.randn_like(results[1])
    gradients = [torch.autograd.grad(result, inputs, upstream) for result in results]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_the_operator_has_shapes_and_gradients_for_compilers() -> None:
    """Compiled, with the backward pass; and its registration as torch checks it."""
    inputs, positions, since = make(CASES[1])
    expected = packed_attention(*inputs, positions, since, "sdpa")
    upstream = torch.randn_like(expected)
    compiled = torch.compile(packed_attention, backend="aot_eager", fullgraph=True)
    found = compiled(*inputs, positions, since, "flash")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        rtol=1e-5,
        atol=1e-6,
    )
