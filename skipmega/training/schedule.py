"""Learning rate as a pure function of the step."""

import math

from skipmega.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """The rate of optimizer step ``step`` (0-based).

    Linear warm-up reaches the peak at step ``warmup_steps - 1``. ``cosine`` then falls to
    ``final_ratio`` of the peak at ``decay_steps`` (the run's length if left out) and stays there;
    ``inverse_sqrt`` falls as 1/sqrt(step) from the end of the warm-up; ``constant`` stays.
    """
    schedule, peak = config.schedule, config.optimizer.learning_rate
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    if schedule.name == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / max(step + 1, warmup, 1))
    end = max(schedule.decay_steps or config.training.steps, warmup + 1)
    progress = min(1.0, (step - warmup) / (end - warmup))
    floor = schedule.final_ratio
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
