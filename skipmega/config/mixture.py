"""Rules of a mixture of sources."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipmega.config.sections import DataConfig, DataSource


def check_mixture(data: "DataConfig") -> None:
    """Refuse a mixture that cannot be drawn.

    Raises:
        ValueError: names the field, the value and the mend.
    """
    for part, sources in (("train", data.train), ("valid", data.valid)):
        _check_sources(part, sources, data.order)
    if data.order == "documents":
        _refuse_what_streams_know(data)
    _check_stages(data)
    if any(not 0 <= first <= last for first, last in data.leave_out):
        raise ValueError(f"leave_out={data.leave_out}: give [first, last] with 0 <= first <= last")


def _check_sources(part: str, sources: "Sequence[DataSource]", order: str) -> None:
    weights = [source.weight for source in sources]
    if order == "documents" and 0 in weights:
        raise ValueError(
            f"{part} has a source of weight 0: leave it out (sources rest with order=stream only)"
        )
    twice = [name for name, times in Counter(source.label for source in sources).items() if times > 1]
    if order == "stream" and twice:
        raise ValueError(f"{part} has several sources called {twice[0]!r}: give each a name of its own")
    if sources and not any(weights):
        raise ValueError(f"{part} has sources of weight 0 only: give one of them a weight")


def _refuse_what_streams_know(data: "DataConfig") -> None:
    for name in ("temperature", "stages", "leave_out"):
        if getattr(data, name):
            raise ValueError(f"{name}={getattr(data, name)} needs order=stream: set it, or leave {name} out")
    limited = [source for source in (*data.train, *data.valid) if source.max_epochs is not None]
    if limited:
        raise ValueError(
            f"max_epochs={limited[0].max_epochs} of {limited[0].label} needs order=stream: set it, or leave "
            "max_epochs out"
        )


def _check_stages(data: "DataConfig") -> None:
    begins = [stage.from_tokens for stage in data.stages]
    if any(first >= second for first, second in pairwise(begins)):
        raise ValueError(f"stages begin at from_tokens={begins}: give them in ascending order")
    names = {source.label for source in data.train}
    for stage in data.stages:
        at = f"the stage from_tokens={stage.from_tokens}"
        if unknown := sorted(set(stage.weights) - names):
            raise ValueError(f"{at} weighs {unknown[0]!r}, which is none of train's {sorted(names)}")
        if any(weight < 0 for weight in stage.weights.values()) or not any(stage.weights.values()):
            raise ValueError(f"{at} has weights={stage.weights}: give weights >= 0, one of them greater")
