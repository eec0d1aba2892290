"""A run's data sets: order, blend and split, and refusals that reach every rank."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from skipmega.config import DataConfig, DataSource
from skipmega.data.order.batches import make_loader
from skipmega.data.order.datasets import RunDatasets, build_datasets
from skipmega.data.pairs import token_reader
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import DataError, DataFaultError

LENGTH = 16
WritePair = Callable[..., str]


def _documents(count: int, token: int) -> list[list[int]]:
    """``count`` documents of 7 tokens, all ``token`` but the end."""
    return [[token] * 6 + [2] for _ in range(count)]


def _config(*sources: str, **changes: object) -> DataConfig:
    train = [DataSource(path=path) for path in sources]
    return DataConfig(train=train, sequence_length=LENGTH).model_copy(update=changes)


def _build(
    config: DataConfig, tokenizer: Tokenizer, cache: Path, train: int = 20, valid: int = 4, seed: int = 3
) -> RunDatasets:
    return build_datasets(
        config, tokenizer, num_train_samples=train, num_valid_samples=valid, seed=seed, index_cache=cache
    )


def _tokens(datasets: RunDatasets, count: int = 20) -> list[list[int]]:
    return [datasets.train[index]["tokens"].tolist() for index in range(count)]


@pytest.fixture
def counted(tmp_path: Path, write_pair: WritePair) -> str:
    """200 documents of tokens 10, 11, ... 209 and an end token each."""
    return write_pair(tmp_path / "counted", [[token] * 6 + [2] for token in range(10, 210)])


def test_samples_follow_the_format(tmp_path: Path, counted: str, tokenizer: Tokenizer) -> None:
    datasets = _build(_config(counted), tokenizer, tmp_path / "cache", train=60, valid=0)
    assert len(datasets.train) >= 60
    sample = datasets.train[0]
    assert sample["tokens"].shape == sample["labels"].shape == sample["loss_mask"].shape == (LENGTH,)
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert (sample["tokens"].dtype, sample["loss_mask"].dtype) == (torch.int64, torch.float32)
    assert all(datasets.train[index]["loss_mask"].all() for index in range(60))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_become_batches(tmp_path: Path, counted: str, tokenizer: Tokenizer, num_workers: int) -> None:
    datasets = _build(_config(counted), tokenizer, tmp_path / "cache", valid=0)
    batches = make_loader(
        datasets.train,
        consumed_samples=2,
        total_samples=20,
        micro_batch_size=3,
        dp_rank=0,
        dp_size=2,
        document_end=tokenizer.eod_id,
        num_workers=num_workers,
        pin_memory=False,
    )
    batch = next(batches)
    assert batch.sample_ids.tolist() == [2, 3, 4]
    assert batch.tokens.tolist() == _tokens(datasets)[2:5]
    assert batch.document_ids is not None
    for tokens, documents in zip(batch.tokens, batch.document_ids, strict=True):
        for document in documents.unique():  # every document of this data repeats one token
            assert len(set(tokens[documents == document].tolist()) - {tokenizer.eod_id}) <= 1


def test_the_order_is_a_function_of_the_arguments(tmp_path: Path, counted: str, tokenizer: Tokenizer) -> None:
    config = _config(counted, split=[80.0, 20.0])
    first = _tokens(_build(config, tokenizer, tmp_path / "a"))
    assert _tokens(_build(config, tokenizer, tmp_path / "b")) == first
    assert _tokens(_build(config, tokenizer, tmp_path / "a")) == first
    assert _tokens(_build(config, tokenizer, tmp_path / "a", valid=0)) == first
    assert _tokens(_build(config, tokenizer, tmp_path / "a", seed=4)) != first


def test_the_split_cuts_by_documents(tmp_path: Path, counted: str, tokenizer: Tokenizer) -> None:
    datasets = _build(_config(counted, split=[90.0, 10.0]), tokenizer, tmp_path / "cache", train=70, valid=8)
    assert datasets.valid is not None
    train = {token for row in _tokens(datasets, 70) for token in row} - {2}
    valid = {token for index in range(8) for token in datasets.valid[index]["tokens"].tolist()} - {2}
    assert max(train) < 190 <= min(valid)


def test_separate_held_out_sources(
    tmp_path: Path, counted: str, tokenizer: Tokenizer, write_pair: WritePair
) -> None:
    held_out = DataSource(path=write_pair(tmp_path / "held-out", _documents(30, 300)))
    datasets = _build(_config(counted, valid=[held_out]), tokenizer, tmp_path / "cache", train=87)
    assert datasets.valid is not None
    assert set(datasets.valid[0]["tokens"].tolist()) <= {2, 300}
    seen = {token for row in _tokens(datasets, 87) for token in row}
    assert seen <= {2, *range(10, 210)}
    assert len(seen) >= 199  # of 1400 tokens the last 7 fill no sample


def test_sources_are_drawn_by_weight(tmp_path: Path, tokenizer: Tokenizer, write_pair: WritePair) -> None:
    sources = [
        DataSource(path=write_pair(tmp_path / name, _documents(40, token)), weight=weight)
        for name, token, weight in (("a", 10, 3.0), ("b", 11, 1.0))
    ]
    datasets = _build(_config(train=sources), tokenizer, tmp_path / "cache", train=100, valid=0)
    rows = _tokens(datasets, 100)
    assert sum(10 in row for row in rows) == 75
    assert datasets.valid is None


@pytest.mark.parametrize("samples", [1, 2, 7, 100])
def test_uneven_blends_do_not_run_out_of_samples(
    tmp_path: Path, tokenizer: Tokenizer, write_pair: WritePair, samples: int
) -> None:
    """megatron-core's own margin is too small where many sources round up."""
    sources = [
        DataSource(path=write_pair(tmp_path / str(n), _documents(3, 10)), weight=90.0 if n == 0 else 1.1)
        for n in range(10)
    ]
    datasets = _build(_config(train=sources), tokenizer, tmp_path / "cache", train=samples, valid=0)
    assert len(datasets.train) >= samples


