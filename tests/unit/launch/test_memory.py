"""What memory a process is said to need: by hand, by what is really kept for backward, and as measured."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from small_runs import (
    DENSE,
    HIDDEN,
    INNER,
    LAYERS,
    MATRICES,
    ROOT,
    TABLE,
    VOCABULARY,
    WEIGHTS,
    make_config,
    memory,
)

from skipmega.config import RunConfig, load_config, resolve_grid
from skipmega.launch.environment import discover_process
from skipmega.launch.estimate import GIB
from skipmega.launch.memory import _in_flight, _kept_layers, _layer_activations
from skipmega.models.decoder import DecoderStage
from skipmega.models.layer import LayerContext
from skipmega.models.rotary import rotary_table
from skipmega.models.stages import cut_stages
from skipmega.parallel.grid import ParallelGrid, create_grid, release_grid
from skipmega.routing.noise import NoiseKey
from skipmega.routing.state import RoutingState
from support.worlds import run_world


@pytest.mark.parametrize(
    ("precision", "summed", "optimizer", "zero", "replicas", "weight", "gradient", "states"),
    [
        ("bf16", "fp32", "adamw", 1, 1, 2, 4, 12),
        ("bf16", "bf16", "adamw", 1, 1, 2, 2, 12),
        ("bf16", "fp32", "adamw", 1, 8, 2, 4, 12 / 8),
        ("bf16", "fp32", "adamw", 2, 8, 2, 4, 12 / 8),
        ("fp32", "fp32", "adamw", 1, 4, 4, 4, 12 / 4),
        ("bf16", "bf16", "adafactor", 1, 2, 2, 2, 4 / 2),
    ],
)
def test_weights_and_gradients_are_whole_and_optimizer_states_shared(
    precision: str,
    summed: str,
    optimizer: str,
    zero: int,
    replicas: int,
    weight: int,
    gradient: int,
    states: float,
) -> None:
    config = make_config(
        routing=DENSE, training={"precision": precision, "gradient_precision": summed},
        optimizer={"name": optimizer}, parallel={"zero_stage": zero},
    )  # fmt: skip
    found = memory(config, replicas)
    assert found.weights == WEIGHTS * weight
    assert found.gradients == WEIGHTS * gradient
    assert found.optimizer == pytest.approx(WEIGHTS * states)
    copied = 4 * WEIGHTS / replicas * ((summed == "bf16") + (optimizer == "adafactor"))
    evaluated = (10 if precision == "bf16" else 8) * 32 * VOCABULARY
    assert found.update == pytest.approx(max(8 * TABLE, copied, evaluated))


def test_the_peak_is_the_activations_or_the_update_never_both() -> None:
    copied = {"optimizer": {"name": "adafactor"}, "training": {"gradient_precision": "bf16"}}
    found = memory(make_config(routing=DENSE, **copied))
    states = found.weights + found.gradients + found.optimizer
    assert found.activations + found.logits < found.update
    assert found.total == states + found.update
    large = memory(make_config(routing=DENSE, **copied, data={"sequence_length": 262_144}))
    assert large.activations + large.logits > large.update
    assert large.total == states + large.activations + large.logits


def test_a_large_model_s_update_is_a_matrix_or_a_copy_of_its_gradients() -> None:
    model = {"num_layers": 1, "hidden_size": 4096, "num_attention_heads": 4, "ffn_hidden_size": 65_536}
    weights = 4 * 4096**2 + 2 * 4096 * 65_536 + 3 * 4096 + VOCABULARY * 4096
    assert memory(make_config(routing=DENSE, model=model)).update == 8 * 2 * 4096 * 65_536
    in_bf16 = make_config(routing=DENSE, model=model, training={"gradient_precision": "bf16"})
    assert memory(in_bf16, 2).update == 8 * 2 * 4096 * 65_536 > 4 * weights / 2
    for_zero_3 = make_config(routing=DENSE, model=model, parallel={"zero_stage": 3})
    assert memory(for_zero_3, 2).update == max(500_000_000 * 4, 4 * weights / 2)
    by_two = make_config(routing=DENSE, model=model, optimizer={"name": "adafactor"})
    assert memory(by_two).update == max(8 * 2 * 4096 * 65_536, 4 * weights)


@pytest.mark.parametrize("tied", [True, False])
def test_tensor_ranks_and_stages_hold_their_part(tied: bool) -> None:
    grid = {"tensor_parallel": 2, "pipeline_parallel": 2}
    config = make_config(
        model={"tie_embeddings": tied},
        parallel={**grid, "layers_per_stage": [2, 2]},
        routing={"dense_first": 0, "dense_last": 0},
    )
    found = memory(config, 4)
    half = 2 * (MATRICES / 2 + 2 * HIDDEN + 2 * HIDDEN) + TABLE / 2  # norms and routers are whole
    assert {0: half, 1: half + HIDDEN}[found.stage] * 2 == found.weights
    # first stage: two micro-batches in flight; last one: one, and the logits
    alone = make_config(routing={"dense_first": 0, "dense_last": 0})
    assert found.stage == 0 or found.logits == 12 * 32 * VOCABULARY / 2
    assert memory(alone).logits == 12 * 32 * VOCABULARY


@pytest.mark.parametrize(("precision", "size"), [("bf16", 2), ("fp32", 4)])
def test_a_compiled_loss_keeps_logits_and_their_gradient(precision: str, size: int) -> None:
    training = {"compile": True, "precision": precision}
    assert memory(make_config(training=training)).logits == 2 * size * 32 * VOCABULARY
    cut = memory(make_config(training=training, parallel={"tensor_parallel": 2}), 2)
    assert cut.logits == 12 * 32 * VOCABULARY / 2, "megatron-core's, over shards, is not compiled"


def test_the_loss_is_kept_as_the_partitioner_keeps_it(grid: ParallelGrid) -> None:
    config = make_config(model={"vocab_size": 1024})
    stage = DecoderStage(config, grid).to(torch.bfloat16).train()
    losses = torch.compile(stage._losses, backend="aot_eager_decomp_partition", dynamic=False)
    kept = []
    hidden = torch.randn(16, 3, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses(hidden, torch.randint(0, 1024, (3, 16)))
    logits = [tensor for tensor in kept if tensor.numel() == 48 * 1024]
    assert [tensor.dtype for tensor in logits] == [torch.bfloat16], "its gradient is as large again"


def test_an_evaluation_of_much_vocabulary_may_be_the_peak() -> None:
    wide = make_config(model={"vocab_size": 2**20}, training={"micro_batch_size": 16, "compile": True})
    found = memory(wide)
    assert found.update == (4 + 4 + 2) * 16 * 16 * 2**20 > found.activations + found.logits


def test_the_first_stage_keeps_a_micro_batch_for_every_stage() -> None:
    """With little vocabulary the first stage needs most: as many micro-batches as there are stages, at most
    all of a step."""
    model, long = {"vocab_size": 128, "ffn_hidden_size": 400}, {"sequence_length": 524_288}
    whole = memory(make_config(routing=DENSE, model=model, data=long)).activations
    staged = {"model": model, "data": long, "routing": DENSE, "parallel": {"pipeline_parallel": 4}}
    assert memory(make_config(**staged), 4).stage == 0
    assert memory(make_config(**staged), 4).activations == pytest.approx(whole)
    few = {"global_batch_size": 4}  # two micro-batches of two sequences
    assert memory(make_config(**staged, training=few), 4).activations == pytest.approx(whole / 2)


def routed(**routing: Any) -> float:
    """Activations of a model whose four layers are routed; 16 tokens a sequence, two sequences."""
    return float(memory(make_config(routing={"dense_first": 0, "dense_last": 0, **routing})).activations)


def test_packed_rows_are_those_of_the_capacity() -> None:
    dense, half = routed(router="always"), routed(density=0.5, capacity_factor=1.0)
    assert half < dense
    assert routed(density=0.4, capacity_factor=1.25) == half
    assert routed(density=0.5, capacity_factor=None) == half
    assert routed(router="topk", density=0.5, capacity_factor=1.25) == half, "top-k fills its slots exactly"
    assert routed(density=0.5, capacity_factor=1.25) > half
    assert routed(density=0.05, capacity_factor=1.0, min_capacity=8) == half
    assert routed(density=0.3, capacity_factor=1.0, group_size=4) == half, "2 slots of 4"
    everything = routed(density=1.0)
    assert routed(density=0.5, density_warmup_steps=3) == everything, "at first everybody runs"
    assert routed(density=0.5, gradient="dense") <= everything


def kept_for_backward(config: RunConfig, grid: ParallelGrid) -> float:
    """Bytes that one compiled layer keeps, masks of attention left out, as torch's partitioner decides."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    stage = DecoderStage(config, grid).to(torch.bfloat16).train()
    layer = torch.compile(stage.layers["0"], backend="aot_eager_decomp_partition", dynamic=False)
    model, length, batch = config.model, config.data.sequence_length, config.training.micro_batch_size
    state, shards = RoutingState(config, stage.routed_layers, grid.device), stage.shards
    at = shards.positions(length, grid.device)
    inputs = state.for_training(0, NoiseKey(1, torch.arange(batch)), at).get(0)
    hidden = torch.randn(len(at), batch, model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    positions = shards.context_positions(length, grid.device).unsqueeze(1)
    table = rotary_table(length, model.head_size, model.rope_theta, grid.device)
    context = LayerContext(
        None,
        config.routing.capacity_factor,
        rotary=table,
        positions=positions if shards.context.size > 1 else None,
    )
    own = {tensor.untyped_storage().data_ptr() for tensor in (*stage.parameters(), *table)}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_mask = tensor.dim() == 4 and tensor.shape[1] == 1
        if storage.data_ptr() not in own and not is_mask:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, inputs, context)
    return float(sum(size for size, _ in kept.values()))


KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "dense-swiglu": {"routing": DENSE, "model": {"activation": "swiglu", "num_key_value_heads": 4}},
    "wide-heads": {"routing": DENSE, "model": {"head_dim": 64}},
    "gumbel": {"routing": {"router": "gumbel", "density": 0.5, "group_size": 16}},
    "executed-keys": {"routing": {"router": "topk", "keys_values": "executed", "density": 0.25}},
    "mlp": {"routing": {"wrap": "mlp", "density": 0.25, "group_size": 16}},
    "attention": {"routing": {"wrap": "attention", "density": 0.25, "group_size": 16}},
    "highway": {"routing": {"router": "highway"}},
}
SP = {"tensor_parallel": 2, "sequence_parallel": True}


def one_layer(kind: str, **sections: dict[str, Any]) -> RunConfig:
    model = {"num_layers": 1, "hidden_size": 256, "num_attention_heads": 8, "ffn_hidden_size": 896}
    return make_config(
        model=model | KINDS[kind].get("model", {}),
        routing={"dense_first": 0, "dense_last": 0, **KINDS[kind]["routing"]},
        data={"sequence_length": 64},
        **sections,
    )


@pytest.mark.timeout(200)
@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_a_compiled_layer_keeps(grid: ParallelGrid, kind: str, recompute: str) -> None:
    """Nearly: indices and other small things are left out."""
    config = resolve_grid(layer_of(kind, {}, recompute), 1)
    kept = kept_for_backward(config, grid)
    assert 0.96 * kept < _layer_activations(config, 0, recompute) < kept


