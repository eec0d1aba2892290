"""Write, load and verify a Hugging Face export: weights, configuration, model code and tokenizer in a folder.

An export loads with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` on a machine
that has torch and transformers but no skipmega.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from skipmega.config import RunConfig
from skipmega.errors import CheckpointError, ConfigError
from skipmega.hf import configuration_skipmega, modeling_skipmega
from skipmega.hf.configuration_skipmega import SkipmegaConfig
from skipmega.hf.naming import to_hf_config, to_hf_state
from skipmega.hf.tokenizer import export_tokenizer
from skipmega.routing.state import RoutingState

_CODE_FILES = (Path(configuration_skipmega.__file__), Path(modeling_skipmega.__file__))
_AUTO_MAP = {
    "AutoConfig": "configuration_skipmega.SkipmegaConfig",
    "AutoModel": "modeling_skipmega.SkipmegaModel",
    "AutoModelForCausalLM": "modeling_skipmega.SkipmegaForCausalLM",
}
_EXPORT_FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    *(path.name for path in _CODE_FILES),
)


def write_export(
    out_dir: str | Path,
    config: RunConfig,
    state: Mapping[str, Tensor],
    tokenizer_path: str | Path | None,
    routing: RoutingState,
    step: int,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """Write an export, whole or not at all; an earlier export at ``out_dir`` is replaced.

    Args:
        config: the run's configuration, with the vocabulary resolved.
        state: the model's full tensors by their native names; shapes as
            :class:`skipmega.models.decoder.DecoderStage` has them on a grid of one.
        tokenizer_path: the sentencepiece model; without it the export has no tokenizer.
        routing: the state of all routed layers, which gives the routers' thresholds.
        step: optimizer steps done, which give the routers' temperature.
        dtype: of the weights in the export.
        max_shard_size: largest size of one safetensors file, e.g. ``"500MB"``.

    Returns:
        ``out_dir`` as a path.

    Raises:
        CheckpointError: ``state`` does not fit ``config``, or ``out_dir`` holds something else.
        ConfigError: the model or the tokenizer has no Hugging Face form, or they do not fit together.
        DataError: the tokenizer is missing or damaged.
    """
    target = Path(os.path.abspath(out_dir))
    _check_target(target)
    hf_config = to_hf_config(config, routing, step)
    hf_config.dtype = dtype
    hf_config.architectures = ["SkipmegaForCausalLM"]
    hf_config.auto_map = dict(_AUTO_MAP)
    tensors = {
        name: tensor.to("cpu", dtype).contiguous() for name, tensor in to_hf_state(state, config).items()
    }
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        if tokenizer_path is not None:
            _write_tokenizer(partial, hf_config, tokenizer_path)
        hf_config.save_pretrained(partial)
        _generation_config(hf_config).save_pretrained(partial)
        save_torch_state_dict(tensors, partial, max_shard_size=max_shard_size)
        for path in _CODE_FILES:
            shutil.copyfile(path, partial / path.name)
        (partial / "README.md").write_text(_model_card(hf_config), encoding="utf-8")
        _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def load_export(export_dir: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The exported model in evaluation mode, loaded as any user of the export loads it.

    Args:
        dtype: of the loaded weights; left out, that of the export.
    """
    _read_config(Path(export_dir))
    return AutoModelForCausalLM.from_pretrained(
        str(export_dir), trust_remote_code=True, dtype=dtype if dtype is not None else "auto"
    )


@torch.no_grad()
def verify_export(
    export_dir: str | Path, native_logits: Tensor, tokens: Tensor, tolerance: float = 1e-4
) -> float:
    """Compare the export's logits, computed in fp32, with those of the native model.

    Args:
        native_logits: fp32 [b, s, V], from the native model's evaluation of ``tokens``.
        tokens: integer ids [b, s].
        tolerance: largest absolute difference allowed. Weights exported in bf16 are rounded and need a
            larger one than fp32's default.

    Returns:
        the largest absolute difference.

    Raises:
        CheckpointError: the shapes differ, or the difference exceeds ``tolerance`` or is not a number.
    """
    model = load_export(export_dir, dtype=torch.float32)
    logits = model(tokens.to(model.device), use_cache=False).logits
    if logits.shape != native_logits.shape:
        raise CheckpointError(
            f"export {export_dir} gives logits of shape {tuple(logits.shape)}, the native model "
            f"{tuple(native_logits.shape)}: export again with the configuration of the run"
        )
    difference = (logits - native_logits.to(logits)).abs().max().item()
    if not difference <= tolerance:
        raise CheckpointError(
            f"export {export_dir} differs from the native model by {difference:.3g} in a logit, allowed is "
            f"{tolerance:.3g}: do not use it; export in float32 with the configuration of the run"
        )
    return difference


