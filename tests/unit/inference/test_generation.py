"""Texts are gone on with as reading them whole would have it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from skipmega.errors import ConfigError
from skipmega.inference.generation import Sampling, generate
from skipmega.inference.native import NativeModel
from skipmega.parallel.grid import ParallelGrid
from support.native import make_model

PROMPT = [3, 14, 15, 9, 2, 6]
NEVER, SIZE = -1, 40  # ids beyond belong to no token


@pytest.fixture(scope="module", params=["reads on", "reads whole texts"])
def model(request: pytest.FixtureRequest, grid: ParallelGrid) -> NativeModel:
    return make_model(grid, {} if request.param == "reads on" else {"keys_values": "executed"})


def next_logits(model: NativeModel, text: list[int]) -> Tensor:
    return model.logits(torch.tensor([text]))[0, -1, :SIZE]


def test_the_likeliest_tokens_follow(model: NativeModel) -> None:
    text = list(PROMPT)
    for token in generate(model, PROMPT, 20, NEVER, SIZE, Sampling()):
        assert token == next_logits(model, text).argmax()
        text.append(token)
    assert len(text) == len(PROMPT) + 20


def test_a_text_ends_before_its_end_token(model: NativeModel) -> None:
    whole = list(generate(model, PROMPT, 20, NEVER, SIZE, Sampling(1.0, seed=3)))
    end = whole[7]
    assert list(generate(model, PROMPT, 20, end, SIZE, Sampling(1.0, seed=3))) == whole[: whole.index(end)]


def test_draws_follow_from_the_seed(model: NativeModel) -> None:
    def drawn(**sampling: Any) -> list[int]:
        return list(generate(model, PROMPT, 12, NEVER, SIZE, Sampling(**sampling)))

    assert drawn(temperature=1.0, seed=1) == drawn(temperature=1.0, seed=1)
    assert drawn(temperature=1.0, seed=1) != drawn(temperature=1.0, seed=2)
    assert drawn(temperature=5.0, top_k=1) == drawn()
    assert max(drawn(temperature=100.0)) < SIZE


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 1.1, -0.4])
    generator = torch.Generator().manual_seed(0)
    for sampling, kept in ((Sampling(0.7), 5), (Sampling(1.5, top_k=3), 3)):
        drawn = torch.tensor([sampling.choose(logits, generator) for _ in range(4000)])
        found = torch.bincount(drawn, minlength=5) / 4000
        expected = (logits / sampling.temperature).exp()
        expected[logits < logits.sort(descending=True).values[kept - 1]] = 0
        torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("prompt", "wanted", "said"),
    [(PROMPT, 59, "a prompt of 6 are longer than the model's 64 tokens"), ([], 5, "give one or more of both"),
     (PROMPT, 0, "give one or more of both")],
)  # fmt: skip
def test_what_cannot_be_generated(model: NativeModel, prompt: list[int], wanted: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        generate(model, prompt, wanted, NEVER, SIZE, Sampling())
    assert len(list(generate(model, PROMPT, 58, NEVER, SIZE, Sampling()))) == 58


@pytest.mark.parametrize(
    ("sampling", "said"), [({"temperature": -0.1}, "negative"), ({"top_k": 0}, "no token")]
)
def test_values_without_meaning_are_refused(sampling: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Sampling(**sampling)
