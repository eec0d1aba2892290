"""Streams of packed pairs: samples as they were packed, in the same order for every history."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from skipmega.data.corpora.readers import Corpus
from skipmega.data.order.batches import make_loader
from skipmega.data.order.datasets import RunDatasets
from skipmega.data.pairs.arrangement import Arrangement, arrange
from skipmega.data.pairs.documents import Documents
from skipmega.data.tokenizer import Tokenizer
from skipmega.data.tokenizing.prepare import prepare_dataset
from skipmega.errors import DataError
from support.streams import LENGTH, build, config

SAMPLES = 96
Piece = tuple[int, ...]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """``data``, and ``web-00000`` to ``web-00002`` packed of it."""
    folder = tmp_path_factory.mktemp("packed")
    texts = [" ".join(f"{97 * number + i}" for i in range(1 + 5 * number % 17)) for number in range(150)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_dataset(Corpus([folder / "corpus.jsonl"]), folder / "data", tokenizer)
    arrange(Arrangement((f"{folder}/data",), folder / "web", shards=3, sequence_length=LENGTH), 1)
    return folder


def train_on(
    folder: Path, tokenizer: Tokenizer, count: int = SAMPLES, valid: int = 0, **changes: Any
) -> RunDatasets:
    changes = {"train": [{"path": f"{folder}/web-*", "name": "web"}], **changes}
    return build(config(folder, **changes), tokenizer, train=count, valid=valid)


def read_pieces(
    datasets: Sequence[dict[str, torch.Tensor]], end: int
) -> tuple[Counter[tuple[int, ...]], int]:
    """Documents of some samples by their ends, and the number of tokens that pad."""
    pieces: Counter[tuple[int, ...]] = Counter()
    padding = 0
    for sample in datasets:
        tokens, labels, mask = (sample[name].tolist() for name in ("tokens", "labels", "loss_mask"))
        piece: list[int] = []
        for token in [*tokens, labels[-1]]:
            piece.append(token)
            if token == end:
                pieces[tuple(piece)] += len(piece) > 1
                padding += len(piece) == 1
                piece = []
        pieces[tuple(piece)] += bool(piece)
        assert mask == [float((a, b) != (end, end)) for a, b in zip(tokens, labels, strict=True)]
    return +pieces, padding


def test_an_epoch_has_every_document_and_padding_is_not_learnt(packed: Path, tokenizer: Tokenizer) -> None:
    source = [{"path": f"{packed}/web-*", "name": "web"}]
    whole = build(config(packed, train=source, split=[100.0, 0.0]), tokenizer, train=1)
    assert whole.plan is not None
    count = round(1 / whole.plan.sources[0][0].epochs)
    epoch = build(config(packed, train=source, split=[100.0, 0.0]), tokenizer, train=count).train
    pieces, padding = read_pieces([dict(epoch[n]) for n in range(count)], tokenizer.eod_id)
    documents = Documents(f"{packed}/data")
    for number in range(len(documents)):
        document = tuple(documents[number].tolist())
        if len(document) <= LENGTH + 1:
            assert pieces[document] >= 1  # a rest may be the same
            pieces -= Counter([document])
    assert max(map(len, pieces)) == LENGTH + 1, "the rest is of longer ones"
    assert padding > 0
    share = whole.plan.sources[0][0].padding
    assert share == pytest.approx(padding / (count * (LENGTH + 1)))
    assert f", {share:.3%} padding" in str(whole.plan)


def test_one_stream_for_every_history(packed: Path, tokenizer: Tokenizer) -> None:
    """Resumed at every step, on 1, 2 and 4 ranks in turn, across a stage and past samples left out."""
    changes = {
        "train": [{"path": f"{packed}/web-00000"}, {"path": f"{packed}/web-00001", "weight": 0.3}],
        "stages": [{"from_tokens": 30 * LENGTH, "weights": {"web-00001": 1.0}}],
        "leave_out": [[12, 21]],
    }
    first_attempt = train_on(packed, tokenizer, **changes).train
    whole = [first_attempt[n]["tokens"].tolist() for n in range(SAMPLES)]
    assert whole != [train_on(packed, tokenizer).train[n]["tokens"].tolist() for n in range(SAMPLES)]
    rows: list[list[int]] = []
    for number, first in enumerate(range(0, SAMPLES, 8)):
        ranks, attempt = (1, 2, 4)[number % 3], train_on(packed, tokenizer, **changes).train
        loaders = [
            make_loader(
                attempt, consumed_samples=first, total_samples=first + 8, micro_batch_size=2, dp_rank=rank,
                dp_size=ranks, document_end=tokenizer.eod_id, num_workers=0, pin_memory=False,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        rows += [row for _ in range(4 // ranks) for each in loaders for row in next(each).tokens.tolist()]
    assert rows == whole


def test_each_padding_token_is_a_document_of_its_own(packed: Path, tokenizer: Tokenizer) -> None:
    loader = make_loader(
        train_on(packed, tokenizer).train, consumed_samples=0, total_samples=SAMPLES,
        micro_batch_size=SAMPLES, dp_rank=0, dp_size=1, document_end=tokenizer.eod_id, num_workers=0,
        pin_memory=False,
    )  # fmt: skip
    batch = next(loader)
    assert batch.document_ids is not None
    found = 0
    for tokens, documents in zip(batch.tokens.tolist(), batch.document_ids.tolist(), strict=True):
        sizes = Counter(documents)
        for at in range(1, LENGTH):
            if tokens[at - 1] == tokens[at] == tokenizer.eod_id:
                assert sizes[documents[at]] == 1
                found += 1
    assert found > 0


def test_held_out_samples_are_whole_ones(packed: Path, tokenizer: Tokenizer) -> None:
    datasets = train_on(packed, tokenizer, count=200, valid=40)
    assert datasets.valid is not None
    train, valid = (
        {tuple(part[n]["tokens"].tolist()) for n in range(count)}
        for part, count in ((datasets.train, 200), (datasets.valid, 40))
    )
    assert not train & valid
    read_pieces([dict(datasets.valid[n]) for n in range(40)], tokenizer.eod_id)


def test_another_length_is_refused(packed: Path, tokenizer: Tokenizer) -> None:
    data = config(packed, train=[{"path": f"{packed}/web-00000"}], sequence_length=32)
    with pytest.raises(DataError, match=r"packed for samples of 16 tokens, and data\.sequence_length is 32"):
        build(data, tokenizer)
