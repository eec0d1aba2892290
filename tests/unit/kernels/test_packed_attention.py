"""Packed attention against a softmax written as loops in float64, and its block mask against every pair."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from skipmega.errors import ConfigError
from skipmega.kernels.attention import (
    AttentionBackend,
    choose_attention,
    document_starts,
    packed_attention,
    packed_block_mask,
    visibility,
)
from skipmega.kernels.blocks import BLOCK

BATCH, HEAD = 2, 16


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
    documents: Tensor | None,
    backend: AttentionBackend,
) -> Tensor:
    since = None if documents is None else document_starts(documents)
    return packed_attention(query, key, value, positions, since, backend)


def loop_attention(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None, documents: Tensor | None
) -> Tensor:
    """One query, one head, one visible key at a time."""
    count, batch, heads, size = query.shape
    shared = heads // key.shape[2]
    q, k, v = query.double(), key.double(), value.double()
    out = torch.zeros(count, batch, heads, size, dtype=torch.float64)
    for b in range(batch):
        for i in range(count):
            at = i if positions is None else int(positions[i, b])
            seen = [j for j in range(at + 1) if documents is None or documents[b, j] == documents[b, at]]
            for h in range(heads):
                weights = [math.exp(float(q[i, b, h] @ k[j, b, h // shared]) / math.sqrt(size)) for j in seen]
                for j, weight in zip(seen, weights, strict=True):
                    out[i, b, h] += weight / sum(weights) * v[j, b, h // shared]
    return out


def make_inputs(
    length: int, heads: int, kv_heads: int, queries: int | None, documents: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``queries`` None asks for all tokens. Positions end with two padding slots at the last position."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    positions = None
    if queries is not None:
        chosen = [
            torch.randperm(length, generator=generator)[: queries - 2].sort().values for _ in range(BATCH)
        ]
        ends = torch.full((2, BATCH), length - 1)
        positions = torch.cat([torch.stack(chosen, dim=1), ends])
    ends_here = torch.rand(BATCH, length, generator=generator) < 6 / length
    return (
        normal(length if queries is None else queries, BATCH, heads, HEAD),
        normal(length, BATCH, kv_heads, HEAD),
        normal(length, BATCH, kv_heads, HEAD),
        positions,
        ends_here.long().cumsum(1) if documents else None,
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("queries", [None, 9])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_both_backends_are_a_masked_softmax(
    kv_heads: int, queries: int | None, documents: bool, backend: AttentionBackend
) -> None:
    inputs = make_inputs(24, 4, kv_heads, queries, documents)
    found = attend(*inputs, backend)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), loop_attention(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "queries"),
    [(128, None), (200, None), (256, 128), (300, 131), (257, 40), (130, 130), (64, 300)],
)
@pytest.mark.parametrize("documents", [False, True])
def test_flex_is_sdpa_at_any_length(length: int, queries: int | None, documents: bool) -> None:
    count = None if queries is None else min(queries, length + 2)
    inputs = make_inputs(length, 4, 2, count, documents, seed=length)
    flex, sdpa = attend(*inputs, "flex"), attend(*inputs, "sdpa")
    torch.testing.assert_close(flex, sdpa, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_a_query_sees_nothing_after_it_or_of_another_document(backend: AttentionBackend) -> None:
    """Poisoned keys and values outside a query's sight do not change its answer by a bit."""
    query, key, value, _, _ = make_inputs(12, 2, 2, None, False)
    documents = torch.tensor([[0] * 5 + [1] * 7] * BATCH)
    positions = torch.full((1, BATCH), 8)
    clean = attend(query[:1], key, value, positions, documents, backend)
    for unseen in (range(5), range(9, 12)):
        key[list(unseen)], value[list(unseen)] = 1e4, -1e4
    assert torch.equal(attend(query[:1], key, value, positions, documents, backend), clean)
    value[5] += 1
    assert not torch.equal(attend(query[:1], key, value, positions, documents, backend), clean)


