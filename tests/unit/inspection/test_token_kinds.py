"""Tokens are sorted by the words they are part of, wherever the tokenizer cuts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipmega.inspection.routers.kinds import KINDS, find_kinds


def kinds_of(*documents: list[str]) -> list[list[str]]:
    """The kinds of the tokens of each document, given as its pieces."""
    pieces = sorted({piece for document in documents for piece in document})
    ids = [np.array([pieces.index(piece) for piece in document]) for document in documents]
    found = find_kinds(ids, [piece.encode() for piece in pieces])
    return [[KINDS[kind] for kind in text.kind] for text in found]


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        (["  ", "\n", "\t\r\n"], "whitespace"),
        ([" (", "—", "“", "€", "\x00", " →"], "punctuation"),
        (["19", "84"], "number"),
        (["0x", "1F"], "number"),
        (["num", "_lay", "ers"], "identifier"),
        (["get", "Name"], "identifier"),
        (["x", "2"], "identifier"),
        (["tree", "s"], "frequent word"),  # of one word, it is among the commonest half
        (["हि", "न्दी"], "frequent word"),  # with vowel signs, which are neither letters nor punctuation
        ([" don"], "frequent word"),
    ],
)
def test_kinds(pieces: list[str], kind: str) -> None:
    assert kinds_of(pieces) == [[kind] * len(pieces)]


def test_code_is_known_by_what_touches_it() -> None:
    pieces = ["os", ".", "path", " of", ".", " call", "(", "end", ")", ".", "\n", "so", " so"]
    (kinds,) = kinds_of(pieces)
    code = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == "identifier"]
    assert code == ["os", "path", " call"]
    assert kinds[3] == kinds[7] == "rare word"
    assert kinds[-2:] == ["frequent word", "frequent word"]


def test_words_are_counted_over_all_documents() -> None:
    first, second = kinds_of([" so", " it", " is"], [" so", " was", " so"])
    assert [first[0], second[0], second[2]] == ["frequent word"] * 3
    assert [*first[1:], second[1]] == ["rare word"] * 3


def test_equally_common_words_are_alike() -> None:
    assert set(kinds_of([" a", " b", " c", " d"])[0]) == {"frequent word"}


def test_bytes_of_a_character_are_what_it_is() -> None:
    pieces = [b"\xe2", b"\x82", b"\xac", b" ", b"n", b"\xc3", b"\xa9"]
    (found,) = find_kinds([np.arange(len(pieces))], pieces)
    assert [KINDS[kind] for kind in found.kind] == ["punctuation"] * 3 + ["whitespace"] + [
        "frequent word"
    ] * 3
    assert found.shown() == ["", "", "€", " ", "n", "", "é"]


@given(st.text(), st.data())
def test_every_token_of_any_text_has_a_kind_however_it_is_cut(text: str, data: st.DataObject) -> None:
    content = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(content) - 1, 1)))) & set(range(1, len(content))))
    pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    (found,) = find_kinds([np.arange(len(pieces))], pieces)
    assert len(found.kind) == len(pieces)
    assert "".join(found.shown()) == text
    for piece, kind in zip(pieces, found.kind, strict=True):
        if piece.isascii() and piece.decode().isspace():
            assert KINDS[kind] == "whitespace"
