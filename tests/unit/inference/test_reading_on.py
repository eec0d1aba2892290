"""Reading on from cached keys and values gives what reading the whole text gives, whatever the routing."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipmega.config.routing import RouterName
from skipmega.inference.native import NativeModel
from skipmega.models.layer import LayerContext, RoutingRecord
from skipmega.parallel.grid import ParallelGrid
from support.native import VOCABULARY, make_model

ROUTINGS: dict[str, dict[str, Any]] = {
    "gumbel": {"router": "gumbel", "density": 0.3},
    "quantile, groups": {"router": "quantile", "group_size": 8},
    "sigmoid mlp": {"router": "sigmoid", "wrap": "mlp", "update_weight": "score"},
    "raw attention": {"router": "quantile", "wrap": "attention", "router_input": "raw"},
    "predictor": {"router": "topk", "stand_in": "predictor"},
    "top-k, its own score": {"router": "topk", "group_size": 8},
    "another density": {"router": "quantile", "eval_density": 0.25, "router_bias": True},
    "computed, then masked": {"router": "gumbel", "gradient": "dense"},
    "a coin": {"router": "random", "density": 0.4},
    "a learnt coin": {"router": "fixed_input", "density": 0.4},
    "highway": {"router": "highway"},
    "dense": {"router": "always"},
    "nobody": {"router": "never"},
}

# what a token executes or sees depends on more than keys and values
WHOLE: dict[str, dict[str, Any]] = {
    "executed keys": {"router": "quantile", "keys_values": "executed"},
    "executed keys, groups": {"router": "topk", "keys_values": "executed", "eval_density": 0.3},
    "capacity": {"router": "gumbel", "eval_capacity_factor": 0.6, "group_size": 8},
    "capacity, mlp": {"router": "quantile", "wrap": "mlp", "eval_capacity_factor": 0.5, "group_size": 4},
}


@pytest.fixture(scope="module", params=ROUTINGS)
def model(request: pytest.FixtureRequest, grid: ParallelGrid) -> NativeModel:
    return make_model(grid, ROUTINGS[request.param])


def texts(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]


def as_in_training(model: NativeModel, tokens: Tensor) -> tuple[Tensor, dict[int, RoutingRecord]]:
    """Logits [b, s, vocabulary] and records of the layers that training runs."""
    positions = torch.arange(tokens.shape[1])
    inputs = model._routing.for_evaluation(0, len(tokens), positions)
    context = LayerContext(None, model.config.routing.eval_capacity_factor)
    with torch.no_grad():
        output = model.stage(tokens, context, inputs)
        return model.stage.logits(output.hidden).transpose(0, 1), output.records


def padded(parts: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=1)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=4))
def test_texts_read_in_pieces_have_the_logits_of_whole_ones(
    model: NativeModel, pieces: list[tuple[int, int, int]]
) -> None:
    """Rows of unequal length, padded anew in each piece."""
    whole = texts([sum(row) for row in pieces])
    cache, done = model.new_cache(len(pieces)), [0] * len(pieces)
    for number in range(3):
        counts = [row[number] for row in pieces]
        parts = [text[at : at + count] for text, at, count in zip(whole, done, counts, strict=True)]
        tokens = padded(parts)
        at = torch.arange(tokens.shape[1]).expand(len(parts), -1)
        found = model.read(cache, tokens, counts, at)
        for row, (text, begin, count) in enumerate(zip(whole, done, counts, strict=True)):
            expected = model.logits(text.unsqueeze(0))[0, begin : begin + count]
            torch.testing.assert_close(found[row, :count], expected, rtol=0, atol=2e-5)
        done = [begin + count for begin, count in zip(done, counts, strict=True)]
    assert cache.lengths == [len(text) for text in whole]


def test_rows_taken_several_times_go_their_own_ways(model: NativeModel) -> None:
    stems, ends = texts([7, 4]), texts([3, 5, 1], seed=1)
    cache = model.new_cache(2)
    model.read(cache, padded(stems), [7, 4])
    owners = [0, 0, 1]
    taken = cache.take(owners)
    found = model.read(taken, padded(ends), [3, 5, 1])
    assert found.shape == (3, 1, VOCABULARY)
    for row, (owner, end) in enumerate(zip(owners, ends, strict=True)):
        expected = model.logits(torch.cat([stems[owner], end]).unsqueeze(0))[0, -1]
        torch.testing.assert_close(found[row, 0], expected, rtol=0, atol=2e-5)
    assert cache.lengths == [7, 4], "what was taken is a copy"
    again = model.read(cache.take(owners), padded(ends), [3, 5, 1])
    assert torch.equal(again, found)


def test_layers_that_tokens_executed_are_counted_without_padding(model: NativeModel) -> None:
    model.take_work()
    rows = texts([7, 4])
    model.read(model.new_cache(2), padded(rows), [7, 4])
    work = model.take_work()
    assert work.tokens == 11
    expected = [11] * 5
    for layer, record in as_in_training(model, padded(rows))[1].items():
        expected[layer] = int(record.executed[:7, 0].sum() + record.executed[:4, 1].sum())
    assert work.executed == expected
    assert model.take_work().tokens == 0


def test_one_token_at_a_time_beyond_the_room_that_is_kept(model: NativeModel) -> None:
    (text,) = texts([150])
    cache = model.new_cache(1)
    model.read(cache, text[:10].unsqueeze(0), [10])
    steps = [model.read(cache, token.view(1, 1), [1])[0, 0] for token in text[10:]]
    expected = model.logits(text.unsqueeze(0))[0, 10:]
    torch.testing.assert_close(torch.stack(steps), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("wrap", ["layer", "mlp", "attention"])
def test_what_is_not_executed_is_not_computed(grid: ParallelGrid, wrap: str, batch: int) -> None:
    model = make_model(grid, {"router": "gumbel", "wrap": wrap})
    rows, calls = 0, 0

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal rows, calls
        rows, calls = rows + len(output), calls + 1

    layers = [model.stage.layers[str(layer)] for layer in model.stage.routed_layers]
    for layer in layers:
        last = layer.attention.output if wrap == "attention" else layer.mlp.down
        last.register_forward_hook(count)
    tokens = torch.stack(texts([30] * batch))
    cache = model.new_cache(batch)
    model.read(cache, tokens[:, :20], [20] * batch)
    assert calls == len(layers)
    for at in range(20, 30):
        model.read(cache, tokens[:, at : at + 1], [1] * batch)
    executed = model.take_work().executed
    assert rows == sum(executed[layer] for layer in model.stage.routed_layers)
    assert 0 < rows < 30 * batch * len(layers)
    if batch == 1:
        assert calls < 11 * len(layers), "nothing is called for a token that nothing runs for"


@pytest.mark.parametrize("of", [*ROUTINGS, *WHOLE])
def test_reading_gives_what_training_computes(grid: ParallelGrid, of: str) -> None:
    """Layers are written twice, with slots and without: logits and decisions are the same."""
    model = make_model(grid, {**ROUTINGS, **WHOLE}[of])
    tokens = torch.stack(texts([24, 24, 24], seed=3))
    expected, records = as_in_training(model, tokens)
    torch.testing.assert_close(model.logits(tokens), expected, rtol=0, atol=2e-5)
    if records:
        decided = torch.stack([record.executed.t() for record in records.values()])
        assert torch.equal(model.trace(tokens, tokens)[1], decided)


def test_every_kind_of_router_reads_on() -> None:
    assert {routing["router"] for routing in ROUTINGS.values()} == set(get_args(RouterName))


def test_decisions_are_those_of_whole_texts(model: NativeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which tokens execute which layer: rows of unequal length, then single tokens."""
    pieces: list[Tensor] = []  # of each read, [routed layers, n, b]
    through = model._through

    def note(*arguments: Any, **more: Any) -> Any:
        hidden, executed = through(*arguments, **more)
        if executed:
            pieces.append(torch.stack(list(executed.values())))
        return hidden, executed

    monkeypatch.setattr(model, "_through", note)
    rows = texts([15, 12])
    model.logits(padded(rows))
    cache = model.new_cache(2)
    model.read(cache, padded([rows[0][:9], rows[1][:6]]), [9, 6])
    for step in range(6):
        model.read(cache, torch.stack([rows[0][9 + step], rows[1][6 + step]]).unsqueeze(1), [1, 1])
    if not pieces:
        pytest.skip("no layer is routed: there is nothing to decide")
    whole, first, *rest = pieces
    for row, begin in enumerate((9, 6)):
        found = torch.cat([first[:, :begin, row], *(step[:, :, row] for step in rest)], dim=1)
        assert torch.equal(found, whole[:, : begin + 6, row])


