"""Sums over micro-batches and their means, against numbers computed by hand."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipmega.config import ParallelConfig, RunConfig, build_config
from skipmega.models.layer import RoutingRecord
from skipmega.parallel.grid import ParallelGrid, create_grid, release_grid
from skipmega.parallel.process import ProcessInfo
from skipmega.training.sums import StepSums, average, mean_loss
from support.worlds import run_world


def make_config(group_size: int | None = None) -> RunConfig:
    return build_config(
        {
            "model": {"num_layers": 4, "vocab_size": 128},
            "data": {"sequence_length": 4},
            "routing": {"group_size": group_size},
        },
        source="test",
    )


def record(chosen: list[str], executed: list[str] | None = None, slots: int = 0, entropy: float = 0.0) -> Any:
    """Of sequences in x (yes) and . (no), one string each."""

    def tensor(rows: list[str]) -> Tensor:
        return torch.tensor([[mark == "x" for mark in row] for row in rows]).t()

    return RoutingRecord(
        chosen=tensor(chosen).float(),
        executed=tensor(executed or chosen),
        score=torch.zeros(len(chosen[0]), len(chosen)),
        auxiliary=torch.zeros(()),
        entropy=torch.tensor(entropy),
        slots=slots,
        moved=0,
    )


# layers 1 and 2 are routed; two sequences of four tokens
FIRST = {
    1: record(["xxx.", "x..."], ["xx..", "x..."], slots=4, entropy=0.5),
    2: record(["....", "...."], slots=2, entropy=0.1),
}
SECOND = {
    1: record(["....", "..xx"], slots=4, entropy=0.3),
    2: record(["xxxx", "x.x."], slots=6, entropy=0.2),
}


def test_shares_are_means_over_tokens_and_micro_batches(grid: ParallelGrid) -> None:
    config = make_config()
    sums = StepSums.zeros(config, grid)
    sums.add_routing(FIRST)
    sums.add_routing(SECOND)
    sums.loss += 12.0
    sums.tokens += 16.0
    seen = average(sums, config, grid)
    assert seen.loss == pytest.approx(0.75)
    assert seen.density == pytest.approx([0, (4 / 8 + 2 / 8) / 2, (0 + 6 / 8) / 2, 0])
    assert seen.executed == pytest.approx([0, (3 / 8 + 2 / 8) / 2, (0 + 6 / 8) / 2, 0])
    assert seen.computed == pytest.approx([0, (4 / 8 + 4 / 8) / 2, (2 / 8 + 6 / 8) / 2, 0])
    assert seen.entropy == pytest.approx([0, 0.4, 0.15, 0])
    assert seen.router_gradient == [0.0] * 4


@pytest.mark.parametrize(
    ("group_size", "fullest"), [(None, [0, 0.5, 1.0, 0]), (2, [0, 1.0, 1.0, 0]), (1, [0, 1.0, 1.0, 0])]
)
def test_the_fullest_group_is_the_fullest_of_all_micro_batches(
    grid: ParallelGrid, group_size: int | None, fullest: list[float]
) -> None:
    """Groups are pieces of one sequence: of layer 1, two of the four first tokens are the most."""
    config = make_config(group_size)
    for order in ((FIRST, SECOND), (SECOND, FIRST)):
        sums = StepSums.zeros(config, grid)
        for records in order:
            sums.add_routing(records)
        assert average(sums, config, grid).fullest_group == pytest.approx(fullest)


def test_groups_are_consecutive_tokens_of_one_sequence(grid: ParallelGrid) -> None:
    """Half of each pair runs, although each position's two tokens differ as much as they can."""
    config = make_config(2)
    sums = StepSums.zeros(config, grid)
    sums.add_routing({1: record(["x.x.", "x.x."]), 2: record(["xx..", ".x.."])})
    assert average(sums, config, grid).fullest_group == pytest.approx([0, 0.5, 1.0, 0])


def test_nothing_seen_is_zero(grid: ParallelGrid) -> None:
    config = make_config()
    seen = average(StepSums.zeros(config, grid), config, grid)
    assert (seen.loss, seen.density, seen.fullest_rank) == (0.0, [0.0] * 4, [0.0] * 4)


def test_a_copy_is_added_to_alone(grid: ParallelGrid) -> None:
    sums, config = StepSums.zeros(make_config(), grid), make_config()
    sums.add_routing(FIRST)
    sums.loss, sums.tokens = torch.tensor(10.0), torch.tensor(5.0)
    before = average(sums, config, grid)
    added = sums.copy()
    added.add_routing(FIRST)
    added.loss += 3
    added.tokens += 2
    assert mean_loss(sums, added, grid) == 1.5
    assert average(sums, config, grid) == before
    assert average(added, config, grid).loss == 13 / 7


