"""The tool as it is typed, what it warns of, and what it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_model import NOTES, DigitModel
from torch import Tensor

from skipmega import exit_codes
from skipmega.config import build_config
from skipmega.data.tokenizer import train_tokenizer
from skipmega.errors import CheckpointError, ConfigError, DataError, SkipmegaError
from skipmega.hf import native_to_hf_names, to_hf_config, write_export
from skipmega.hf.modeling_skipmega import SkipmegaForCausalLM
from skipmega.inspection.routers import inspect_routers, named_paths, open_subject
from skipmega.inspection.routers.report import prepare_output
from skipmega.inspection.routers.texts import read_texts
from skipmega.routing.state import RoutingState
from support.worlds import ROOT


def inspect(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/inspect_routing.py", *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=120, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_tool_inspects_a_run_folder_and_says_where(digit_model: DigitModel, tmp_path: Path) -> None:
    run, out = digit_model.checkpoint.parent, tmp_path / "new" / "folder"
    done = inspect(run, "--text", f"years={digit_model.texts['years']}", "--text", digit_model.texts[NOTES],
                   "--output", out, "--max-tokens", 150)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"open {out / 'index.html'}" in done.stdout
    assert "Layers per token, by kind: from 1.00" in done.stdout
    assert "tokens/s" in done.stderr  # speed and time left, while it works
    findings = json.loads((out / "inspection.json").read_text())
    assert findings["model"]["name"] == str(digit_model.checkpoint)
    sources = findings["text"]["sources"]
    assert [(source["name"], source["tokens"], source["complete"]) for source in sources] == [
        ("years", 150, False), ("notes", 150, False),
    ]  # fmt: skip
    assert "Only the beginning of years was read: 150 tokens (--max-tokens)." in done.stdout


def test_an_error_is_a_sentence(digit_model: DigitModel, tmp_path: Path) -> None:
    done = inspect(digit_model.checkpoint, "--text", tmp_path / "none.txt", "--output", tmp_path / "out")
    assert done.returncode == exit_codes.USER_ERROR
    assert done.stderr.strip().endswith(f"error: text {tmp_path / 'none.txt'} does not exist")


@pytest.mark.parametrize("limit", [1, 7, 40, 10_000])
def test_no_more_is_read_than_was_asked_for(digit_model: DigitModel, limit: int) -> None:
    """And what is read is the beginning of the whole."""
    with open_subject(digit_model.export) as subject:
        whole = read_texts(digit_model.texts, subject.vocabulary, 100_000)
        part = read_texts(digit_model.texts, subject.vocabulary, limit)
    for number, source in enumerate(part.sources):
        ids, expected = (
            np.concatenate([d for d, s in zip(t.documents, t.source_of, strict=True) if s == number])
            for t in (part, whole)
        )
        assert ids.tolist() == expected[:limit].tolist()
        assert source.complete == (limit >= len(expected))


def test_names_of_texts(tmp_path: Path) -> None:
    (tmp_path / "a=b.txt").write_text("text")
    (tmp_path / "notes.txt.gz").write_text("text")
    notes, odd = tmp_path / "notes.txt.gz", tmp_path / "a=b.txt"
    assert named_paths([f"talk={odd}", str(notes), str(odd)]) == {"talk": odd, "notes": notes, "a=b": odd}
    with pytest.raises(
        ConfigError, match=r"two texts are called 'notes', .*gz and .*txt: name them, name=path"
    ):
        named_paths([str(notes), f"notes={odd}"])
    with pytest.raises(DataError, match=r"text nowhere/talk.txt does not exist"):
        named_paths(["talk=nowhere/talk.txt"])


def test_what_makes_numbers_doubtful_is_said(digit_model: DigitModel, tmp_path: Path) -> None:
    short = {"short": tmp_path / "short.txt"}
    short["short"].write_text("so many trees in 1984")
    with open_subject(digit_model.export) as subject:

        def beyond_all(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            losses, executed = subject.trace(tokens, labels)
            return losses + 99, executed

        def broken(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            losses, executed = subject.trace(tokens, labels)
            return losses * torch.nan, executed

        how: dict[str, Any] = {"max_tokens": 99, "shown_tokens": 9, "show_progress": False}
        found = inspect_routers(replace(subject, trace=beyond_all), short, tmp_path / "out", **how)
        beyond, uncertain = found["warnings"]
        assert beyond.endswith("(5.95): is this the model's own tokenizer, and the model trained?")
        assert (
            uncertain == "No confidence intervals: they need 8 documents, or as many sequences of 24 tokens."
        )
        assert {entry["interval"] for entry in found["rank_correlation"]["with"].values()} == {None}

        with pytest.raises(DataError, match=r"loses no finite number of nats on \d+ of \d+ tokens"):
            inspect_routers(replace(subject, trace=broken), short, tmp_path / "out", **how)


TextCase = tuple[type[SkipmegaError], bytes, str, str]
BAD_TEXTS: dict[str, TextCase] = {
    "empty": (DataError, b"", "empty.txt", "the corpus is empty"),
    "only empty documents": (DataError, b'{"text": ""}\n', "none.jsonl", "none.jsonl holds no text"),
    "a picture": (DataError, b"\x89PNG\r\n\x1a\n", "picture.png", "picture.png:1: not valid UTF-8"),
    "another field": (DataError, b'{"content": "a"}\n', "other.jsonl", "no field 'text', only 'content'"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_texts_that_are_none_are_refused(case: str, digit_model: DigitModel, tmp_path: Path) -> None:
    error, content, name, message = BAD_TEXTS[case]
    (tmp_path / name).write_bytes(content)
    with open_subject(digit_model.export) as subject, pytest.raises(error, match=message):
        read_texts({"text": tmp_path / name}, subject.vocabulary, 10)


def test_models_that_cannot_be_inspected_are_refused(digit_model: DigitModel, tmp_path: Path) -> None:
    larger = train_tokenizer([f"word{i} {chr(200 + i)}" for i in range(400)], tmp_path / "larger.model", 700)
    cases: list[tuple[type[SkipmegaError], str, Callable[[], Any]]] = [
        (CheckpointError, "holds no complete checkpoint", lambda: open_subject(tmp_path)),
        (
            ConfigError,
            r"dense routes none of its 3 layers \(router always\): there is nothing to inspect",
            lambda: open_subject(write_router(tmp_path / "dense", "always", digit_model.tokenizer)),
        ),
        (
            CheckpointError,
            r"export .*bare has no tokenizer: give its sentencepiece model \(--tokenizer\)",
            lambda: open_subject(write_router(tmp_path / "bare", "gumbel", None)),
        ),
        (
            ConfigError,
            r"the tokenizer has 700 ids, more than the vocabulary of 384 of .*: give the tokenizer that",
            lambda: open_subject(digit_model.checkpoint, tokenizer=larger.path),
        ),
        (
            DataError,
            "cannot read tokenizer .*gone.model",
            lambda: open_subject(digit_model.checkpoint, tokenizer=tmp_path / "gone.model"),
        ),
        (
            ConfigError,
            "eval_density=0.3 moves the thresholds of a native checkpoint, and .* is an export",
            lambda: open_subject(digit_model.export, eval_density=0.3),
        ),
    ]
    for error, message, opened in cases:
        with pytest.raises(error, match=message), opened():
            pass


def write_router(folder: Path, router: str, tokenizer: Path | None) -> Path:
    """An export of three layers."""
    shape = {"num_layers": 3, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 8}
    model = {**shape, "vocab_size": 384}
    config = build_config({"model": model, "routing": {"router": router}}, source="the test")
    weights = SkipmegaForCausalLM(to_hf_config(config)).state_dict()
    state = {native: weights[hf] for native, hf in native_to_hf_names(config).items()}
    routing = RoutingState(config, config.routed_layers, torch.device("cpu"))
    return write_export(folder, config, state, tokenizer, routing, 0)


def test_folders_that_cannot_be_written_to_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot make the output folder .*file/out: Not a directory; name"):
        prepare_output(tmp_path / "file" / "out")
    # by hand, since the test may be root's, who may write everywhere
    monkeypatch.setattr(os, "access", lambda *asked: False)
    with pytest.raises(ConfigError, match=r"output folder .*here is not writable: name another"):
        prepare_output(tmp_path / "here")
