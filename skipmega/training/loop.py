"""The training loop."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from skipmega.config import RunConfig
from skipmega.data.batches import TokenBatch
from skipmega.errors import TrainingError
from skipmega.routing.state import warmed_up
from skipmega.training.engine import TrainingEngine
from skipmega.training.metrics import (
    HeldOutAlarms,
    RoutingAlarms,
    StepTimer,
    peak_memory_gib,
    routing_numbers,
    speed_numbers,
)
from skipmega.training.schedule import learning_rate
from skipmega.training.sinks import Sink
from skipmega.training.sums import StepSums, average

Batches = Iterator[TokenBatch]


@dataclass
class Progress:
    """How far a run is: optimizer steps done, and samples of the data order consumed by them."""

    step: int = 0
    consumed_samples: int = 0


class TrainingLoop:
    """Steps, records, held-out evaluations and saves, in that order, until the end or ``stop_after``.

    Args:
        config: the resolved configuration.
        engine: does the steps.
        train_batches: micro-batches of this data rank, continuing at ``progress``.
        held_out: makes the held-out micro-batches from their beginning; None when there are none.
        progress: where to start; advanced in place.
        sinks: where records go; empty on all processes but the first.
        save: writes a checkpoint of the present state.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: TrainingEngine,
        train_batches: Batches,
        held_out: Callable[[], Batches] | None,
        progress: Progress,
        sinks: list[Sink],
        save: Callable[[Progress], object],
    ) -> None:
        self.config = config
        self.engine = engine
        self.train_batches = train_batches
        self.held_out = held_out
        self.progress = progress
        self.sinks = sinks
        self.save = save
        self.end = config.training.stop_after or config.training.steps
        self._timer = StepTimer()
        self._alarms = RoutingAlarms(config)
        self._held_out_alarms = HeldOutAlarms(config)
        self._forget()

    def run(self) -> None:
        """Train to the end; the last step is always recorded, evaluated and saved."""
        while self.progress.step < self.end:
            norm = self.train_step()
            if self._due(self.config.logging.interval):
                self.record(norm)
            if self._due(self.config.training.eval_interval):
                self.evaluate()
            if self._due(self.config.checkpoint.interval):
                self._aside(lambda: self.save(self.progress))

    def train_step(self) -> Tensor:
        """One optimizer step; returns its gradient norm, still on the device."""
        rate = learning_rate(self.config, self.progress.step)
        norm = self.engine.train_step(self.train_batches, self.progress.step, rate, self._sums)
        self._steps += 1
        self.progress.step += 1
        self.progress.consumed_samples += self.config.training.global_batch_size
        return norm

    def record(self, norm: Tensor) -> None:
        """Reduce what was seen since the last record and write it.

        Raises:
            TrainingError: the loss or the gradient norm is not finite; nothing after the last checkpoint
                is kept.
        """
        seen = average(self._sums, self.config, self.engine.grid)
        grad_norm = float(norm)
        if not math.isfinite(seen.loss) or not math.isfinite(grad_norm):
            raise TrainingError(
                f"step {self.progress.step}: loss {seen.loss}, gradient norm {grad_norm}: the run diverged; "
                "lower optimizer.learning_rate or raise schedule.warmup_steps, and resume from the last "
                "checkpoint"
            )
        routing = routing_numbers(self.config, seen)
        speed = speed_numbers(self.config, seen, self._steps, self._timer.read(), self.engine.grid.world_size)
        self._write(
            {
                "kind": "train",
                "step": self.progress.step,
                "steps": self.config.training.steps,
                "tokens": self.progress.consumed_samples * self.config.data.sequence_length,
                "loss": seen.loss,
                "learning_rate": learning_rate(self.config, self.progress.step - 1),
                "grad_norm": grad_norm,
                **speed,
                "eta_seconds": speed["seconds_per_step"] * (self.end - self.progress.step),
                "memory_gib": peak_memory_gib(self.engine.grid.device),
                **routing,
                **({"stage_seconds": seen.stage_seconds} if len(seen.stage_seconds) > 1 else {}),
                "router_gradient": [seen.router_gradient[layer] for layer in self.config.routed_layers],
            }
        )
        self._alarm(self._alarms.check(seen, warmed_up(self.config, self.progress.step - 1)))
        self._forget()

    def evaluate(self) -> None:
        """Held-out loss and densities over ``training.eval_sequences`` sequences."""
        if self.held_out is None:
            return
        training, grid = self.config.training, self.engine.grid
        micro_batches = training.eval_sequences // (training.micro_batch_size * grid.data.size)
        held_out = self.held_out()

        def measure() -> None:
            seen = self.engine.evaluate(held_out, micro_batches, self.progress.step)
            routing = routing_numbers(self.config, seen)
            self._write({"kind": "eval", "step": self.progress.step, "loss": seen.loss, **routing})
            self._alarm(self._held_out_alarms.check(seen))

        self._aside(measure)

    def _due(self, interval: int) -> bool:
        step = self.progress.step
        return step == self.end or (interval > 0 and step % interval == 0)

    def _aside(self, work: Callable[[], object]) -> None:
        """Do what is not training without counting its time as training's."""
        self._timer.pause()
        work()
        self._timer.resume()

    def _alarm(self, messages: list[str]) -> None:
        for message in messages:
            self._write({"kind": "alarm", "step": self.progress.step, "message": message})

    def _write(self, record: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)

    def _forget(self) -> None:
        self._sums = StepSums.zeros(self.config, self.engine.grid)
        self._steps = 0
