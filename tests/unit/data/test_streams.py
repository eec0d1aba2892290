"""Runs of the order ``stream``: exactly the samples that the mixture says, whoever reads them and when."""

import hashlib
import random
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipmega.data.order.batches import make_loader
from skipmega.data.order.datasets import RunDatasets
from skipmega.data.order.token_stream import TokenRange, TokenStream
from skipmega.data.pairs.indexed import open_dataset
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import DataError
from support.streams import LENGTH, TOTAL, build, config

WritePair = Callable[..., str]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, write_pair: WritePair) -> Path:
    """``web-0`` to ``web-2`` of documents of ids below 300, ``code`` of ids from there on, ``few`` of 599."""
    folder = tmp_path_factory.mktemp("sources")
    numbers = random.Random(5)
    for name, low, high, documents in (
        ("web-0", 10, 300, 60), ("web-1", 10, 300, 9), ("web-2", 10, 300, 40),
        ("code", 300, 599, 80), ("few", 599, 600, 12),
    ):  # fmt: skip
        lengths = [numbers.randrange(3, 60) for _ in range(documents)]
        write_pair(
            folder / name, [[*(numbers.randrange(low, high) for _ in range(count)), 2] for count in lengths]
        )
    return folder


STAGES = [
    {"from_tokens": LENGTH * 100, "weights": {"web": 1.0, "few": 1.0}},
    {"from_tokens": LENGTH * 250 - 3, "weights": {"code": 1.0, "web": 0.1}},
]


def read_rows(
    datasets: RunDatasets, tokenizer: Tokenizer, first: int, end: int, dp_size: int, micro: int
) -> list[list[int]]:
    """Tokens of the samples of all ranks, in the order of the run."""
    loaders = [
        make_loader(
            datasets.train, consumed_samples=first, total_samples=end, micro_batch_size=micro, dp_rank=rank,
            dp_size=dp_size, document_end=tokenizer.eod_id, num_workers=0, pin_memory=False,
        )
        for rank in range(dp_size)
    ]  # fmt: skip
    steps = (end - first) // (micro * dp_size)
    return [row for _ in range(steps) for loader in loaders for row in next(loader).tokens.tolist()]


