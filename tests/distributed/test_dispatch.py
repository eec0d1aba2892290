"""Rows that other ranks run: results and gradients of one process, and no byte more than the plan says."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from skipmega.launch.environment import discover_process
from skipmega.parallel.grid import Axis, create_grid
from skipmega.routing.dispatch import BalancePlan, gather_counts, plan_balance, run_balanced
from support.worlds import run_world

HIDDEN, INNER, OUT = 6, 16, 5
COUNTS: dict[int, list[tuple[int, ...]]] = {
    2: [(0, 7), (7, 0), (3, 3), (0, 0), (1, 0), (4, 3), (9, 4), (64, 2)],
    4: [(5, 0, 0, 0), (0, 0, 0, 1), (1, 0, 0, 0), (4, 4, 4, 4), (0, 0, 0, 0), (6, 6, 0, 0), (1, 64, 5, 9),
        (3, 2, 3, 2), (0, 11, 2, 17), (8, 1, 8, 2)],
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """How a case is run: ``constant`` are the ranks whose rows need no gradient."""

    dtype: torch.dtype = torch.float32
    autocast: bool = False
    recompute: str = ""
    pad: bool = False
    constant: tuple[int, ...] = ()
    weights: bool = True
    evaluates: bool = False


VARIANTS = {
    "plain": Variant(),
    "bf16": Variant(dtype=torch.bfloat16),
    "autocast": Variant(autocast=True),
    "recompute-run": Variant(recompute="run"),
    "recompute-all": Variant(recompute="all"),
    "padded": Variant(pad=True),
    "padded-recompute-all": Variant(pad=True, recompute="all"),
    "constant-on-first": Variant(constant=(0,)),
    "constant-but-first": Variant(constant=(1, 2, 3)),
    "constant-on-first-recompute-all": Variant(constant=(0,), recompute="all"),
    "constant-on-first-no-weights": Variant(constant=(0,), weights=False),
    "constant-on-first-no-weights-recompute-all": Variant(constant=(0,), weights=False, recompute="all"),
    "evaluation": Variant(evaluates=True),
}
CASES = [
    pytest.param(counts, variant, id=f"{'-'.join(map(str, counts))}:{variant}")
    for size in COUNTS
    for counts in COUNTS[size]
    for variant in VARIANTS
]


class CountedBytes(TorchDispatchMode):
    """Bytes that this rank hands to the process group for other ranks, and the calls, by operation."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = str(function).removesuffix(".default")
        if name.startswith("c10d."):
            self.calls[name] += 1
            if name == "c10d.alltoall_base_":
                _, rows, _, _, splits, *_ = arguments
                assert sum(splits) == len(rows)
                assert not splits[self.rank], "what stays home is not handed over"
                self.sent[name] += rows.numel() * rows.element_size()
        return function(*arguments, **(keywords or {}))


@dataclass
class Network:
    """A gated feed-forward network, or a function without weights; remembers how many rows it ran."""

    variant: Variant
    device: torch.device
    ran: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        shapes = [(HIDDEN, INNER), (HIDDEN, INNER), (INNER, OUT)]
        made = [torch.randn(shape).to(self.device, self.variant.dtype) for shape in shapes]
        self.weights = [weight.requires_grad_() for weight in made]

    def __call__(self, rows: Tensor) -> Tensor:
        self.ran.append(len(rows))
        if not self.variant.weights:
            return torch.nn.functional.silu(rows[:, :OUT]) * rows[:, 1:]
        gate, up, down = self.weights
        return (torch.nn.functional.silu(rows @ gate) * (rows @ up)) @ down


