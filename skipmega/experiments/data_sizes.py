"""Opens data of many sizes and measures what a rank pays for it: time, memory, samples a second.

Files are sparse: each shard has the length of real tokens and takes no room, its index is whole and one file
under all names (hard links). What is read of tokens is zeros: the host's work, without a disk's.
"""

import gc
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from skipmega.config import DataConfig
from skipmega.data.files import sha256_of
from skipmega.data.order.batches import SampleSource, make_loader
from skipmega.data.order.datasets import RunDatasets, build_datasets
from skipmega.data.order.streams import build_streams
from skipmega.data.pairs.manifest import FileRecord, Manifest, TokenizerRecord, manifest_path
from skipmega.data.tokenizer import Tokenizer

_READS = 4000
_LENGTH = 2048
_HEADER = np.dtype(
    [("magic", "S9"), ("version", "<u8"), ("type", "u1"), ("sequences", "<u8"), ("boundaries", "<u8")]
)
_UINT16 = 8  # megatron-core's code


def write_sparse_shards(folder: Path, shards: int, shard_tokens: int, tokenizer: Tokenizer) -> str:
    """Make ``shards`` pairs of ``shard_tokens`` uint16 tokens each, in documents of about 1000.

    What is there already is kept.

    Returns:
        The pattern that fits them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / "shard-00000"
    lengths = _document_lengths(shard_tokens)
    if not Path(f"{first}.idx").exists():
        _write_index(Path(f"{first}.idx"), lengths)
    manifest = Manifest(
        skipmega_version="0", part="all", valid_fraction=0.0, documents=len(lengths), tokens=shard_tokens,
        text_bytes=0, max_token_id=0, dtype="uint16", empty_documents=0, bad_records=0, text_field="text",
        sources=(), bin=FileRecord(bytes=2 * shard_tokens, sha256="not computed: sparse"),
        idx=FileRecord(bytes=Path(f"{first}.idx").stat().st_size, sha256=sha256_of(Path(f"{first}.idx"))),
        tokenizer=TokenizerRecord(
            sha256=tokenizer.sha256, vocab_size=tokenizer.size, eod_id=tokenizer.eod_id
        ),
    ).model_dump_json()  # fmt: skip
    for number in range(shards):
        prefix = folder / f"shard-{number:05d}"
        if not manifest_path(prefix).exists():
            if number:
                os.link(f"{first}.idx", f"{prefix}.idx")
            with Path(f"{prefix}.bin").open("wb") as stream:
                stream.truncate(2 * shard_tokens)
            manifest_path(prefix).write_text(manifest)
    return f"{folder}/shard-*"


def measure(pattern: str, tokenizer: Tokenizer, tokens: int, order: str, cache: Path) -> dict[str, Any]:
    """Open the data, read a first batch of 8 and then samples all over it; in a process of its own, for its
    memory is told.

    Returns:
        ``open_seconds`` until the data are open, ``first_batch_seconds`` until a batch is there, ``peak_gib``
        of the process, ``above_imports_gib`` of it since this began, and ``samples_per_second`` at random.
    """
    gc.collect()
    before = _begin_peak()
    began = time.perf_counter()
    opened = _open(pattern, tokenizer, tokens, order, cache)
    open_seconds = time.perf_counter() - began
    loader = make_loader(
        opened.train, consumed_samples=len(opened.train) // 2, total_samples=len(opened.train),
        micro_batch_size=8, dp_rank=0, dp_size=1, document_end=tokenizer.eod_id, num_workers=0,
        pin_memory=False,
    )  # fmt: skip
    next(loader)
    return {
        "order": order,
        "tokens": tokens,
        "open_seconds": open_seconds,
        "first_batch_seconds": time.perf_counter() - began,
        "samples_per_second": _random_reads(opened.train),
        "peak_gib": _peak_gib(),
        "above_imports_gib": _peak_gib() - before,
    }


def forget_pages(folder: Path) -> None:
    """Ask the system to drop what it holds of the files in ``folder``: the next reads go to the disk."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".bin":
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _open(pattern: str, tokenizer: Tokenizer, tokens: int, order: str, cache: Path) -> RunDatasets:
    samples = tokens // _LENGTH - 1000
    if order == "stream":
        config = DataConfig.model_validate(
            {"train": [{"path": pattern}], "order": order, "sequence_length": _LENGTH, "split": [1.0, 0.0]}
        )
        return build_streams(config, tokenizer, num_train_samples=samples, num_valid_samples=0, seed=1)
    folder, name = os.path.split(pattern)
    prefixes = sorted(str(path.with_suffix("")) for path in Path(folder).glob(f"{name}.idx"))
    config = DataConfig.model_validate(
        {
            "train": [{"path": prefix} for prefix in prefixes],
            "sequence_length": _LENGTH,
            "split": [1.0, 0.0],
        }
    )
    return build_datasets(
        config, tokenizer, num_train_samples=samples, num_valid_samples=0, seed=1, index_cache=cache
    )


def _random_reads(samples: SampleSource) -> float:
    numbers = np.random.default_rng(0).integers(0, len(samples), _READS).tolist()
    began = time.perf_counter()
    for number in numbers:
        samples[number]
    return _READS / (time.perf_counter() - began)


def _document_lengths(tokens: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Log-normal, of about 1000 tokens, ``tokens`` in all."""
    count = tokens // 1000
    drawn = np.random.default_rng(0).lognormal(0.0, 1.0, count)
    ends = np.rint(np.cumsum(drawn) * (tokens / drawn.sum())).astype(np.int64)
    ends[-1] = tokens
    return np.diff(ends, prepend=0).astype(np.int32)


def _write_index(path: Path, lengths: np.ndarray[Any, np.dtype[np.int32]]) -> None:
    header = np.array([(b"MMIDIDX\x00\x00", 1, _UINT16, len(lengths), len(lengths) + 1)], _HEADER)
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * 2
    with path.open("wb") as stream:
        for array in (header, lengths, pointers, np.arange(len(lengths) + 1, dtype=np.int64)):
            array.tofile(stream)


def _begin_peak() -> float:
    """Forget the peak so far; returns what is resident now, in GiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_gib()


def _peak_gib() -> float:
    """Most that was resident since then, mapped files included."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 2**20
