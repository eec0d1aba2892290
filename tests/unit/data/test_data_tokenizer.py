"""The tokenizer: lossless, exact in a Hugging Face fast tokenizer, deaf to control tokens in text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers

from skipmega.data.tokenizer import Tokenizer, train_tokenizer
from skipmega.errors import DataError

HARD_TEXTS = [
    "",
    "def f():\n    if x:\n\t\treturn  1\n",
    "windows\r\nline\rends\n\n\n",
    "  leading and trailing  ",
    "\x00\x01\x1b\x7f",
    "漢字 é e\u0301 🙂 \u2028 \ufeff \ufffd",
    "<s> </s> <unk> <pad> <0x0A>",
]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_decoding_gives_back_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_decoding_gives_back_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_in_text_stay_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<s>b</s>c<pad>d<unk>")
    assert not {0, tokenizer.bos_id, tokenizer.eod_id, tokenizer.pad_id} & set(ids)


def test_special_ids_and_size(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eod_id, tokenizer.pad_id, tokenizer.size) == (1, 2, 3, 600)
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("x"), tokenizer.eod_id]) == "x"


def test_indentation_is_not_one_token_per_space(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("        ")) == 1


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("  \n\tabcdef().:=\"'_01é"), max_size=200))
def test_a_fast_tokenizer_gives_the_same_ids(tokenizer: Tokenizer, text: str) -> None:
    """What makes an export exact; see the training options."""
    assert _as_fast_tokenizer(tokenizer.path).encode(text).ids == tokenizer.encode(text)


def test_training_is_deterministic(tmp_path: Path, source_texts: list[str]) -> None:
    first, second = (train_tokenizer(source_texts, tmp_path / name, 400) for name in ("a.model", "b.model"))
    assert first.sha256 == second.sha256


@pytest.mark.parametrize(
    ("documents", "vocab_size", "message"),
    [
        ([], 400, "no text"),
        (["", ""], 400, "no text"),
        (["some words"], 400, r"400 is too large .* at most \d+"),
        (["some words"], 100, r"100 is too small .* at least \d+"),
    ],
)
def test_unusable_corpora_are_explained(
    tmp_path: Path, documents: list[str], vocab_size: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        train_tokenizer(documents, tmp_path / "t.model", vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_reader_is_kept(tmp_path: Path) -> None:
    def documents():  # type: ignore[no-untyped-def]
        yield "text " * 100
        raise DataError("corpus.jsonl:2: not a line of JSON")

    with pytest.raises(DataError, match=r"^corpus\.jsonl:2"):
        train_tokenizer(documents(), tmp_path / "t.model", 300)


def test_an_existing_model_is_not_replaced(tmp_path: Path, source_texts: list[str]) -> None:
    path = tmp_path / "t.model"
    path.write_bytes(b"precious")
    with pytest.raises(DataError, match="exists"):
        train_tokenizer(source_texts, path, 400)
    assert path.read_bytes() == b"precious"
    assert train_tokenizer(source_texts, path, 400, overwrite=True).size == 400


@pytest.mark.parametrize("content", [b"", b"not a model", b"{}"])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer.load(path)


def test_truncated_and_missing_models_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "cut.model"
    path.write_bytes(tokenizer.path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer.load(path)
    with pytest.raises(DataError, match="train_tokenizer"):
        Tokenizer.load(tmp_path / "missing.model")


def test_what_is_no_text_or_no_id_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="UTF-8"):
        tokenizer.encode("lone \ud800 surrogate")
    with pytest.raises(DataError, match="outside"):
        tokenizer.decode([600])


def _as_fast_tokenizer(path: Path) -> FastTokenizer:
    """A Hugging Face BPE with the pieces of a sentencepiece model."""
    pieces = SentencePieceProcessor(model_file=str(path))
    ids = {pieces.id_to_piece(token): token for token in range(pieces.get_piece_size())}
    merges = []
    for piece, token in ids.items():
        if not (pieces.is_byte(token) or pieces.is_control(token) or pieces.is_unknown(token)):
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            known = [(left, right) for left, right in halves if left in ids and right in ids]
            merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    fast = FastTokenizer(models.BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    fast.normalizer = normalizers.Replace(" ", "▁")
    return fast
