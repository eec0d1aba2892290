"""From ``DataConfig`` to the samples of a run: megatron-core's blended GPT data sets, checked beforehand.

Rank 0 checks the files and builds the sample indices in the index cache; all ranks map them from there, so
they must share the cache, or each node must have one that was filled before. Whatever rank 0 finds wrong
every rank raises, which is why no rank is left waiting.
"""

import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch.distributed as dist
from megatron.core.datasets import blended_dataset, gpt_dataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from skipmega.config import DataConfig, DataSource
from skipmega.data.files import atomic_write
from skipmega.data.order.batches import SampleSource
from skipmega.data.order.mixture_plan import MixturePlan
from skipmega.data.pairs.indexed import check_dataset
from skipmega.data.pairs.token_reader import read_with_retries
from skipmega.data.ranks import from_all_ranks, on_rank_0, rank
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import DataError

_SMALLEST_SURPLUS = 0.005


@dataclass(frozen=True)
class RunDatasets:
    """Training and held-out samples in the run's order; ``valid`` is None if none were asked for.

    ``valid_sources`` are those of single sources, by name, where there are several; ``plan`` says what is
    drawn of which source, ``fingerprint`` what the training samples are cut from. They are known of the order
    ``stream`` only.
    """

    train: SampleSource
    valid: SampleSource | None
    valid_sources: Mapping[str, SampleSource] = field(default_factory=dict)
    plan: MixturePlan | None = None
    fingerprint: str | None = None


def build_datasets(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    num_train_samples: int,
    num_valid_samples: int,
    seed: int,
    index_cache: str | Path,
) -> RunDatasets:
    """Check the data and build the samples; all processes call it if torch.distributed is initialised.

    Sources are drawn in proportion to their weights and repeated as often as the samples need. The order
    is a function of the arguments and the data alone.

    Args:
        config: sources, split and sequence length.
        tokenizer: the run's tokenizer.
        num_train_samples: sequences of the whole run; part of what determines their order.
        num_valid_samples: held-out sequences; 0 builds none.
        seed: of the shuffles.
        index_cache: folder for the sample indices, shared by all processes; or on each node's own disk, if
            all indices are there already.

    Raises:
        DataError: no sources, a data set that :func:`skipmega.data.pairs.indexed.check_dataset` refuses, a
            part too small for one sample, or a cache that not all processes can use.
    """
    parts = _plan_parts(config, num_train_samples, num_valid_samples)
    cache = Path(index_cache)
    fingerprints = on_rank_0(lambda: _check_parts(parts, config.sequence_length, tokenizer))
    adapter = _MegatronTokenizer(tokenizer, fingerprints)

    def build(on_this_rank: bool) -> list[SampleSource]:
        with _process_group(), _indices_whole_or_absent():
            return [
                _build_part(part, config.sequence_length, adapter, seed, cache, on_this_rank)
                for part in parts
            ]

    if not _is_shared(cache):
        _check_copies(cache, build(on_this_rank=rank() == 0))
    built = build(on_this_rank=True)
    for part in built:
        read_with_retries(part, config.read_retries)
    return RunDatasets(train=built[0], valid=built[1] if len(built) > 1 else None)


@dataclass(frozen=True)
class _Part:
    """The training or the held-out part: its sources, and which share of their documents it takes."""

    split: Split
    sources: tuple[DataSource, ...]
    share: tuple[float, float]
    samples: int


def _plan_parts(config: DataConfig, num_train_samples: int, num_valid_samples: int) -> list[_Part]:
    if not config.train:
        raise DataError("data.train names no data set: give the path of a prepared pair, without its ending")
    whole = (0.0, 1.0)
    cut = config.split[0] / sum(config.split)
    train_share = whole if config.valid else (0.0, cut)
    parts = [_Part(Split.train, tuple(config.train), train_share, num_train_samples)]
    if num_valid_samples > 0:
        valid_share = whole if config.valid else (cut, 1.0)
        parts.append(_Part(Split.valid, tuple(config.valid or config.train), valid_share, num_valid_samples))
    return parts


def _check_parts(parts: Sequence[_Part], sequence_length: int, tokenizer: Tokenizer) -> dict[str, str]:
    """Refuse unusable sources; return the SHA-256 of each one's index."""
    prefixes = dict.fromkeys(source.path for part in parts for source in part.sources)
    checked = {prefix: check_dataset(prefix, tokenizer) for prefix in prefixes}
    for part in parts:
        for source in part.sources:
            lengths = checked[source.path].lengths
            first, end = (round(edge * float(len(lengths))) for edge in part.share)
            tokens = int(lengths[first:end].sum(dtype=np.int64))
            if tokens <= sequence_length:
                of = "" if part.share == (0.0, 1.0) else f" of the {len(lengths)} (data.split)"
                raise DataError(
                    f"{source.path} is too small: its {part.split.name} part has {tokens} tokens in "
                    f"{end - first} documents{of}, and one sample needs data.sequence_length + 1 = "
                    f"{sequence_length + 1}: give more data, another split, or shorter sequences"
                )
    return {prefix: dataset.index_sha256 for prefix, dataset in checked.items()}


