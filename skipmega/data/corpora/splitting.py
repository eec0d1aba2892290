"""A corpus in parts of about the same size, by files."""

from skipmega.data.corpora.readers import Corpus, SourceFile
from skipmega.errors import DataError


def check_shards(corpus: Corpus, shards: int) -> None:
    """Refuse a number of shards that the corpus cannot be cut into.

    Raises:
        DataError: there are fewer files.
    """
    if not 1 <= shards <= len(corpus.files):
        raise DataError(
            f"{shards} shards of a corpus of {len(corpus.files)} files: a file is not cut, so use 1 to "
            f"{len(corpus.files)} shards, or cut the corpus into more files"
        )


def split_files(corpus: Corpus, shards: int) -> list[list[SourceFile]]:
    """The corpus's files by shard, in order; a file is where its middle is.

    Raises:
        DataError: there are fewer files than shards.
    """
    check_shards(corpus, shards)
    result: list[list[SourceFile]] = [[] for _ in range(shards)]
    start = 0
    for file in corpus.files:
        if file.size:
            result[shards * (2 * start + file.size) // (2 * corpus.total_bytes)].append(file)
        start += file.size
    return result
