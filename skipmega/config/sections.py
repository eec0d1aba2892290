"""The sections of a run's configuration, one pydantic model per component.

Every field states its unit. Validators here check one section by itself; what spans sections is in
:mod:`skipmega.config.run`. Unknown keys and wrong types are refused (``extra="forbid"``, strict types).
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from skipmega.config.base import Section


class ModelConfig(Section):
    """Shape of the decoder.

    ``num_key_value_heads`` below ``num_attention_heads`` is grouped-query attention. ``ffn_hidden_size``
    left out is 8 x hidden for GELU (SkipLayer, arXiv 2311.15436) and 8/3 x hidden, rounded up to a
    multiple of 64, for SwiGLU. ``vocab_size`` left out is the tokenizer's, padded up to a multiple of
    ``vocab_multiple`` so that every tensor-parallel size divides it and a checkpoint's shapes do not
    depend on the grid.
    """

    num_layers: int = Field(12, ge=1)
    hidden_size: int = Field(768, ge=1)
    num_attention_heads: int = Field(12, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=2)
    ffn_hidden_size: int | None = Field(None, ge=1)
    activation: Literal["gelu", "swiglu"] = "gelu"
    norm_epsilon: float = Field(1e-5, gt=0)
    rope_theta: float = Field(10_000.0, gt=0)
    tie_embeddings: bool = True
    vocab_size: int | None = Field(None, ge=1)
    vocab_multiple: int = Field(128, ge=1)
    init_std: float = Field(0.02, gt=0)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Inner width of the feed-forward network."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.activation == "gelu":
            return 8 * self.hidden_size
        return -(-(8 * self.hidden_size) // (3 * 64)) * 64

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                f"{self.num_attention_heads}: change one of them or give head_dim"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim={self.head_size} is odd: rotary positions need an even head_dim")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.kv_heads}: choose a divisor"
            )
        return self


class ParallelConfig(Section):
    """The grid. ``data_parallel`` left out is the world size over (tensor x context x pipeline).

    ``sequence_parallel`` cuts the tokens between matrix products over the tensor-parallel ranks (arXiv
    2205.05198), ``context_parallel`` those of all activations over ranks of its own, which exchange keys and
    values. A sequence is cut among them in equal parts.

    With ``chunks_per_stage`` above 1 every pipeline stage has several chunks of consecutive layers, run in
    the interleaved order (arXiv 2104.04473), which idles less and sends more. ``layers_per_stage`` gives the
    number of layers of every stage, or of every chunk in the order of the layers; left out, they are cut so
    that the dearest one is as cheap as can be.

    With ``zero_stage`` 1 and 2 data ranks share out the optimizer's states, with 3 the weights too; gradients
    are whole until the end of a step with any, so 1 and 2 are the same here.
    """

    tensor_parallel: int = Field(1, ge=1)
    sequence_parallel: bool = False
    context_parallel: int = Field(1, ge=1)
    pipeline_parallel: int = Field(1, ge=1)
    chunks_per_stage: int = Field(1, ge=1)
    data_parallel: int | None = Field(None, ge=1)
    layers_per_stage: list[Annotated[int, Field(ge=1)]] | None = None
    zero_stage: Literal[0, 1, 2, 3] = 1
    timeout_minutes: float = Field(30.0, gt=0)

    @property
    def processes_per_replica(self) -> int:
        """Processes that share a sample: the world size is a multiple of it."""
        return self.tensor_parallel * self.context_parallel * self.pipeline_parallel

    def describe_replica(self) -> str:
        """The axes of :attr:`processes_per_replica` by field, for messages."""
        names = ["tensor_parallel", "context_parallel", "pipeline_parallel"]
        used = [name for name in names if getattr(self, name) > 1 or name == "tensor_parallel"]
        return " x ".join(f"parallel.{name}={getattr(self, name)}" for name in used)

    @property
    def sequence_shards(self) -> int:
        """Number of ranks that a sequence is cut over."""
        return self.context_parallel * (self.tensor_parallel if self.sequence_parallel else 1)

    @model_validator(mode="after")
    def _something_to_cut_over(self) -> "ParallelConfig":
        if self.chunks_per_stage > 1 and self.pipeline_parallel == 1:
            raise ValueError(
                f"chunks_per_stage={self.chunks_per_stage} interleaves the chunks of several stages, and "
                "pipeline_parallel=1 is one: raise pipeline_parallel, or leave chunks_per_stage out"
            )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError(
                "sequence_parallel=true cuts tokens over tensor-parallel ranks, and tensor_parallel=1 leaves "
                "one: raise tensor_parallel, or leave sequence_parallel out"
            )
        return self


class OptimizerConfig(Section):
    """AdamW (decoupled weight decay on matrices), or Adafactor as SkipLayer uses it (no first moment,
    fixed second-moment decay ``beta2``, update-RMS clipping at ``update_clip``; arXiv 1804.04235)."""

    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, gt=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    gradient_clip: float = Field(1.0, ge=0)
    update_clip: float = Field(1.0, gt=0)


class ScheduleConfig(Section):
    """Learning rate by step: linear warm-up over ``warmup_steps``, then ``cosine`` to ``final_ratio`` of
    the peak at ``decay_steps`` (left out: the run's length), ``inverse_sqrt``, or ``constant``."""

    name: Literal["cosine", "inverse_sqrt", "constant"] = "cosine"
    warmup_steps: int = Field(100, ge=0)
    decay_steps: int | None = Field(None, ge=1)
    final_ratio: float = Field(0.1, ge=0, le=1)


class TrainingConfig(Section):
    """Length and batch of the run. Batches in sequences, the length in optimizer steps.

    ``stop_after`` ends the process cleanly after that step (a checkpoint is saved) although the run is
    longer: its schedule and data order are those of the whole run, and resuming continues it.
    ``max_duration``, in minutes since training was started, does so with the exit status that asks to be
    started again. A run that makes no progress for ``hang_minutes`` (three times that in the first step,
    which may be compiled) is ended, and the rank that holds it up is named.

    A step whose loss or gradients are not finite, or whose loss exceeds the mean of the last ``spike_window``
    ones by more than ``spike_sigmas`` of their standard deviations (0: any finite loss will do), is executed
    again; if that is no better, it updates nothing, and ``max_discarded`` of them in a row bring back the
    last checkpoint's state. Every ``replica_interval`` steps (0: only at such a step) ranks compare what they
    must have in common.

    ``recompute`` runs a part of each layer again in backward in place of keeping what it needs: what is
    ``cheap`` (norms, packing of normalised rows, the activation; only compiled layers then keep no inputs of
    the matrix products that follow), ``attention`` (its projections too), ``mlp`` (the feed-forward network
    with its norm), or the layer in ``full``; decisions and gradients are the same. ``gradient_precision`` is
    that in which gradients of a bf16 run are summed over micro-batches and over data ranks: in bf16 what is
    small beside its sum is lost.

    ``attention`` names what attends for packed queries, see :mod:`skipmega.kernels.attention`.

    ``cuda_graphs`` launches the compiled layers of a micro-batch as one graph forward and one backward: for
    layers that take longer to launch than to run. The memory of a micro-batch's activations and of one
    gradient per parameter is then never given back.
    """

    steps: int = Field(1000, ge=1)
    stop_after: int | None = Field(None, ge=1)
    max_duration: float | None = Field(None, gt=0)
    hang_minutes: float = Field(15.0, gt=0)
    max_discarded: int = Field(3, ge=1)
    spike_sigmas: float = Field(6.0, ge=0)
    spike_window: int = Field(128, ge=2)
    replica_interval: int = Field(100, ge=0)
    micro_batch_size: int = Field(4, ge=1)
    global_batch_size: int = Field(32, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    attention: Literal["auto", "sdpa", "flex", "flash"] = "auto"
    cuda_graphs: bool = False
    recompute: Literal["none", "cheap", "attention", "mlp", "full"] = "none"
    seed: int = Field(1234, ge=0)
    eval_interval: int = Field(100, ge=0)
    eval_sequences: int = Field(64, ge=1)


class CheckpointConfig(Section):
    """``interval`` in steps (0: only at the end); ``keep`` newest checkpoints (0: all), beside those of every
    ``keep_every`` steps (0: none). A save that fails is tried again ``retries`` times, after 1, 2, 4 ...
    seconds. ``resume: auto`` continues from the newest sound checkpoint of the run, if there is one;
    ``never`` demands an empty run folder; a path names a checkpoint to start from, until the run has one of
    its own."""

    interval: int = Field(500, ge=0)
    keep: int = Field(2, ge=0)
    keep_every: int = Field(0, ge=0)
    retries: int = Field(3, ge=0)
    resume: str = "auto"


class EvaluationConfig(Section):
    """Tasks that are evaluated every ``interval`` steps (0: never) and at the end, on the grid that trains.

    ``tasks`` are names of lm-eval's tasks and of suites, whose sets lie in ``data_dir`` (left out: the
    Hugging Face cache); ``include_paths`` folders of own task files. The first ``limit`` questions of each
    are asked, ``batch_size`` at a time (short ones more), after ``num_fewshot`` examples. Whoever asks to
    stop must wait for the answers.
    """

    interval: int = Field(0, ge=0)
    tasks: list[str] = Field(default_factory=lambda: ["skiplayer24"], min_length=1)
    data_dir: str | None = None
    include_paths: list[str] = Field(default_factory=list)
    limit: int = Field(100, ge=1)
    num_fewshot: int = Field(1, ge=0)
    batch_size: int = Field(16, ge=1)


class LoggingConfig(Section):
    """Sinks beside the JSONL file that is always written. ``peak_tflops`` (per device, dense bf16) gives
    the MFU; without it none is reported."""

    interval: int = Field(10, ge=1)
    tensorboard: bool = False
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "skipmega"
    peak_tflops: float | None = Field(None, gt=0)
