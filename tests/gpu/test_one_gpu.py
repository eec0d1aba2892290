"""One GPU gives what the CPU gives; compiled gives what eager gives; bf16 stays near fp32."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from skipmega.kernels.attention import document_starts, has_flash, packed_attention
from support.steps import tiny_grid, train_tiny
from support.worlds import ROOT, run_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

STEPS = 3
WIDE = {"model": {"hidden_size": 128, "num_attention_heads": 4}, "data": {"sequence_length": 256},
        "routing": {"group_size": 128}}  # fmt: skip
# a coin decides, not a rounding
COIN = {**WIDE, "routing": {**WIDE["routing"], "router": "random"}}
BF16 = {**COIN, "training": {"compile": True, "precision": "bf16"}}
# each step of the warm-up is a program of its own
ROUTED = {
    "gumbel": {},
    "quantile": {"router": "quantile"},
    "mixture-of-depths": {"router": "topk", "stand_in": "predictor", "keys_values": "executed",
                          "group_size": None, "density": 0.3},
    "mlp": {"router": "sigmoid", "wrap": "mlp", "density_control": "bias"},
    "attention": {"router": "gumbel", "wrap": "attention", "density_control": "coefficient"},
    "fixed-input": {"router": "fixed_input"},
    "dense-gradient": {"router": "gumbel", "gradient": "dense"},
    "warmup": {"router": "quantile", "density_warmup_steps": 2},
}  # fmt: skip


WAYS = {
    "eager": {}, "compiled": {"compile": True}, "graphs": {"compile": True, "cuda_graphs": True},
    "cheap": {"compile": True, "cuda_graphs": True, "recompute": "cheap"},
}  # fmt: skip


def routed(name, training):
    return {**WIDE, "routing": {**WIDE["routing"], **ROUTED[name]}, "training": training}


def check_near(found, expected, tolerance):
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=tolerance, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=10 * tolerance, atol=0)
    for name, gradient in expected["gradients"].items():
        error = (found["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < 20 * tolerance, f"gradient of {name} is off by {error:.1e}"


def train(*variants):
    with tiny_grid({}) as grid:
        return [train_tiny(grid, {}, STEPS, overrides) for overrides in variants]


@pytest.fixture(scope="module")
def on_gpu():
    ((tiny, fp32, bf16),) = run_world(train, 1, None, COIN, BF16, limit=280)
    return {"tiny": tiny, "fp32": fp32, "bf16": bf16}


@pytest.fixture(scope="module")
def each_way():
    """By variant and way; all variants at once, since compiling is what takes time."""

    def train_each(name):
        (results,) = run_world(train, 1, *(routed(name, training) for training in WAYS.values()), limit=560)
        return dict(zip(WAYS, results, strict=True))

    with ThreadPoolExecutor() as pool:
        return dict(zip(ROUTED, pool.map(train_each, ROUTED), strict=True))


@pytest.mark.timeout(400)
def test_gpu_equals_cpu(on_gpu):
    (on_cpu,) = run_world(train, 1, None, variables={"CUDA_VISIBLE_DEVICES": ""})
    check_near(on_gpu["tiny"], on_cpu[0], 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ROUTED)
def test_compiled_equals_eager(each_way, name):
    """Block-sparse attention against the reference, and every kind of routing, documents included.

    Strict for the first step; later ones may differ by a token whose score meets its threshold.
    """
    eager, compiled = each_way[name]["eager"], each_way[name]["compiled"]
    first = [{**run, "losses": run["losses"][:1], "norms": run["norms"][:1]} for run in (compiled, eager)]
    check_near(*first, 1e-5)
    torch.testing.assert_close(compiled["losses"], eager["losses"], rtol=1e-3, atol=0)
    for found, expected in zip(compiled["seen"], eager["seen"], strict=True):
        assert found.density == pytest.approx(expected.density, abs=5e-3)
        assert found.executed == pytest.approx(expected.executed, abs=5e-3)
        assert found.computed == pytest.approx(expected.computed)
    for tensor_name, tensor in eager["state"].items():
        torch.testing.assert_close(compiled["state"][tensor_name], tensor, rtol=1e-2, atol=4e-2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ROUTED)
def test_graphs_equal_compiled(each_way, name):
    """Several micro-batches a step, evaluations between, and a warm-up before the capture."""
    compiled, graphs = each_way[name]["compiled"], each_way[name]["graphs"]
    check_near(graphs, compiled, 1e-6)
    for tensor_name, tensor in compiled["state"].items():
        torch.testing.assert_close(graphs["state"][tensor_name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ROUTED)
def test_what_is_made_anew_changes_no_gradient(each_way, name):
    first = [{**run, "losses": run["losses"][:1], "norms": run["norms"][:1]} for run in
             (each_way[name]["cheap"], each_way[name]["graphs"])]  # fmt: skip
    check_near(*first, 1e-5)


@pytest.mark.timeout(400)
def test_bf16_stays_near_fp32(on_gpu):
    torch.testing.assert_close(on_gpu["bf16"]["losses"], on_gpu["fp32"]["losses"], rtol=1e-2, atol=0)
    torch.testing.assert_close(on_gpu["bf16"]["norms"], on_gpu["fp32"]["norms"], rtol=5e-2, atol=0)


def attention_inputs(length, queries, with_documents):
    """Query, key, value; positions; the first positions that may be seen."""
    torch.manual_seed(0)
    batch = 3
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
    return inputs, positions, since


def attend_and_back(attention, inputs, *rest):
    out = attention(*inputs, *rest)
    upstream = torch.linspace(-1, 1, out.numel(), device="cuda").reshape(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def check_errors(found, expected, tolerance):
    for result, reference in zip(found, expected, strict=True):
        error = (result.double() - reference).norm() / reference.norm()
        assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("queries", [None, 300])
def test_attention_back_ends_agree_in_forward_and_backward(with_documents, queries):
    inputs, *rest = attention_inputs(512, queries, with_documents)
    expected = attend_and_back(packed_attention, inputs, *rest, "sdpa")
    check_errors(attend_and_back(torch.compile(packed_attention), inputs, *rest, "flex"), expected, 2e-3)


@pytest.mark.skipif(not has_flash(), reason="not installed: pip install 'skipmega[flash]'")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("length", "queries", "with_documents"),
    [(512, 300, False), (512, 300, True), (700, None, True), (300, 7, False), (1024, 512, True)],
)
def test_flash_attention_in_bf16_is_near_the_reference(length, queries, with_documents, compiled):
    inputs, *rest = attention_inputs(length, queries, with_documents)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = attend_and_back(packed_attention, exact, *rest, "sdpa")
    attention = torch.compile(packed_attention) if compiled else packed_attention
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    check_errors(attend_and_back(attention, rounded, *rest, "flash"), expected, 1e-2)


@pytest.mark.skipif(not has_flash(), reason="not installed: pip install 'skipmega[flash]'")
@pytest.mark.timeout(400)
def test_flash_attention_trains_as_flex_attention_does():
    """In CUDA graphs, where every memory it writes must have been there before."""
    ways = ({**BF16["training"], "cuda_graphs": True, "attention": kind} for kind in ("flex", "flash"))
    ((flex, flash),) = run_world(train, 1, *({**COIN, "training": way} for way in ways), limit=380)
    torch.testing.assert_close(flash["losses"], flex["losses"], rtol=1e-3, atol=0)
    torch.testing.assert_close(flash["norms"], flex["norms"], rtol=1e-2, atol=0)


def test_the_doctor_reads_this_gpu(tmp_path):
    """NVML itself answers, wherever there is a driver; and no kernel is what a GPU should not use."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"run_dir: {tmp_path}\nmodel: {{vocab_size: 512}}\ntraining: {{precision: bf16}}\n"
        "data: {attend_across_documents: true}\n"
    )

    def ask_doctor(*overrides):
        command = [sys.executable, "tools/doctor.py", config, *overrides]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    shown = ask_doctor()
    print(shown)
    for expected in (
        r"^libraries: .*triton [\d.]+, CUDA [\d.]+, NCCL [\d.]+, NVIDIA",
        r"^kernels: bf16, layers not compiled; attention: sdpa \((flash|cudnn)[^,]*, else (eff|cudnn)",
        r"; adamw \(fused\), ZeRO 1$",
        r"^GPU health: driver [\d.]+; \d+ °C, clocks held back by ",
        r"uncorrected memory errors \d+ since the driver was loaded, \d+ ever; rows remapped \d+$",
        r"^doctor: 1 processes are fit to train$",
    ):
        assert re.search(expected, shown, re.MULTILINE), f"{expected} is missing in\n{shown}"
    (speed,) = re.findall(r"^matrix products: [\d.]+ to ([\d.]+) TFLOP/s$", shown, re.MULTILINE)
    assert float(speed) > 50, "not a GPU's speed"
    assert "layers compiled; attention: flex" in ask_doctor("training.compile=true")
