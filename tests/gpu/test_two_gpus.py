"""Grids of two GPUs, over NCCL, equal one GPU."""

import pytest
import torch

from support.parity import names_of
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
TP2 bf16, TP2-SP bf16, PP2 bf16, PP2-V2 bf16, DP2 bf16, DP2-Z2 bf16, DP2-Z3 bf16, CP2 bf16
"""


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
