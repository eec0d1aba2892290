"""A whole stage: what it hands on, its losses and its logits."""

import torch

from skipmega.config import build_config
from skipmega.models.decoder import DecoderStage, stage_layers
from skipmega.models.layer import LayerContext
from skipmega.parallel.grid import ParallelGrid
from skipmega.routing.noise import NoiseKey, logistic


def make_stage(grid: ParallelGrid, tie: bool) -> DecoderStage:
    model = {
        "num_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24, "vocab_size": 32,
        "tie_embeddings": tie, "init_std": 0.3,
    }  # fmt: skip
    return DecoderStage(build_config({"model": model}, source="test"), grid)


def test_layers_are_cut_evenly_and_in_order() -> None:
    assert [tuple(stage_layers(12, 3, stage)) for stage in range(3)] == [(0, 4), (4, 8), (8, 12)]


def test_losses_are_the_nats_of_the_labels_under_the_logits(grid: ParallelGrid) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 32, (2, 3, 8), generator=generator)
    for tie in (True, False):
        stage = make_stage(grid, tie)
        output = stage(tokens, LayerContext(None, None))
        assert list(output.records) == [1, 2], "the routed layers, by global number"
        logits = stage.logits(output.hidden).double()
        assert logits.shape == (8, 3, 32)
        losses = stage.losses(output.hidden, labels)
        assert losses.dtype == torch.float32
        for i in range(8):
            for b in range(3):
                expected = logits[i, b].logsumexp(0) - logits[i, b, labels[b, i]]
                torch.testing.assert_close(losses[i, b].double(), expected, rtol=1e-5, atol=1e-5)


def test_the_future_does_not_reach_the_past(grid: ParallelGrid) -> None:
    """Through routing with a tight capacity as well."""
    stage = make_stage(grid, tie=True)
    tokens = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 5) % 32
    for factor in (None, 0.5):
        context = LayerContext(None, factor)
        before, after = (stage.logits(stage(t, context).hidden) for t in (tokens, changed))
        assert torch.equal(before[:7], after[:7])
        assert not torch.equal(before[7:], after[7:])


def test_each_routed_layer_gets_the_noise_of_its_own_number(grid: ParallelGrid) -> None:
    """And reports the share that chose to run, before capacity, with the router's gradient."""
    stage, key = make_stage(grid, tie=True), NoiseKey(7, torch.tensor([4, 2**33]))
    tokens = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    context = LayerContext(None, 0.5)
    output = stage(tokens, context, key)
    hidden, chosen = stage.embedding(tokens).transpose(0, 1), []
    for number in range(4):
        hidden, record = stage.layers[str(number)](
            hidden, logistic(key, torch.tensor([number]), 12)[0], context
        )
        if record is not None:
            chosen.append(record.chosen.sum() / 24)
            assert torch.equal(output.records[number].executed, record.executed)
    assert torch.equal(output.hidden, hidden)
    torch.testing.assert_close(output.densities(), torch.stack(chosen))
    assert output.densities().requires_grad
    assert not torch.equal(output.hidden, stage(tokens, context).hidden), "without a key it decides greedily"
