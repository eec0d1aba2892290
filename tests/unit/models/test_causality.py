"""No router looks ahead in evaluation, those that need not look ahead don't in training, and nothing of one
document reaches another.

Packed rows may be multiplied in matrices of other sizes, so outputs are compared to 1e-5; decisions exactly.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipmega.config import RunConfig, build_config
from skipmega.kernels.attention import document_starts
from skipmega.models.decoder import DecoderStage
from skipmega.models.layer import LayerContext
from skipmega.parallel.grid import ParallelGrid
from skipmega.routing.noise import NoiseKey
from skipmega.routing.state import RoutingState

LENGTH, BATCH, VOCABULARY, GROUP = 12, 2, 32, 6
GROUPED: dict[str, Any] = {"group_size": GROUP}
CAUSAL: dict[str, dict[str, Any]] = {
    "gumbel": {"router": "gumbel", **GROUPED},
    "gumbel-executed": {"router": "gumbel", "keys_values": "executed"},
    "gumbel-dense": {"router": "gumbel", "gradient": "dense", **GROUPED},
    "sigmoid": {"router": "sigmoid", **GROUPED},
    "sigmoid-mlp": {"router": "sigmoid", "wrap": "mlp", **GROUPED},
    "quantile-running": {"router": "quantile", "quantile_from": "running", **GROUPED},
    "random": {"router": "random", "wrap": "attention", **GROUPED},
    "fixed_input": {"router": "fixed_input", **GROUPED},
    "highway": {"router": "highway", **GROUPED},
    "never": {"router": "never", **GROUPED},
    "always": {"router": "always"},
}
RANKING: dict[str, dict[str, Any]] = {
    "quantile": {"router": "quantile", **GROUPED},
    "topk": {"router": "topk", **GROUPED},
    "topk-executed": {"router": "topk", "keys_values": "executed"},
    "topk-predictor": {"router": "topk", "stand_in": "predictor", **GROUPED},
    "topk-attention-executed": {"router": "topk", "keys_values": "executed", "wrap": "attention"},
}
ROUTERS = CAUSAL | RANKING
SLOW = settings(
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


class Seen(NamedTuple):
    logits: Tensor  # [s, b, vocabulary]
    executed: Tensor  # [routed layers, s, b]


class Model:
    """A stage with the state of its routers."""

    def __init__(self, routing: dict[str, Any], grid: ParallelGrid) -> None:
        self.config: RunConfig = build_config(
            {
                "model": {
                    "num_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24,
                    "vocab_size": VOCABULARY, "init_std": 0.3,
                },
                "routing": routing,
                "data": {"sequence_length": LENGTH},
            },
            source="test",
        )  # fmt: skip
        self.stage = DecoderStage(self.config, grid)
        self.state = RoutingState(self.config, self.stage.routed_layers, grid.device)

    @torch.no_grad()
    def run(
        self,
        tokens: Tensor,
        training: bool = False,
        factor: float | None = None,
        documents: Tensor | None = None,
    ) -> Seen:
        self.stage.train(training)
        if training:
            inputs = self.state.for_training(3, NoiseKey(5, torch.arange(BATCH)), torch.arange(LENGTH))
        else:
            inputs = self.state.for_evaluation(3, tokens.shape[0], torch.arange(tokens.shape[1]))
        since = None if documents is None else document_starts(documents)
        output = self.stage(tokens, LayerContext(since, factor), inputs)
        executed = output.stacked("executed") if output.records else torch.zeros(0, LENGTH, BATCH)
        return Seen(self.stage.logits(output.hidden), executed)


@pytest.fixture(scope="module")
def models(grid: ParallelGrid) -> dict[str, Model]:
    return {name: Model(routing, grid) for name, routing in ROUTERS.items()}


def random_tokens(seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


@st.composite
def changes(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Tokens, the same with one or more changed from a position on, and that position."""
    tokens, start = random_tokens(draw(st.integers(0, 99))), draw(st.integers(1, LENGTH - 1))
    changed = tokens.clone()
    end = draw(st.sampled_from([start + 1, LENGTH]))
    changed[:, start:end] = (changed[:, start:end] + draw(st.integers(1, VOCABULARY - 1))) % VOCABULARY
    return tokens, changed, start


def check_the_past(before: Seen, after: Seen, start: int) -> None:
    assert torch.equal(before.executed[:, :start], after.executed[:, :start])
    torch.testing.assert_close(before.logits[:start], after.logits[:start], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before.logits[start], after.logits[start], atol=1e-3), "the change is felt"


