"""Memory of a process, before anything runs; it follows from the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from skipmega.config import RunConfig
from skipmega.models.flops import computed_share, layer_parameters, matrix_parameters, part_shares
from skipmega.models.stages import cut_stages

_MASTER = 4  # bytes of a weight's fp32 copy, and of each of its moments
_EAGER_LOGIT = 12  # bytes in backward: log-probability, its gradient and the logit's, in fp32
_EVALUATED_LOGIT = 8  # bytes: the logit in fp32 and its log-probability; evaluation is eager
_NORMED = 8  # bytes of a gradient whose norm is taken, which DeepSpeed does in double precision, one by one
_BUCKET = 500_000_000  # elements that ZeRO 3 sets aside for reducing gradients
# weights that ZeRO 3 leaves gathered between forward and backward: those it needs again within 10^9
_GATHERED = 500_000_000


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes on one process of pipeline stage ``stage`` (0-based), the stage that needs most.

    ``weights`` in the run's precision, ``gradients`` in theirs (ZeRO 2 saves none of the latter: a whole
    step's pile up before ranks average them). ZeRO 3 leaves its share of both over data and context ranks,
    and weights that are gathered. ``optimizer``: fp32 weights and moments, its share
    over the same ranks. ``activations`` of the micro-batches in flight, as compiled (eager execution keeps up
    to half as much again, and masks), and ``logits`` with their gradients. ``update``: what reducing
    gradients, updating weights or evaluating need, when the activations are gone. What libraries and
    communication allocate is left out.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    update: float

    @property
    def total(self) -> float:
        """The peak: activations and the update don't meet."""
        states = self.weights + self.gradients + self.optimizer
        return states + max(self.activations + self.logits, self.update)


def process_memory(config: RunConfig) -> ProcessMemory:
    """Memory of one process of the stage that needs most.

    Args:
        config: the run's configuration, vocabulary and grid resolved.
    """
    stages = [_stage_memory(config, stage) for stage in range(config.parallel.pipeline_parallel)]
    return max(stages, key=lambda memory: memory.total)


def _stage_memory(config: RunConfig, stage: int) -> ProcessMemory:
    parallel = config.parallel
    # ranks with the same weights: ZeRO cuts the optimizer's states among them, ZeRO 3 everything
    replicas = (parallel.data_parallel or 1) * parallel.context_parallel
    size, adamw = _element_size(config), config.optimizer.name == "adamw"
    is_last = stage == parallel.pipeline_parallel - 1
    summed = size if config.training.gradient_precision == "bf16" else _MASTER
    weights = _stage_parameters(config, stage)
    held = weights / replicas if parallel.zero_stage == 3 else weights
    gathered = min(weights, max(_largest_part(config, stage), _GATHERED)) if parallel.zero_stage == 3 else 0.0
    logits = _rows(config).entered * config.vocab_size / parallel.tensor_parallel if is_last else 0.0
    # ZeRO 3, and gradients in bf16, are copied; Adafactor's step holds directions beside them
    copies = (parallel.zero_stage == 3 or summed < _MASTER) + (not adamw)
    update = max(
        _BUCKET * summed if parallel.zero_stage == 3 else _largest_matrix(config, stage) * _NORMED,
        weights * copies * _MASTER / replicas,
        logits * (_EVALUATED_LOGIT + (size if size < _MASTER else 0)),
    )
    return ProcessMemory(
        stage=stage,
        weights=(held + gathered) * size,
        gradients=held * summed,
        # of Adafactor's moments nothing is left but rows and columns
        optimizer=weights * (3 if adamw else 1) * _MASTER / replicas,
        activations=_in_flight(config, stage) + _recomputed(config, stage),
        logits=logits * _logit_bytes(config),
        update=update,
    )


def _layers_of(config: RunConfig, stage: int) -> list[int]:
    return [layer for chunk in cut_stages(config)[stage] for layer in chunk]


def _stage_parameters(config: RunConfig, stage: int) -> float:
    """Weights on one tensor-parallel rank of a stage: matrices cut, norms and routers whole."""
    model, last = config.model, config.parallel.pipeline_parallel - 1
    layers = sum(_layer_parameters(config, layer) for layer in _layers_of(config, stage))
    tables = 1 if last == 0 and model.tie_embeddings else (stage == 0) + (stage == last)
    return layers + tables * _table_parameters(config) + (model.hidden_size if stage == last else 0)


def _layer_parameters(config: RunConfig, layer: int) -> float:
    cut = sum(matrix_parameters(config))
    return layer_parameters(config, layer) - cut + cut / config.parallel.tensor_parallel


def _table_parameters(config: RunConfig) -> float:
    return config.vocab_size * config.model.hidden_size / config.parallel.tensor_parallel


def _largest_part(config: RunConfig, stage: int) -> float:
    """Weights of the largest layer, or table of embeddings."""
    layers = [_layer_parameters(config, layer) for layer in _layers_of(config, stage)]
    return max([*layers, _tables(config, stage)])


def _largest_matrix(config: RunConfig, stage: int) -> float:
    largest = max(matrix_parameters(config)) / config.parallel.tensor_parallel
    return max(largest, _tables(config, stage))