def layer_of(kind: str, parallel: dict[str, Any], recompute: str) -> RunConfig:
    return one_layer(kind, parallel=parallel, training={"recompute": recompute})


CUTS: list[tuple[str, dict[str, Any], str]] = [
    ("gumbel", {"tensor_parallel": 2}, "none"),
    ("wide-heads", {"tensor_parallel": 2}, "none"),
    *((kind, SP, "none") for kind in ("gumbel", "dense-swiglu", "mlp", "attention")),
    *((kind, SP, "cheap") for kind in ("gumbel", "dense-swiglu", "mlp")),
    ("gumbel", {"tensor_parallel": 2}, "cheap"),
    ("gumbel", {"context_parallel": 2}, "cheap"),
    *((kind, {"context_parallel": 2}, "none") for kind in ("gumbel", "dense-swiglu", "mlp")),
]


def kept_in_world() -> list[float]:
    """For ``run_world``: what a process keeps of each of ``CUTS``."""
    kept = []
    for cut in CUTS:
        config = resolve_grid(layer_of(*cut), 2)
        kept.append(kept_for_backward(config, create_grid(discover_process(), config.parallel)))
        release_grid()
    return kept


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_activations_are_what_a_process_keeps_of_cut_tokens() -> None:
    for measured in run_world(kept_in_world, 2, limit=250):
        for cut, kept in zip(CUTS, measured, strict=True):
            config = resolve_grid(layer_of(*cut), 2)
            found = _layer_activations(config, 0, config.training.recompute)
            assert 0.96 * kept < found < kept, cut


