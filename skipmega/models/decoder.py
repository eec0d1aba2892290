"""A pipeline stage of the decoder: its chunks of layers, and the embedding or head at the ends.

Parameter names are global (``layers.7.mlp.up.weight`` is layer 7 on any grid); shapes are those of this
tensor-parallel rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core.enums import ModelType
from torch import Tensor, nn

from skipmega.config import RunConfig
from skipmega.models.graphs import LayerGraphs
from skipmega.models.initialization import initialize
from skipmega.models.layer import DecoderLayer, LayerContext, LayerResult, RoutingRecord
from skipmega.models.norm import RMSNorm
from skipmega.models.recompute import run_again
from skipmega.models.rotary import rotary_table
from skipmega.models.stages import cut_stages
from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.layers import (
    ColumnLinear,
    VocabularyEmbedding,
    gather_vocabulary,
    megatron_config,
    token_losses,
)
from skipmega.parallel.sequence import SequenceShards
from skipmega.routing.router import Router, RouterInputs


@dataclass(frozen=True)
class StageOutput:
    """What a stage hands on: ``hidden`` [rows of this rank, b, hidden] and its routed layers' records by
    global number."""

    hidden: Tensor
    records: dict[int, RoutingRecord]

    def stacked(self, field: str) -> Tensor:
        """One field of all records as one tensor, [routed layers, ...]."""
        return torch.stack([getattr(record, field) for record in self.records.values()])

    def densities(self) -> Tensor:
        """[routed layers] float32: share of tokens each router chose, with the routers' gradients."""
        return self.stacked("chosen").mean(dim=(1, 2))


class StageChunk(nn.Module):
    """Consecutive layers of a stage, which a schedule runs at a time; ``number`` counts those of the stage.

    Holds no weights, those are the stage's; a module because the interleaved schedule insists.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, stage: "DecoderStage", number: int, layers: range) -> None:
        super().__init__()
        self._stage = (stage,)  # not as a submodule
        self.config = stage.config
        self.number = number
        self.layers = layers
        grid, chunks = stage.grid, stage.parallel.chunks_per_stage
        self.is_first = grid.is_first_stage and number == 0
        self.is_last = grid.is_last_stage and number == chunks - 1
        self.received: Tensor | None = None

    @property
    def routed_layers(self) -> list[int]:
        """Global numbers of the chunk's routed layers."""
        return [layer for layer in self._stage[0].routed_layers if layer in self.layers]

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Receive the previous chunk's hidden states; called by the schedule before each forward."""
        self.received = input_tensor[0]

    def forward(
        self, tokens: Tensor, context: LayerContext, inputs: Mapping[int, RouterInputs]
    ) -> StageOutput:
        """Run the chunk; as :meth:`DecoderStage.forward`."""
        output: StageOutput = self._stage[0](tokens, context, inputs, self)
        return output


