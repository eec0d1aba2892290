"""The Hugging Face model computes what its semantics say, with and without a cache, packed or not."""

import pytest
import torch
from hf_reference import build_model, make_config, random_state, reference
from torch import Tensor
from torch.nn import functional as F

from skipmega.hf.configuration_skipmega import SkipmegaConfig

CONFIGS = {
    "gelu": make_config(),
    "swiglu, grouped queries": make_config(activation="swiglu", num_key_value_heads=2),
    "one key head, wide heads": make_config(num_key_value_heads=1, head_dim=10),
    "untied, other rotary base and epsilon": make_config(
        tie_embeddings=False, rope_theta=100.0, norm_epsilon=1e-2
    ),
    "every layer routed": make_config({"dense_first": 0, "dense_last": 0}),
    "dense": make_config({"router": "always"}),
}
ROUTED = CONFIGS["swiglu, grouped queries"]


def tokens_of(shape: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_and_decisions_are_the_references(name: str, attention: str) -> None:
    config, tokens = CONFIGS[name], tokens_of((2, 11))
    state = random_state(config)
    outputs = build_model(config, state, attention)(tokens, output_execution=True)
    logits, executed = reference(config, state, tokens)
    assert torch.equal(torch.stack(outputs.executed), executed)
    torch.testing.assert_close(outputs.logits.double(), logits, atol=2e-5, rtol=0)
    routed = [layer for layer in range(5) if config.layer_is_routed(layer)]
    assert not routed or 0 < executed[routed].double().mean() < 1


@pytest.mark.parametrize("execute", [True, False])
@torch.no_grad()
def test_all_or_none_execute(execute: bool) -> None:
    config, tokens = ROUTED, tokens_of((2, 9))
    state = random_state(config)
    for name in state:  # channel 0 of the residual stream is 5 in every token and layer
        if name.endswith(("attention.output.weight", "mlp.down.weight")):
            state[name][0] = 0
        if name.endswith("router.weight"):
            state[name] = torch.zeros_like(state[name])  # a tie, which skips
            state[name][1, 0] = float(execute)
        if name.endswith("norm.weight"):
            state[name] = state[name].abs()
    state["embedding.weight"][:, 0] = 5
    model = build_model(config, state)
    outputs = model(tokens, output_execution=True)
    logits, executed = reference(config, state, tokens)
    torch.testing.assert_close(outputs.logits.double(), logits, atol=2e-5, rtol=0)
    assert torch.equal(torch.stack(outputs.executed), executed)
    assert executed[1:4].all() if execute else not executed[1:4].any()
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        model.generate(tokens, use_cache=True, **greedy), model.generate(tokens, use_cache=False, **greedy)
    )