@pytest.mark.parametrize("name", ROUTERS)
@SLOW
@given(change=changes(), limited=st.booleans())
def test_evaluation_does_not_look_ahead(
    models: dict[str, Model], name: str, change: tuple[Tensor, Tensor, int], limited: bool
) -> None:
    """Through a tight capacity as well, which needs groups."""
    tokens, changed, start = change
    factor = 0.7 if limited and "group_size" in ROUTERS[name] else None
    before, after = (models[name].run(t, factor=factor) for t in (tokens, changed))
    check_the_past(before, after, start)


@pytest.mark.parametrize("name", CAUSAL)
@SLOW
@given(change=changes(), factor=st.sampled_from([0.7, 1.25, None]))
def test_routers_that_compare_with_a_threshold_train_without_looking_ahead(
    models: dict[str, Model], name: str, change: tuple[Tensor, Tensor, int], factor: float | None
) -> None:
    tokens, changed, start = change
    before, after = (models[name].run(t, training=True, factor=factor) for t in (tokens, changed))
    check_the_past(before, after, start)


@pytest.mark.parametrize("name", RANKING)
def test_routers_that_rank_tokens_do_look_ahead_in_training(models: dict[str, Model], name: str) -> None:
    """So the tests above can see it."""
    looked = False
    for seed in range(20):
        tokens = random_tokens(seed)
        changed = tokens.clone()
        changed[:, GROUP - 2 :] = (changed[:, GROUP - 2 :] + 3) % VOCABULARY
        before, after = (models[name].run(t, training=True) for t in (tokens, changed))
        looked |= not torch.equal(before.executed[:, : GROUP - 2], after.executed[:, : GROUP - 2])
    assert looked


@pytest.mark.parametrize("name", ROUTERS)
@SLOW
@given(
    seed=st.integers(0, 99), starts=st.lists(st.integers(1, LENGTH - 1), min_size=1, max_size=3, unique=True)
)
def test_documents_do_not_influence_each_other_in_evaluation(
    models: dict[str, Model], name: str, seed: int, starts: list[int]
) -> None:
    """Dropless; whichever of them changes."""
    bounds = [0, *sorted(starts), LENGTH]
    documents = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    documents[0, bounds[1:-1]] = 1
    documents = documents.cumsum(1)
    tokens = random_tokens(seed)
    before = models[name].run(tokens, documents=documents)
    for first, end in pairwise(bounds):
        changed = tokens.clone()
        changed[0, first:end] = (changed[0, first:end] + 1) % VOCABULARY
        after = models[name].run(changed, documents=documents)
        others = torch.ones(LENGTH, BATCH, dtype=torch.bool)
        others[first:end, 0] = False
        assert torch.equal(before.executed[:, others], after.executed[:, others])
        torch.testing.assert_close(before.logits[others], after.logits[others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "always"])
def test_a_document_alone_is_what_it_is_among_others(models: dict[str, Model], name: str) -> None:
    """But for coins, which know positions."""
    if ROUTERS[name]["router"] in ("random", "fixed_input"):
        pytest.skip("a coin of the position")
    documents = torch.tensor([[0] * 4 + [1] * 8] * BATCH)
    tokens = random_tokens(2)
    whole = models[name].run(tokens, documents=documents)
    alone = models[name].run(tokens[:, 4:])
    assert torch.equal(whole.executed[:, 4:], alone.executed)
    torch.testing.assert_close(whole.logits[4:], alone.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ROUTERS)
def test_running_twice_gives_the_same_bits(models: dict[str, Model], name: str, training: bool) -> None:
    factor = 1.25 if training else None
    first, second = (models[name].run(random_tokens(3), training, factor) for _ in range(2))
    assert torch.equal(first.executed, second.executed)
    assert torch.equal(first.logits, second.logits)


@pytest.mark.parametrize("name", ROUTERS)
def test_some_tokens_run_and_some_are_skipped(models: dict[str, Model], name: str) -> None:
    """So the tests above are about something."""
    share = {"highway": 1.0, "never": 0.0}.get(name)
    if name == "always":
        pytest.skip("nothing is routed")
    for training in (True, False):
        executed = models[name].run(random_tokens(5), training).executed.float().mean(dim=(1, 2))
        assert all(0 < of_layer < 1 if share is None else of_layer == share for of_layer in executed)


@pytest.mark.parametrize("name", ROUTERS)
def test_sequences_of_a_batch_do_not_influence_each_other_in_evaluation(
    models: dict[str, Model], name: str
) -> None:
    tokens = random_tokens(4)
    both = models[name].run(tokens)
    for b in range(BATCH):
        one = models[name].run(tokens[b : b + 1])
        torch.testing.assert_close(both.logits[:, b], one.logits[:, 0], rtol=1e-5, atol=1e-5)
