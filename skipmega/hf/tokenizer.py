"""From a sentencepiece BPE model to a Hugging Face tokenizer that gives the same ids.

The export loads with plain ``AutoTokenizer``, without remote code. It adds no ``<s>`` or ``</s>``, because
training encodes without special tokens, and it reads a literal ``<s>`` in a text as three characters, as
sentencepiece does (``split_special_tokens``). It names no ``bos_token``: training never shows ``<s>`` to the
model, and evaluation harnesses would begin texts with it, where training begins them after ``</s>``. What is
not exact:

- The bare ``tokenizers.Tokenizer.from_file("tokenizer.json")`` does turn a literal ``<s>`` into its id; the
  setting that prevents it lives in ``tokenizer_config.json``.
- Where two splits of one piece overlap in a periodic text, sentencepiece merges the leftmost pair and
  ``tokenizers`` the pair it has ranked first. Neither documents nor random periodic strings showed a case;
  :func:`count_mismatches` measures a given corpus.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from skipmega.errors import ConfigError, DataError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def export_tokenizer(sentencepiece_model: str | Path, out_dir: str | Path) -> PreTrainedTokenizerFast:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``out_dir`` and return the tokenizer.

    Raises:
        DataError: the file is missing or is no sentencepiece model.
        ConfigError: a model that cannot be converted exactly: unigram, or trained with options that
            ``tokenizers`` cannot reproduce.
    """
    proto = _read_model(Path(sentencepiece_model))
    _check_convertible(proto, Path(sentencepiece_model))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_build_backend(proto),
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        **_special_tokens(proto),
    )
    tokenizer.save_pretrained(out_dir)
    return tokenizer


def count_mismatches(sentencepiece_model: str | Path, hf_dir: str | Path, texts: Iterable[str]) -> int:
    """How many of ``texts`` get other ids, or decode to another text, than with the sentencepiece model."""
    native = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    exported = AutoTokenizer.from_pretrained(str(hf_dir))
    mismatches = 0
    for text in texts:
        ids = native.encode(text)
        same = exported(text).input_ids == ids and exported.decode(ids) == native.decode(ids)
        mismatches += not same
    return mismatches


def _read_model(path: Path) -> Any:
    """The model file as a sentencepiece ``ModelProto``."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read sentencepiece model {path}: {error.strerror}") from None
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError:
        raise DataError(f"{path} is not a sentencepiece model: give the trained .model file") from None
    if not proto.pieces:
        raise DataError(f"{path} is a sentencepiece model without pieces: train it again")
    return proto


def _check_convertible(proto: Any, path: Path) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kind = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}[trainer.model_type]
    user_defined = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    demands = [
        (kind == "bpe", f"model_type={kind}", "model_type=bpe"),
        (trainer.byte_fallback, "byte_fallback=false", "byte_fallback=true"),
        (
            not normalizer.precompiled_charsmap,
            f"normalization_rule_name={normalizer.name}",
            "normalization_rule_name=identity",
        ),
        (
            not normalizer.remove_extra_whitespaces,
            "remove_extra_whitespaces=true",
            "remove_extra_whitespaces=false",
        ),
        (normalizer.escape_whitespaces, "escape_whitespaces=false", "escape_whitespaces=true"),
        (
            not trainer.treat_whitespace_as_suffix,
            "treat_whitespace_as_suffix=true",
            "treat_whitespace_as_suffix=false",
        ),
        (
            not (normalizer.add_dummy_prefix and user_defined),
            "add_dummy_prefix=true together with user-defined symbols",
            "only one of the two",
        ),
        (
            not any(SPACE in symbol or " " in symbol for symbol in user_defined),
            "user-defined symbols that contain a space",
            "symbols without spaces",
        ),
    ]
    for fulfilled, found, wanted in demands:
        if not fulfilled:
            raise ConfigError(
                f"tokenizer {path} has {found}, which has no exact Hugging Face form: train it with "
                f"{wanted}, or export without a tokenizer"
            )


def _special_tokens(proto: Any) -> dict[str, str]:
    """The special tokens with a part in training, as ``PreTrainedTokenizerFast`` calls them."""
    trainer = proto.trainer_spec
    ids = {
        "eos_token": trainer.eos_id,
        "pad_token": trainer.pad_id,
        "unk_token": trainer.unk_id,
    }
    return {name: proto.pieces[index].piece for name, index in ids.items() if index >= 0}


def _build_backend(proto: Any) -> Tokenizer:
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
            merges=_merges(normal),
            unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    normalize: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    decode: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        normalize.insert(0, normalizers.Prepend(SPACE))
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(normalize)
    tokenizer.decoder = decoders.Sequence(decode)
    tokenizer.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in proto.pieces
            if piece.type in (piece.CONTROL, piece.UNKNOWN)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=False)
            for piece in proto.pieces
            if piece.type == piece.USER_DEFINED
        ]
    )
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, in the order in which sentencepiece prefers the results.

    Args:
        scores: the mergeable pieces. Control, byte and user-defined pieces are never made by a merge.
    """
    by_preference = sorted(scores, key=lambda piece: -scores[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in by_preference
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
