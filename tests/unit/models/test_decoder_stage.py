"""A whole stage: what it hands on, its losses and its logits."""

from typing import Any

import pytest
import torch

from skipmega.config import build_config
from skipmega.models.decoder import DecoderStage
from skipmega.models.layer import LayerContext
from skipmega.parallel.grid import ParallelGrid
from skipmega.routing.noise import NoiseKey, logistic
from skipmega.routing.state import RoutingState

LENGTH, VOCABULARY = 12, 32


def make_stage(grid: ParallelGrid, tie: bool = True, **routing: Any) -> tuple[DecoderStage, RoutingState]:
    model = {
        "num_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24,
        "vocab_size": VOCABULARY, "tie_embeddings": tie, "init_std": 0.3,
    }  # fmt: skip
    config = build_config({"model": model, "routing": {"router": "gumbel", **routing}}, source="test")
    stage = DecoderStage(config, grid)
    return stage, RoutingState(config, stage.routed_layers, grid.device)


def random_tokens(batch: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tie", [True, False])
def test_losses_are_the_nats_of_the_labels_under_the_logits(grid: ParallelGrid, tie: bool) -> None:
    stage, state = make_stage(grid, tie)
    tokens = random_tokens(3)
    labels = tokens.flip(0)
    output = stage.eval()(tokens, LayerContext(None, None), state.for_evaluation(0, 3, torch.arange(LENGTH)))
    logits = stage.logits(output.hidden).double()
    assert logits.shape == (LENGTH, 3, VOCABULARY)
    losses = stage.losses(output.hidden, labels)
    assert losses.dtype == torch.float32
    for i in range(LENGTH):
        for b in range(3):
            expected = logits[i, b].logsumexp(0) - logits[i, b, labels[b, i]]
            torch.testing.assert_close(losses[i, b].double(), expected, rtol=1e-5, atol=1e-5)


def test_each_routed_layer_gets_the_noise_of_its_own_number(grid: ParallelGrid) -> None:
    """And reports the share that chose to run, before capacity, with the router's gradient."""
    stage, state = make_stage(grid)
    key, tokens = NoiseKey(7, torch.tensor([4, 2**33])), random_tokens(2)
    context, inputs = LayerContext(None, 0.5), state.for_training(0, key, torch.arange(LENGTH))
    assert list(inputs) == [1, 2], "the routed layers, by global number"
    output = stage(tokens, context, inputs)
    hidden, chosen = stage.embedding(tokens), []
    for number in range(4):
        told = None
        if number in inputs:
            told = inputs[number]._replace(
                noise=logistic(key, torch.tensor([number]), torch.arange(LENGTH))[0]
            )
        hidden, record = stage.layers[str(number)](hidden, told, context)
        assert (record is None) == (number not in inputs)
        if record is not None:
            chosen.append(record.chosen.sum() / 24)
            assert torch.equal(output.records[number].executed, record.executed)
    assert torch.equal(output.hidden, hidden)
    torch.testing.assert_close(output.densities(), torch.stack(chosen))
    assert output.densities().requires_grad
    greedy = stage(tokens, context, state.for_evaluation(0, 2, torch.arange(LENGTH)))
    assert not torch.equal(output.hidden, greedy.hidden), "evaluation draws nothing"


def test_each_layer_has_its_own_density(grid: ParallelGrid) -> None:
    stage, state = make_stage(grid, router="topk", density=[0.25, 0.75])
    key = NoiseKey(0, torch.arange(2))
    context = LayerContext(None, 1.0)
    output = stage(random_tokens(2), context, state.for_training(0, key, torch.arange(LENGTH)))
    assert output.densities().tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("routing", "routed"),
    [
        ({"every": 2, "dense_last": 0}, [1, 3]),
        ({"dense_first": 0, "dense_last": 0}, [0, 1, 2, 3]),
        ({"dense_first": 2}, [2]),
        ({"router": "always"}, []),
    ],
)
def test_the_layers_asked_for_are_routed(
    grid: ParallelGrid, routing: dict[str, Any], routed: list[int]
) -> None:
    stage, state = make_stage(grid, **routing)
    inputs = state.for_training(0, NoiseKey(0, torch.arange(2)), torch.arange(LENGTH))
    assert list(stage(random_tokens(2), LayerContext(None, None), inputs).records) == routed
    assert list(stage.router_weights()) == routed


@pytest.mark.parametrize(("training", "slots"), [(True, 3), (False, 9)])
def test_capacity_follows_the_density_that_is_wanted(grid: ParallelGrid, training: bool, slots: int) -> None:
    stage, state = make_stage(grid, density=0.25, eval_density=0.75)
    inputs = state.for_evaluation(0, 2, torch.arange(LENGTH))
    output = stage.train(training)(random_tokens(2), LayerContext(None, 1.0), inputs)
    assert {record.slots for record in output.records.values()} == {slots * 2}