def _is_shared(cache: Path) -> bool:
    """Whether all ranks see the same folder; refuses one that rank 0 cannot write."""

    def leave_marker() -> str:
        name = f".visible-{uuid.uuid4().hex}"
        try:
            cache.mkdir(parents=True, exist_ok=True)
            (cache / name).touch()
        except OSError as error:
            raise DataError(
                f"cannot write the index cache {cache}: {error.strerror}; set data.index_cache to a "
                "writable folder"
            ) from None
        return name

    marker = cache / on_rank_0(leave_marker)
    seen = from_all_ranks(marker.exists())
    if rank() == 0:
        marker.unlink()
    return all(seen)


def _check_copies(cache: Path, built: Sequence[Any]) -> None:
    """Refuse a folder of a node's own that lacks an index of the samples that rank 0 has ``built`` in its."""

    def list_files() -> dict[str, int]:
        parts = [part for samples in built for part in (samples, *getattr(samples, "datasets", ()))]
        paths = [path for part in parts for path in cache.glob(f"{part.unique_description_hash}-*")]
        return {path.name: path.stat().st_size for path in paths}

    wanted = on_rank_0(list_files)
    whole = all(_size(cache / name) == size for name, size in wanted.items())
    lacking = [number for number, is_whole in enumerate(from_all_ranks(whole)) if not is_whole]
    if lacking:
        raise DataError(
            f"the index cache {cache} of rank 0 is not visible on ranks {lacking}, and theirs lacks indices: "
            "run tools/build_indices.py on every node first, or set data.index_cache to a folder on a file "
            "system that all nodes share"
        )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


class _MegatronTokenizer:
    """What megatron-core's data sets ask of a tokenizer.

    ``unique_identifiers`` goes into the names of cached indices: with the fingerprints of the data, a cache
    made from files that were since replaced is not found again. There is no ``pad``: samples are full.
    """

    def __init__(self, tokenizer: Tokenizer, fingerprints: dict[str, str]) -> None:
        self.eod = tokenizer.eod_id
        self.vocab_size = tokenizer.size
        self.unique_identifiers = {"tokenizer": tokenizer.sha256, "indices": fingerprints}


def _build_part(
    part: _Part,
    sequence_length: int,
    tokenizer: _MegatronTokenizer,
    seed: int,
    cache: Path,
    on_this_rank: bool,
) -> SampleSource:
    prefixes = [source.path for source in part.sources]
    weights = [source.weight for source in part.sources] if len(prefixes) > 1 else None
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=(prefixes, weights),
        split="1,1,1",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mmap_bin_files=False,
        mid_level_dataset_surplus=_surplus(weights, part.samples),
    )
    config.split_matrix = [part.share if split is part.split else None for split in Split]
    sizes = [part.samples if split is part.split else 0 for split in Split]
    try:
        built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: on_this_rank, config).build()
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, (OSError, EOFError, ValueError)):
            raise DataError(
                f"cannot use the index cache {cache} ({cause}): remove the folder, it is made anew"
            ) from error
        raise
    return cast(SampleSource, built[part.split.value])


def _surplus(weights: list[float] | None, samples: int) -> float:
    """The share of samples that each source must have beyond its own, lest a blend run out of one.

    megatron-core rounds every source's samples up, and so makes the blend longer than what it built the
    sources for.
    """
    if weights is None:
        return _SMALLEST_SURPLUS
    shares = [weight / sum(weights) for weight in weights]
    planned = [math.ceil(samples * share) for share in shares]
    drawn = [math.floor(sum(planned) * share) + 1 for share in shares]
    needed = (most / least - 1 for most, least in zip(drawn, planned, strict=True))
    return max(_SMALLEST_SURPLUS, *needed)


@contextmanager
def _indices_whole_or_absent() -> Iterator[None]:
    """megatron-core writes its sample indices in place, and a process that was killed meanwhile would leave a
    torn one that every later start finds; here they get their names when they are complete."""
    modules = (gpt_dataset, blended_dataset)
    try:
        for module in modules:
            module.numpy = _NumpySavingAtomically("numpy")
        yield
    finally:
        for module in modules:
            module.numpy = np


class _NumpySavingAtomically(ModuleType):
    """numpy, but for :func:`numpy.save`."""

    @staticmethod
    def save(path: str, array: np.ndarray[Any, Any], allow_pickle: bool) -> None:
        with atomic_write(Path(path)) as stream:
            np.save(stream, array, allow_pickle=allow_pickle)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@contextmanager
def _process_group() -> Iterator[None]:
    """A group of this one process where there is none: megatron-core's blends ask for a rank."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()
