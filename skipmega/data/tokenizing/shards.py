"""Preparation in shards, by several processes at any times: the files are those of one process."""

import shutil
from pathlib import Path

from skipmega.data.corpora.readers import Corpus, SourceFile
from skipmega.data.corpora.splitting import split_files
from skipmega.data.pairs.manifest import Manifest, SourceRecord, read_manifest
from skipmega.data.tokenizer import Tokenizer
from skipmega.data.tokenizing.prepare import (
    PreparedPair,
    finish_pairs,
    new_pairs,
    pair_targets,
    prepare_dataset,
)
from skipmega.errors import DataError


def prepare_shard(
    corpus: Corpus,
    prefix: Path,
    tokenizer: Tokenizer,
    shard: int,
    shards: int,
    *,
    workers: int = 1,
    valid_fraction: float = 0.0,
) -> list[PreparedPair]:
    """Tokenize the files of one shard into ``<prefix>.shards/``; nothing if that was done before.

    Args:
        corpus: the whole of it; shards are runs of its files, of about the same number of bytes.
        shard: 0 to ``shards - 1``.
        workers, valid_fraction: as for :func:`skipmega.data.tokenizing.prepare.prepare_dataset`.

    Returns:
        The shard's pairs; none if it has no files.

    Raises:
        DataError: there is no such shard, more shards than files, what is there was made of something else,
            or the corpus is unreadable.
    """
    files = split_files(corpus, shards)
    if not 0 <= shard < shards:
        raise DataError(f"shard {shard} of {shards}: number them from 0 to {shards - 1}")
    if not files[shard]:
        return []
    target = _shard_prefix(prefix, shard, shards)
    done = _finished(target, files[shard], corpus.text_field, tokenizer, valid_fraction)
    if done:
        return done
    part = Corpus(
        [file.path for file in files[shard]], text_field=corpus.text_field, skip_bad=corpus.skip_bad
    )
    return prepare_dataset(
        part, target, tokenizer,
        workers=workers, valid_fraction=valid_fraction, overwrite=True, allow_empty=True,
    )  # fmt: skip


def merge_shards(
    corpus: Corpus,
    prefix: Path,
    tokenizer: Tokenizer,
    shards: int,
    *,
    valid_fraction: float = 0.0,
    overwrite: bool = False,
) -> list[PreparedPair]:
    """Join all shards, bit-identical to a preparation in one piece, and remove them.

    Raises:
        DataError: a shard is missing, or was made of other files or with another tokenizer; a result exists.
    """
    finished = []
    for shard, files in enumerate(split_files(corpus, shards)):
        target = _shard_prefix(prefix, shard, shards)
        done: list[PreparedPair] = []
        if files:
            done = _finished(target, files, corpus.text_field, tokenizer, valid_fraction)
        if files and not done:
            raise DataError(
                f"shard {shard} of {shards} is missing ({target}.*): prepare it, then merge again"
            )
        finished.append(done)
    with new_pairs(prefix, tokenizer, valid_fraction, overwrite) as writers:
        for pairs in finished:
            for writer, pair in zip(writers, pairs, strict=bool(pairs)):
                writer.add_pair(pair.prefix, pair.manifest)
        first = [pairs[0].manifest for pairs in finished if pairs]
        corpus.bad_records = sum(manifest.bad_records for manifest in first)
        empty = sum(manifest.empty_documents for manifest in first)
        merged = finish_pairs(writers, corpus, tokenizer, valid_fraction, empty)
    shutil.rmtree(shards_folder(prefix))
    return merged


def shards_folder(prefix: Path) -> Path:
    """Where the shards of a preparation are."""
    return prefix.with_name(f"{prefix.name}.shards")


def _shard_prefix(prefix: Path, shard: int, shards: int) -> Path:
    return shards_folder(prefix) / f"{shard:04d}-of-{shards:04d}"


def _finished(
    target: Path, files: list[SourceFile], text_field: str, tokenizer: Tokenizer, valid_fraction: float
) -> list[PreparedPair]:
    """The pairs of a shard, if all are there.

    Raises:
        DataError: they were made of something else.
    """
    pairs = []
    for path in pair_targets(target, valid_fraction).values():
        manifest = read_manifest(path)
        if manifest is None:
            return []
        _check_same(path, manifest, files, text_field, tokenizer, valid_fraction)
        pairs.append(PreparedPair(path, manifest))
    return pairs


def _check_same(
    path: Path,
    manifest: Manifest,
    files: list[SourceFile],
    text_field: str,
    tokenizer: Tokenizer,
    valid_fraction: float,
) -> None:
    sources = tuple(SourceRecord(path=str(file.path), bytes=file.size) for file in files)
    for what, there, here in (
        ("the tokenizer's SHA-256", manifest.tokenizer.sha256, tokenizer.sha256),
        ("text_field", manifest.text_field, text_field),
        ("valid_fraction", manifest.valid_fraction, valid_fraction),
        ("the files", [item.path for item in manifest.sources], [item.path for item in sources]),
        ("the files' sizes", [item.bytes for item in manifest.sources], [item.bytes for item in sources]),
    ):
        if there != here:
            raise DataError(
                f"{path} is a shard of something else: {what}: {there} there, {here} here; remove "
                f"{path.parent} to start again"
            )
