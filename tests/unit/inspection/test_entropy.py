"""The unigram baseline against direct computation."""

import math
from pathlib import Path

import numpy as np
import pytest

from skipmega.errors import DataError
from skipmega.inspection import count_dataset, count_tokens, entropy, unigram_entropy


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    """Four documents of 1 to 3 sequences in a Megatron pair."""
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(5)
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "text.bin"), dtype=np.uint16)
    documents = []
    for lengths in ([7], [3, 11, 2], [20], [1, 4]):
        tokens = generator.integers(0, 50, size=sum(lengths))
        builder.add_document(torch.from_numpy(tokens), lengths)
        documents.append(tokens)
    builder.finalize(str(tmp_path / "text.idx"))
    return tmp_path / "text", documents


def test_entropy_is_the_mean_surprise_of_held_out_tokens():
    train, held_out = np.array([0, 0, 1, 2]), np.array([0, 3, 3])
    counts = [count_tokens([tokens], 4) for tokens in (train, held_out)]
    probabilities = [3 / 8, 2 / 8, 2 / 8, 1 / 8]  # one more than seen, of 4 seen and 4 ids
    expected = -sum(math.log(probabilities[token]) for token in held_out) / 3
    assert unigram_entropy(*counts) == pytest.approx(expected, rel=1e-12)


def test_entropy_of_uniform_tokens_is_that_of_the_vocabulary():
    counts = np.full(1000, 77)
    assert unigram_entropy(counts, counts) == pytest.approx(math.log(1000), rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_counts_of_a_dataset_are_those_of_its_documents(dataset, monkeypatch, chunk):
    prefix, documents = dataset
    monkeypatch.setattr(entropy, "CHUNK_TOKENS", chunk)
    for chosen in (None, range(4), range(1, 3), range(3, 4), range(2, 2)):
        expected = np.zeros(50, dtype=np.int64)
        for index in chosen if chosen is not None else range(4):
            expected += np.bincount(documents[index], minlength=50)
        assert (count_dataset(prefix, 50, chosen) == expected).all()


def test_what_cannot_be_counted_is_refused(dataset, tmp_path):
    prefix, _ = dataset
    with pytest.raises(DataError, match="there is no tokenized data set"):
        count_dataset(tmp_path / "other", 50)
    with pytest.raises(DataError, match="do not fit a vocabulary of 20"):
        count_dataset(prefix, 20)
    with pytest.raises(DataError, match="documents 0 to 3"):
        count_dataset(prefix, 50, range(2, 5))
    with pytest.raises(DataError, match="no held-out tokens"):
        unigram_entropy(np.ones(4, dtype=np.int64), np.zeros(4, dtype=np.int64))
    with pytest.raises(DataError, match="of 4 ids, the held-out counts of 5"):
        unigram_entropy(np.ones(4, dtype=np.int64), np.ones(5, dtype=np.int64))
