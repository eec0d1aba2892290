"""megatron-core's mixture of experts with one expert and a capacity below the number of tokens: a skip."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils, router
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from skipmega.config import ModelConfig
from skipmega.experiments.speed.peers.plain import PlainLayer
from skipmega.parallel.cpu import run_megatron_on_cpu


class OneExpert(nn.Module):
    """Dense attention; the feed-forward network runs the ``density`` share of tokens with the best scores of
    the micro-batch, times the sigmoid of the score.

    Needs a grid (:func:`skipmega.parallel.grid.create_grid`), which has megatron-core's groups.
    """

    def __init__(self, model: ModelConfig, length: int, density: float) -> None:
        super().__init__()
        self.layer = PlainLayer(model, length)
        del self.layer.gate, self.layer.up, self.layer.down
        swiglu = model.activation == "swiglu"
        config = TransformerConfig(
            num_layers=1,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            ffn_hidden_size=model.ffn_size,
            moe_ffn_hidden_size=model.ffn_size,
            add_bias_linear=False,
            gated_linear_unit=swiglu,
            activation_func=F.silu if swiglu else _gelu,
            num_moe_experts=1,
            moe_router_topk=1,
            moe_router_load_balancing_type="none",
            moe_router_score_function="sigmoid",
            moe_expert_capacity_factor=density,
            moe_token_drop_policy="probs",
            moe_token_dispatcher_type="allgather",
            use_cpu_initialization=True,
        )
        # without Transformer Engine megatron-core (0.16.1) never defines what its router then looks up
        vars(moe_utils).setdefault("te_general_gemm", None)
        if not torch.cuda.is_available():
            run_megatron_on_cpu(router)
        spec = get_moe_module_spec(use_te=False, num_experts=1, moe_grouped_gemm=False)
        self.experts = MoELayer(config, spec.submodules)
        self.attend: Callable[[Tensor], Tensor] = self.layer.attend

    def compile_parts(self) -> None:
        """Compile the dense half; megatron-core's reads sizes back from the device."""
        self.attend = torch.compile(self.layer.attend, dynamic=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, hidden] to the same shape."""
        middle = hidden + self.attend(hidden)
        return middle + self.experts(self.layer.mlp_norm(middle))[0]


def _gelu(inner: Tensor) -> Tensor:
    return F.gelu(inner, approximate="tanh")
