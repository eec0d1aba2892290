"""The Hugging Face model makes the native model's decisions and logits, whatever the routing."""

import math
from typing import Any

import pytest
import torch
from hf_reference import build_model, make_config, random_state
from torch import Tensor

from skipmega.config import RunConfig
from skipmega.models.decoder import DecoderStage, StageOutput
from skipmega.models.layer import LayerContext
from skipmega.parallel.grid import ParallelGrid
from skipmega.routing.state import LEVELS, RoutingState

GROUPED = {"num_key_value_heads": 2, "activation": "swiglu"}
STEP = 250  # of 1000, for temperatures that change
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gumbel": ({"router": "gumbel", "router_bias": True, "density": 0.3}, {}),
    "gumbel, score": (
        {"update_weight": "score", "temperature": 3.0, "final_temperature": 0.2, "density": 0.7},
        GROUPED,
    ),
    "gumbel, dial": ({"router": "gumbel", "eval_density": [0.2, 0.4, 0.6]}, GROUPED),
    "sigmoid, mlp": (
        {"router": "sigmoid", "wrap": "mlp", "update_weight": "score", "temperature": 0.4},
        GROUPED,
    ),
    "sigmoid, every second layer": (
        {"router": "sigmoid", "router_bias": True, "dense_first": 0, "dense_last": 0, "every": 2},
        {},
    ),
    "quantile": ({"router": "quantile", "density": {"first": 0.6, "last": 0.2}}, GROUPED),
    "quantile, raw attention": (
        {"router": "quantile", "wrap": "attention", "router_input": "raw", "eval_density": 0.4},
        {"tie_embeddings": False},
    ),
    "topk, predictor": ({"router": "topk", "stand_in": "predictor", "density": 0.25}, GROUPED),
    "topk, predictor, dial": ({"router": "topk", "stand_in": "predictor", "eval_density": 0.6}, {}),
    "topk, score of a biased mlp": ({"router": "topk", "router_bias": True, "wrap": "mlp"}, {}),
    "random": ({"router": "random", "density": 0.4}, GROUPED),
    "random, dial": ({"router": "random", "wrap": "attention", "eval_density": 0.7}, {}),
    "fixed_input": ({"router": "fixed_input"}, {}),
    "fixed_input, dial": ({"router": "fixed_input", "wrap": "mlp", "eval_density": 0.3}, GROUPED),
    "highway": ({"router": "highway", "router_bias": True}, GROUPED),
    "highway, raw attention": ({"router": "highway", "wrap": "attention", "router_input": "raw"}, {}),
    "never": ({"router": "never", "wrap": "mlp"}, {}),
    "never any layer": ({"router": "never"}, {}),
    "dense gradient": ({"router": "sigmoid", "gradient": "dense", "update_weight": "twice_score"}, GROUPED),
    "everybody": ({"router": "random", "eval_density": 1.0}, {}),
}
ONE_MIND = {"highway": 1.0, "highway, raw attention": 1.0, "never": 0.0, "never any layer": 0.0}
ONE_MIND |= {"everybody": 1.0}
TOKENS = torch.randint(0, 64, (3, 32), generator=torch.Generator().manual_seed(1))


