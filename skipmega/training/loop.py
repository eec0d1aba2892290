"""The training loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from skipmega.config import RunConfig
from skipmega.errors import ReplicaDriftError, RunFaultError, RunFencedError, RunStopped
from skipmega.parallel.agreement import Agreement
from skipmega.routing.state import warmed_up
from skipmega.training.energy import energy_source, of_all_devices
from skipmega.training.engine import TrainingEngine
from skipmega.training.guard import Batches, Beat, StepGuard, reported
from skipmega.training.metrics import (
    HeldOutAlarms,
    RoutingAlarms,
    StepMeter,
    padding_share,
    peak_memory_gib,
    routing_numbers,
    speed_numbers,
)
from skipmega.training.schedule import learning_rate
from skipmega.training.sinks import Sink
from skipmega.training.stopping import Request, StopRequests
from skipmega.training.sums import Averages, StepSums, average


class Saver(Protocol):
    """Writes checkpoints beside training."""

    @property
    def failed(self) -> bool:
        """Whether the last save has failed on this process."""

    def begin(self, progress: "Progress") -> None:
        """Wait for the save before, then copy the present state and start to write it; collective."""

    def wait(self) -> None:
        """Wait until the last save is complete, raise what it raised; collective."""


@dataclass
class Progress:
    """How far a run is: optimizer steps done, samples of the data order consumed by them, whether the
    evaluation that is due after the last of them is still to be done, how many updates were discarded, how
    many steps a second execution mended, and the losses of the last updates, by which the next are judged."""

    step: int = 0
    consumed_samples: int = 0
    owes_evaluation: bool = False
    discarded_updates: int = 0
    transient_faults: int = 0
    recent_losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class HeldOut:
    """What makes held-out micro-batches from their beginning: of all sources in their shares, and of single
    ones by name, where there are several."""

    blend: Callable[[], Batches]
    sources: Mapping[str, Callable[[], Batches]]


class _GiveWay(Exception):  # noqa: N818 (nothing went wrong)
    """Somebody asked to stop during an evaluation."""


class TrainingLoop:
    """Steps, records, held-out evaluations and saves, in that order, until the end, until ``stop_after`` or
    until somebody asks to stop.

    Args:
        config: the resolved configuration.
        engine: does the steps.
        train_batches: micro-batches of this data rank, continuing at ``progress``.
        held_out: what to evaluate on; None when there is nothing.
        progress: where to start; advanced in place.
        sinks: where records go; empty on all processes but the first.
        saver: writes checkpoints of the present state.
        stops: what this process was asked.
        check_owned: raises on the first process when the run has been taken over.
        go_back: puts the state of the last good checkpoint back, if there is one, and returns its path.
        beat: is told the step (0-based) and what it enters, for whoever watches.
        ask_tasks: evaluates the tasks of ``evaluation`` after so many steps and returns what to record.
    """

    _sums: StepSums
    _norm: Tensor | None
    _steps: int

    def __init__(
        self,
        config: RunConfig,
        engine: TrainingEngine,
        train_batches: Batches,
        held_out: HeldOut | None,
        progress: Progress,
        sinks: list[Sink],
        saver: Saver,
        stops: StopRequests,
        check_owned: Callable[[], None],
        go_back: Callable[[], Path | None],
        beat: Beat,
        ask_tasks: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.train_batches = train_batches
        self.held_out = held_out
        self.progress = progress
        self.sinks = sinks
        self.saver = saver
        self.stops = stops
        self.check_owned = check_owned
        self.go_back = go_back
        self.beat = beat
        self.ask_tasks = ask_tasks
        self.end = config.training.stop_after or config.training.steps
        self.agreement = Agreement()
        self.guard = StepGuard(config, engine, progress.recent_losses, beat)
        self._began, self._saved_step = progress.step, 0
        self._discarded, self._discarded_in_a_row = False, 0
        self._went_back_to: Path | None = None
        energy = energy_source(engine.grid.device)
        self._seconds = StepMeter()
        self._joules = StepMeter(energy) if energy else None
        self._meters = [meter for meter in (self._seconds, self._joules) if meter]
        self._alarms = RoutingAlarms(config)
        self._held_out_alarms = HeldOutAlarms(config)
        self._forget()

    def run(self) -> None:
        """Train to the end; the last step is always recorded, evaluated and saved.

        Raises:
            RunStopped: somebody asked to stop; the state is saved.
            RunFencedError: the run has been taken over.
            StorageFaultError: a checkpoint could not be written.
            RunFaultError: the numbers stay out of range.
            ReplicaDriftError: ranks differ in what they must have in common.
        """
        self.stops.training_begins()
        if self.progress.owes_evaluation:
            self.evaluate()
        while self.progress.step < self.end:
            self.train_step()
            if self._due(self.config.logging.interval) and self._norm is not None:
                self.record(self._norm)
            if self._due(self.config.training.eval_interval):
                self.evaluate()
            if self.ask_tasks is not None and self._due(self.config.evaluation.interval):
                self._aside(partial(self._record_tasks, self.ask_tasks))
            if self._due(self.config.checkpoint.interval):
                self._save()
            self._heed()
        self.beat(self.progress.step, "waiting for the last save")
        self.saver.wait()

    def train_step(self) -> None:
        """One optimizer step, whose update may be discarded."""
        step, rate = self.progress.step, learning_rate(self.config, self.progress.step)
        try:
            done = self.guard.step(self.train_batches, self._sums, step, rate)
        except ReplicaDriftError:
            self.saver.wait()  # what is still being written was sound
            raise
        self.progress.step += 1
        self.progress.consumed_samples += self.config.training.global_batch_size
        self._discarded = done.problem is not None
        if done.problem is not None:
            self._answer_discarded_update(done.problem)
            return
        if done.overcome is not None:
            self.progress.transient_faults += 1
            self._alarm([f"{done.overcome}: not so when executed again, which counts: a transient fault"])
        self._sums, self._norm = done.sums, done.norm
        self._steps += 1
        self._discarded_in_a_row = 0

    def record(self, norm: Tensor) -> None:
        """Reduce what was seen since the last record and write it."""
        seen = average(self._sums, self.config, self.engine.grid)
        routing = routing_numbers(self.config, seen)
        grid, joules = self.engine.grid, self._joules.read() if self._joules else None
        joules = of_all_devices(joules, grid.device)
        speed = speed_numbers(self.config, seen, self._steps, self._seconds.read(), grid.world_size, joules)
        self._write(
            {
                "kind": "train",
                "step": self.progress.step,
                "steps": self.config.training.steps,
                "tokens": self.progress.consumed_samples * self.config.data.sequence_length,
                "loss": seen.loss,
                "padding": padding_share(self.config, seen, self._steps),
                "discarded_updates": self.progress.discarded_updates,
                "transient_faults": self.progress.transient_faults,
                "learning_rate": learning_rate(self.config, self.progress.step - 1),
                "grad_norm": float(norm),
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

    def _answer_discarded_update(self, problem: str) -> None:
        """Go on with the next data; after several in a row, from the state of the last good checkpoint.

        The samples of the step count as consumed: no later step reads them. While the state may be at fault
        it is not saved over a good one.

        Raises:
            RunFaultError: there is no good checkpoint, or going back to it did not help.
        """
        self._forget()
        for meter in self._meters:
            meter.read()
        self._discarded_in_a_row += 1
        self.progress.discarded_updates += 1
        limit = self.config.training.max_discarded
        self._alarm([f"{problem}, also when executed again: its update is discarded"])
        if self._discarded_in_a_row < limit:
            return
        self.saver.wait()
        checkpoint = self.go_back()
        failed = f"{limit} updates in a row were discarded, the last since {problem}"
        mend = (
            "lower optimizer.learning_rate or raise schedule.warmup_steps, look at data and devices, and if "
            "this is no spike set training.spike_sigmas=0"
        )
        if checkpoint is None:
            raise RunFaultError(f"{failed}, and there is no checkpoint to go back to: {mend}")
        if checkpoint == self._went_back_to:
            raise RunFaultError(f"{failed}, also after going back to {checkpoint}: {mend}")
        self._alarm([f"{failed}: going on from the state of {checkpoint} with the data that follow"])
        self._went_back_to, self._discarded_in_a_row = checkpoint, 0

    def evaluate(self) -> None:
        """Held-out loss and densities over ``training.eval_sequences`` sequences, and the loss over as many
        of each source where there are several; owed if it is cut short."""
        held_out = self.held_out
        if held_out is None:
            return

        def measure() -> None:
            self.progress.owes_evaluation = True
            try:
                seen = self._evaluate_on(held_out.blend())
                losses = {name: self._evaluate_on(make()).loss for name, make in held_out.sources.items()}
            except _GiveWay:
                return
            self.progress.owes_evaluation = False
            routing = routing_numbers(self.config, seen)
            loss = {"loss": seen.loss, **({"source_loss": losses} if losses else {})}
            self._write({"kind": "eval", "step": self.progress.step, **loss, **routing})
            self._alarm(self._held_out_alarms.check(seen))

        self._aside(measure)

    def _evaluate_on(self, batches: Batches) -> Averages:
        training, step = self.config.training, self.progress.step
        micro_batches = training.eval_sequences // (training.micro_batch_size * self.engine.grid.data.size)
        held_out = reported(batches, self.beat, step, "evaluation, micro-batch")
        return self.engine.evaluate(held_out, micro_batches, step, self._give_way)

    def _record_tasks(self, ask: Callable[[int], dict[str, Any]]) -> None:
        self._write({"kind": "tasks", "step": self.progress.step, **ask(self.progress.step)})

    def _save(self) -> None:
        """Begin to save, once a step; no state that may be at fault over a good one, unless the run ends."""
        step = self.progress.step
        if step == self._saved_step or (self._discarded and step < self.end):
            return
        self.beat(step, "saving")
        self._aside(lambda: self.saver.begin(self.progress))
        self._saved_step = step

    def _heed(self) -> None:
        """Leave if any process has a reason to: the run taken over, a failed save, somebody who asks."""
        self.beat(self.progress.step, "end of step")
        fenced: RunFencedError | None = None
        try:
            self.check_owned()
        except RunFencedError as error:
            fenced = error
        is_fenced, has_failed, asked = self.agreement.greatest(
            fenced is not None, self.saver.failed, self.stops.now()
        )
        if is_fenced:
            raise fenced or RunFencedError("a newer attempt has taken over, as the first process says")
        if has_failed:
            self.saver.wait()
        if asked and self.progress.step < self.end:
            self._save()
            self.saver.wait()
            self.stops.heeded()
            raise RunStopped(
                f"{Request(asked).describe()} at step {self.progress.step} of {self.end}; start again to "
                f"continue from step {max(self._began, self._saved_step)}"
            )

    def _give_way(self) -> None:
        """End an evaluation, on every process at once, if one of them was asked to stop."""
        (asked,) = self.agreement.greatest(self.stops.now())
        if asked:
            raise _GiveWay

    def _due(self, interval: int) -> bool:
        step = self.progress.step
        return step == self.end or (interval > 0 and step % interval == 0)

    def _aside(self, work: Callable[[], object]) -> None:
        """Do what is not training without counting its time and energy as training's."""
        for meter in self._meters:
            meter.pause()
        work()
        for meter in self._meters:
            meter.resume()

    def _alarm(self, messages: list[str]) -> None:
        for message in messages:
            self._write({"kind": "alarm", "step": self.progress.step, "message": message})

    def _write(self, record: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)

    def _forget(self) -> None:
        self._sums = StepSums.zeros(self.config, self.engine.grid)
        self._norm = None
        self._steps = 0
