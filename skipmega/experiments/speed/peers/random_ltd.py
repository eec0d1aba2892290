"""DeepSpeed's random-LTD (arXiv 2211.11586): a random share of tokens runs the layer, the others pass by."""

import math
from typing import Any

from deepspeed.runtime.data_pipeline import constants
from deepspeed.runtime.data_pipeline.data_routing.basic_layer import RandomLayerTokenDrop
from torch import Tensor, nn

from skipmega.config import ModelConfig
from skipmega.experiments.speed.peers.plain import PlainLayer


class RandomTokens(nn.Module):
    """DeepSpeed's wrapper, driven as its scheduler drives it, at a fixed number of tokens.

    It replaces the rows it ran by the layer's output and tells the layer no positions. On a GPU DeepSpeed
    compiles its own kernels at the first call.
    """

    def __init__(self, model: ModelConfig, length: int, density: float, sequences: int) -> None:
        super().__init__()
        self.layer = PlainLayer(model, length)
        self.wrapper = RandomLayerTokenDrop(self.layer)
        settings = {
            constants.RANDOM_LTD_MODEL_MASK_NAME: None,
            constants.RANDOM_LTD_MICRO_BATCH_SIZE: sequences,
            constants.RANDOM_LTD_HIDDEN_STATE_ORDER: "batch_seq_dim",
            constants.RANDOM_LTD_MODEL_TYPE: "decoder",
        }
        self.wrapper.init_config(settings, _FixedLength(math.ceil(density * length), length), 0)

    def compile_parts(self) -> None:
        """Compile what is wrapped; the wrapper's kernels are not PyTorch's."""
        self.layer.compile(dynamic=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, hidden] to the same shape."""
        return self.wrapper(hidden)


class _FixedLength:
    """The scheduler's interface, for one layer."""

    def __init__(self, kept: int, length: int) -> None:
        self.kept = kept
        self.random_ltd_layer_num = 1
        self.state: dict[str, Any] = {constants.RANDOM_LTD_MAX_VALUE: length}

    def get_current_seq(self) -> int:
        return self.kept
