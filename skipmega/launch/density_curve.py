"""One checkpoint at several densities: what it computes, what it predicts, what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipmega.checkpoint.store import Checkpoint
from skipmega.data.files import atomic_write
from skipmega.data.order.batches import make_loader
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import ConfigError
from skipmega.evaluation import EvaluationResult
from skipmega.evaluation.results import as_json
from skipmega.inference.configuration import with_eval_density
from skipmega.inference.native import NativeModel
from skipmega.inference.work import Work
from skipmega.launch.run import build_data
from skipmega.models.flops import forward_flops_per_token
from skipmega.parallel.grid import ParallelGrid

GIGA = 1e9


@dataclass(frozen=True)
class CurvePoint:
    """A checkpoint at one density.

    ``density`` was asked for, ``executed`` is the mean share of held-out tokens that the routed layers ran;
    ``flops`` are forward operations per token at the mean position, as executed, ``dense_flops`` those of all
    layers; ``loss`` is held out, nats per token; ``scores`` are the means of suites' families over the sets
    that are there, and the first metric of every other task.
    """

    density: float
    executed: float
    flops: float
    dense_flops: float
    loss: float
    scores: dict[str, float]


@dataclass(frozen=True)
class DensityCurve:
    """Points by rising density, and the evaluation behind each."""

    model: str
    points: list[CurvePoint]
    results: list[EvaluationResult]

    def table(self) -> str:
        """A Markdown table, one line a density."""
        names = list(self.points[0].scores)
        heads = ["density", "executed", "GFLOPs/token", "of dense", "held-out loss", *names]
        lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for point in self.points:
            share = point.flops / point.dense_flops
            cells = [
                f"{point.density:g}",
                f"{point.executed:.3f}",
                f"{point.flops / GIGA:.4g}",
                f"{share:.3f}",
                f"{point.loss:.4f}",
                *(f"{point.scores[name]:.4f}" for name in names),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def write_json(self, path: str | Path) -> None:
        """Write everything to ``path``, atomically; a value that is not finite is written as null."""
        with atomic_write(Path(path)) as stream:
            stream.write(as_json(self))


def measure_curve(
    checkpoint: Checkpoint,
    grid: ParallelGrid,
    densities: Sequence[float],
    evaluate: Callable[[NativeModel], EvaluationResult],
) -> DensityCurve:
    """Evaluate ``checkpoint`` at each of ``densities``; all processes of ``grid`` call it together.

    The held-out sequences are those that its run evaluated on.

    Raises:
        ConfigError: a density has no meaning for the model, or the run held nothing out.
        DataError: the run's data is not here.
    """
    for density in densities:  # all of them before the first takes its hours
        with_eval_density(checkpoint.config, density)
    loader = _held_out(checkpoint, grid)
    points, results = [], []
    for density in sorted(set(densities)):
        model = NativeModel.load(checkpoint, grid, eval_density=density)
        config = model.config
        loss = model.held_out_loss(loader())
        works: list[Work] = model.exchange(model.take_work())
        tokens = sum(work.tokens for work in works)
        shares = {
            layer: sum(work.executed[layer] for work in works) / tokens for layer in config.routed_layers
        }
        result = evaluate(model)
        results.append(result)
        points.append(
            CurvePoint(
                density=density,
                executed=sum(shares.values()) / len(shares),
                flops=forward_flops_per_token(config, shares),
                dense_flops=forward_flops_per_token(config, {}),
                loss=loss,
                scores=_scores(result),
            )
        )
    return DensityCurve(str(checkpoint.path), points, results)


def _held_out(checkpoint: Checkpoint, grid: ParallelGrid) -> Callable[[], Any]:
    """Makes the run's held-out micro-batches of this replica, from the first."""
    config = checkpoint.config
    tokenizer = Tokenizer.load(str(config.data.tokenizer))
    samples = build_data(config, tokenizer).valid
    if samples is None:
        raise ConfigError(
            f"training.eval_interval={config.training.eval_interval}: the run {checkpoint.path} held nothing "
            "out to measure a loss on; evaluate single densities with --eval-density"
        )
    micro_batch = min(config.training.micro_batch_size, config.training.eval_sequences // grid.data.size)
    at_once = micro_batch * grid.data.size
    return lambda: make_loader(
        samples,
        consumed_samples=0,
        total_samples=config.training.eval_sequences // at_once * at_once,
        micro_batch_size=micro_batch,
        dp_rank=grid.data.rank,
        dp_size=grid.data.size,
        document_end=None if config.data.attend_across_documents else tokenizer.eod_id,
        num_workers=0,
        pin_memory=False,
    )


def _scores(result: EvaluationResult) -> dict[str, float]:
    averages = {}
    for average in result.averages:
        if average.value is not None:
            tasks = average.present + len(average.missing)
            averages[f"{average.suite}, {average.family}, {average.present} of {tasks}"] = average.value
    suites = tuple(f"{average.suite}_" for average in result.averages)
    others = {
        f"{task.name}, {task.metrics[0].name}": task.metrics[0].value
        for task in result.tasks
        if task.metrics and not task.name.startswith(suites)
    }
    return averages | others