def _check_target(target: Path) -> None:
    """Refuse to replace anything but an empty folder or an earlier export to which nothing was added."""
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"export target {target} is a file: name a folder")
    foreign = [
        entry.name for entry in target.iterdir() if not any(entry.match(pattern) for pattern in _EXPORT_FILES)
    ]
    if foreign:
        raise CheckpointError(
            f"export target {target} holds files that no export wrote {sorted(foreign)[:3]}: name another "
            "folder or empty this one"
        )
    if any(target.iterdir()):
        _read_config(target)


def _read_config(export_dir: Path) -> dict[str, Any]:
    """``config.json`` of an export; a :class:`CheckpointError` if the folder holds no skipmega export."""
    path = export_dir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{export_dir} holds no skipmega export: cannot read {path} ({error})"
        ) from None
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type != SkipmegaConfig.model_type:
        raise CheckpointError(
            f"{export_dir} holds no skipmega export: {path} has model_type={model_type!r}, not "
            f"{SkipmegaConfig.model_type!r}"
        )
    return values


def _write_tokenizer(folder: Path, hf_config: SkipmegaConfig, tokenizer_path: str | Path) -> None:
    """Write the tokenizer and set its special token ids in ``hf_config``."""
    tokenizer = export_tokenizer(tokenizer_path, folder)
    if len(tokenizer) > hf_config.vocab_size:
        raise ConfigError(
            f"data.tokenizer={tokenizer_path} has {len(tokenizer)} ids, more than the model's "
            f"model.vocab_size={hf_config.vocab_size}: give the tokenizer that the run was trained with"
        )
    hf_config.eos_token_id = tokenizer.eos_token_id
    hf_config.pad_token_id = tokenizer.pad_token_id


def _generation_config(hf_config: SkipmegaConfig) -> GenerationConfig:
    """Token ids only: a length set here would override the limits of evaluation harnesses."""
    pad = hf_config.pad_token_id if hf_config.pad_token_id is not None else hf_config.eos_token_id
    return GenerationConfig(eos_token_id=hf_config.eos_token_id, pad_token_id=pad)


def _replace(partial: Path, target: Path) -> None:
    """Move ``partial`` to ``target``; the earlier export, if any, is removed only after that."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _model_card(hf_config: SkipmegaConfig) -> str:
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [skipmega, skiplayer]
---
# A skipmega language model

- Layers: {hf_config.num_hidden_layers}. {_routers(hf_config)}
- Hidden size: {hf_config.hidden_size}.
- Trained on sequences of {hf_config.max_position_embeddings} tokens.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("The history of", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

- Needs transformers >= 5. `model(..., output_execution=True).executed` tells which tokens ran which layer.
- The tokenizer, if the folder has one, adds no special tokens, has no `bos_token` (training knows none) and
  reads a literal `<s>` as plain text.
- Key/value caches hold every token in every layer: a token that skips a layer still writes its keys and
  values there.
"""


def _routers(hf_config: SkipmegaConfig) -> str:
    if not hf_config.routed_layers:
        return "Every token runs all of them."
    part = {"layer": "layer", "mlp": "layer's feed-forward network", "attention": "layer's attention"}
    return f"""In {len(hf_config.routed_layers)} of them a router (`{hf_config.router}`) decides for each
  token whether it runs the {part[hf_config.wrap]} or passes unchanged (SkipLayer, arXiv 2311.15436).
  Higher `router_thresholds` in `config.json` let fewer tokens in (not for `highway` and `never`)."""