def test_sdpa_s_gradients_are_the_loop_s() -> None:
    inputs = make_inputs(10, 4, 2, 7, True, seed=3)
    tensors, rest = inputs[:3], inputs[3:]
    cotangent = torch.randn(7, BATCH, 4, HEAD, generator=torch.Generator().manual_seed(1))
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    found = torch.autograd.grad(attend(*leaves, *rest, "sdpa"), leaves, cotangent)

    def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen = torch.stack([brute_visibility(rest[0][:, b], rest[1][b], 10) for b in range(BATCH)])
        wide_key, wide_value = (t.repeat_interleave(2, dim=2) for t in (key, value))
        scores = torch.einsum("qbhd,sbhd->bhqs", query, wide_key) / math.sqrt(HEAD)
        weights = scores.masked_fill(~seen.unsqueeze(1), -math.inf).softmax(-1)
        return torch.einsum("bhqs,sbhd->qbhd", weights, wide_value)

    wide = [tensor.double().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(masked(*wide), wide, cotangent.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def brute_visibility(positions: Tensor, documents: Tensor | None, length: int) -> Tensor:
    """[q, s] bool of one sequence, pair by pair."""
    rows = []
    for at in positions.tolist():
        same = [True] * length if documents is None else (documents == documents[at]).tolist()
        rows.append([j <= at and same[j] for j in range(length)])
    return torch.tensor(rows)


@st.composite
def packings(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Ascending positions [b, q] and documents [b, s] of a few blocks, lengths at and off block borders."""
    length = draw(st.sampled_from([1, 100, 128, 129, 256, 300, 384]))
    queries = draw(st.sampled_from([1, 127, 128, 130, 256]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    low = draw(st.integers(0, length - 1))
    positions = torch.randint(low, length, (BATCH, queries), generator=generator).sort(dim=1).values
    share = draw(st.sampled_from([0.0, 0.005, 0.05]))
    documents = (torch.rand(BATCH, length, generator=generator) < share).long().cumsum(1)
    return positions, documents, length


def test_a_document_starts_at_its_first_token() -> None:
    """Numbers need not follow each other; the first document may be cut at the front and have any."""
    documents = torch.tensor([[0, 0, 1, 1, 1, 4], [3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 4, 5]])
    assert document_starts(documents).tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6, [0, 1, 2, 3, 4, 5]]


@settings(deadline=None, max_examples=40)
@given(packings())
def test_visibility_is_every_pair(packing: tuple[Tensor, Tensor, int]) -> None:
    positions, documents, length = packing
    for seen_documents in (None, documents):
        since = None if seen_documents is None else document_starts(documents)
        found = visibility(positions.t(), since, length, BATCH, torch.device("cpu"))
        for b in range(BATCH):
            expected = brute_visibility(
                positions[b], None if seen_documents is None else documents[b], length
            )
            assert torch.equal(found[b], expected)


def block_mask(positions: Tensor, documents: Tensor | None, length: int) -> BlockMask:
    """Of positions [b, q]."""
    since = None if documents is None else document_starts(documents)
    return packed_block_mask(positions.t(), since, length, len(positions))


def listed(count: Tensor | None, index: Tensor | None, sequence: int, block: int) -> set[int]:
    assert count is not None
    assert index is not None
    assert int(index.min()) >= 0
    chosen = index[sequence, 0, block, : int(count[sequence, 0, block])].tolist()
    assert chosen == sorted(set(chosen))
    return set(chosen)


@settings(deadline=None, max_examples=60)
@given(packings(), st.booleans())
def test_blocks_are_classified_as_by_every_pair(
    packing: tuple[Tensor, Tensor, int], with_documents: bool
) -> None:
    """Full: every pair visible; skipped: none; partial: the rest.

    Between documents a block may be called partial though nothing in it is seen (the ranges of documents
    overlap, the documents do not), and a last block of fewer keys is; that costs time only, the mask inside
    the block is exact. By block of keys the same pairs are listed.
    """
    positions, documents, length = packing
    last_asked = [block.max(dim=1).values for block in positions.split(BLOCK, dim=1)]
    mask = block_mask(positions, documents if with_documents else None, length)
    assert mask.seq_lengths == (positions.shape[1], length)
    keys = (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)
    queries = (mask.q_num_blocks, mask.q_indices), (mask.full_q_num_blocks, mask.full_q_indices)
    for b in range(BATCH):
        for (count, index), (transposed_count, transposed_index) in zip(keys, queries, strict=True):
            blocks = range(transposed_count.shape[2])
            listed_there = [listed(transposed_count, transposed_index, b, j) for j in blocks]
            for i in range(count.shape[2]):
                assert listed(count, index, b, i) == {j for j in blocks if i in listed_there[j]}
        seen = brute_visibility(positions[b], documents[b] if with_documents else None, length)
        for i, rows in enumerate(seen.split(BLOCK, dim=0)):
            partial, full = (listed(count, index, b, i) for count, index in keys)
            pairs = rows.split(BLOCK, dim=1)
            assert full == {j for j, block in enumerate(pairs) if block.all() and block.shape[1] == BLOCK}
            mixed = {j for j, block in enumerate(pairs) if block.any()} - full
            if with_documents:
                assert mixed <= partial
                assert not partial & full
                assert all(j * BLOCK <= last_asked[i][b] for j in partial), "never a block in the future"
            else:
                assert partial == mixed


@pytest.mark.parametrize("with_documents", [False, True])
def test_no_positions_means_all_tokens(with_documents: bool) -> None:
    every = torch.arange(300).expand(BATCH, -1)
    documents = every // 140 if with_documents else None
    given = block_mask(every, documents, 300)
    since = None if documents is None else document_starts(documents)
    implied = packed_block_mask(None, since, 300, BATCH)
    assert torch.equal(implied.to_dense(), given.to_dense())
    for field in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(implied, field), getattr(given, field))


def test_documents_spare_the_blocks_before_them() -> None:
    """What block sparsity is for: the second half's queries never touch the first half's keys."""
    positions = torch.arange(512).unsqueeze(0)
    documents = (positions >= 256).long()
    mask = block_mask(positions, documents, 512)
    assert mask.full_kv_num_blocks is not None
    total = (mask.kv_num_blocks + mask.full_kv_num_blocks).flatten().tolist()
    assert total == [1, 2, 1, 2]
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 0, 1]


def test_the_mask_inside_partial_blocks_is_every_pair() -> None:
    positions = torch.tensor([[3, 130, 131, 199]])
    documents = (torch.arange(200) >= 100).long().unsqueeze(0)
    mask = block_mask(positions, documents, 200)
    zero = torch.tensor(0)
    pairs = [
        [bool(mask.mask_mod(zero, zero, torch.tensor(i), torch.tensor(j))) for j in range(200)]
        for i in range(4)
    ]
    assert torch.equal(torch.tensor(pairs), brute_visibility(positions[0], documents[0], 200))


@pytest.mark.parametrize(
    ("capability", "head_size", "message"),
    [
        ((8, 0), 64, r"9\.0 \(H100\) and newer, and this one has 8\.0"),
        ((9, 0), 192, "8, 16, .* these have 192"),
    ],
)
def test_flash_attention_is_refused_where_it_has_no_kernels(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], head_size: int, message: str
) -> None:
    monkeypatch.setattr("skipmega.kernels.attention.has_flash", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ConfigError, match=message):
        choose_attention("flash", torch.device("cuda"), True, head_size)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_attention("flash", torch.device("cuda"), True, 128) == "flash"


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipmega.kernels.attention.has_flash", lambda: False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_attention("auto", cpu, True, 64) == "sdpa"
    assert choose_attention("auto", gpu, True, 64) == "flex"
    for arguments, message in (
        (("flash", cpu, True, 64), "attention=flash needs a GPU"),
        (("flash", gpu, True, 64), r"attention=flash needs the package flash-attn-4: pip install"),
        (("flex", gpu, False, 64), "training.compile=true"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_attention(*arguments)