class DecoderStage(nn.Module):
    """This process's part of the decoder.

    Args:
        config: the run's configuration, vocabulary resolved.
        grid: this process's place.
    """

    def __init__(self, config: RunConfig, grid: ParallelGrid) -> None:
        super().__init__()
        model = config.model
        self.grid = grid
        self.parallel = config.parallel
        self.shards = SequenceShards.of(grid)
        self.model = model
        self.recompute_layers = config.training.recompute == "full"
        self.tied = model.tie_embeddings
        self.dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        self.config = megatron_config(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            dtype=self.dtype,
            grid=grid,
            chunks_per_stage=config.parallel.chunks_per_stage,
        )
        densities, eval_densities = config.densities, config.eval_densities or {}
        self.layers = nn.ModuleDict(
            {
                str(number): DecoderLayer(
                    config, densities.get(number), eval_densities.get(number), self.shards
                )
                for layers in cut_stages(config)[grid.pipeline.rank]
                for number in layers
            }
        )
        self.chunks = [
            StageChunk(self, number, layers)
            for number, layers in enumerate(cut_stages(config)[grid.pipeline.rank])
        ]
        if grid.is_first_stage or (grid.is_last_stage and self.tied):
            self.embedding = VocabularyEmbedding(
                config.vocab_size, model.hidden_size, self.config, self.shards
            )
        if grid.is_last_stage:
            self.final_norm = RMSNorm(model.hidden_size, model.norm_epsilon)
            if not self.tied:
                self.head = ColumnLinear(model.hidden_size, config.vocab_size, grid.tensor)
        if self.shares_embedding and not grid.is_first_stage:
            # DeepSpeed counts a parameter so marked once in the gradient norm
            self.embedding.weight.ds_pipe_replicated = True
        self.graphs: dict[int, LayerGraphs] = {}
        self._compiled: dict[str, Callable[..., LayerResult]] = {}
        self._compiled_losses: Callable[..., Tensor] = self._losses
        initialize(self, config, grid.tensor)

    @property
    def shares_embedding(self) -> bool:
        """Whether the tied embedding lives on this stage and on another one."""
        ends = self.grid.is_first_stage or self.grid.is_last_stage
        return self.tied and self.grid.pipeline.size > 1 and ends

    @property
    def routed_layers(self) -> list[int]:
        """Global numbers of this stage's routed layers."""
        return [int(name) for name, layer in self.layers.items() if layer.router is not None]

    def router_weights(self) -> dict[int, nn.Parameter]:
        """What the routers that read tokens read them with, by global layer number."""
        weights = {}
        for number in self.routed_layers:
            router = self.layers[str(number)].router
            if isinstance(router, Router) and router.weight is not None:
                weights[number] = router.weight
        return weights

    def compile_parts(self) -> None:
        """Compile each layer and the loss for training, where shapes are fixed; evaluation (dropless) stays
        eager. Compiled, the loss never holds its logits in fp32; megatron-core's, of a vocabulary that is cut
        over the tensor axis, stays eager too.

        Every distinct density and warm-up stage is a program of its own. Falling back to eager beyond torch's
        limit on their number would be silent: it is raised, and made an error (process-wide settings).
        """
        torch._dynamo.config.recompile_limit = 1024
        torch._dynamo.config.accumulated_recompile_limit = 4096
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        self._compiled = {name: torch.compile(layer, dynamic=False) for name, layer in self.layers.items()}
        if self.grid.tensor.size == 1:
            self._compiled_losses = torch.compile(self._losses, dynamic=False)

    def use_graphs(self, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Run the layers of each chunk as CUDA graphs in training, once the density has warmed up. Backward
        adds the gradients of the layers' parameters to ``sums``, which stay where they are."""
        for chunk in self.chunks:
            run = partial(self._run_layers, chunk.layers)
            layers = [self.layers[str(number)] for number in chunk.layers]
            self.graphs[chunk.number] = LayerGraphs(run, layers, sums)

    def forward(
        self,
        tokens: Tensor,
        context: LayerContext,
        inputs: Mapping[int, RouterInputs],
        chunk: StageChunk | None = None,
    ) -> StageOutput:
        """Run a chunk of the stage.

        Args:
            tokens: [b, s] int64, whole sequences; read by the first chunk only.
            context: what all layers share; with ``positions`` it comes with the ``rotary`` table of all.
            inputs: of each routed layer's router, by global layer number.
            chunk: which one; left out, the first.
        """
        chunk = chunk or self.chunks[0]
        hidden = self.enter(tokens, chunk)
        context = self._at_positions(context, tokens.shape[1], hidden.device)
        if chunk.number in self.graphs and self.training and context.warmed == 1.0:
            return StageOutput(*self.graphs[chunk.number](hidden, context, inputs))
        return StageOutput(*self._run_layers(chunk.layers, hidden, context, inputs))

    def enter(self, tokens: Tensor, chunk: StageChunk) -> Tensor:
        """What the layers of ``chunk`` are given: ``tokens`` [b, s], embedded, or what the last chunk sent.

        Returns:
            [rows of this rank, b, hidden].
        """
        if chunk.is_first:
            embedded: Tensor = self.embedding(self.shards.take_context(tokens, dim=1))
            return embedded.to(self.dtype)
        assert chunk.received is not None
        return chunk.received

    def _run_layers(
        self, layers: range, hidden: Tensor, context: LayerContext, inputs: Mapping[int, RouterInputs]
    ) -> tuple[Tensor, dict[int, RoutingRecord]]:
        records = {}
        for number in layers:
            hidden, record = self._run(str(number), hidden, inputs.get(number), context)
            if record is not None:
                records[number] = record
        return hidden, records

    def _at_positions(self, context: LayerContext, length: int, device: torch.device) -> LayerContext:
        if context.rotary is not None:
            return context
        table = rotary_table(length, self.model.head_size, self.model.rope_theta, device)
        positions = None
        if self.shards.context.size > 1:
            positions = self.shards.context_positions(length, device).unsqueeze(1)
        return replace(context, rotary=table, positions=positions)

    def _run(
        self, name: str, hidden: Tensor, inputs: RouterInputs | None, context: LayerContext
    ) -> LayerResult:
        layer = self.layers[name]
        if not self.training:
            result: LayerResult = layer(hidden, inputs, context)
            return result
        run = self._compiled.get(name, layer)
        result = run_again(run, hidden, inputs, context, when=self.recompute_layers)
        return result

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each token on the last stage, in nats.

        Args:
            hidden: [rows of this rank, b, hidden].
            labels: [b, n] int64, of this context rank's rows.

        Returns:
            [n, b] float32.
        """
        run = self._compiled_losses if self.training else self._losses
        return run(hidden, labels)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows of this rank, b, hidden] to [n, b, vocabulary] on the last stage, n being this context rank's
        rows, the same on all its tensor ranks."""
        return gather_vocabulary(self._logits(hidden), self.grid.tensor)

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return token_losses(self._logits(hidden), labels.t(), self.grid.tensor)

    def _logits(self, hidden: Tensor) -> Tensor:
        normed = self.shards.enter(self.final_norm(hidden))
        if self.tied:
            return self.embedding(normed, as_head=True)
        return self.head(normed)
