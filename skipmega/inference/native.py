"""A checkpoint as a language model: tokens in, logits out, on any grid."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skipmega.checkpoint.store import Checkpoint
from skipmega.config import RunConfig
from skipmega.data.order.batches import TokenBatch
from skipmega.inference.cache import KeyValueCache, LayerCache
from skipmega.inference.configuration import on_grid, with_eval_density
from skipmega.inference.layers import Pass, read_layer
from skipmega.inference.work import Work
from skipmega.kernels.attention import document_starts, visibility
from skipmega.models.decoder import DecoderStage, StageChunk
from skipmega.models.layer import DecoderLayer
from skipmega.models.rotary import rotary_table
from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.logical import LogicalTensor, partition_dim
from skipmega.parallel.pipeline import run_micro_batches
from skipmega.routing.state import RoutingState


class NativeModel:
    """A trained decoder, without noise, at ``routing.eval_capacity_factor`` (dropless by default).

    All processes of a replica (tensor x pipeline) call :meth:`logits` and :meth:`read` together with the same
    tokens; each gets the whole result. Data-parallel replicas are independent, but for :meth:`exchange`.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: ParallelGrid,
        stage: DecoderStage,
        routing: RoutingState,
        step: int,
        before_pass: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.grid = grid
        self.stage = stage.eval()
        self._routing = routing
        self._steps_done = step
        self._before_pass = before_pass
        self._work = Work()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        grid: ParallelGrid,
        precision: str = "fp32",
        eval_density: float | None = None,
    ) -> "NativeModel":
        """Read a checkpoint written on any grid.

        Args:
            checkpoint: a complete one.
            grid: the present grid; the checkpoint's own does not matter.
            precision: "fp32" or "bf16", of weights and activations.
            eval_density: share of tokens to execute in each routed layer; None as the checkpoint's
                configuration says.

        Raises:
            ConfigError: the model does not fit the grid, or ``eval_density`` has no meaning for it.
            CheckpointError: the checkpoint cannot be read.
        """
        config = on_grid(with_eval_density(checkpoint.config, eval_density), grid, precision)
        stage = DecoderStage(config, grid)
        routing = RoutingState(config, stage.routed_layers, torch.device("cpu"))
        weights = {
            f"weights/{name}": LogicalTensor(parameter.data, partition_dim(parameter))
            for name, parameter in stage.named_parameters()
        }
        remembered = {f"routing/{name}": LogicalTensor(t, None) for name, t in routing.tensors().items()}
        checkpoint.read_into(weights | remembered, grid)
        stage = stage.to(grid.device, stage.dtype)
        return cls(config, grid, stage, routing.to(grid.device), checkpoint.state["step"])

    @property
    def max_length(self) -> int:
        """The longest input, in tokens: what the model was trained on."""
        return self.config.data.sequence_length

    @property
    def vocab_size(self) -> int:
        """Width of the logits: the padded vocabulary."""
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        """Where :meth:`logits` leaves its result."""
        return self.grid.device

    @property
    def replica(self) -> int:
        """Number of this replica among the :attr:`replicas`, which share work."""
        return self.grid.data.rank

    @property
    def replicas(self) -> int:
        """How many there are."""
        return self.grid.data.size

    def exchange(self, found: Any) -> list[Any]:
        """What each replica found, in their order; all processes call it together."""
        everything: list[Any] = [None] * self.replicas
        torch.distributed.all_gather_object(everything, found, group=self.grid.data.group)
        return everything

    def take_work(self) -> Work:
        """What this replica read since the last call; its processes call it together."""
        done, self._work = self._work, Work()
        return done.on_host(self.grid.pipeline.group if self.grid.pipeline.size > 1 else None)

    @property
    def reads_on(self) -> bool:
        """Whether :meth:`new_cache` can be used: whether what a token executes and sees depends on nothing
        but keys and values of the tokens before it."""
        routing = self.config.routing
        return routing.keys_values == "all" and routing.eval_capacity_factor is None

    def new_cache(self, batch: int) -> KeyValueCache:
        """For :meth:`read`: of ``batch`` empty texts."""
        return KeyValueCache({name: LayerCache() for name in self.stage.layers}, [0] * batch)

    @torch.no_grad()
    def logits(self, tokens: Tensor, at: Tensor | None = None) -> Tensor:
        """Next-token logits; every token sees all earlier ones of its row.

        Args:
            tokens: [b, s] int64.
            at: [b, m] int64, the positions whose logits are wanted; None for all.

        Returns:
            [b, m or s, vocabulary] float32.
        """
        group = self.config.routing.group_size or 1
        padded = torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % group))
        if at is None:
            at = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
        return self._run(padded, (at.max(dim=1).values + 1).tolist(), at, None)

    @torch.no_grad()
    def trace(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens executed which routed layer, and what each prediction lost; layers on one stage only.

        Args:
            tokens: [b, s] int64.
            labels: [b, s] int64, the token that follows each.

        Returns:
            losses in nats, [b, s] float32, and bool [routed layers, b, s].
        """
        assert self.grid.pipeline.size == 1
        length = tokens.shape[1]
        group = self.config.routing.group_size or 1
        padded = torch.nn.functional.pad(tokens, (0, -length % group)).to(self.device)
        self._before_pass()
        hidden, executed = self._through(self.stage.chunks[0], padded)
        losses = self.stage.losses(hidden[:length], labels.to(self.device))
        return losses.t(), torch.stack(list(executed.values()))[:, :length].transpose(1, 2)

    @torch.no_grad()
    def read(
        self, cache: KeyValueCache, tokens: Tensor, counts: Sequence[int], at: Tensor | None = None
    ) -> Tensor:
        """Read on: append ``tokens`` to the texts of ``cache``, which grows by them.

        Args:
            cache: of b texts.
            tokens: [b, n] int64, padded on the right.
            counts: how many of the n tokens of each row are no padding.
            at: [b, m] int64 below n, the tokens whose logits are wanted; None for the last of each row.

        Returns:
            [b, m or 1, vocabulary] float32: next-token logits.
        """
        assert self.reads_on
        if at is None:
            at = torch.tensor(counts).unsqueeze(1) - 1
        result = self._run(tokens, counts, at, cache)
        cache.lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
        return result

    @torch.no_grad()
    def held_out_loss(self, batches: Iterator[TokenBatch]) -> float:
        """Mean loss in nats of the tokens that count, over all replicas, each with micro-batches of its own.

        All processes call it together; it is what training reports of the same micro-batches.
        """
        sums = torch.zeros(2, device=self.device)
        for batch in batches:
            self._before_pass()
            rows, length = batch.tokens.shape
            collected = run_micro_batches(
                self.stage.chunks,
                iter([batch.to(self.device)]),
                self._loss_step,
                num_micro_batches=1,
                sequence_length=length,
                micro_batch_size=rows,
                backward=False,
                collect_outputs=True,
            )
            if self.grid.is_last_stage:
                sums += collected[0]
        torch.distributed.all_reduce(sums, group=self.grid.data.group)
        loss, tokens = self.grid.broadcast_from_last_stage(sums).tolist()
        return loss / tokens

    def _loss_step(
        self, batches: Iterator[TokenBatch], chunk: StageChunk
    ) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)
        rows, length = batch.tokens.shape
        since = None if batch.document_ids is None else document_starts(batch.document_ids)
        hidden, executed = self._through(chunk, batch.tokens, since=since)
        self._work.add([length] * rows, self._all_layers(executed, hidden, chunk.layers))
        if not chunk.is_last:
            return hidden, _output
        counted = batch.loss_mask.t()
        losses = self.stage.losses(hidden, batch.labels) * counted
        return torch.stack([losses.sum(), counted.sum()]), _output

    def _run(self, tokens: Tensor, counts: Sequence[int], at: Tensor, cache: KeyValueCache | None) -> Tensor:
        self._before_pass()
        tokens, at = tokens.to(self.device), at.to(self.device)
        batch, length = tokens.shape
        collected = run_micro_batches(
            self.stage.chunks,
            iter([tokens]),
            partial(self._step, counts, at, cache),
            num_micro_batches=1,
            sequence_length=length,
            micro_batch_size=batch,
            backward=False,
            collect_outputs=True,
        )
        if self.grid.is_last_stage:
            result = collected[0].transpose(0, 1).float().contiguous()
        else:
            result = torch.empty(*at.shape, self.vocab_size, device=self.device)
        return self.grid.broadcast_from_last_stage(result)

    def _step(
        self,
        counts: Sequence[int],
        at: Tensor,
        cache: KeyValueCache | None,
        batches: Iterator[Tensor],
        chunk: StageChunk,
    ) -> tuple[Tensor, Callable[..., Any]]:
        hidden, executed = self._through(chunk, next(batches), cache)
        self._work.add(counts, self._all_layers(executed, hidden, chunk.layers))
        if not chunk.is_last:
            return hidden, _output
        wanted = at.t().unsqueeze(2).expand(-1, -1, hidden.shape[2])
        return self.stage.logits(hidden.gather(0, wanted)), _output

    def _through(
        self,
        chunk: StageChunk,
        tokens: Tensor,
        cache: KeyValueCache | None = None,
        since: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Read ``tokens`` [b, n].

        Args:
            cache: of the texts that they go on with.
            since: [b, n] int64, the first position each of them sees, where they are whole texts.

        Returns:
            hidden states [n, b, hidden], and by routed layer who executed: [n, b] bool.
        """
        batch, length = tokens.shape
        now, positions = self._pass(batch, length, cache, since)
        inputs = self._routing.for_evaluation(self._steps_done, batch, positions)
        hidden, executed = self.stage.enter(tokens, chunk), {}
        for number in chunk.layers:
            layer, held = self.stage.layers[str(number)], None if cache is None else cache.layers[str(number)]
            assert isinstance(layer, DecoderLayer)
            hidden, ran = read_layer(layer, hidden, inputs.get(number), now, held)
            if ran is not None:
                executed[number] = ran
        return hidden, executed

    def _pass(
        self, batch: int, length: int, cache: KeyValueCache | None, since: Tensor | None
    ) -> tuple[Pass, Tensor]:
        """What layers share, and the tokens' positions [n] or [n, b] int64."""
        model, factor = self.config.model, self.config.routing.eval_capacity_factor
        positions, at, end, visible = torch.arange(length, device=self.device), None, length, None
        if cache is not None:
            end = max(cache.lengths) + length
            cache.make_room(end)
            if any(cache.lengths):
                positions = at = positions.unsqueeze(1) + torch.tensor(cache.lengths, device=self.device)
        slots = length if cache is None else cache.slots
        if at is not None or since is not None:
            visible = visibility(at, since, slots, batch, self.device)
        table = rotary_table(end, model.head_size, model.rope_theta, self.device)
        return Pass.of(table, at, visible, self.stage.dtype, slots, factor), positions

    def _all_layers(self, executed: Mapping[int, Tensor], hidden: Tensor, here: range) -> Tensor:
        """bool [layers of the whole model, b, n]: who ran, of the layers ``here``."""
        length, batch, _ = hidden.shape
        everybody = torch.ones(batch, length, dtype=torch.bool, device=self.device)
        nobody = torch.zeros_like(everybody)
        ran = dict.fromkeys(here, everybody) | {layer: mine.t() for layer, mine in executed.items()}
        return torch.stack([ran.get(layer, nobody) for layer in range(self.config.model.num_layers)])


def _output(output: Tensor, non_loss_data: bool) -> Tensor:
    assert non_loss_data
    return output
