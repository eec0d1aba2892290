"""Whole training steps: skipmega's through its engine, and Hugging Face's Llama beside it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipmega.config import RunConfig
from skipmega.data.order.batches import TokenBatch
from skipmega.experiments.speed.bench import GROUPED, Bench, Row, fill, precision, timed
from skipmega.experiments.speed.layers import DENSE, DENSITIES, attention_on
from skipmega.experiments.step_times import measure_steps, random_batches
from skipmega.models.decoder import DecoderStage
from skipmega.models.flops import training_flops_per_token
from skipmega.models.layer import LayerContext
from skipmega.training.metrics import peak_memory_gib

Losses = Callable[[TokenBatch], Tensor]


def step_rows() -> list[Row]:
    """Rows of ``bench.py step``, those that most targets need first."""
    rows = [_engine_row("MHA dense", DENSE), _engine_row("MHA 0.5", ["routing.density=0.5"])]
    rows += [
        Row("step", "Hugging Face, fp32 masters", partial(_measure_plain, build=hugging_face, masters=True)),
        Row("step", "Hugging Face, bf16 weights", partial(_measure_plain, build=hugging_face, masters=False)),
        Row("step", "own, bf16 weights", partial(_measure_plain, build=own_stage, masters=False)),
    ]
    rows += [_engine_row(f"MHA {density}", [f"routing.density={density}"]) for density in (0.125, 0.25)]
    rows.append(_engine_row("GQA dense", [*GROUPED, *DENSE]))
    rows += [_engine_row(f"GQA {density}", [*GROUPED, f"routing.density={density}"]) for density in DENSITIES]
    return [*rows, Row("step", "MHA 0.5, twice as many layers", _twice_the_layers)]


def _engine_row(name: str, overrides: Sequence[str]) -> Row:
    return Row("step", name, partial(_measure_engine, overrides=overrides))


def _twice_the_layers(bench: Bench) -> dict[str, Any]:
    count = 2 * bench.config().model.num_layers
    return _measure_engine(bench, [f"model.num_layers={count}", "routing.density=0.5"])


def _measure_engine(bench: Bench, overrides: Sequence[str]) -> dict[str, Any]:
    """DeepSpeed's engine: bf16 weights, fp32 masters, moments and sums of gradients."""
    config = bench.config(*overrides)
    measured = measure_steps(config, random_batches(config, bench.grid), 1, bench.steps, bench.grid)
    tokens = config.training.global_batch_size * config.data.sequence_length
    return {
        **measured,
        "seconds": measured["seconds_per_step"],
        "flops": measured["flops_per_step"],
        "tokens_per_second": tokens / measured["seconds_per_step"],
        "layers": config.model.num_layers,
    }


def _measure_plain(
    bench: Bench, build: Callable[[RunConfig, Bench], tuple[nn.Module, Losses]], masters: bool
) -> dict[str, Any]:
    """A dense model in a plain loop: micro-batches, clipping, AdamW."""
    config = bench.config(*DENSE)
    device = bench.grid.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model, loss = build(config, bench)
    model.train()
    parameters = list(model.parameters())
    settings = config.optimizer
    options: dict[str, Any] = {
        "lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2), "eps": settings.epsilon,
        "weight_decay": settings.weight_decay, "fused": device.type == "cuda",
    }  # fmt: skip
    update = MasterWeights(parameters, options) if masters else PlainWeights(parameters, options)
    batches = random_batches(config, bench.grid)

    def step() -> None:
        update.begin()
        for _ in range(config.micro_batches):
            (loss(next(batches).to(device)) / config.micro_batches).backward()
        update.step(settings.gradient_clip)

    measured = timed(step, bench.with_few_repeats())
    tokens = config.training.global_batch_size * config.data.sequence_length
    return {
        **measured,
        "flops": tokens * training_flops_per_token(config),
        "tokens_per_second": tokens / measured["seconds"],
        "peak_memory_gib": peak_memory_gib(device),
        "layers": config.model.num_layers,
    }


class PlainWeights:
    """AdamW on the weights themselves, their gradients clipped to a norm."""

    def __init__(self, parameters: list[nn.Parameter], options: dict[str, Any]) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(self.updated(), **options)

    def updated(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        return self.parameters

    def begin(self) -> None:
        """Before the first micro-batch of a step."""

    def step(self, clip: float) -> None:
        """Update once and forget the gradients."""
        torch.nn.utils.clip_grad_norm_(self.updated(), clip, foreach=True)
        self.optimizer.step()
        for parameter in (*self.parameters, *self.updated()):
            parameter.grad = None


class MasterWeights(PlainWeights):
    """AdamW on fp32 copies, which are then rounded to the weights; gradients are summed in fp32 as the
    engine sums them (the embedding must not be tied)."""

    def __init__(self, parameters: list[nn.Parameter], options: dict[str, Any]) -> None:
        self.masters = [nn.Parameter(parameter.detach().float().clone()) for parameter in parameters]
        super().__init__(parameters, options)
        for parameter in parameters:
            parameter.grad_dtype = None  # any

    def begin(self) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)

    def updated(self) -> list[nn.Parameter]:
        return self.masters

    def step(self, clip: float) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = parameter.grad
        super().step(clip)
        with torch.no_grad():
            torch._foreach_copy_([*self.parameters], [*self.masters])


def own_stage(config: RunConfig, bench: Bench) -> tuple[nn.Module, Losses]:
    """skipmega's dense model, without the engine."""
    stage = DecoderStage(config, bench.grid).to(bench.grid.device, precision(config))
    if config.training.compile:
        stage.compile_parts()
    context = LayerContext(None, None, attention_on(bench.grid, config))

    def loss(batch: TokenBatch) -> Tensor:
        hidden = stage(batch.tokens, context, {}).hidden
        return stage.losses(hidden, batch.labels).mean()

    return stage, loss


def hugging_face(config: RunConfig, bench: Bench) -> tuple[nn.Module, Losses]:
    """Llama of the same shape, each layer and the loss compiled."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config.model
    llama = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=config.data.sequence_length,
        rms_norm_eps=shape.norm_epsilon, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_embeddings, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(llama)
    model.to(precision(config)).to_empty(device=bench.grid.device)
    with bench.grid.device:  # its angles are no weights, and were lost on the way
        model.model.rotary_emb = type(model.model.rotary_emb)(llama)
    fill(model.parameters())

    def head_and_loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(hidden).float().flatten(0, 1), labels.flatten())

    if config.training.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        head_and_loss = torch.compile(head_and_loss, dynamic=False)

    def loss(batch: TokenBatch) -> Tensor:
        return head_and_loss(model.model(input_ids=batch.tokens).last_hidden_state, batch.labels)

    return model, loss
