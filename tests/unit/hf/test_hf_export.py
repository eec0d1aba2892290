"""What is exported is the native model, whole, and loads where skipmega is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_reference import build_model, export, make_config, random_state, reference
from torch import Tensor
from transformers import AutoModel

from skipmega.errors import CheckpointError, ConfigError
from skipmega.hf import (
    load_export,
    native_to_hf_names,
    to_hf_config,
    to_hf_state,
    verify_export,
)

CONFIG = make_config(activation="swiglu", num_key_value_heads=2, rope_theta=500.0)
UNTIED = make_config(tie_embeddings=False)
TOKENS = torch.arange(22).reshape(2, 11) * 7 % 64

LOAD_WITHOUT_SKIPMEGA = """
import sys
sys.modules["skipmega"] = None  # importing it would fail
import torch
from transformers import AutoConfig, AutoModelForCausalLM

folder, tokens, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = torch.load(tokens)
generated = model.generate(tokens, max_new_tokens=5, do_sample=False)
torch.save((model(tokens).logits, generated), out)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "skipmega"
"""


def native_logits(config: object = CONFIG) -> Tensor:
    return reference(config, random_state(config), TOKENS)[0].float()


def test_export_loads_where_skipmega_is_not_installed(tmp_path: Path) -> None:
    folder = export(tmp_path / "export", CONFIG, random_state(CONFIG), max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    torch.save(TOKENS, tmp_path / "tokens.pt")
    subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_SKIPMEGA, folder, tmp_path / "tokens.pt", tmp_path / "out.pt"],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path,
        check=True,
    )
    logits, generated = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(logits, native_logits(), atol=2e-5, rtol=0)
    model = build_model(CONFIG, random_state(CONFIG))
    assert torch.equal(generated, model.generate(TOKENS, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_verification_passes_on_the_native_logits(tmp_path: Path, config: object) -> None:
    folder = export(tmp_path / "new" / "export", config, random_state(config))
    assert verify_export(folder, native_logits(config), TOKENS) < 2e-5
    model = load_export(folder)
    assert not model.training
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (config is CONFIG)
    base = AutoModel.from_pretrained(str(folder), trust_remote_code=True)
    torch.testing.assert_close(
        base(TOKENS).last_hidden_state, model(TOKENS, output_hidden_states=True).hidden_states[-1]
    )


def test_verification_refuses_another_model(tmp_path: Path) -> None:
    folder = export(tmp_path / "export", CONFIG, random_state(CONFIG, seed=5))
    with pytest.raises(CheckpointError, match="differs from the native model by"):
        verify_export(folder, native_logits(), TOKENS)
    with pytest.raises(CheckpointError, match="differs from the native model by nan"):
        verify_export(folder, native_logits() * torch.nan, TOKENS)
    with pytest.raises(CheckpointError, match="logits of shape"):
        verify_export(folder, native_logits()[..., :-1], TOKENS)


def test_export_keeps_the_dtype_asked_for(tmp_path: Path) -> None:
    folder = export(tmp_path / "export", CONFIG, random_state(CONFIG), dtype=torch.bfloat16)
    assert {p.dtype for p in load_export(folder).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_export(folder, torch.float32).parameters()} == {torch.float32}


def test_generation_config_sets_no_length(tmp_path: Path) -> None:
    folder = export(tmp_path / "export", CONFIG, random_state(CONFIG))
    values = json.loads((folder / "generation_config.json").read_text())
    assert not [name for name in values if "length" in name or "tokens" in name]


def test_earlier_export_is_replaced_and_anything_else_refused(tmp_path: Path) -> None:
    folder, state = tmp_path / "export", random_state(CONFIG)
    folder.mkdir()
    export(folder, CONFIG, state, max_shard_size="20KB")
    export(folder, CONFIG, state)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    (folder / "results.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no export wrote \['results.json'\]"):
        export(folder, CONFIG, state)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type='llama'"):
        export(other, CONFIG, state)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        export(tmp_path / "file", CONFIG, state)


def test_failed_export_leaves_the_earlier_one_and_no_litter(tmp_path: Path) -> None:
    folder = export(tmp_path / "export", CONFIG, random_state(CONFIG))
    before = (folder / "model.safetensors").read_bytes()
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(b"no model")
    with pytest.raises(Exception, match=r"damaged\.model"):
        export(folder, CONFIG, random_state(CONFIG, seed=1), damaged)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.model", "export"]


def test_loading_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no skipmega export"):
        load_export(tmp_path)


def test_capacity_limited_evaluation_has_no_hugging_face_form() -> None:
    limited = {"eval_capacity_factor": 1.25, "group_size": 16}
    with pytest.raises(ConfigError, match=r"routing.eval_capacity_factor=1.25 .* set it to null"):
        to_hf_config(make_config(limited))
    to_hf_config(make_config({"router": "always", **limited}))


def test_keys_of_executed_tokens_only_have_no_hugging_face_form() -> None:
    config = make_config({"keys_values": "executed"})
    with pytest.raises(
        ConfigError, match=r"routing.keys_values=executed .* evaluate the checkpoint natively"
    ):
        to_hf_config(config)
    to_hf_config(make_config({"keys_values": "executed", "router": "always"}))


PREDICTED = make_config({"router": "topk", "router_bias": True, "stand_in": "predictor"})
COIN = make_config({"router": "fixed_input"})


@pytest.mark.parametrize("config", [CONFIG, UNTIED, PREDICTED, COIN], ids=["tied", "untied", "topk", "coin"])
def test_every_native_tensor_has_its_own_name(config: object) -> None:
    state = random_state(config)
    names = native_to_hf_names(config)
    renamed = to_hf_state(state, config)
    assert names.keys() == state.keys()
    assert len(renamed) == len(state)
    assert all(renamed[names[name]] is tensor for name, tensor in state.items())
    whole = build_model(config, state).state_dict()
    # the model of a tied configuration lists the embedding a second time, as its head
    assert whole.keys() - renamed.keys() == ({"lm_head.weight"} if config.model.tie_embeddings else set())
    assert renamed.keys() <= whole.keys()


def test_state_that_does_not_fit_is_refused() -> None:
    state = random_state(CONFIG)
    with pytest.raises(CheckpointError, match=r"1 are unknown \['stray'\]"):
        to_hf_state({**state, "stray": state["final_norm.weight"]}, CONFIG)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \['layers.1.router.weight'\]"):
        to_hf_state({name: t for name, t in state.items() if name != "layers.1.router.weight"}, CONFIG)
    with pytest.raises(CheckpointError, match=r"embedding.weight has shape \(63, 24\).*\(64, 24\)"):
        to_hf_state({**state, "embedding.weight": state["embedding.weight"][1:]}, CONFIG)