def digest(rows: list[list[int]]) -> str:
    return hashlib.sha256(np.array(rows, np.int64).tobytes()).hexdigest()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_one_stream_for_every_history(sources: Path, tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Any sequence of attempts, each on as many ranks and with batches as large as it likes, across stages
    and past samples left out."""
    datasets = build(config(sources, stages=STAGES, leave_out=[[40, 59], [90, 101]]), tokenizer)
    rows: list[list[int]] = []
    while len(rows) < 288:
        dp_size = data.draw(st.sampled_from([1, 2, 4]))
        micro = data.draw(st.sampled_from([1, 2, 3]))
        steps = data.draw(st.integers(1, 12))
        end = min(len(rows) + steps * dp_size * micro, TOTAL)
        rows += read_rows(datasets, tokenizer, len(rows), end, dp_size, micro)
    whole = [datasets.train[number]["tokens"].tolist() for number in range(len(rows))]
    assert digest(rows) == digest(whole)


def test_resumed_at_every_boundary(sources: Path, tokenizer: Tokenizer) -> None:
    """Data ranks 1, 2 and 4 in turn, a step of 8 samples each time, every attempt opened anew."""
    data = config(sources, stages=STAGES)
    whole = read_rows(build(data, tokenizer), tokenizer, 0, TOTAL, 1, 8)
    rows: list[list[int]] = []
    for number, first in enumerate(range(0, TOTAL, 8)):
        attempt = build(data, tokenizer)
        rows += read_rows(attempt, tokenizer, first, first + 8, (1, 2, 4)[number % 3], 2)
    assert digest(rows) == digest(whole)


def test_the_stream_never_changes(sources: Path, tokenizer: Tokenizer) -> None:
    """A run that was started reads on what it was promised: this hash is not to be updated."""
    datasets = build(config(sources, stages=STAGES, leave_out=[[40, 59]]), tokenizer)
    assert digest(read_rows(datasets, tokenizer, 0, TOTAL, 1, 8)) == STREAM


STREAM = "e59bda4444a87891543ff39aa3f39f432a7c01f6656e6f9abc47e7565df4c0c5"


def test_a_longer_run_begins_as_a_shorter_one(sources: Path, tokenizer: Tokenizer) -> None:
    short, long = (build(config(sources), tokenizer, train=count) for count in (50, 5000))
    assert [short.train[n]["tokens"].tolist() for n in range(50)] == [
        long.train[n]["tokens"].tolist() for n in range(50)
    ]


def test_samples_left_out_are_missing_and_nothing_else(sources: Path, tokenizer: Tokenizer) -> None:
    whole = read_rows(build(config(sources), tokenizer), tokenizer, 0, 100, 1, 1)
    kept = build(config(sources, leave_out=[[10, 19], [50, 50]]), tokenizer)
    assert read_rows(kept, tokenizer, 0, 89, 1, 1) == [*whole[:10], *whole[20:50], *whole[51:]]


def test_samples_follow_the_format(sources: Path, tokenizer: Tokenizer) -> None:
    sample = build(config(sources), tokenizer).train[5]
    assert sample["tokens"].shape == sample["labels"].shape == sample["loss_mask"].shape == (LENGTH,)
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert (sample["tokens"].dtype, sample["loss_mask"].dtype) == (torch.int64, torch.float32)


def test_shares_and_stages(sources: Path, tokenizer: Tokenizer) -> None:
    rows = read_rows(build(config(sources, stages=STAGES), tokenizer), tokenizer, 0, TOTAL, 1, 1)

    def sources_of(rows: list[list[int]]) -> dict[str, int]:
        ids = [max(token for token in row if token != 2) for row in rows]
        return dict(Counter("few" if i == 599 else "code" if i >= 300 else "web" for i in ids))

    first, second = sources_of(rows[:100]), sources_of(rows[100:250])
    assert all(abs(first[name] - count) <= 2 for name, count in (("web", 50), ("code", 40), ("few", 10)))
    assert "code" not in second
    assert abs(second["web"] - 75) <= 2
    assert "few" not in sources_of(rows[250:]), "a stage begins with the first whole sample"


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(lambda sizes: max(sizes) > 8),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 5),
)
def test_an_epoch_has_every_sample_once(tokens: list[int], seed: int, epoch: int) -> None:
    """No token is twice an input, none lies outside its range, and what is left over fills no sample."""
    ranges = [TokenRange(str(n), "uint16", 100 * n, size) for n, size in enumerate(tokens)]
    stream = TokenStream("all", ranges, 8, seed, 600, 0)
    count = stream.samples_per_epoch
    places = [stream.place(epoch * count + index) for index in range(count)]
    for number, part in enumerate(ranges):
        firsts = sorted(first for of, first in places if of == number)
        assert len(firsts) == part.samples(8)
        assert all(second - first == 8 for first, second in pairwise(firsts))
        if firsts:
            assert part.first <= firsts[0] < part.first + 8
            assert firsts[-1] + 9 <= part.first + part.tokens


def test_epochs_differ(sources: Path, tokenizer: Tokenizer) -> None:
    pair = open_dataset(str(sources / "code"), tokenizer)
    stream = TokenStream("code", [TokenRange(pair.prefix, pair.dtype, 0, pair.tokens)], LENGTH, 3, 600, 0)
    count = stream.samples_per_epoch
    epochs = [[stream.place(epoch * count + n)[1] for n in range(count)] for epoch in range(4)]
    assert len({tuple(places) for places in epochs}) == 4
    assert len({min(places) for places in epochs}) > 1, "cut elsewhere"


def test_training_and_held_out_share_no_document(sources: Path, tokenizer: Tokenizer) -> None:
    pair = open_dataset(str(sources / "code"), tokenizer)
    cut = pair.tokens_before(round(0.9 * pair.documents))
    tokens = np.fromfile(sources / "code.bin", pair.dtype)
    assert tokens[cut - 1] == 2, "at a document's end"
    datasets = build(config(sources, train=[{"path": f"{sources}/code"}]), tokenizer, train=200, valid=20)
    assert datasets.valid is not None

    def windows(part: Any) -> set[bytes]:
        return {bytes(np.lib.stride_tricks.sliding_window_view(part, 8)[n]) for n in range(len(part) - 7)}

    held_out = windows(tokens[cut:].astype(np.int64))
    for n in range(200):
        assert not windows(datasets.train[n]["tokens"].numpy()) & held_out
    for n in range(20):
        assert windows(datasets.valid[n]["tokens"].numpy()) <= held_out


def test_held_out_samples_of_each_source(sources: Path, tokenizer: Tokenizer) -> None:
    datasets = build(config(sources, split=[50.0, 50.0]), tokenizer, valid=8)
    assert list(datasets.valid_sources) == ["web", "code", "few"]
    assert set(datasets.valid_sources["few"][3]["tokens"].tolist()) <= {599, 2}
    alone = build(config(sources, valid=[{"path": f"{sources}/few"}]), tokenizer, valid=8)
    assert not alone.valid_sources, "what the loss of all says already"


def test_the_plan(sources: Path, tokenizer: Tokenizer) -> None:
    plan = build(config(sources, stages=STAGES), tokenizer).plan
    assert plan is not None
    text = str(plan)
    assert "data: 1.6k tokens from token 0 on" in text
    assert "data: 2.4k tokens from token 1.6k on" in text
    assert "50.00%" in text
    assert sum(source.tokens for stage in plan.sources for source in stage) == TOTAL * LENGTH


def test_temperature(sources: Path, tokenizer: Tokenizer) -> None:
    train = [{"path": f"{sources}/web-*", "name": "web"}, {"path": f"{sources}/few"}]
    shares = []
    for temperature in (1.0, 3.0, 1e9):
        plan = build(config(sources, train=train, temperature=temperature), tokenizer).plan
        assert plan is not None
        shares.append(plan.sources[0][1].share)
    tokens = [
        sum(open_dataset(str(path.with_suffix("")), tokenizer).tokens for path in sources.glob(pattern))
        for pattern in ("web-*.idx", "few.idx")
    ]
    assert shares[0] == pytest.approx(tokens[1] / sum(tokens), rel=0.1)
    assert shares[0] < shares[1] < shares[2] == pytest.approx(0.5)


def test_epoch_limits(sources: Path, tokenizer: Tokenizer) -> None:
    train = [{"path": f"{sources}/web-*", "name": "web"}, {"path": f"{sources}/few", "max_epochs": 4.0}]
    data = config(sources, train=train)
    with pytest.raises(DataError, match=r"would read few \S+ times, and its max_epochs is 4: lower its"):
        build(data, tokenizer, train=400)
    plan = build(data, tokenizer, train=20).plan
    assert plan is not None
    assert plan.sources[0][1].epochs <= 4


def test_no_data(sources: Path, tokenizer: Tokenizer) -> None:
    for train, message in (
        ([], "names no data set"),
        ([{"path": f"{sources}/nothing-*"}], r"no data set fits .*nothing-\*: there is no"),
        ([{"path": f"{sources}/few"}], "few is too small: its train part has 0 tokens in 1 files"),
    ):
        with pytest.raises(DataError, match=message):
            build(config(sources, train=train, split=[0.0, 100.0]), tokenizer)


def test_the_fingerprint_is_of_what_is_read(
    sources: Path, tokenizer: Tokenizer, tmp_path: Path, write_pair: WritePair
) -> None:
    def fingerprint(folder: Path, **changes: Any) -> str | None:
        return build(config(folder, **changes), tokenizer).fingerprint

    moved = shutil.copytree(sources, tmp_path / "moved")
    first = fingerprint(sources)
    assert fingerprint(moved) == first
    assert fingerprint(sources, split=[80.0, 20.0]) != first
    write_pair(moved / "web-3", [[11] * 50 + [2]])
    assert fingerprint(moved) != first
