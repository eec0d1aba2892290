"""Mixtures that cannot be drawn are refused with the field, the value and the mend."""

import pytest

from skipmega.config import build_config
from skipmega.errors import ConfigError

SOURCES = [{"path": "data/a"}, {"path": "data/b-*", "name": "b", "weight": 0.0, "max_epochs": 4.0}]
STREAM = {"order": "stream", "train": SOURCES}


def test_a_whole_mixture() -> None:
    stages = [
        {"from_tokens": 10, "weights": {"b": 1.0}},
        {"from_tokens": 20, "weights": {"a": 2.0, "b": 1.0}},
    ]
    values = {"data": STREAM | {"stages": stages, "temperature": 2.0, "leave_out": [[5, 5], [7, 90]]}}
    data = build_config(values, source="test").data
    assert [source.label for source in data.train] == ["a", "b"]
    assert data.stages[1].weights == {"a": 2.0, "b": 1.0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": [SOURCES[0] | {"weight": 0.0}]}, "train has a source of weight 0: leave it out"),
        ({"train": [SOURCES[0] | {"max_epochs": 2.0}]}, "max_epochs=2.0 of a needs order=stream: set it"),
        ({"temperature": 1.0}, "temperature=1.0 needs order=stream: set it, or leave temperature out"),
        ({"leave_out": [[1, 2]]}, "leave_out=[[1, 2]] needs order=stream"),
        ({"stages": [{"from_tokens": 1, "weights": {}}]}, "needs order=stream"),
        (STREAM | {"train": [SOURCES[0], {"path": "more/a"}]}, "train has several sources called 'a': give"),
        (STREAM | {"train": [SOURCES[1]]}, "train has sources of weight 0 only: give one of them a weight"),
        (STREAM | {"valid": [SOURCES[1]]}, "valid has sources of weight 0 only"),
        (STREAM | {"leave_out": [[2, 1]]}, "leave_out=[[2, 1]]: give [first, last] with 0 <= first <= last"),
        (STREAM | {"leave_out": [[1, 2, 3]]}, "at most 2 items"),
        (
            STREAM | {"stages": [{"from_tokens": n, "weights": {"a": 1.0}} for n in (9, 9)]},
            "stages begin at from_tokens=[9, 9]: give them in ascending order",
        ),
        (
            STREAM | {"stages": [{"from_tokens": 9, "weights": {"c": 1.0}}]},
            "the stage from_tokens=9 weighs 'c', which is none of train's ['a', 'b']",
        ),
        (STREAM | {"stages": [{"from_tokens": 9, "weights": {"a": 0.0}}]}, "give weights >= 0, one of them"),
        (STREAM | {"stages": [{"from_tokens": 9, "weights": {"a": -1.0, "b": 2.0}}]}, "give weights >= 0"),
        (STREAM | {"stages": [{"from_tokens": 0, "weights": {"a": 1.0}}]}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_drawn(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build_config({"data": data}, source="test")
    assert message in str(refused.value)
