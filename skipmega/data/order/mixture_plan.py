"""What a run will draw of which source: tokens and epochs, before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass

from skipmega.config import DataConfig
from skipmega.data.order.mixture import Mixture, Stage
from skipmega.data.order.token_stream import TokenStream
from skipmega.errors import DataError


@dataclass(frozen=True)
class PlannedSource:
    """One source in one stage: its ``share`` of the stage's samples, the ``tokens`` drawn of it in the stage,
    the ``epochs`` of it that the run has seen at the stage's end, and the share of its tokens that pads."""

    name: str
    share: float
    tokens: int
    epochs: float
    padding: float = 0.0


@dataclass(frozen=True)
class MixturePlan:
    """Stages of a mixture and what each draws.

    Attributes:
        stages: as :class:`Mixture` takes them.
        sources: by stage, then by source.
        length: tokens of a sample.
    """

    stages: tuple[Stage, ...]
    sources: tuple[tuple[PlannedSource, ...], ...]
    length: int

    @classmethod
    def of(cls, config: DataConfig, streams: Sequence[TokenStream], seed: int, samples: int) -> "MixturePlan":
        """Plan the first ``samples`` samples of the order.

        Raises:
            DataError: a source would be read more often than its ``max_epochs``.
        """
        stages = _stages(config, streams)
        ends = [min(stage.first_sample, samples) for stage in stages[1:]] + [samples]
        planned, before = [], (0,) * len(streams)
        mixture = Mixture(stages, seed)
        for stage, end in zip(stages, ends, strict=True):
            after = mixture.drawn(end)
            planned.append(_planned(stage, streams, before, after))
            before = after
        _check_epochs(config, planned[-1])
        return cls(stages, tuple(planned), config.sequence_length)

    def __str__(self) -> str:
        width = max(len(source.name) for source in self.sources[0])
        lines = []
        for stage, sources in zip(self.stages, self.sources, strict=True):
            total = sum(source.tokens for source in sources)
            begin = stage.first_sample * self.length
            lines.append(f"data: {_short(total)} tokens from token {_short(begin)} on")
            lines += [
                f"  {source.name:<{width}}  {source.share:7.2%}  {_short(source.tokens):>8} tokens, "
                f"{source.epochs:.3g} epochs by then"
                + (f", {source.padding:.3%} padding" if source.padding else "")
                for source in sources
            ]
        return "\n".join(lines)


def _stages(config: DataConfig, streams: Sequence[TokenStream]) -> tuple[Stage, ...]:
    sizes = [
        1.0 if config.temperature is None else stream.tokens ** (1 / config.temperature) for stream in streams
    ]

    def stage(tokens: int, weights: Sequence[float]) -> Stage:
        weighted = tuple(weight * size for weight, size in zip(weights, sizes, strict=True))
        return Stage(-(-tokens // config.sequence_length), weighted)

    labels = [source.label for source in config.train]
    return (
        stage(0, [source.weight for source in config.train]),
        *(
            stage(later.from_tokens, [later.weights.get(label, 0.0) for label in labels])
            for later in config.stages
        ),
    )


def _planned(
    stage: Stage, streams: Sequence[TokenStream], before: Sequence[int], after: Sequence[int]
) -> tuple[PlannedSource, ...]:
    return tuple(
        PlannedSource(
            name=stream.name,
            share=weight / sum(stage.weights),
            tokens=(end - begin) * stream.length,
            epochs=end / stream.samples_per_epoch,
            padding=stream.padding,
        )
        for stream, weight, begin, end in zip(streams, stage.weights, before, after, strict=True)
    )


def _check_epochs(config: DataConfig, sources: Sequence[PlannedSource]) -> None:
    for source, planned in zip(config.train, sources, strict=True):
        if source.max_epochs is not None and planned.epochs > source.max_epochs:
            raise DataError(
                f"the run would read {source.label} {planned.epochs:.3g} times, and its max_epochs is "
                f"{source.max_epochs:g}: lower its weight by {1 - source.max_epochs / planned.epochs:.0%} or "
                "more, give more data, or train for fewer tokens"
            )


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g}T"
