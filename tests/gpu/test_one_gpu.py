"""One GPU gives what the CPU gives; compiled gives what eager gives; bf16 stays near fp32."""

import pytest
import torch

from skipmega.kernels.attention import document_starts, packed_attention
from support.steps import train_tiny
from support.worlds import run_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

WIDE = {"model": {"hidden_size": 128, "num_attention_heads": 4}, "data": {"sequence_length": 256},
        "routing": {"group_size": 128}}  # fmt: skip
COMPILED = {**WIDE, "training": {"compile": True}}
BF16 = {**WIDE, "training": {"compile": True, "precision": "bf16"}}


def check_near(found, expected, tolerance):
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=tolerance, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=10 * tolerance, atol=0)
    for name, gradient in expected["gradients"].items():
        error = (found["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < 20 * tolerance, f"gradient of {name} is off by {error:.1e}"


def train(*variants):
    return [train_tiny(1, 1, 3, overrides) for overrides in variants]


@pytest.fixture(scope="module")
def on_gpu():
    ((tiny, wide, compiled, bf16),) = run_world(train, 1, None, WIDE, COMPILED, BF16, limit=280)
    return {"tiny": tiny, "wide": wide, "compiled": compiled, "bf16": bf16}


@pytest.mark.timeout(400)
def test_gpu_equals_cpu(on_gpu):
    (on_cpu,) = run_world(train, 1, None, variables={"CUDA_VISIBLE_DEVICES": ""})
    check_near(on_gpu["tiny"], on_cpu[0], 1e-5)


@pytest.mark.timeout(400)
def test_compiled_block_sparse_attention_equals_eager(on_gpu):
    check_near(on_gpu["compiled"], on_gpu["wide"], 1e-5)


@pytest.mark.timeout(400)
def test_bf16_stays_near_fp32(on_gpu):
    torch.testing.assert_close(on_gpu["bf16"]["losses"], on_gpu["wide"]["losses"], rtol=1e-2, atol=0)
    torch.testing.assert_close(on_gpu["bf16"]["norms"], on_gpu["wide"]["norms"], rtol=5e-2, atol=0)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("queries", [None, 300])
def test_attention_back_ends_agree_in_forward_and_backward(with_documents, queries):
    torch.manual_seed(0)
    length, batch = 512, 3
    documents = (torch.rand(batch, length, device="cuda") < 0.01).long().cumsum(1)
    since = document_starts(documents) if with_documents else None
    positions = None
    if queries is not None:
        chosen = [torch.randperm(length, device="cuda")[:queries].sort().values for _ in range(batch)]
        positions = torch.stack(chosen, dim=1)
    inputs = [
        torch.randn(n, batch, heads, 64, device="cuda", requires_grad=True)
        for n, heads in ((queries or length, 8), (length, 2), (length, 2))
    ]
    upstream = torch.randn(queries or length, batch, 8, 64, device="cuda")
    compiled = torch.compile(packed_attention)
    results = []
    for attention, backend in ((packed_attention, "sdpa"), (compiled, "flex")):
        out = attention(*inputs, positions, since, backend)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for reference, found in zip(*results, strict=True):
        error = (found - reference).norm() / reference.norm()
        assert error < 2e-3, f"relative error {error:.1e}"