@pytest.mark.parametrize("routing", WHOLE.values())
def test_what_depends_on_more_than_keys_and_values_does_not_read_on(
    grid: ParallelGrid, routing: dict[str, Any]
) -> None:
    assert make_model(grid, {}).reads_on
    assert not make_model(grid, routing).reads_on


def test_a_trace_has_the_losses_of_the_logits_and_who_executed(model: NativeModel) -> None:
    routed = model.config.routed_layers
    if not routed:
        pytest.skip("no layer is routed: there is nothing to trace")
    tokens, labels = padded(texts([13, 13, 13])), padded(texts([13, 13, 13], seed=1))
    losses, executed = model.trace(tokens, labels)
    expected = torch.nn.functional.cross_entropy(
        model.logits(tokens).transpose(1, 2), labels, reduction="none"
    )
    torch.testing.assert_close(losses, expected, rtol=0, atol=2e-5)
    assert executed.shape == (len(routed), 3, 13)
    assert executed.dtype == torch.bool
    assert bool(executed.all()) == (model.config.routing.router == "highway")
    assert bool(executed.any()) == (model.config.routing.router != "never")
    again = model.trace(tokens[:, :5], labels[:, :5])[1]  # nobody looks ahead
    assert torch.equal(again, executed[:, :, :5])
