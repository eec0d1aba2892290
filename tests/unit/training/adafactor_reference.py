"""Adafactor on whole matrices: arXiv 1804.04235, algorithm 4, with beta1 = 0 and a fixed decay.

A fixed decay needs the bias correction that the paper's increasing one does away with (section 7.1).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

EPSILON_1, EPSILON_2 = 1e-30, 1e-3


def rms(x: Tensor) -> float:
    return math.sqrt(float(x.pow(2).sum()) / x.numel())


@dataclass
class PlainAdafactor:
    """One float64 parameter, ``weight``, and its moments."""

    weight: Tensor
    beta2: float
    clip: float
    decay: float
    steps: int = 0
    moments: dict[str, Tensor] = field(default_factory=dict)
    clipped: int = 0
    scaled: int = 0

    def step(self, gradient: Tensor, rate: float) -> None:
        self.steps += 1
        square = gradient.double() ** 2 + EPSILON_1
        if square.dim() == 2:
            rows = self._average("rows", square @ torch.ones(square.shape[1], 1, dtype=torch.float64))
            columns = self._average("columns", torch.ones(1, square.shape[0], dtype=torch.float64) @ square)
            moment = rows @ columns / rows.sum()
        else:
            moment = self._average("full", square)
        moment = moment / (1 - self.beta2**self.steps)
        update = gradient.double() / moment.sqrt()
        self.clipped += rms(update) > self.clip
        update = update / max(1.0, rms(update) / self.clip)
        self.scaled += rms(self.weight) > EPSILON_2
        size = max(EPSILON_2, rms(self.weight)) * rate
        self.weight = self.weight * (1 - rate * self.decay) - size * update

    def _average(self, name: str, now: Tensor) -> Tensor:
        before = self.moments.get(name, torch.zeros_like(now))
        self.moments[name] = self.beta2 * before + (1 - self.beta2) * now
        return self.moments[name]
