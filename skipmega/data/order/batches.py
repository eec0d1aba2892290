"""Micro-batches: which samples a rank takes, and the tensors it gets.

The order is a pure function of the samples consumed so far: neither the number of data-parallel ranks nor
a restart changes which sample comes when.
"""

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


class SampleSource(Sized, Protocol):
    """What :func:`make_loader` reads: megatron-core's GPT and blended datasets, or anything like them.

    A sample holds ``tokens`` and ``labels``, int64 [s], and ``loss_mask``, float32 [s].
    """

    def __getitem__(self, index: int, /) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of one data-parallel rank: b sequences of s tokens.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], the token that follows each.
        loss_mask: float32 [b, s], 1 where the label counts.
        sample_ids: int64 [b], each sequence's number in the data order of the run.
        document_ids: int64 [b, s], counting documents within each sequence from 0 (a document's end token
            belongs to it); None where attention crosses documents.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    sample_ids: Tensor
    document_ids: Tensor | None

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        """From a process that reads ahead by value: sharing its memory takes a file descriptor and a
        conversation of a millisecond for each tensor, and room in /dev/shm."""
        each = (self.tokens, self.labels, self.loss_mask, self.sample_ids)
        documents = None if self.document_ids is None else self.document_ids.numpy()
        return _of_arrays, ([tensor.numpy() for tensor in each], documents)

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on ``device``; from pinned memory the copy is asynchronous."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return TokenBatch(
            move(self.tokens),
            move(self.labels),
            move(self.loss_mask),
            move(self.sample_ids),
            None if self.document_ids is None else move(self.document_ids),
        )

    def pin_memory(self) -> "TokenBatch":
        """The same batch in page-locked memory (the DataLoader calls this)."""
        return TokenBatch(
            self.tokens.pin_memory(),
            self.labels.pin_memory(),
            self.loss_mask.pin_memory(),
            self.sample_ids.pin_memory(),
            None if self.document_ids is None else self.document_ids.pin_memory(),
        )


def _of_arrays(each: list[np.ndarray], documents: np.ndarray | None) -> TokenBatch:
    tokens, labels, loss_mask, sample_ids = (torch.from_numpy(array) for array in each)
    document_ids = None if documents is None else torch.from_numpy(documents)
    return TokenBatch(tokens, labels, loss_mask, sample_ids, document_ids)


def number_documents(tokens: Tensor, eod_id: int) -> Tensor:
    """Number the documents of each sequence from 0.

    Args:
        tokens: int64 [b, s].
        eod_id: the token that ends a document and belongs to it.

    Returns:
        int64 [b, s].
    """
    ends = (tokens == eod_id).long()
    return ends.cumsum(dim=-1) - ends


class MicroBatchSampler(Sampler[list[int]]):
    """Yields the sample numbers of one data-parallel rank, micro-batch by micro-batch.

    Micro-batch ``k`` of all ranks together is the samples from
    ``consumed_samples + k * micro_batch_size * dp_size`` on; rank ``r`` has the ``r``-th consecutive
    ``micro_batch_size`` of them. Samples at the end that do not fill a micro-batch on every rank are left
    out.

    Args:
        consumed_samples: samples that the run has already used, over all ranks.
        total_samples: where the data ends.
        micro_batch_size: sequences of one micro-batch on one rank.
        dp_rank: this data-parallel rank.
        dp_size: number of data-parallel ranks.
    """

    def __init__(
        self, *, consumed_samples: int, total_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> None:
        assert 0 <= dp_rank < dp_size
        assert consumed_samples >= 0
        stride = micro_batch_size * dp_size
        self._first = consumed_samples + dp_rank * micro_batch_size
        self._stride = stride
        self._size = micro_batch_size
        self._steps = max(0, total_samples - consumed_samples) // stride

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._steps):
            start = self._first + step * self._stride
            yield list(range(start, start + self._size))


def make_loader(
    dataset: SampleSource,
    *,
    consumed_samples: int,
    total_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    document_end: int | None,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[TokenBatch]:
    """This rank's micro-batches, from ``consumed_samples`` to ``total_samples``.

    Leaves torch's global random state alone, so that making a loader does not change a run.

    Args:
        dataset: at least ``total_samples`` samples.
        document_end: the end-of-document token, to number documents by; None lets attention cross them.
        num_workers: processes that read ahead; 0 reads in this one.
        pin_memory: deliver in page-locked memory (where batches go to a GPU).

    The other arguments are those of :class:`MicroBatchSampler`.
    """
    assert total_samples <= len(dataset), f"{total_samples} samples asked of {len(dataset)}"
    sampler = MicroBatchSampler(
        consumed_samples=consumed_samples,
        total_samples=total_samples,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    return iter(
        DataLoader(
            _Numbered(dataset),
            batch_sampler=sampler,
            collate_fn=_Collate(document_end),
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),
        )
    )


class _Numbered(Dataset[tuple[int, Mapping[str, Tensor]]]):
    """Samples with their number."""

    def __init__(self, samples: SampleSource) -> None:
        self._samples = samples

    def __getitem__(self, index: int) -> tuple[int, Mapping[str, Tensor]]:
        return index, self._samples[index]


class _Collate:
    """Numbered samples to a :class:`TokenBatch`; a class so that worker processes can be sent it."""

    def __init__(self, document_end: int | None) -> None:
        self._document_end = document_end

    def __call__(self, numbered: list[tuple[int, Mapping[str, Tensor]]]) -> TokenBatch:
        samples = [sample for _, sample in numbered]
        tokens = torch.stack([sample["tokens"] for sample in samples])
        return TokenBatch(
            tokens=tokens,
            labels=torch.stack([sample["labels"] for sample in samples]),
            loss_mask=torch.stack([sample["loss_mask"] for sample in samples]),
            sample_ids=torch.tensor([number for number, _ in numbered], dtype=torch.int64),
            document_ids=None if self._document_end is None else number_documents(tokens, self._document_end),
        )
