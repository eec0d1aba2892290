"""One step's micro-batches through a stage that is no model of ours, and losses attached on the way."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core.enums import ModelType
from torch import Tensor, nn

from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.layers import megatron_config
from skipmega.parallel.pipeline import attach_loss, run_micro_batches

AUXILIARY = 0.5


class Stage(nn.Module):
    """Multiplies by a vector."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, grid: ParallelGrid) -> None:
        super().__init__()
        self.config = megatron_config(
            num_layers=1, hidden_size=3, num_attention_heads=1, dtype=torch.float32, grid=grid
        )
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        assert input_tensor == [None], "a first stage receives nothing"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def micro_batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, generator=generator) for _ in range(count)]


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def auxiliary_of(stage: Stage, x: Tensor) -> Tensor:
    return AUXILIARY * (stage.weight * x.mean()).sum()


def forward_step(count: int) -> Callable[[Iterator[Tensor], Stage], tuple[Tensor, Callable[..., Any]]]:
    def step(batches: Iterator[Tensor], stage: Stage) -> tuple[Tensor, Callable[..., Any]]:
        x = next(batches)
        output = attach_loss(stage(x), auxiliary_of(stage, x), 1 / count)

        def finish(output: Tensor, non_loss_data: bool = False) -> Any:
            return output.detach() if non_loss_data else (loss_of(output), loss_of(output).item())

        return output, finish

    return step


def run(stage: Stage, count: int, **modes: bool) -> list[Any]:
    return run_micro_batches(
        [stage], iter(micro_batches(count)), forward_step(count), num_micro_batches=count, sequence_length=4,
        micro_batch_size=1, **modes,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_those_of_the_mean_loss_with_what_is_attached(grid: ParallelGrid, count: int) -> None:
    stage = Stage(grid)
    data = run(stage, count, backward=True)
    batches = micro_batches(count)
    total = sum(loss_of(stage(x)) + auxiliary_of(stage, x) for x in batches) / count
    assert isinstance(total, Tensor)
    (expected,) = torch.autograd.grad(total, stage.weight)
    assert stage.weight.grad is not None
    torch.testing.assert_close(stage.weight.grad, expected)
    assert data == pytest.approx([float(loss_of(stage(x))) for x in batches])


def test_forward_alone_leaves_no_gradient_and_collects_outputs_in_order(grid: ParallelGrid) -> None:
    stage = Stage(grid)
    with torch.no_grad():
        outputs = run(stage, 3, backward=False, collect_outputs=True)
    assert stage.weight.grad is None
    assert len(outputs) == 3
    for output, x in zip(outputs, micro_batches(3), strict=True):
        assert torch.equal(output, stage(x))


def test_an_attached_loss_changes_no_value_and_adds_its_scaled_gradient() -> None:
    x = torch.randn(
        3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16, requires_grad=True
    )
    w = torch.tensor(2.0, requires_grad=True)
    attached = attach_loss(x, w.square(), scale=0.25)
    assert torch.equal(attached, x)
    assert attached.dtype == torch.bfloat16
    attached.float().sum().backward()
    assert w.grad == 0.25 * 2 * 2.0
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
