"""Named texts as documents of token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skipmega.data.corpora.readers import Corpus
from skipmega.errors import ConfigError, DataError
from skipmega.inspection.routers.subject import Vocabulary


@dataclass(frozen=True)
class Source:
    """Where texts come from; ``complete`` is false if reading stopped at the limit of tokens."""

    name: str
    path: Path
    complete: bool


@dataclass(frozen=True)
class Texts:
    """``documents`` are token ids, int64 [tokens], without special ones; ``source_of`` the number of each
    one's source."""

    sources: list[Source]
    documents: list[NDArray[np.int64]]
    source_of: list[int]

    @property
    def num_tokens(self) -> int:
        """In all documents."""
        return sum(len(document) for document in self.documents)


def named_paths(arguments: Sequence[str]) -> dict[str, Path]:
    """``name=path`` or ``path`` (called as its file, without endings), as typed, by name.

    Raises:
        ConfigError: two of one name.
        DataError: a path is missing.
    """
    named: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or "/" in name or Path(argument).exists():
            name, path = Path(argument).name.partition(".")[0] or argument, argument
        if name in named:
            raise ConfigError(
                f"two texts are called {name!r}, {named[name]} and {path}: name them, name=path"
            )
        if not Path(path).exists():
            raise DataError(f"text {path} does not exist")
        named[name] = Path(path)
    return named


def read_texts(
    paths: Mapping[str, Path],
    vocabulary: Vocabulary,
    max_tokens: int,
    text_field: str = "text",
    skip_bad: bool = False,
) -> Texts:
    """Read and tokenize the beginning of each source, documents of every format of a corpus.

    Args:
        paths: files or folders by the name of their source.
        vocabulary: gives the ids.
        max_tokens: of each source; the rest is not read.
        text_field: of JSON lines and parquet files.
        skip_bad: leave out records without usable text instead of raising.

    Raises:
        DataError: a path is missing, damaged or no text, or a source has no text.
    """
    texts = Texts([], [], [])
    longest = max(map(len, vocabulary.pieces))
    for name, path in paths.items():
        left, complete = max_tokens, True
        for document in Corpus([path], text_field=text_field, skip_bad=skip_bad):
            if left == 0:
                complete = False
                break
            begin = document.text[: left * longest]  # no more characters can be wanted
            ids = np.array(vocabulary.encode(begin), dtype=np.int64)
            complete = len(ids) <= left and len(begin) == len(document.text)
            if len(ids):
                texts.documents.append(ids[:left])
                texts.source_of.append(len(texts.sources))
                left -= len(texts.documents[-1])
        if left == max_tokens:
            raise DataError(f"{path} holds no text: every document in it is empty")
        texts.sources.append(Source(name, path, complete))
    return texts