def rows_of_all(counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows of all ranks [n, hidden] and the gradients of their results [n, out]."""
    generator = torch.Generator().manual_seed(hash(counts))
    total = sum(counts)
    return torch.randn(total, HIDDEN, generator=generator), torch.randn(total, OUT, generator=generator)


def balanced(network: Network, axis: Axis, plan: BalancePlan, variant: Variant) -> Callable[[Tensor], Tensor]:
    again = partial(checkpoint, use_reentrant=False)
    run = partial(again, network) if variant.recompute == "run" else network
    whole = partial(run_balanced, run=run, axis=axis, plan=plan, pad=variant.pad)
    return partial(again, whole) if variant.recompute == "all" else whole


def run_case(axis: Axis, device: torch.device, counts: tuple[int, ...], variant: Variant) -> dict[str, Any]:
    rows, upstream = (t.split(counts)[axis.rank].to(device, variant.dtype) for t in rows_of_all(counts))
    rows.requires_grad_(axis.rank not in variant.constant)
    network = Network(variant, device)
    gathered = gather_counts(len(rows), axis, device)
    with (
        CountedBytes(axis.rank) as forward,
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=variant.autocast),
        torch.inference_mode(variant.evaluates),
    ):
        results = balanced(network, axis, plan_balance(gathered), variant)(rows)
    with CountedBytes(axis.rank) as backward:
        results.backward(upstream.to(results.dtype)) if results.requires_grad else None
    return {
        "gathered": gathered,
        "results": results.detach().cpu(),
        "has_backward": results.requires_grad,
        "rows": None if rows.grad is None else rows.grad.cpu(),
        "weights": [None if weight.grad is None else weight.grad.cpu() for weight in network.weights],
        "ran": network.ran,
        "forward": (forward.sent, forward.calls),
        "backward": (backward.sent, backward.calls),
    }


def run_cases() -> dict[tuple[tuple[int, ...], str], dict[str, Any]]:
    """For ``run_world``: what this rank made of every case of its world's size."""
    grid = create_grid(discover_process())
    return {
        (counts, name): run_case(grid.data, grid.device, counts, variant)
        for counts in COUNTS[grid.data.size]
        for name, variant in VARIANTS.items()
    }


@pytest.fixture(scope="module")
def worlds() -> dict[int, list[Any]]:
    return {size: run_world(run_cases, size, limit=90.0) for size in COUNTS}


def of_ranks(worlds: dict[int, list[Any]], counts: tuple[int, ...], name: str) -> list[dict[str, Any]]:
    return [results[counts, name] for results in worlds[len(counts)]]


def tolerance(variant: Variant) -> float:
    return 3e-2 if variant.autocast or variant.dtype == torch.bfloat16 else 1e-5


def check_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().clamp(min=1.0).item() if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(("counts", "name"), CASES)
def test_results_and_gradients_are_those_of_one_process(
    counts: tuple[int, ...], name: str, worlds: dict[int, list[Any]]
) -> None:
    variant = VARIANTS[name]
    rows, upstream = (tensor.to(variant.dtype).double() for tensor in rows_of_all(counts))
    network = Network(variant, torch.device("cpu"))
    network.weights = [weight.detach().double().requires_grad_() for weight in network.weights]
    expected = network(rows.requires_grad_())
    expected.backward(upstream)
    close = partial(check_close, tolerance=tolerance(variant))
    assert rows.grad is not None
    parts = zip(of_ranks(worlds, counts, name), expected.split(counts), rows.grad.split(counts), strict=True)
    for rank, (found, results, gradients) in enumerate(parts):
        close(found["results"], results.detach())
        if rank in variant.constant or variant.evaluates:
            assert found["rows"] is None
        else:
            close(found["rows"], gradients)
    trained = variant.weights and not variant.evaluates
    for index, weight in enumerate(network.weights if trained else []):
        mine = [found["weights"][index].double() for found in of_ranks(worlds, counts, name)]
        assert weight.grad is not None
        close(torch.stack(mine).sum(0), weight.grad)


@pytest.mark.parametrize(("counts", "name"), CASES)
def test_every_rank_runs_its_target(counts: tuple[int, ...], name: str, worlds: dict[int, list[Any]]) -> None:
    variant = VARIANTS[name]
    mean, left = divmod(sum(counts), len(counts))
    found = of_ranks(worlds, counts, name)
    first = [result["ran"][0] for result in found]
    if variant.pad:
        assert first == [mean + (left > 0)] * len(counts)
    else:
        assert sorted(first) == [mean] * (len(counts) - left) + [mean + 1] * left
    for result in found:
        assert result["gathered"] == list(counts)
        assert set(result["ran"]) == {result["ran"][0]}
        again = bool(variant.recompute) and result["has_backward"]
        assert len(result["ran"]) == 1 + again


@pytest.mark.parametrize(("counts", "name"), CASES)
def test_the_bytes_sent_are_those_of_the_moved_rows(
    counts: tuple[int, ...], name: str, worlds: dict[int, list[Any]]
) -> None:
    variant = VARIANTS[name]
    found = of_ranks(worlds, counts, name)
    plan = plan_balance(counts)
    away = HIDDEN * (2 if variant.dtype == torch.bfloat16 else 4)
    home = OUT * (2 if variant.dtype == torch.bfloat16 or variant.autocast else 4)
    again = {"": 0, "run": 0, "all": away}[variant.recompute]  # results aren't brought home a second time
    for rank, result in enumerate(found):
        assert result["has_backward"] or variant.evaluates or not plan.moved
        out, back = sum(plan.sent(rank)), sum(plan.received(rank))
        assert result["forward"][0].total() == out * away + back * home
        backward = 0 if variant.evaluates else out * home + back * away + out * again
        assert result["backward"][0].total() == backward
        exchanges = Counter({"c10d.alltoall_base_": 2} if plan.moved else {})
        assert result["forward"][1] == exchanges
        expected = 0 if variant.evaluates else 3 if again else 2
        assert result["backward"][1].total() == (expected if plan.moved else 0)
    assert sum(result["forward"][0].total() for result in found) == plan.moved * (away + home)