def test_replaced_data_is_not_read_through_an_old_cache(
    tmp_path: Path, tokenizer: Tokenizer, write_pair: WritePair
) -> None:
    prefix = write_pair(tmp_path / "data", _documents(40, 10))
    _build(_config(prefix), tokenizer, tmp_path / "cache", valid=0)
    write_pair(tmp_path / "data", [[11] * 20 + [2] for _ in range(20)])
    fresh = _tokens(_build(_config(prefix), tokenizer, tmp_path / "fresh", valid=0))
    assert _tokens(_build(_config(prefix), tokenizer, tmp_path / "cache", valid=0)) == fresh


def test_too_small_data_is_refused_with_counts(
    tmp_path: Path, counted: str, tokenizer: Tokenizer, write_pair: WritePair
) -> None:
    with pytest.raises(DataError, match=r"valid part has 14 tokens in 2 documents of the 200 .* = 17"):
        _build(_config(counted), tokenizer, tmp_path / "cache")
    small = write_pair(tmp_path / "small", [[5] * LENGTH])
    with pytest.raises(DataError, match=r"train part has 16 tokens in 1 documents, .* = 17"):
        _build(_config(small, split=[1.0, 0.0]), tokenizer, tmp_path / "cache", valid=0)
    enough = write_pair(tmp_path / "enough", [[5] * (LENGTH + 1)])
    assert len(_build(_config(enough, split=[1.0, 0.0]), tokenizer, tmp_path / "cache", valid=0).train) >= 20


def test_no_sources(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"data\.train names no data set"):
        _build(_config(), tokenizer, tmp_path / "cache")


