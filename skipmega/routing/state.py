"""What routing remembers between steps, and the thresholds that follow from it.

Per routed layer of a stage: a threshold and a penalty coefficient, moved by the density controllers, and
running quantiles of the margins, by which scores lie over the threshold of their step, with what these change
by a step. From these follows the threshold at which any wanted share of tokens executes: that of the quantile
router (whose own stays at 0), and that of ``routing.eval_density`` for every router. With their trend, since
scores move all the time and a mean of past ones lags behind: by 0.02 standard deviations a step, say, which a
mean over 50 steps turns into a third of the tokens.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from skipmega.config import RunConfig
from skipmega.routing.noise import NoiseKey, logistic
from skipmega.routing.router import RouterInputs

LEVELS = 65
WARMUP_STAGES = 8
_GROWTH = 2  # steps in which running quantiles learn to remember one more
_QUARTERS_APART = 2 * 0.67449  # of a normal variable, in standard deviations
_LEAST_SPREAD = 0.1  # alike as scores may be, a threshold has to pass them
_NOISE_VARIANCE = math.pi**2 / 3  # of logistic noise


class RoutingState:
    """The state of some routed layers.

    ``threshold`` and ``coefficient`` are [layers], ``margins`` (at 0, 1/64, ..., 1) and their ``trend`` per
    step [layers, LEVELS], all float32 on ``device``.

    Args:
        config: the run's configuration.
        layers: global numbers of the routed layers.
        device: where the tensors live.
    """

    def __init__(self, config: RunConfig, layers: list[int], device: torch.device) -> None:
        self.config = config
        self.layers = layers
        self.numbers = torch.tensor(layers, dtype=torch.int64, device=device)
        self.target = torch.tensor([config.densities[layer] for layer in layers], device=device)
        self.threshold = _initial_threshold(config, self.target)
        self.coefficient = torch.zeros(len(layers), device=device)
        scores = _initial_quantiles(config, len(layers)).to(device)
        self.margins = scores - self.threshold.unsqueeze(1)
        self.trend = torch.zeros_like(self.margins)

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by logical name (``layers.3.threshold``), each of one dimension."""
        named = {}
        for i, layer in enumerate(self.layers):
            named[f"layers.{layer}.threshold"] = self.threshold[i : i + 1]
            named[f"layers.{layer}.coefficient"] = self.coefficient[i : i + 1]
            named[f"layers.{layer}.margins"] = self.margins[i]
            named[f"layers.{layer}.trend"] = self.trend[i]
        return named

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors named as :meth:`tensors` names them into the state."""
        for name, live in self.tensors().items():
            live.copy_(tensors[name])

    def to(self, device: torch.device) -> "RoutingState":
        """A copy on another device."""
        moved = RoutingState(self.config, self.layers, device)
        moved.load(self.tensors())
        return moved

    def wanted(self, step: int) -> Tensor:
        """[layers] float32: density of optimizer step ``step`` (0-based), warming up to the target."""
        return 1 - (1 - self.target) * warmed_up(self.config, step)

    def for_training(self, step: int, key: NoiseKey, positions: Tensor) -> dict[int, RouterInputs]:
        """What the routers of tokens at ``positions`` [s] int64 are told at optimizer step ``step``
        (0-based), by global layer number."""
        routing, wanted = self.config.routing, self.wanted(step)
        thresholds = self.threshold
        if routing.router == "quantile":
            thresholds = self._quantile(1 - wanted)
        elif routing.router == "random":
            thresholds = -torch.logit(wanted)
        elif routing.router != "topk" and warmed_up(self.config, step) < 1:
            thresholds = thresholds + self._warmup_shift(wanted)
        return self._inputs(thresholds, step, key if routing.draws else None, positions)

    def for_evaluation(self, step: int, batch: int, positions: Tensor) -> dict[int, RouterInputs]:
        """What the routers of tokens at ``positions`` [s] or [s, b] int64 of ``batch`` sequences are told in
        evaluation after ``step`` steps; the same for every sequence.

        Routers that don't read the token draw noise of layer and position alone.
        """
        routing, config = self.config.routing, self.config
        key = None
        if routing.draws_in_evaluation:
            samples = torch.zeros(batch, dtype=torch.int64, device=self.threshold.device)
            key = NoiseKey(config.training.seed, samples)
        return self._inputs(self.evaluation_thresholds(), step, key, positions)

    def evaluation_thresholds(self) -> Tensor:
        """[layers] float32: what a score must exceed for the layer to run in evaluation."""
        routing, wanted = self.config.routing, self.config.eval_densities
        share = self.target if wanted is None else self.target.new_tensor([wanted[i] for i in self.layers])
        if routing.router == "random":
            return -torch.logit(share)
        if routing.router == "quantile" or (wanted is not None and routing.scores_tokens):
            return self._quantile(1 - share)
        if wanted is not None:  # fixed_input: the score is its quantile, the coin's share is wanted
            return self._quantile(torch.full_like(share, 0.5)) - torch.logit(share)
        return self.threshold

    def spread(self) -> Tensor:
        """[layers] float32: the standard deviation of what is compared with the threshold, scores and noise,
        if scores are normal."""
        quarter = LEVELS // 4
        scores = (self.margins[:, -1 - quarter] - self.margins[:, quarter]) / _QUARTERS_APART
        noise = _NOISE_VARIANCE if self.config.routing.draws else 0.0
        return (scores.square() + noise).sqrt().clamp(min=_LEAST_SPREAD)

    def temperature(self, step: int) -> float:
        """The temperature at optimizer step ``step``: linear over the run to ``final_temperature``."""
        routing, steps = self.config.routing, self.config.training.steps
        if routing.final_temperature is None:
            return routing.temperature
        done = min(1.0, step / max(steps - 1, 1))
        return routing.temperature + done * (routing.final_temperature - routing.temperature)

    def _inputs(
        self, thresholds: Tensor, step: int, key: NoiseKey | None, positions: Tensor
    ) -> dict[int, RouterInputs]:
        if not self.layers:
            return {}
        temperature = thresholds.new_full((), self.temperature(step))
        noise: list[Tensor | None] = [None] * len(self.layers)
        if key is not None:
            noise = list(logistic(key, self.numbers, positions).unbind())
        each = zip(self.layers, thresholds.unbind(), noise, strict=True)
        return {layer: RouterInputs(threshold, temperature, drawn) for layer, threshold, drawn in each}

    def _warmup_shift(self, wanted: Tensor) -> Tensor:
        """[layers]: what moves thresholds of the target density to ``wanted``; exact while a coin decides
        (which the noise of a fresh gumbel router is)."""
        if self.config.routing.router == "sigmoid":
            shift = self._quantile(1 - wanted) - self._quantile(1 - self.target)
        else:
            shift = torch.logit(self.target) - torch.logit(wanted)
        return torch.where(wanted < 1, shift, -math.inf)

    def _quantile(self, level: Tensor) -> Tensor:
        """Each layer's score at ``level`` [layers] in the next step, between the two nearest known ones;
        below all at 0."""
        at = level.clamp(0, 1) * (LEVELS - 1)
        lower = at.floor().long().clamp(max=LEVELS - 2)
        margins = self.margins + self.trend
        below = margins.gather(1, lower.unsqueeze(1)).squeeze(1)
        above = margins.gather(1, lower.unsqueeze(1) + 1).squeeze(1)
        margin = below + (above - below) * (at - lower)
        return torch.where(level > 0, self.threshold + margin, -math.inf)


def warmed_up(config: RunConfig, step: int) -> float:
    """How far the density has come from 1 (0.0) to its target (1.0), in eighths.

    Each stage is a shape of its own for compiled layers, hence few of them.
    """
    warmup = config.routing.density_warmup_steps
    return 1.0 if step >= warmup else math.floor(WARMUP_STAGES * step / warmup) / WARMUP_STAGES


def tracking_gains(step: int, rate: float) -> tuple[float, float]:
    """Shares of what a step (0-based) found beyond the expected that go to level and trend.

    Those of a straight line through past values: through about the latest half of them, until weights
    that fall by ``1 - rate`` a step remember no more than that (filters of degree 1 and of expanding and
    fading memory: Morrison, Introduction to Sequential Smoothing and Prediction, 1969).
    """
    if step == 0:
        return 1.0, 0.0
    known = step / _GROWTH
    both = (known + 1) * (known + 2)
    of_level = min(1.0, 2 * (2 * known + 1) / both)
    of_trend = min(1.0, 6 / both)
    return max(of_level, rate * (2 - rate)), max(of_trend, rate**2)


def _initial_threshold(config: RunConfig, target: Tensor) -> Tensor:
    """Where the routers start at their target density, their weights being as initialised.

    The gumbel router's noise is much wider than its scores and taken for the whole.
    """
    routing = config.routing
    if routing.router in ("gumbel", "fixed_input"):
        return -torch.logit(target)
    if routing.router == "sigmoid" and routing.router_input == "normed":
        return _initial_spread(config) * torch.special.ndtri(1 - target)
    return torch.zeros_like(target)


def _initial_quantiles(config: RunConfig, layers: int) -> Tensor:
    """[layers, LEVELS]: of scores as initialised, until the first step has been seen."""
    levels = torch.linspace(0, 1, LEVELS).clamp(1e-3, 1 - 1e-3)
    spread = _initial_spread(config) if config.routing.scores_tokens else 0.0
    return (spread * torch.special.ndtri(levels)).expand(layers, -1).clone()


def _initial_spread(config: RunConfig) -> float:
    """Standard deviation of a fresh router's scores of normed tokens."""
    rows = 2 if config.routing.router == "gumbel" else 1
    return config.model.init_std * math.sqrt(rows * config.model.hidden_size)
