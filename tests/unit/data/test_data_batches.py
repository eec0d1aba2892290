"""Batches: one stream of samples whatever the number of ranks, and wherever a run was interrupted."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skipmega.data.order.batches import MicroBatchSampler, TokenBatch, make_loader, number_documents

EOD = 2


class Samples:
    """Sample ``i`` is made from ``i`` alone; every fifth token ends a document."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text = torch.arange(index, index + 9) % 5 + EOD
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": torch.ones(8)}


def _stream(consumed: int, total: int, micro_batch_size: int, dp_size: int) -> list[int]:
    """Samples in the order in which all ranks together take them."""
    ranks = [
        list(
            MicroBatchSampler(
                consumed_samples=consumed,
                total_samples=total,
                micro_batch_size=micro_batch_size,
                dp_rank=rank,
                dp_size=dp_size,
            )
        )
        for rank in range(dp_size)
    ]
    return [sample for step in zip(*ranks, strict=True) for chunk in step for sample in chunk]


@given(
    step_size=st.sampled_from([4, 8, 16]),
    steps=st.integers(0, 6),
    resumed_at=st.integers(0, 6),
    rest=st.integers(0, 3),
    sizes=st.lists(st.sampled_from([1, 2, 4]), min_size=2, max_size=2),
)
def test_ranks_and_restarts_do_not_change_the_stream(
    step_size: int, steps: int, resumed_at: int, rest: int, sizes: list[int]
) -> None:
    """A run is interrupted after some steps and resumed on another number of ranks."""
    total = steps * step_size
    before, after = sizes
    consumed = min(resumed_at, steps) * step_size
    first = _stream(0, consumed, step_size // before, before)
    second = _stream(consumed, total + rest, step_size // after, after)
    assert first + second == list(range(total))


@given(dp_size=st.sampled_from([1, 2, 4]), micro_batch_size=st.integers(1, 3), total=st.integers(0, 40))
def test_every_rank_takes_the_same_number_of_full_batches(
    dp_size: int, micro_batch_size: int, total: int
) -> None:
    for rank in range(dp_size):
        sampler = MicroBatchSampler(
            consumed_samples=3,
            total_samples=total,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp_size,
        )
        batches = list(sampler)
        assert len(batches) == len(sampler) == max(0, total - 3) // (micro_batch_size * dp_size)
        assert all(len(batch) == micro_batch_size and max(batch) < total for batch in batches)


def _load(**changes: int | None) -> list[TokenBatch]:
    arguments = {
        "consumed_samples": 4,
        "total_samples": 16,
        "micro_batch_size": 2,
        "dp_rank": 1,
        "dp_size": 2,
        "document_end": EOD,
        "num_workers": 0,
    }
    return list(make_loader(Samples(20), pin_memory=False, **arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_hold_the_rank_s_samples(num_workers: int) -> None:
    batches = _load(num_workers=num_workers)
    assert [batch.sample_ids.tolist() for batch in batches] == [[6, 7], [10, 11], [14, 15]]
    for batch in batches:
        for row, sample in enumerate(batch.sample_ids.tolist()):
            expected = Samples(20)[sample]
            assert torch.equal(batch.tokens[row], expected["tokens"])
            assert torch.equal(batch.labels[row], expected["labels"])
            assert torch.equal(batch.loss_mask[row], expected["loss_mask"])
        assert batch.document_ids is not None
        assert {t.dtype for t in (batch.tokens, batch.labels, batch.sample_ids, batch.document_ids)} == {
            torch.int64
        }
        assert batch.loss_mask.dtype == torch.float32
        assert batch.loss_mask.shape == batch.tokens.shape == (2, 8)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_documents_are_not_numbered_where_attention_crosses_them(num_workers: int) -> None:
    assert all(batch.document_ids is None for batch in _load(document_end=None, num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_leaves_the_random_state_alone(num_workers: int) -> None:
    before = torch.get_rng_state()
    _load(num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_samples_than_there_are_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="21 samples asked of 20"):
        _load(total_samples=21)


@given(tokens=st.lists(st.integers(EOD, EOD + 2), min_size=1, max_size=30))
def test_the_end_token_belongs_to_its_document(tokens: list[int]) -> None:
    expected, document = [], 0
    for token in tokens:
        expected.append(document)
        document += token == EOD
    assert number_documents(torch.tensor([tokens]), EOD).tolist() == [expected]


def test_to_moves_every_tensor() -> None:
    for document_end in (EOD, None):
        batch = _load(document_end=document_end)[0]
        moved = batch.to(torch.device("meta"))
        assert {name for name, value in vars(moved).items() if value is None} == (
            set() if document_end else {"document_ids"}
        )
        assert all(value.is_meta for value in vars(moved).values() if value is not None)


def test_batches_can_be_sent_between_processes() -> None:
    batch = _load()[0]
    assert torch.equal(pickle.loads(pickle.dumps(batch)).tokens, batch.tokens)
