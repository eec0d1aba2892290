"""From ``DataConfig`` to the samples of a run in the order ``stream``: sources, mixture, plan, samples.

No index is built. A run of a trillion tokens starts as fast as the headers of its files are read, and holds
no more than their names.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from skipmega.config import DataConfig, DataSource
from skipmega.data.files import find_pairs
from skipmega.data.order.batches import SampleSource
from skipmega.data.order.datasets import RunDatasets
from skipmega.data.order.left_out import LeftOut
from skipmega.data.order.mixture import Mixture, Stage
from skipmega.data.order.mixture_plan import MixturePlan
from skipmega.data.order.token_stream import TokenRange, TokenStream
from skipmega.data.pairs.indexed import OpenedPair, open_dataset
from skipmega.data.ranks import on_rank_0
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import DataError


class MixedSamples(SampleSource):
    """Samples of several sources in the order of a mixture.

    Args:
        streams: by the mixture's numbers of sources.
        mixture: whose turn it is.
        left_out: samples of the order that are passed over.
        samples: length.
        end: the token that ends documents. One after another pads, and is not learnt: no document is empty.
    """

    def __init__(
        self, streams: Sequence[TokenStream], mixture: Mixture, left_out: LeftOut, samples: int, end: int
    ) -> None:
        self._streams, self._mixture, self._left_out = streams, mixture, left_out
        self._samples, self._end = samples, end
        self._all = torch.ones(streams[0].length)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        source, number = self._mixture.locate(self._left_out.number(index))
        tokens = torch.from_numpy(self._streams[source].read(number))
        mask = self._all
        if self._streams[source].padding:
            ends = tokens == self._end
            mask = (~(ends[:-1] & ends[1:])).float()
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": mask}


def build_streams(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    num_train_samples: int,
    num_valid_samples: int,
    seed: int,
) -> RunDatasets:
    """Open the data; all processes call it if torch.distributed is initialised.

    The order of training samples depends on ``config`` and ``seed``, not on how many are asked for.

    Args:
        config: sources and mixture.
        tokenizer: the run's tokenizer.
        num_train_samples: sequences of the whole run.
        num_valid_samples: held-out sequences, of all sources together and of each; 0 opens none.
        seed: of the orders.

    Raises:
        DataError: no sources, one that :func:`skipmega.data.pairs.indexed.open_dataset` refuses or that is
            too small for one sample or packed for samples of another length, or more epochs of one than it
            allows.
    """
    if not config.train:
        raise DataError("data.train names no data set: give the path of a prepared pair, without its ending")
    pairs = on_rank_0(lambda: _open_sources((*config.train, *config.valid), tokenizer))
    cut = config.split[0] / sum(config.split)

    def stream(source: DataSource, share: tuple[float, float], what: str) -> TokenStream:
        ranges = [_part(pair, share, config.sequence_length) for pair in pairs[source.path]]
        opened = TokenStream(
            source.label, ranges, config.sequence_length, seed, tokenizer.size, config.read_retries
        )
        _check_holds_samples(opened, what)
        return opened

    train = [stream(source, (0.0, 1.0 if config.valid else cut), "train") for source in config.train]
    left_out = LeftOut(config.leave_out)
    plan = on_rank_0(lambda: MixturePlan.of(config, train, seed, left_out.number(num_train_samples - 1) + 1))
    mixture = Mixture(plan.stages, seed)
    samples = MixedSamples(train, mixture, left_out, num_train_samples, tokenizer.eod_id)
    fingerprint = _fingerprint(config, pairs)
    if num_valid_samples == 0:
        return RunDatasets(samples, None, plan=plan, fingerprint=fingerprint)
    held_out = config.valid or config.train
    valid = [stream(source, (0.0 if config.valid else cut, 1.0), "valid") for source in held_out]

    def mixed(weights: Sequence[float], streams: Sequence[TokenStream]) -> MixedSamples:
        alone = Mixture([Stage(0, tuple(weights))], seed)
        return MixedSamples(streams, alone, LeftOut([]), num_valid_samples, tokenizer.eod_id)

    return RunDatasets(
        samples,
        mixed([source.weight for source in held_out], valid),
        valid_sources={each.name: mixed([1.0], [each]) for each in valid if len(valid) > 1},
        plan=plan,
        fingerprint=fingerprint,
    )


def _open_sources(sources: Sequence[DataSource], tokenizer: Tokenizer) -> dict[str, list[OpenedPair]]:
    paths = dict.fromkeys(source.path for source in sources)
    return {path: [open_dataset(prefix, tokenizer) for prefix in find_pairs(path)] for path in paths}


def _fingerprint(config: DataConfig, pairs: Mapping[str, Sequence[OpenedPair]]) -> str:
    """SHA-256 of what the sources hold, wherever it lies."""
    content = [
        (source.label, pair.tokens, pair.sha256) for source in config.train for pair in pairs[source.path]
    ]
    return hashlib.sha256(repr((content, config.split, bool(config.valid))).encode()).hexdigest()


def _part(pair: OpenedPair, share: tuple[float, float], length: int) -> TokenRange:
    """The tokens of that share of a pair's documents, or of its samples if it is packed."""
    if pair.packed_for is None:
        first, end = (pair.tokens_before(round(edge * pair.documents)) for edge in share)
        return TokenRange(pair.prefix, pair.dtype, first, end - first)
    if pair.packed_for != length:
        raise DataError(
            f"{pair.prefix} is packed for samples of {pair.packed_for} tokens, and data.sequence_length is "
            f"{length}: set it to the former, or pack the data for the latter (tools/data.py shuffle --pack)"
        )
    samples = pair.tokens // (length + 1)
    first, end = (round(edge * samples) * (length + 1) for edge in share)
    padding = pair.padding * (end - first) / max(pair.tokens, 1)
    return TokenRange(pair.prefix, pair.dtype, first, end - first, packed=True, padding=padding)


def _check_holds_samples(stream: TokenStream, what: str) -> None:
    if stream.samples_per_epoch == 0:
        raise DataError(
            f"{stream.name} is too small: its {what} part has {stream.tokens} tokens in {len(stream.ranges)} "
            f"files, and one sample needs data.sequence_length + 1 = {stream.length + 1}: give more data, "
            "another split, or shorter sequences"
        )
