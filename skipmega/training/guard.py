"""Steps whose faults do not reach the weights: judged before the update, executed again if in doubt."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from skipmega.config import RunConfig
from skipmega.data.order.batches import TokenBatch
from skipmega.errors import ReplicaDriftError
from skipmega.training.engine import TrainingEngine
from skipmega.training.replicas import Drift, ReplicaCheck
from skipmega.training.spikes import SpikeDetector
from skipmega.training.state import renew_copies
from skipmega.training.sums import StepSums, mean_loss

Batches = Iterator[TokenBatch]
Beat = Callable[[int, str], None]


@dataclass(frozen=True)
class GuardedStep:
    """What came of a step.

    Attributes:
        norm: [] float32, of the gradients.
        sums: those before the step and what it added.
        problem: why its update was discarded; None if it was made.
        overcome: what was wrong with the first execution, if the second was made the update of.
    """

    norm: Tensor | None
    sums: StepSums
    problem: str | None = None
    overcome: str | None = None


@dataclass(frozen=True)
class _Execution:
    loss: float
    norm: Tensor | None
    sums: StepSums
    problem: str | None
    drift: Drift | None = None


class StepGuard:
    """Executes steps; making one is collective, as is :meth:`step`.

    The loss of a step, agreed by all processes, is judged before its update, and so are what ranks have in
    common every ``training.replica_interval`` steps; gradients that are not finite DeepSpeed finds in its
    update. In each case nothing has moved yet, and the same micro-batches are executed again from the same
    weights. What is wrong again is the data's or the model's fault, and the update is discarded; what is not
    was a transient fault of a device, and the second execution counts.

    Args:
        config: the run's configuration.
        engine: does the steps.
        recent_losses: those of the last updates, oldest first; kept up in place.
        beat: is told the step (0-based) and what it enters.
    """

    def __init__(
        self, config: RunConfig, engine: TrainingEngine, recent_losses: list[float], beat: Beat
    ) -> None:
        self._interval = config.training.replica_interval
        self._engine, self._beat = engine, beat
        self._spikes = SpikeDetector(config, recent_losses)
        self._replicas = ReplicaCheck(engine)

    def step(self, batches: Batches, sums: StepSums, step: int, rate: float) -> GuardedStep:
        """Optimizer step ``step`` (0-based) at learning rate ``rate``.

        Args:
            batches: the next micro-batches.
            sums: of earlier steps; left as they are.

        Raises:
            ReplicaDriftError: ranks differ in what cannot be had again from elsewhere.
        """
        kept: list[TokenBatch] = []
        compares = self._interval > 0 and (step + 1) % self._interval == 0
        first = self._execute(_keeping(batches, kept), "micro-batch", sums, step, rate, compares)
        if first.problem is None:
            return GuardedStep(first.norm, first.sums)
        drift = first.drift or self._replicas.find()
        if drift is not None:
            self._renew(drift, step)
        second = self._execute(iter(kept), "again, micro-batch", sums, step, rate, compares=False)
        words = (
            first.problem if drift is None or drift is first.drift else f"{first.problem}; {drift.describe()}"
        )
        if second.problem is not None:
            return GuardedStep(None, sums, problem=second.problem)
        return GuardedStep(
            second.norm, second.sums, overcome=f"{words} (loss {first.loss}, then {second.loss})"
        )

    def _execute(
        self, batches: Batches, phase: str, before: StepSums, step: int, rate: float, compares: bool
    ) -> _Execution:
        sums = before.copy()
        self._engine.accumulate_gradients(reported(batches, self._beat, step, phase), step, sums)
        self._beat(step, "update")
        loss = mean_loss(before, sums, self._engine.grid)
        problem = self._spikes.problem(loss, step)
        drift = self._replicas.find() if compares else None
        if drift is not None:
            problem = drift.describe()
        if problem is not None:
            self._engine.discard_gradients()
            return _Execution(loss, None, sums, problem, drift)
        norm = self._engine.apply_gradients(step, rate)
        if self._engine.discarded_update:
            return _Execution(loss, None, sums, f"the gradients of step {step + 1} are not finite")
        self._spikes.accept(loss, step)
        return _Execution(loss, norm, sums, None)

    def _renew(self, drift: Drift, step: int) -> None:
        if not drift.renewable:
            raise ReplicaDriftError(
                f"ranks differ at step {step + 1}: {drift.describe()}; start again to continue from the last "
                "checkpoint, without that host if it is named again"
            )
        renew_copies(self._engine)


def reported(batches: Batches, beat: Beat, step: int, phase: str) -> Batches:
    """The same batches; taking one is a beat."""
    for number, batch in enumerate(batches):
        beat(step, f"{phase} {number}")
        yield batch


def _keeping(batches: Batches, kept: list[TokenBatch]) -> Batches:
    for batch in batches:
        kept.append(batch)
        yield batch
