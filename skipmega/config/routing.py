"""The routing section: which tokens run which layer."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from skipmega.config.base import Section

RouterName = Literal[
    "gumbel", "sigmoid", "quantile", "topk", "random", "fixed_input", "highway", "always", "never"
]
UpdateWeight = Literal["straight_through", "score", "twice_score"]
DensityControl = Literal["penalty", "coefficient", "bias", "none"]

_CONTROLLED: tuple[RouterName, ...] = ("gumbel", "sigmoid", "fixed_input")
_UNLEARNED: tuple[RouterName, ...] = ("random", "always", "never")
_WITHOUT_DENSITY: tuple[RouterName, ...] = ("highway", "always", "never")


class DensityRamp(Section):
    """Densities that run linearly from the first routed layer to the last."""

    first: float
    last: float


def _check_density(value: Any) -> Any:
    shares = [value]
    if isinstance(value, dict) and value.keys() == {"first", "last"}:
        shares = list(value.values())
    elif isinstance(value, DensityRamp):
        shares = [value.first, value.last]
    elif isinstance(value, list) and value:
        shares = value
    if not all(type(share) in (int, float) and 0 < share <= 1 for share in shares):
        raise ValueError(
            f"{value!r} is no density: give a share greater than 0 and less than or equal to 1, a list of "
            "such, one per routed layer, or a ramp {first: ..., last: ...}"
        )
    return value


Density = Annotated[float | list[float] | DensityRamp, BeforeValidator(_check_density)]


class RoutingConfig(Section):
    """Which tokens run which layer.

    **Router.** ``gumbel``: straight-through Gumbel-Softmax (SkipLayer, arXiv 2311.15436). ``sigmoid``:
    executes where sigmoid(score) > 0.5. ``quantile``: executes where the score exceeds its (1 - density)
    quantile, that of the micro-batch in training (``quantile_from: batch``; ``running`` uses the running one
    there too) and a running one in evaluation. ``topk``: the best ``density`` share of each group (expert
    choice; Mixture-of-Depths, arXiv 2404.02258); evaluation, which must not look ahead, thresholds its
    ``stand_in``, the router's own ``score`` or a small ``predictor``, trained by cross-entropy times
    ``stand_in_weight``. ``random``: a coin. ``fixed_input``: a coin with a learned bias per layer (Glavas et
    al., arXiv 2410.20022). ``highway``: everybody runs, the update is weighted by sigmoid(score) (arXiv
    1505.00387). ``always``: a dense model. ``never``: identity.

    **Where.** ``wrap`` names what is skipped. Between the first ``dense_first`` and last ``dense_last``
    layers every ``every``-th one is routed. ``density``, the target share of tokens that execute, is one
    number, one per routed layer, or a ramp ``{first, last}``. ``keys_values: executed`` makes keys and values
    of executed tokens only (Mixture-of-Depths); ``all`` keeps skipped tokens visible as context (SkipLayer).

    **Score.** Linear in the ``normed`` or ``raw`` layer input, in fp32; ``router_learning_rate`` multiplies
    the optimizer's rate; ``z_loss_weight`` is the factor of the mean squared log-partition of the logits
    (arXiv 2202.08906). The probability of executing is sigmoid((score - threshold + noise) / temperature) for
    gumbel, sigmoid and the coins, sigmoid(score) for the others. ``temperature`` runs linearly over the run
    to ``final_temperature``. Routers start at their target density (sigmoid: if its input is normed).

    **Gradient.** ``update_weight``: executed updates are added as they are, with the probability's gradient
    (``straight_through``; its mean over the micro-batch is taken out where the threshold follows the
    scores), or times the probability (``score``) or twice that (``twice_score``). ``gradient: dense``
    computes every token and masks, so that skipped ones too teach the router.

    **Density control** (of gumbel, sigmoid and fixed_input; the others hold their density by construction):
    ``penalty``, ``density_loss_weight`` times the squared error of each layer, summed (its density is that
    of one micro-batch over all data-parallel ranks, so ``training.micro_batch_size`` times their number is
    part of the objective); ``coefficient``, a linear penalty whose factor integrates the error per step at
    ``coefficient_rate`` outside ``dead_band`` (arXiv 2506.21103); ``bias``, a threshold that integrates it at
    ``bias_rate``, in standard deviations of what it is compared with (after arXiv 2412.19437).
    ``density_warmup_steps`` starts at density 1. ``eval_density`` moves the thresholds of evaluation so that
    another share executes, without training anew; running quantiles of the scores, which follow where these
    move and forget at ``running_rate`` per step, tell where they lie. Without it gumbel evaluates as in the
    paper, without noise: far from its target at first if that is not 0.5.

    **Capacity.** Groups of ``group_size`` tokens (left out: the whole sequence) have
    ``ceil(capacity_factor * density * group_size)`` slots, at least ``min_capacity``; null is dropless.
    ``eval_capacity_factor`` is evaluation's, of ``eval_density``. top-k fills exactly its share in training.
    Dropless, ranks execute unequal numbers of tokens; with ``dispatch: balanced`` the feed-forward networks
    of all ranks that hold different tokens run the same number, which are moved and brought home.
    """

    router: RouterName = "quantile"
    wrap: Literal["layer", "mlp", "attention"] = "layer"
    density: Density = 0.5
    eval_density: Density | None = None
    dense_first: int = Field(1, ge=0)
    dense_last: int = Field(1, ge=0)
    every: int = Field(1, ge=1)
    keys_values: Literal["all", "executed"] = "all"
    router_input: Literal["normed", "raw"] = "normed"
    router_bias: bool = False
    router_learning_rate: float = Field(1.0, gt=0)
    temperature: float = Field(1.0, gt=0)
    final_temperature: float | None = Field(None, gt=0)
    update_weight: UpdateWeight | None = None
    gradient: Literal["packed", "dense"] = "packed"
    quantile_from: Literal["batch", "running"] = "batch"
    running_rate: float = Field(0.05, gt=0, le=1)
    stand_in: Literal["score", "predictor"] = "score"
    stand_in_weight: float = Field(0.01, ge=0)
    density_control: DensityControl | None = None
    density_loss_weight: float = Field(0.1, ge=0)
    coefficient_rate: float = Field(0.01, gt=0)
    dead_band: float = Field(0.01, ge=0)
    bias_rate: float = Field(0.5, gt=0)
    density_warmup_steps: int = Field(0, ge=0)
    z_loss_weight: float = Field(0.0, ge=0)
    group_size: int | None = Field(None, ge=1)
    capacity_factor: float | None = Field(1.25, gt=0)
    dispatch: Literal["local", "balanced"] = "local"
    eval_capacity_factor: float | None = Field(None, gt=0)
    min_capacity: int = Field(1, ge=1)

    @property
    def weight_of_updates(self) -> UpdateWeight:
        """``update_weight``, or what the router's authors use."""
        if self.update_weight is not None:
            return self.update_weight
        own: dict[str, UpdateWeight] = {"topk": "score", "highway": "score", "quantile": "twice_score"}
        return own.get(self.router, "straight_through")

    @property
    def control(self) -> DensityControl:
        """``density_control``, or ``penalty`` for the routers that need one."""
        if self.density_control is not None:
            return self.density_control
        return "penalty" if self.router in _CONTROLLED else "none"

    @property
    def scores_tokens(self) -> bool:
        """Whether the router reads the token."""
        return self.router not in (*_UNLEARNED, "fixed_input")

    @property
    def centres_gradient(self) -> bool:
        """Whether the mean over the micro-batch is taken out of the gradient of the scores.

        The loss asks to execute more (or less) on the whole, whatever the tokens. A penalty answers; where
        the threshold follows the scores instead, they would drift without end, and faster than it can follow,
        since Adam makes steps of full size of the smallest gradients.
        """
        ranked = self.router in ("quantile", "topk") and self.weight_of_updates == "straight_through"
        return ranked or self.control == "bias"

    @property
    def draws(self) -> bool:
        """Whether noise is added to the scores in training."""
        return self.router in ("gumbel", "random", "fixed_input")

    @property
    def draws_in_evaluation(self) -> bool:
        """Whether evaluation needs a coin: the router doesn't read the token."""
        return self.router in ("random", "fixed_input")

    @property
    def computes_all(self) -> bool:
        """Whether every token is computed, whatever the decision."""
        return self.gradient == "dense" or self.router == "highway"

    @model_validator(mode="after")
    def _fits_together(self) -> "RoutingConfig":
        router = self.router
        if self.control != "none" and router not in _CONTROLLED:
            raise ValueError(
                f"density_control={self.density_control} has nothing to do for router={router}, which holds "
                f"its density by construction: leave it out, or choose a router of {', '.join(_CONTROLLED)}"
            )
        if self.router_bias and router in _UNLEARNED:
            raise ValueError(f"router_bias=true gives router={router} something to learn: leave it out")
        if self.control == "bias" and router == "fixed_input":
            raise ValueError(
                "density_control=bias holds the one number that router=fixed_input learns: use penalty or "
                "coefficient"
            )
        if self.eval_density is not None and router in _WITHOUT_DENSITY:
            raise ValueError(f"eval_density has no meaning for router={router}: leave it out")
        if self.weight_of_updates != "straight_through" and router in (*_UNLEARNED, "fixed_input"):
            raise ValueError(
                f"update_weight={self.update_weight} needs a score, and router={router} has none: "
                "leave it out"
            )
        if router == "highway" and self.weight_of_updates != "score":
            raise ValueError(
                f"router=highway weights updates by its score, update_weight={self.update_weight} is another "
                "method: leave it out"
            )
        if self.dispatch == "balanced" and self.capacity_factor is not None:
            raise ValueError(
                f"dispatch=balanced has nothing to balance at capacity_factor={self.capacity_factor}, which "
                "gives every rank the same number of slots: set capacity_factor=null, or leave dispatch out"
            )
        if self.dispatch == "balanced" and (
            self.wrap == "attention" or self.computes_all or router in _WITHOUT_DENSITY
        ):
            raise ValueError(
                "dispatch=balanced moves tokens of packed feed-forward networks: use wrap=layer or wrap=mlp, "
                f"gradient=packed and a router that skips (router={router})"
            )
        if self.keys_values == "executed" and self.wrap == "mlp":
            raise ValueError(
                "keys_values=executed skips attention, wrap=mlp does not: use wrap=layer or wrap=attention"
            )
        if self.keys_values == "executed" and (self.group_size is not None or self.computes_all):
            raise ValueError(
                "keys_values=executed packs whole sequences: leave group_size out and use gradient=packed "
                "and a router other than highway"
            )
        if self.wrap == "mlp" and self.router_input == "raw":
            raise ValueError("router_input=raw is the layer's input, which wrap=mlp does not see: use normed")
        return self
