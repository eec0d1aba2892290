"""The exported tokenizer gives sentencepiece's ids, whatever the text."""

import inspect
import io
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import zstandard
from hf_reference import export, make_config, random_state
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from skipmega.config import loader
from skipmega.errors import ConfigError, DataError
from skipmega.hf import count_mismatches, export_tokenizer

CORPUS = Path(__file__).parents[4] / "shared" / "corpus"
SOURCE = inspect.getsource(inspect) + inspect.getsource(loader)
OPTIONS = {
    "model_type": "bpe",
    "vocab_size": 2000,
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "byte_fallback": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
    "minloglevel": 2,
}
PROBES = [
    "",
    " ",
    "  two spaces lead, two trail  ",
    "\ttab\n\n newline\r\n\0",
    "a <s>literal</s> <unk><pad> <0x0A>",
    "\u2581 is the space of sentencepiece",
    "caf\u00e9 cafe\u0301 \u65e5\u672c\u8a9e \U0001f52c\ufffd\u2028",
]


def train(path: Path, texts: Iterable[str], **options: Any) -> Path:
    """A sentencepiece model of ``texts`` at ``path``.model."""
    lines = (line for text in texts for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(path), **{**OPTIONS, **options}
    )
    return path.with_suffix(".model")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model trained on Python source, and the folder of its export."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model = train(folder / "source", [SOURCE])
    export_tokenizer(model, folder / "hf")
    return model, folder / "hf"


@cache
def both(model: Path, hf_dir: Path) -> tuple[Any, Any]:
    return sentencepiece.SentencePieceProcessor(model_file=str(model)), AutoTokenizer.from_pretrained(
        str(hf_dir)
    )


def read_documents(name: str, number: int) -> list[str]:
    if not (CORPUS / name).exists():
        pytest.skip(f"no corpus at {CORPUS}")
    with zstandard.open(CORPUS / name, "rb") as raw:
        lines = io.TextIOWrapper(raw, encoding="utf-8")
        return [json.loads(line)["text"] for line, _ in zip(lines, range(number), strict=False)]


def test_source_and_probes_get_the_same_ids(exported: tuple[Path, Path]) -> None:
    assert count_mismatches(*exported, [SOURCE, *SOURCE.split("\n"), *PROBES]) == 0


def test_real_documents_get_the_same_ids(tmp_path: Path) -> None:
    documents = read_documents("docs-train.jsonl.zst", 1000)
    model = train(tmp_path / "documents", documents[:200])
    export_tokenizer(model, tmp_path)
    assert count_mismatches(model, tmp_path, documents) == 0


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.lists(st.sampled_from(["ab", "aab", " ", "  ", "-", "=-", "\n", "<s>", "</s>", "self."])).map(
            "".join
        ),
    )
)
def test_any_text_gets_the_same_ids(exported: tuple[Path, Path], text: str) -> None:
    native, tokenizer = both(*exported)
    ids = native.encode(text)
    assert tokenizer(text).input_ids == tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == native.decode(ids) == text


def test_mismatches_are_counted(exported: tuple[Path, Path], tmp_path: Path) -> None:
    other = train(tmp_path / "other", [SOURCE], vocab_size=600)
    assert count_mismatches(other, exported[1], ["import this", "", "def main():"]) == 2


def test_special_tokens_are_known_but_not_added_and_there_is_no_beginning_of_text(
    exported: tuple[Path, Path],
) -> None:
    _, tokenizer = both(*exported)
    named = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert named == (0, None, 2, 3)
    batch = tokenizer(["a", "a longer one"], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch.input_ids[0][0] == 3
    assert tokenizer.decode([1, *batch.input_ids[1], 2], skip_special_tokens=True) == "a longer one"


@pytest.mark.parametrize(
    "options", [{"add_dummy_prefix": True}, {"user_defined_symbols": ["<|doc|>", "<|do"]}], ids=str
)
def test_other_convertible_models(tmp_path: Path, options: dict[str, Any]) -> None:
    model = train(tmp_path / "other", [SOURCE], **options)
    export_tokenizer(model, tmp_path)
    texts = ["<|doc|>x<|doc <|do<|doc|> ", "import <|doc|>", *PROBES, *SOURCE.split("\n")[:500]]
    assert count_mismatches(model, tmp_path, texts) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 600}, "model_type=unigram.*train it with model_type=bpe"),
        ({"byte_fallback": False}, "byte_fallback=false"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization_rule_name=nmt_nfkc"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=true"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix=true"),
        ({"user_defined_symbols": ["two words"]}, "symbols that contain a space"),
        ({"user_defined_symbols": ["<x>"], "add_dummy_prefix": True}, "add_dummy_prefix=true together"),
    ],
)
def test_models_without_an_exact_form_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = train(tmp_path / "refused", [SOURCE], **options)
    with pytest.raises(ConfigError, match=message):
        export_tokenizer(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.model: No such file"):
        export_tokenizer(tmp_path / "absent.model", tmp_path)
    for content in (b"no model", b""):
        (tmp_path / "damaged.model").write_bytes(content)
        with pytest.raises(DataError, match=r"damaged\.model is"):
            export_tokenizer(tmp_path / "damaged.model", tmp_path)


def test_model_export_carries_the_tokenizer(exported: tuple[Path, Path], tmp_path: Path) -> None:
    config = make_config(vocab_size=2048)
    folder = export(tmp_path / "export", config, random_state(config), exported[0])
    assert count_mismatches(exported[0], folder, PROBES) == 0
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        assert (values.get("bos_token_id"), values["eos_token_id"], values["pad_token_id"]) == (None, 2, 3)


def test_an_export_continues_text_and_begins_it_after_the_end_of_a_document(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    """As training does: nothing of an export is conditioned on ``<s>``, which no model has seen."""
    harness = pytest.importorskip("lm_eval.models.huggingface")
    config = make_config(vocab_size=2048)
    folder = export(tmp_path / "export", config, random_state(config), exported[0])
    evaluated = harness.HFLM(str(folder), trust_remote_code=True, device="cpu", dtype="float32")
    assert evaluated.prefix_token_id == 2
    assert evaluated.tok_encode("import <s>") == both(*exported)[0].encode("import <s>")
    inputs = evaluated.tokenizer(["import json", "import os.path"], return_tensors="pt", padding=True)
    continued = evaluated.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(continued[:, : inputs.input_ids.shape[1]], inputs.input_ids)
    assert continued.shape[1] > inputs.input_ids.shape[1]


def test_tokenizer_larger_than_the_model_is_refused(exported: tuple[Path, Path], tmp_path: Path) -> None:
    config = make_config(vocab_size=1024)
    with pytest.raises(ConfigError, match=r"has 2000 ids, more than the model's model.vocab_size=1024"):
        export(tmp_path / "export", config, random_state(config), exported[0])
    assert not list(tmp_path.iterdir())
