"""A small tokenizer and small tokenized data sets, made from the standard library's own text."""

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from skipmega.data.tokenizer import Tokenizer, train_tokenizer

_MODULES = (json, textwrap)


@pytest.fixture(scope="session")
def source_texts() -> list[str]:
    """Real Python files."""
    return [Path(str(module.__file__)).read_text(encoding="utf-8") for module in _MODULES]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, source_texts: list[str]) -> Tokenizer:
    return train_tokenizer(source_texts, tmp_path_factory.mktemp("tokenizer") / "small.model", 600)


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory, source_texts: list[str]) -> Tokenizer:
    return train_tokenizer(source_texts, tmp_path_factory.mktemp("tokenizer") / "other.model", 500)


WritePair = Callable[[Path, Sequence[Sequence[int]]], str]


@pytest.fixture(scope="session")
def write_pair() -> WritePair:
    """Writes documents of token ids as a pair without a manifest, as foreign tools do."""

    def write(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for document in documents:
            builder.add_document(np.array(document), [len(document)])
        builder.finalize(f"{prefix}.idx")
        return str(prefix)

    return write
