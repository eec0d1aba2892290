"""Triton's attention against the masked softmax in float64: forward and gradients, odd sizes, documents."""

import pytest
import torch
from torch import Tensor

from skipmega.kernels.attention import document_starts, packed_attention
from support.triton_kernels import DEVICE, HAS_GPU, needs_triton

pytestmark = needs_triton()

# length, queries, sequences, query heads per key head, key heads, channels, documents
CASES = [
    (37, 21, 2, 1, 2, 16, False),
    (37, 21, 2, 4, 1, 16, True),
    (50, 50, 1, 2, 1, 32, False),
    (64, 8, 2, 2, 2, 16, True),
    (33, 1, 1, 1, 1, 16, False),
    (17, 40, 1, 1, 1, 16, True),  # more slots than tokens
]


def make(
    case: tuple[int, int, int, int, int, int, bool], seed: int
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Float64 query, key, value; positions that end with padding, as plans do; first visible positions."""
    length, queries, batch, group, kv_heads, size, documents = case
    torch.manual_seed(seed)
    shapes = [(queries, batch, group * kv_heads, size), *[(length, batch, kv_heads, size)] * 2]
    inputs = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in shapes]
    real = min(queries, length)
    chosen = [torch.randperm(length)[:real].sort().values for _ in range(batch)]
    last = torch.full((queries - real, batch), length - 1)
    positions = torch.cat([torch.stack(chosen, dim=1), last]).to(DEVICE)
    ends = torch.rand(batch, length, device=DEVICE) < 0.2
    return inputs, positions, document_starts(ends.long().cumsum(1)) if documents else None


def tuning() -> object:
    from skipmega.kernels.attention_triton import Tiles, Tuning

    return Tuning(Tiles(16, 32, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 32, 4, 1))


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_are_the_masked_softmax_s(case: tuple) -> None:  # type: ignore[type-arg]
    """Also with inputs whose rows are strided, and twice the same."""
    from skipmega.kernels.attention_triton import attend, attend_backward

    inputs, positions, since = make(case, 0)
    expected = packed_attention(*[x.requires_grad_() for x in inputs], positions, since, "sdpa")
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, upstream)
    small = [x.detach().float().transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    out, logsum = attend(*small, positions, since, tuning())
    found = attend_backward(upstream.float(), *small, positions, since, out, logsum, tuning())
    for result, reference in zip((out, *found), (expected, *gradients), strict=True):
        torch.testing.assert_close(result.double(), reference, rtol=1e-4, atol=1e-5)
    again = attend_backward(upstream.float(), *small, positions, since, out, logsum, tuning())
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_what_no_query_sees_changes_nothing_and_gets_no_gradient() -> None:
    from skipmega.kernels.attention_triton import attend, attend_backward

    inputs, _, _ = make((48, 3, 1, 1, 1, 16, False), 0)
    query, key, value = (x.float() for x in inputs)
    positions = torch.tensor([[4], [9], [9]], device=DEVICE)
    since = torch.zeros(1, 48, dtype=torch.int64, device=DEVICE)
    since[:, 2:] = 2
    clean, _ = attend(query, key, value, positions, since, tuning())
    for poisoned in (key, value):
        poisoned[:2], poisoned[10:] = 1e30, -1e30
    out, logsum = attend(query, key, value, positions, since, tuning())
    assert torch.equal(out, clean)
    _, grad_key, grad_value = attend_backward(
        torch.ones_like(out), query, key, value, positions, since, out, logsum, tuning()
    )
    for gradient in (grad_key, grad_value):
        assert not gradient[:2].any()
        assert not gradient[10:].any()
        assert gradient[2:10].abs().amin(dim=(1, 2, 3)).all()


@pytest.mark.skipif(not HAS_GPU, reason="the operator's tiles are a GPU's: no CUDA device on this machine")
@pytest.mark.parametrize("case", [(300, 131, 2, 4, 2, 128, True), (512, 256, 2, 1, 4, 128, False)])
def test_the_operator_is_attention_in_bf16_compiled_or_not(case: tuple) -> None:  # type: ignore[type-arg]
    inputs, positions, since = make(case, 0)
    expected = packed_attention(*[x.requires_grad_() for x in inputs], positions, since, "sdpa")
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, upstream)
    small = [x.detach().bfloat16().requires_grad_() for x in inputs]
    for attention in (packed_attention, torch.compile(packed_attention)):
        out = attention(*small, positions, since, "triton")
        found = torch.autograd.grad(out, small, upstream.bfloat16())
        for result, reference in zip((out, *found), (expected, *gradients), strict=True):
            error = (result.double() - reference).norm() / reference.norm()
            assert error < 1e-2, f"relative error {error:.1e}"


def test_the_operator_has_gradients_and_shapes_for_compilers() -> None:
    """Through the interface that models use; its fake and its registration as torch checks them."""
    from skipmega.kernels import attention_triton

    inputs, positions, since = make((24, 8, 1, 2, 1, 16, True), 0)
    small = tuple(x.float().requires_grad_() for x in inputs)
    results = [packed_attention(*small, positions, since, backend) for backend in ("triton", "sdpa")]
    upstream = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(result, small, upstream) for result in results]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    torch.library.opcheck(
        attention_triton.attention,
        (*small, positions, since),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
