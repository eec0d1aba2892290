"""Grids of two GPUs, over NCCL, equal one GPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from support.parity import check_gradients, names_of, on_each_grid
from support.steps import tiny_grid, train_tiny
from support.variants import check, train_all, train_alone
from support.worlds import run_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices on this machine"),
]

GRIDS = """
TP2 adamw, PP2 adamw, DP2 adamw, DP2-Z2 adamw, DP2-Z3 adamw, TP2-SP adamw, CP2 adamw,
TP2-SP untied-swiglu-dropless, CP2 untied-swiglu-dropless, PP2 untied-swiglu-dropless,
DP2 quantile, TP2-SP quantile, CP2 quantile, PP2-V2 quantile, PP2-V2 deep,
TP2 mixture-of-depths, DP2 mixture-of-depths, DP2 coefficient, TP2-SP bias-mlp, CP2 bias-mlp,
TP2-SP dense-gradient, TP2-SP recompute, DP2-Z3 recompute, CP2 adafactor,
TP2 bf16, TP2-SP bf16, PP2 bf16, PP2-V2 bf16, DP2 bf16, DP2-Z2 bf16, DP2-Z3 bf16, CP2 bf16,
TP2 bf16-still, TP2-SP bf16-still, PP2 bf16-still, DP2 bf16-still, DP2-Z3 bf16-still, CP2 bf16-still
"""
COMPILED = """
DP2 dense, DP2 routed, PP2-V2 dense, PP2-V2 routed, TP2 dense, TP2 routed, TP2-SP dense, TP2-SP routed,
CP2 dense, CP2 routed
"""
GRAPHS = "DP2 graphs, DP2-Z2 graphs, TP2 graphs, TP2-SP graphs, CP2 graphs, PP2 graphs, PP2-V2 graphs"
WIDE = {"model": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {"sequence_length": 256}, "training": {"compile": True}}  # fmt: skip
GUMBEL = {"router": "gumbel", "group_size": 64}
ROUTERS = {"dense": {"router": "always"}, "routed": GUMBEL, "graphs": GUMBEL}


@pytest.fixture(scope="module")
def one_gpu():
    (results,) = run_world(train_alone, 1, sorted({name.split()[1] for name in names_of(GRIDS)}), limit=280)
    return results


@pytest.fixture(scope="module")
def two_gpus():
    return run_world(train_all, 2, GRIDS, limit=280)


@pytest.mark.parametrize("name", names_of(GRIDS))
def test_two_gpus_equal_one(name, one_gpu, two_gpus):
    check(name, one_gpu, two_gpus)


def train_compiled(grid, parallel, router):
    training = {**WIDE["training"], "cuda_graphs": router == "graphs"}
    return train_tiny(grid, parallel, 2, {**WIDE, "routing": ROUTERS[router], "training": training})


def train_compiled_alone():
    with tiny_grid({}) as grid:
        return {router: train_compiled(grid, {}, router) for router in ROUTERS}


def train_all_compiled(grids):
    return on_each_grid(grids, train_compiled)


@pytest.fixture(scope="module")
def compiled():
    """What one GPU gives, and what two give, all at once, since compiling is what takes time."""
    with ThreadPoolExecutor() as pool:
        alone = pool.submit(run_world, train_compiled_alone, 1, limit=280)
        both = (COMPILED, GRAPHS)
        parts = [pool.submit(run_world, train_all_compiled, 2, part, limit=280) for part in both]
    cut = [a | b for a, b in zip(*(part.result() for part in parts), strict=True)]
    return alone.result()[0], cut


@pytest.mark.parametrize("name", [*names_of(COMPILED), *names_of(GRAPHS)])
def test_so_do_compiled_ones(name, compiled):
    alone, cut = compiled
    expected = alone[name.split()[1]]
    for results in cut:
        found = results[name]
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-4, atol=0)
        check_gradients(found["gradients"], expected["gradients"], 2e-4)
