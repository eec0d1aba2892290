"""Tells losses that stand out from those before them."""

import math
import statistics

from skipmega.config import RunConfig
from skipmega.routing.state import warmed_up


class SpikeDetector:
    """Judges the loss of a step by those of the last ``training.spike_window`` updates.

    Args:
        config: the run's configuration.
        recent: those losses, oldest first; kept up in place, since a resumed run must judge as it would have.
    """

    def __init__(self, config: RunConfig, recent: list[float]) -> None:
        self._config = config
        self._recent = recent

    def problem(self, loss: float, step: int) -> str | None:
        """What is wrong with ``loss``, in nats, of optimizer step ``step`` (0-based); None if nothing is.

        No spike is seen before half a window of losses, nor while the density warms up, when they jump by
        design.
        """
        if not math.isfinite(loss):
            return f"the loss of step {step + 1} is {loss}"
        limit = self._limit()
        if limit is None or loss <= limit or warmed_up(self._config, step) < 1:
            return None
        return (
            f"the loss of step {step + 1}, {loss:.4f}, is a spike: more than {limit:.4f}, the mean of "
            f"{len(self._recent)} before it and training.spike_sigmas={self._config.training.spike_sigmas:g} "
            "standard deviations"
        )

    def accept(self, loss: float, step: int) -> None:
        """The update of that step was made."""
        if warmed_up(self._config, step) == 1:
            self._recent.append(loss)
            del self._recent[: -self._config.training.spike_window]

    def _limit(self) -> float | None:
        training, recent = self._config.training, self._recent
        if training.spike_sigmas == 0 or len(recent) < max(2, training.spike_window // 2):
            return None
        return statistics.fmean(recent) + training.spike_sigmas * statistics.stdev(recent)