class Native:
    """A stage with random weights, and a routing state as if it had been trained.

    Its quantiles are those of the scores of ``TOKENS``, its thresholds anywhere among them.
    """

    def __init__(self, case: str, grid: ParallelGrid) -> None:
        routing, model = CASES[case]
        self.config: RunConfig = make_config(routing, **model)
        assert self.config.training.steps == 1000
        self.weights = random_state(self.config)
        self.stage = DecoderStage(self.config, grid).eval()
        self.stage.load_state_dict(self.weights, strict=True)
        self.routing = RoutingState(self.config, self.stage.routed_layers, torch.device("cpu"))
        generator = torch.Generator().manual_seed(2)
        for i, record in enumerate(self.run(TOKENS).records.values()):
            levels = torch.linspace(0, 1, LEVELS)
            quantiles = record.score.flatten().quantile(levels)
            at = torch.randint(LEVELS // 4, LEVELS * 3 // 4, (), generator=generator)
            if self.config.routing.router not in ("highway", "never"):  # whose thresholds nobody moves
                self.routing.threshold[i] = quantiles[at]
            if self.config.routing.router == "fixed_input":  # whose scores are all the same
                self.routing.threshold[i] += torch.randn((), generator=generator)
            self.routing.margins[i] = quantiles - self.routing.threshold[i]

    @torch.no_grad()
    def run(self, tokens: Tensor) -> StageOutput:
        return self.stage(
            tokens,
            LayerContext(None, None),
            self.routing.for_evaluation(STEP, tokens.shape[0], torch.arange(tokens.shape[1])),
        )

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[b, s, V], and who executed: [routed layers, b, s]."""
        output = self.run(tokens)
        return self.stage.logits(output.hidden).transpose(0, 1), output.stacked("executed").transpose(1, 2)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_and_decisions_are_the_native_ones(case: str, grid: ParallelGrid) -> None:
    native = Native(case, grid)
    expected, executed = native.logits(TOKENS)
    model = build_model(native.config, native.weights, routing=native.routing, step=STEP)
    found = model(TOKENS, output_execution=True)
    routed = [found.executed[layer] for layer in native.config.routed_layers]
    assert torch.equal(torch.stack(routed), executed)
    assert 0.3 < expected.std() < 10
    torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=0)
    shares = executed.float().mean(dim=(1, 2))
    if case in ONE_MIND:
        assert (shares == ONE_MIND[case]).all()
    else:
        assert ((shares > 0.02) & (shares < 0.98)).all()
        assert 0.1 < shares.mean() < 0.9


@pytest.mark.parametrize(
    "case",
    ["sigmoid, mlp", "quantile, raw attention", "topk, predictor", "random", "fixed_input, dial", "highway"],
)
@torch.no_grad()
def test_a_cache_and_padding_change_nothing(case: str, grid: ParallelGrid) -> None:
    native = Native(case, grid)
    model = build_model(native.config, native.weights, routing=native.routing, step=STEP)
    expected = model(TOKENS, use_cache=False).logits
    cache, parts = None, []
    for chunk in TOKENS.split([7, 1, 1, 20, 3], dim=1):
        outputs = model(chunk, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=5e-5, rtol=0)
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 3}
    padded = model.generate(TOKENS, attention_mask=mask, **greedy)
    alone = model.generate(TOKENS[1:2, 4:], attention_mask=mask[1:2, 4:], **greedy)
    assert torch.equal(padded[1:2, 4:], alone)
    assert torch.equal(padded, model.generate(TOKENS, attention_mask=mask, use_cache=False, **greedy))
    assert torch.equal(padded[:1], grown(native, TOKENS[:1], 8)), "natively, one whole sequence after another"


def grown(native: Native, tokens: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        logits, _ = native.logits(tokens)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def test_a_higher_threshold_lets_fewer_in(grid: ParallelGrid) -> None:
    native = Native("gumbel", grid)
    config = build_model(native.config, native.weights, routing=native.routing).config
    assert config.router_thresholds == native.routing.threshold.tolist()
    model = build_model(native.config, native.weights, routing=native.routing)
    lower = torch.stack(model(TOKENS, output_execution=True).executed)
    native.routing.threshold[0] += 1
    model = build_model(native.config, native.weights, routing=native.routing)
    higher = torch.stack(model(TOKENS, output_execution=True).executed)
    assert 0 < higher[1].sum() < lower[1].sum()
    assert not (higher[1] & ~lower[1]).any()


def test_the_first_thresholds_are_those_of_an_untrained_model() -> None:
    config = build_model(make_config({"density": 0.2}), random_state(make_config())).config
    assert config.router_thresholds == pytest.approx([math.log(4)] * 3)