@pytest.mark.timeout(200)
@pytest.mark.parametrize("recompute", ["attention", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_what_is_recomputed_the_input_is_kept(grid: ParallelGrid, kind: str, recompute: str) -> None:
    """At most: the partitioner may make attention's input anew from the layer's."""
    config = resolve_grid(layer_of(kind, {}, recompute), 1)
    kept = kept_for_backward(config, grid)
    assert 0.95 * kept < _layer_activations(config, 0, recompute) < 1.18 * kept


SHARED = {"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2}


def test_keys_are_whole_matrix_inputs_gathered_and_all_else_is_cut() -> None:
    config = make_config(routing=DENSE, parallel=SHARED)
    own, entered, whole = 32 // 4, 32 // 2, 32  # of the 32 tokens of a micro-batch
    layer = own * 2 * HIDDEN  # its input and attention's result
    layer += entered * (2 * HIDDEN + 2 * HIDDEN / 2 + 2 * INNER / 2) + whole * 2 * HIDDEN / 2
    found = memory(config, 8)
    assert found.activations == 2 * LAYERS * layer
    assert found.logits == 12 * entered * VOCABULARY / 2
    full = memory(make_config(routing=DENSE, parallel=SHARED, training={"recompute": "full"}), 8)
    assert full.activations == 2 * (LAYERS * own * HIDDEN + layer)
    inputs = {
        "attention": own * 3 * HIDDEN + entered * (HIDDEN + 2 * INNER / 2),
        "mlp": own * 2 * HIDDEN + entered * (HIDDEN + 2 * HIDDEN / 2) + whole * 2 * HIDDEN / 2,
    }
    for what, kept in inputs.items():
        part = memory(make_config(routing=DENSE, parallel=SHARED, training={"recompute": what}), 8)
        assert part.activations == 2 * (LAYERS * kept + layer)


def test_context_ranks_share_the_states_as_data_ranks_do() -> None:
    for grid, processes in (({"context_parallel": 4}, 8), ({}, 8)):
        found = memory(make_config(routing=DENSE, parallel=grid), processes)
        assert found.weights == WEIGHTS * 2
        assert found.optimizer == pytest.approx(WEIGHTS * 12 / 8)


@pytest.mark.parametrize("parallel", [{}, {"context_parallel": 2}])
def test_zero_3_cuts_weights_and_gradients(parallel: dict[str, int]) -> None:
    small = memory(make_config(routing=DENSE, parallel={"zero_stage": 3, **parallel}), 4)
    assert small.weights == 2 * (WEIGHTS / 4 + WEIGHTS), "all needed again soon, nothing is released"
    assert small.gradients == 4 * WEIGHTS / 4
    assert small.optimizer == 12 * WEIGHTS / 4
    model = {"num_layers": 24, "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 16_384}
    weights = 24 * (4 * 4096**2 + 2 * 4096 * 16_384 + 2 * 4096) + (VOCABULARY + 1) * 4096
    large = memory(make_config(routing=DENSE, model=model, parallel={"zero_stage": 3, **parallel}), 4)
    assert large.weights == 2 * (weights / 4 + 500_000_000)
    one = {"num_layers": 2, "hidden_size": 8192, "num_attention_heads": 32, "ffn_hidden_size": 65_536}
    layer = 4 * 8192**2 + 2 * 8192 * 65_536 + 2 * 8192
    wide = memory(make_config(routing=DENSE, model=one, parallel={"zero_stage": 3, **parallel}), 4)
    assert wide.weights == 2 * ((2 * layer + (VOCABULARY + 1) * 8192) / 4 + layer)


def in_flight_by_megatron(kept: list[list[float]], stage: int, micro_batches: int) -> float:
    """Most that is kept at a time, in the order of megatron-core's own tables."""
    stages, chunks = len(kept), len(kept[stage])
    group = SimpleNamespace(size=lambda: stages, rank=lambda: stage)
    talk = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks)
    total, _, warmup, _ = get_pp_rank_microbatches(micro_batches, chunks, stages, p2p_communicator=talk)
    table = get_schedule_table(micro_batches, chunks, stages)
    steps = [("forward", step) for step in range(warmup)]
    for step in range(total - warmup):
        steps += [("forward", warmup + step), ("backward", step)]
    alive, most = [], 0.0
    for way, step in steps:
        number, chunk = table[step]
        if way == "forward":
            alive.append((number, chunk))
        else:
            alive.remove((number, chunks - 1 - chunk))
        most = max(most, sum(kept[stage][chunk] for _, chunk in alive))
    return most


@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (2, 3), (4, 2), (3, 3)])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_interleaved_stages_keep_more_micro_batches(stages: int, chunks: int, rounds: int) -> None:
    """Chunks of one to three layers."""
    layers = [1 + (3 * i) % 5 % 3 for i in range(stages * chunks)]
    config = make_config(
        model={"num_layers": sum(layers)},
        routing=DENSE,
        parallel={"pipeline_parallel": stages, "chunks_per_stage": chunks, "layers_per_stage": layers},
        training={"global_batch_size": 2 * stages * rounds, "eval_sequences": 2 * stages},
    )
    config = resolve_grid(config, stages)
    kept = [[_kept_layers(config, chunk) for chunk in of_stage] for of_stage in cut_stages(config)]
    for stage in range(stages):
        expected = in_flight_by_megatron(kept, stage, stages * rounds)
        assert _in_flight(config, stage) == pytest.approx(expected)


def test_what_interleaving_keeps_by_hand() -> None:
    """The first of two stages has chunks of 3 layers and 1: forward 3 3 1 1 3, then one off, one on."""
    parallel = {"pipeline_parallel": 2, "chunks_per_stage": 2, "layers_per_stage": [3, 1, 1, 1]}
    sections: dict[str, Any] = {"model": {"num_layers": 6}, "routing": DENSE, "parallel": parallel}
    config = resolve_grid(make_config(**sections), 2)
    (one,) = {_kept_layers(config, [layer]) for layer in range(6)}
    assert _in_flight(config, 0) == 13 * one
    few = resolve_grid(make_config(**sections, training={"global_batch_size": 4, "eval_sequences": 4}), 2)
    assert _in_flight(few, 0) == 8 * one, "all of both micro-batches"
    assert _in_flight(config, 1) == 3 * one


def test_memory_is_near_what_was_measured_on_a_gpu() -> None:
    """36.6 GiB peak allocated with compiled layers and, unlike now, eager loss, bf16 gradients and routers'
    inputs in fp32 (torch 2.11, one H200, 2026-11-22). Compiling changes nothing else in the estimate."""
    overrides = ["model.vocab_size=32000", "training.compile=false", "training.gradient_precision=bf16"]
    config = load_config(ROOT / "pretrain/configs/h100_300m.yaml", overrides)
    read = len(config.routed_layers) * config.training.micro_batch_size * config.data.sequence_length
    of_routers = 4 * read * config.model.hidden_size
    assert (memory(config).total + of_routers) / GIB == pytest.approx(36.6, rel=0.05)


@pytest.mark.parametrize(("density", "measured"), [(1.0, 47.2), (0.5, 39.7), (0.25, 34.5)])
def test_so_it_is_for_a_larger_model_and_every_density(density: float, measured: float) -> None:
    """GiB, peak allocated (torch 2.11, one H200, 2026-11-23)."""
    overrides = ["routing.router=quantile", "routing.group_size=512", f"routing.density={density}"]
    path = ROOT / "pretrain/configs/bench/base_1b.yaml"
    config = load_config(path, overrides if density < 1 else [])
    assert memory(config).total / GIB == pytest.approx(measured, rel=0.05)


def test_recomputing_keeps_less_and_one_layer_at_a_time() -> None:
    kept = {
        how: memory(make_config(training={"recompute": how}))
        for how in ("none", "cheap", "attention", "mlp", "full")
    }
    assert kept["full"].activations < min(kept["attention"].activations, kept["mlp"].activations)
    assert max(kept["attention"].activations, kept["mlp"].activations) < kept["none"].activations
    inputs = LAYERS * 2 * 16 * HIDDEN * 2  # of all layers, two bytes each
    (one,) = {memory(make_config(model={"num_layers": 1}, routing={"router": "always"})).activations}
    dense = memory(make_config(routing={"router": "always"}, training={"recompute": "full"}))
    assert dense.activations == inputs + one