def _tables(config: RunConfig, stage: int) -> float:
    """Weights of a table of embeddings, or of the head, on a stage that has one."""
    return _table_parameters(config) if stage in (0, config.parallel.pipeline_parallel - 1) else 0.0


def _in_flight(config: RunConfig, stage: int) -> float:
    """Bytes that a stage keeps for backward when it keeps most.

    As megatron-core orders a stage's passes (``get_pp_rank_microbatches`` and ``get_schedule_table`` in its
    ``pipeline_parallel/schedules.py``): with one chunk ``stages - stage - 1`` forward passes to warm up, with
    several ``2 (stages - stage - 1) + (chunks - 1) stages``, each of one chunk; then one forward and one
    backward in turn. Chunks take turns after as many micro-batches as there are stages, in backward from the
    last chunk on.
    """
    stages, micro_batches = config.parallel.pipeline_parallel, config.micro_batches
    kept = [_kept_layers(config, chunk) for chunk in cut_stages(config)[stage]]
    turns = [min(stages, micro_batches - first) for first in range(0, micro_batches, stages)]
    forward = [size for turn in turns for size in kept for _ in range(turn)]
    backward = [size for turn in turns for size in reversed(kept) for _ in range(turn)]
    ahead = stages - stage - 1
    if len(kept) > 1:
        ahead = 2 * ahead + (len(kept) - 1) * stages
    now = most = sum(forward[: ahead + 1])
    for more, less in zip(forward[ahead + 1 :], backward, strict=False):
        now += more - less
        most = max(most, now)
    return most


def _kept_layers(config: RunConfig, layers: Sequence[int]) -> float:
    """Bytes that layers keep of one micro-batch for backward."""
    if config.training.recompute == "full":
        return len(layers) * _rows(config).own * config.model.hidden_size * _element_size(config)
    return sum(_layer_activations(config, layer, config.training.recompute) for layer in layers)


def _recomputed(config: RunConfig, stage: int) -> float:
    """Bytes of the layer that is run again in backward, of which there is one at a time."""
    if config.training.recompute == "none":
        return 0.0
    layers = _layers_of(config, stage)
    return max(_layer_activations(config, layer, "none") for layer in layers)


def _layer_activations(config: RunConfig, layer: int, recompute: str) -> float:
    """Bytes that one layer keeps of one micro-batch for backward, on one process.

    What torch's min-cut partitioner keeps: the inputs of the layer and of all matrix products, queries, keys,
    values, the result of attention before and after its projection, the feed-forward network before and after
    its activation, and what a router weights. Products that follow a gathering have gathered inputs. Masks
    are not made, small things are left out. Of what ``recompute`` names, only the input is kept, as it is
    before it is gathered; results of what is ``cheap`` are kept if they are gathered.
    """
    model, routing, tensor = config.model, config.routing, config.parallel.tensor_parallel
    hidden, routed, rows = model.hidden_size, config.layer_is_routed(layer), _rows(config)
    heads = model.num_attention_heads * model.head_size / tensor
    cheap = recompute == "cheap"
    inner = ((2 if model.activation == "swiglu" else 1) + (not cheap)) * model.ffn_size / tensor
    normed = 0 if cheap and not config.parallel.sequence_parallel else hidden
    shares = part_shares(config, computed_share(config, layer))
    packs_queries = routed and not routing.computes_all and routing.keys_values == "all"
    packs_queries = packs_queries and routing.wrap != "mlp"
    own, entered, gathered = (1 + shares.queries) * hidden, 0.0, 0.0
    if routed and routing.wrap != "attention":
        own += shares.mlp * hidden
    if recompute == "attention":
        own += shares.keys_values * hidden
    else:
        entered += shares.keys_values * normed
        entered += shares.queries * (2 * heads + (0 if cheap else packs_queries * hidden))
        gathered += shares.keys_values * 2 * model.kv_heads * model.head_size / tensor
    if recompute != "mlp":
        entered += shares.mlp * (normed + inner)
    elif routed and routing.wrap == "mlp":
        own += shares.mlp * hidden
    kept = own * rows.own + entered * rows.entered + gathered * rows.sequence
    return kept * _element_size(config)


def _logit_bytes(config: RunConfig) -> int:
    """What backward of the loss holds per logit; a compiled one never makes fp32 of them."""
    if config.training.compile and config.parallel.tensor_parallel == 1:
        return 2 * _element_size(config)
    return _EAGER_LOGIT


class _Rows(NamedTuple):
    """Tokens of a micro-batch on one process: between matrix products (``own``), at those that are cut over
    the tensor axis (``entered``), and of whole sequences, whose keys and values it attends."""

    own: float
    entered: float
    sequence: int


def _rows(config: RunConfig) -> _Rows:
    parallel, tokens = config.parallel, config.training.micro_batch_size * config.data.sequence_length
    return _Rows(tokens / parallel.sequence_shards, tokens / parallel.context_parallel, tokens)


def _element_size(config: RunConfig) -> int:
    return 2 if config.training.precision == "bf16" else 4