def test_unusable_caches(tmp_path: Path, counted: str, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the index cache .*file"):
        _build(_config(counted), tokenizer, tmp_path / "file", valid=0)
    _build(_config(counted), tokenizer, tmp_path / "cache", valid=0)
    (index,) = (tmp_path / "cache").glob("*shuffle_index.npy")
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(DataError, match="remove the folder"):
        _build(_config(counted), tokenizer, tmp_path / "cache", valid=0)


def test_no_process_group_is_left_behind(tmp_path: Path, counted: str, tokenizer: Tokenizer) -> None:
    _build(_config(counted), tokenizer, tmp_path / "cache", valid=0)
    assert not dist.is_initialized()


def _in_world_of_two(folder: Path, work: Callable[[int], object]) -> list[object]:
    """Results (or errors) of ``work(rank)`` on two gloo processes."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def run(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        try:
            outcome = work(rank)
        except DataError as error:
            outcome = str(error)
        results.put((rank, outcome))
        dist.destroy_process_group()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    return [outcome for _, outcome in sorted((results.get() for _ in processes), key=lambda pair: pair[0])]


def test_two_processes_agree_with_one(
    tmp_path: Path, counted: str, tokenizer: Tokenizer, write_pair: WritePair
) -> None:
    config = _config(counted, write_pair(tmp_path / "more", _documents(40, 300)), split=[80.0, 20.0])
    alone = _tokens(_build(config, tokenizer, tmp_path / "alone"))
    both = _in_world_of_two(
        tmp_path, lambda rank: np.array(_tokens(_build(config, tokenizer, tmp_path / "cache"))).tolist()
    )
    assert both == [alone, alone]


def test_what_rank_0_refuses_every_rank_raises(tmp_path: Path, counted: str, tokenizer: Tokenizer) -> None:
    config = _config(counted, str(tmp_path / "nowhere"))
    errors = _in_world_of_two(tmp_path, lambda rank: _build(config, tokenizer, tmp_path / "cache"))
    assert errors[0] == errors[1]
    assert "nowhere.idx" in str(errors[0])


def test_a_cache_on_each_node_s_own_disk(
    tmp_path: Path, counted: str, tokenizer: Tokenizer, write_pair: WritePair
) -> None:
    """Is refused, unless every index is in it; what else is in it does not matter."""
    config = _config(counted, write_pair(tmp_path / "more", _documents(40, 300)), split=[80.0, 20.0])

    def on_own_disk(rank: int) -> object:
        return np.array(_tokens(_build(config, tokenizer, tmp_path / f"node{rank}"))).tolist()

    _build(config, tokenizer, tmp_path / "node0", seed=4)
    errors = _in_world_of_two(tmp_path, on_own_disk)
    assert all(
        "not visible on ranks [1], and theirs lacks indices: run tools/" in str(error) for error in errors
    )
    alone = _tokens(_build(config, tokenizer, tmp_path / "node1"))
    assert _in_world_of_two(tmp_path, on_own_disk) == [alone, alone]
    largest = max((tmp_path / "node1").glob("*dataset_index.npy"))
    largest.write_bytes(largest.read_bytes()[:-1])
    errors = _in_world_of_two(tmp_path, on_own_disk)
    assert all("lacks indices" in str(error) for error in errors)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_is_cut_while_it_is_read(
    tmp_path: Path, counted: str, tokenizer: Tokenizer, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a memory map it would be the end of the process, by SIGBUS."""
    monkeypatch.setattr(token_reader, "_FIRST_PAUSE", 0.0)
    samples = _build(_config(counted), tokenizer, tmp_path / "cache", train=60, valid=0).train
    Path(f"{counted}.bin").write_bytes(b"")
    loader = make_loader(
        samples, consumed_samples=0, total_samples=60, micro_batch_size=2, dp_rank=0, dp_size=1,
        document_end=2, num_workers=num_workers, pin_memory=False,
    )  # fmt: skip
    with pytest.raises(
        DataFaultError, match=r"cannot read \d+ bytes of .*counted\.bin at \d+: the file ends at 0"
    ):
        next(loader)


def test_two_ranks_then_one_then_four_read_the_same_tokens(
    tmp_path: Path, counted: str, tokenizer: Tokenizer
) -> None:
    """Eight samples a step, two steps on each number of data ranks."""

    def read(first: int, steps: int, dp_size: int) -> torch.Tensor:
        """Rows of all ranks in the order of the data, [samples, tokens, labels and document numbers]."""
        samples = _build(_config(counted), tokenizer, tmp_path / "cache", train=48, valid=0).train
        loaders = [
            make_loader(
                samples, consumed_samples=8 * first, total_samples=48, micro_batch_size=2, dp_rank=rank,
                dp_size=dp_size, document_end=tokenizer.eod_id, num_workers=0, pin_memory=False,
            )
            for rank in range(dp_size)
        ]  # fmt: skip
        batches = [next(loader) for _ in range(8 * steps // (2 * dp_size)) for loader in loaders]
        assert all(batch.document_ids is not None for batch in batches)
        return torch.cat(
            [torch.cat([b.sample_ids[:, None], b.tokens, b.labels, b.document_ids], 1) for b in batches]  # type: ignore[list-item]
        )

    moved = torch.cat([read(0, 2, 2), read(2, 2, 1), read(4, 2, 4)])
    assert torch.equal(moved, read(0, 6, 1))
    assert moved[:, 0].tolist() == list(range(48))
