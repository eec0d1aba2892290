"""What a run reads, and the rules of a mixture of sources."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from skipmega.config.base import Section


class DataSource(Section):
    """A tokenized data set: the path of its .bin/.idx pair without the ending, and its blending weight.

    With ``data.order=stream`` the path may be a pattern (``web-*``), which stands for all pairs that it fits,
    in the order of their names; ``name`` (left out: the path's last part) is how mixtures, logs and the order
    of samples know it, and a run that would read it more than ``max_epochs`` times is refused.
    """

    path: str
    weight: float = Field(1.0, ge=0)
    name: str | None = None
    max_epochs: float | None = Field(None, gt=0)

    @property
    def label(self) -> str:
        """What the source is called."""
        return self.name or self.path.rsplit("/", 1)[-1]


class MixtureStage(Section):
    """Weights of sources, by name, from that many tokens of the run on; sources not named rest."""

    from_tokens: int = Field(ge=1)
    weights: dict[str, float]


class DataConfig(Section):
    """What the model reads. Lengths in tokens.

    With ``valid`` left empty, ``split`` (weights of train and valid) cuts each of ``train``'s sources.
    Documents in one sample do not see each other unless ``attend_across_documents``. A read that fails is
    tried again ``read_retries`` times, after 1, 2, 4 ... seconds.

    ``order`` is how samples are cut and shuffled. ``documents`` shuffles documents, cuts what it then has and
    shuffles the pieces: megatron-core's, by indices of all documents and samples that must be built.
    ``stream`` cuts files as they are and shuffles the pieces without any index, for data of any size; it
    alone knows what follows. ``temperature`` T multiplies weights with (tokens of the source)^(1/T): 1 draws
    in proportion to size. ``stages`` change the weights during the run. ``leave_out`` lists samples, [first,
    last] by their number in the order, that are passed over.
    """

    tokenizer: str | None = None
    train: list[DataSource] = Field(default_factory=list)
    valid: list[DataSource] = Field(default_factory=list)
    split: list[float] = Field([99.0, 1.0], min_length=2, max_length=2)
    sequence_length: int = Field(1024, ge=2)
    attend_across_documents: bool = False
    order: Literal["documents", "stream"] = "documents"
    temperature: float | None = Field(None, gt=0)
    stages: list[MixtureStage] = Field(default_factory=list)
    leave_out: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = Field(default_factory=list)
    index_cache: str | None = None
    num_workers: int = Field(1, ge=0)
    read_retries: int = Field(4, ge=0)

    @model_validator(mode="after")
    def _can_be_drawn(self) -> "DataConfig":
        for part, sources in (("train", self.train), ("valid", self.valid)):
            _check_sources(part, sources, self.order)
        if self.order == "documents":
            _refuse_what_streams_know(self)
        _check_stages(self)
        if any(not 0 <= first <= last for first, last in self.leave_out):
            raise ValueError(f"leave_out={self.leave_out}: give [first, last] with 0 <= first <= last")
        return self


def _check_sources(part: str, sources: Sequence[DataSource], order: str) -> None:
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


def _refuse_what_streams_know(data: DataConfig) -> None:
    for name in ("temperature", "stages", "leave_out"):
        if getattr(data, name):
            raise ValueError(f"{name}={getattr(data, name)} needs order=stream: set it, or leave {name} out")
    limited = [source for source in (*data.train, *data.valid) if source.max_epochs is not None]
    if limited:
        raise ValueError(
            f"max_epochs={limited[0].max_epochs} of {limited[0].label} needs order=stream: set it, or leave "
            "max_epochs out"
        )


def _check_stages(data: DataConfig) -> None:
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