@torch.no_grad()
def test_skipped_rows_pass_unchanged_and_cost_nothing() -> None:
    model, tokens = build_model(ROUTED, random_state(ROUTED)), tokens_of((2, 11))
    ran: dict[int, int] = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _, inputs, index=index: ran.update({index: inputs[0].numel() // inputs[0].shape[-1]})
        )
    outputs = model(tokens, output_hidden_states=True, output_execution=True)
    assert len(outputs.hidden_states) == 6
    for index, executed in enumerate(outputs.executed):
        assert ran[index] == executed.sum()
        if index < 4:  # the last state is past the final norm
            before, after = outputs.hidden_states[index : index + 2]
            assert torch.equal(before[~executed], after[~executed])
            assert not torch.equal(before[executed], after[executed])


@torch.no_grad()
def test_layer_that_nobody_executes_makes_only_keys_and_values() -> None:
    state = random_state(ROUTED)
    state["layers.2.router.weight"].zero_()
    model = build_model(ROUTED, state)
    calls: list[str] = []
    for name, module in model.model.layers[2].named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    outputs = model(tokens_of((2, 4)), use_cache=True)
    assert calls == ["", "input_layernorm", "self_attn.k_proj", "self_attn.v_proj", "router"]
    assert [layer.get_seq_length() for layer in outputs.past_key_values.layers] == [4] * 5


@pytest.mark.parametrize("chunks", [[1] * 12, [7, 1, 1, 3], [12]])
@torch.no_grad()
def test_cached_logits_equal_uncached(chunks: list[int]) -> None:
    model, tokens = build_model(ROUTED, random_state(ROUTED)), tokens_of((3, 12))
    expected = model(tokens, use_cache=False).logits
    cache, parts = None, []
    for chunk in tokens.split(chunks, dim=1):
        outputs = model(chunk, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    ],
    ids=["greedy", "sampling", "beam"],
)
def test_generation_is_the_same_without_a_cache(how: dict[str, object]) -> None:
    model, tokens = build_model(ROUTED, random_state(ROUTED)), tokens_of((2, 5))
    generated = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        generated.append(model.generate(tokens, max_new_tokens=12, use_cache=use_cache, **how))
    assert torch.equal(*generated)
    assert generated[0].shape[1] == 17


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_left_padding_changes_nothing(attention: str) -> None:
    model, tokens = build_model(ROUTED, random_state(ROUTED), attention), tokens_of((2, 10))
    mask = torch.ones_like(tokens)
    tokens[1, :4], mask[1, :4] = 3, 0
    batch = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(batch[:1], model(tokens[:1]).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch[1:, 4:], model(tokens[1:, 4:]).logits, atol=1e-5, rtol=0)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 3}
    generated = model.generate(tokens, attention_mask=mask, **greedy)
    assert torch.equal(generated[1:, 4:], model.generate(tokens[1:, 4:], **greedy))


def test_loss_is_next_token_cross_entropy_and_trains_all_but_the_routers() -> None:
    model, tokens = build_model(ROUTED, random_state(ROUTED)), tokens_of((2, 11))
    labels = tokens.clone()
    labels[0, :4] = -100
    outputs = model(tokens, labels=labels)
    expected = F.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {f"model.layers.{layer}.router.weight" for layer in (1, 2, 3)}


@torch.no_grad()
def test_bf16_runs_and_stays_near_fp32() -> None:
    dense, tokens = CONFIGS["dense"], tokens_of((2, 11))
    model = build_model(dense, random_state(dense))
    expected = model(tokens).logits
    logits = model.to(torch.bfloat16)(tokens).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.25, rtol=0)
    routed = build_model(ROUTED, random_state(ROUTED)).to(torch.bfloat16)
    assert routed(tokens).logits.isfinite().all()
    assert routed.generate(tokens, max_new_tokens=4).shape == (2, 15)


@torch.no_grad()
def test_only_wanted_logits_are_made() -> None:
    model, tokens = build_model(ROUTED, random_state(ROUTED)), tokens_of((2, 11))
    everything = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, everything[:, -2:])
    torch.testing.assert_close(
        model(tokens, logits_to_keep=torch.tensor([0, 4])).logits, everything[:, [0, 4]]
    )


def test_impossible_inputs_are_refused() -> None:
    model = build_model(ROUTED, random_state(ROUTED))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(None)
    with pytest.raises(ValueError, match="outside the 2 layers"):
        SkipmegaConfig(num_hidden_layers=2, routed_layers=[1, 2])
    with pytest.raises(ValueError, match="router_thresholds has 2 entries, routed_layers 1: give one"):
        SkipmegaConfig(routed_layers=[1], router_thresholds=[0.0, 1.0])
    with pytest.raises(ValueError, match="wrap='mlps' is none of layer, mlp, attention"):
        SkipmegaConfig(routed_layers=[1], wrap="mlps")
    with pytest.raises(
        ValueError, match=r"router='always' routes no layer, routed_layers=\[1\] must be empty"
    ):
        SkipmegaConfig(routed_layers=[1], router="always")