def test_chunks_of_a_stage_are_counted_by_layer(grid: ParallelGrid) -> None:
    config = make_config()
    at_once, by_chunk = StepSums.zeros(config, grid), StepSums.zeros(config, grid)
    for records in (FIRST, SECOND):
        at_once.add_routing(records)
        by_chunk.add_routing({})  # one without a router
        for layer, record in records.items():
            by_chunk.add_routing({layer: record})
    assert average(by_chunk, config, grid) == average(at_once, config, grid)


def test_a_pass_is_measured_and_belongs_to_its_stage(grid: ParallelGrid, monkeypatch: Any) -> None:
    config = make_config()
    sums, times = StepSums.zeros(config, grid), iter([10.0, 10.5, 20.0, 21.5])
    monkeypatch.setattr("skipmega.training.clock.time.perf_counter", lambda: next(times))
    for _ in range(2):
        with sums.clock.measure():
            pass
    assert average(sums, config, grid).stage_seconds == [1.0]


def test_the_sums_carry_no_graph(grid: ParallelGrid) -> None:
    chosen = torch.full((4, 2), 0.5, requires_grad=True)
    sums = StepSums.zeros(make_config(), grid)
    sums.add_routing({1: FIRST[1]._replace(chosen=chosen * 2)})
    assert not sums.density.requires_grad


def routers(gradients: dict[int, list[float]]) -> dict[int, nn.Parameter]:
    weights = {}
    for layer, gradient in gradients.items():
        weights[layer] = nn.Parameter(torch.zeros(1, len(gradient)))
        weights[layer].grad = torch.tensor([gradient])
    return weights


def test_the_router_gradient_is_the_norm_of_the_last_step_s(grid: ParallelGrid) -> None:
    config = make_config()
    sums = StepSums.zeros(config, grid)
    sums.keep_router_gradients(routers({1: [30.0, 40.0], 2: [1.0, 0.0]}))
    weights = routers({1: [3.0, 4.0], 2: [0.0, 0.0]})
    weights[2].grad = None
    sums.keep_router_gradients(weights)
    assert weights[1].grad is not None
    assert average(sums, config, grid).router_gradient == pytest.approx([0, 5.0, 0, 0])
    weights[1].grad.zero_()  # as a step does


def averages_of_both_grids() -> list[dict[str, Any]]:
    """For ``run_world`` of 2: each rank's means, the ranks being data ranks, then stages, that saw different
    things."""
    rank, config = int(os.environ["RANK"]), make_config()
    process = ProcessInfo(rank, 2, rank, "torchrun")
    grid = create_grid(process)
    by_data, by_stage = StepSums.zeros(config, grid), StepSums.zeros(config, grid)
    by_data.add_routing((FIRST, SECOND)[rank])
    by_data.loss += (6.0, 3.0)[rank]
    by_data.tokens += (8.0, 4.0)[rank]
    by_data.keep_router_gradients(routers({1: ([6.0, 0.0], [0.0, 8.0])[rank], 2: [1.0, 0.0]}))
    layer = rank + 1  # of this stage
    by_stage.add_routing({layer: FIRST[layer]})
    by_stage.add_routing({layer: SECOND[layer]})
    by_stage.keep_router_gradients(routers({layer: [3.0, 4.0]}))
    if rank == 1:
        by_stage.loss += 6.0
        by_stage.tokens += 8.0
    seen = [vars(average(by_data, config, grid))]
    release_grid()
    seen.append(vars(average(by_stage, config, create_grid(process, ParallelConfig(pipeline_parallel=2)))))
    return seen


@pytest.mark.timeout(200)
def test_ranks_agree_on_the_mean_over_data_and_on_the_layers_of_all_stages() -> None:
    both, others = run_world(averages_of_both_grids, 2)
    assert both == others
    data, stages = both
    assert data["loss"] == pytest.approx(9 / 12), "each token weighs the same"
    assert data["density"] == pytest.approx([0, 3 / 8, 3 / 8, 0])
    assert data["executed"] == pytest.approx([0, 5 / 16, 3 / 8, 0])
    assert data["fullest_rank"] == pytest.approx([0, 3 / 8, 6 / 8, 0])
    assert data["fullest_group"] == pytest.approx([0, 1 / 2, 1, 0])
    assert data["router_gradient"] == pytest.approx([0, 5, 1, 0]), "the norm of the mean, not the mean norm"
    assert stages["loss"] == pytest.approx(6 / 8)
    assert stages["density"] == pytest.approx([0, 3 / 8, 3 / 8, 0])
    assert stages["entropy"] == pytest.approx([0, 0.4, 0.15, 0])
    assert stages["router_gradient"] == pytest.approx([0, 5, 5, 0])
