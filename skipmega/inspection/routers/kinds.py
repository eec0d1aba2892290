"""What kind of text a token stands for: punctuation, a number, part of an identifier, ..."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KINDS = ("whitespace", "punctuation", "number", "identifier", "frequent word", "rare word")
RULES = {
    "whitespace": "spaces, tabs and line ends alone",
    "punctuation": "begins, after spaces, with punctuation, a symbol or a control character",
    "number": "part of a word that begins with a digit",
    "identifier": "part of a word that looks like code: it has an underscore, a digit, a capital after a "
    "small letter, a bracket right behind it, or a letter on the other side of a full stop",
    "frequent word": "part of one of the commonest other words, which together make half of all",
    "rare word": "part of the other half",
}
_WHITESPACE, _PUNCTUATION, _NUMBER, _IDENTIFIER, _FREQUENT, _RARE = range(len(KINDS))
_LOOKS_LIKE_CODE = re.compile(r"_|\d|[a-z][A-Z]")


@dataclass(frozen=True)
class TokenText:
    """A document as its tokens cut it.

    Token i is the bytes ``bounds[i]`` to ``bounds[i + 1]`` of ``text`` in UTF-8; ``kind`` [tokens] int64 are
    indices of KINDS.
    """

    bounds: NDArray[np.int64]
    text: bytes
    kind: NDArray[np.int64]

    def shown(self) -> list[str]:
        """The text of each token; of a character cut over several, the last one has all of it."""
        import codecs

        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return [
            decoder.decode(self.text[begin:end])
            for begin, end in zip(self.bounds[:-1], self.bounds[1:], strict=True)
        ]


def find_kinds(documents: Sequence[NDArray[np.int64]], pieces: Sequence[bytes]) -> list[TokenText]:
    """The kinds of the tokens of ``documents``, whose words are counted together.

    Args:
        documents: token ids, each [tokens].
        pieces: the bytes of each id.
    """
    lengths = np.array([len(piece) for piece in pieces])
    texts, spans, words = [], [], Counter[str]()
    for ids in documents:
        content = b"".join(pieces[token] for token in ids)
        texts.append((np.concatenate([[0], np.cumsum(lengths[ids])]), content))
        spans.append(_spans(content.decode(errors="replace")))
        words.update(word for _, _, kind, word in spans[-1] if kind == _RARE)
    frequent = _commonest_half(words)
    return [
        TokenText(bounds, content, _kinds_of_tokens(bounds, content, _refine(parts, frequent)))
        for (bounds, content), parts in zip(texts, spans, strict=True)
    ]


_Span = tuple[int, int, int, str]  # first and last + 1 character, kind, text


class _Classes(dict[int, str]):
    """For ``str.translate``: ``s`` for space, ``p`` for punctuation, symbols and controls, ``w`` for what
    words are made of. Remembers the characters it has seen."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        other = unicodedata.category(character)[0] in "PSC" and character != "_"
        self[code] = "s" if character.isspace() else "p" if other else "w"
        return self[code]


def _spans(text: str) -> list[_Span]:
    """Words, runs of whitespace and single other characters; all words that are neither numbers nor code
    count as rare for now."""
    spans = []
    for found in re.finditer("w+|s+|p", text.translate(_Classes())):
        begin, end = found.span()
        part = text[begin:end]
        if found[0][0] != "w":
            kind = _WHITESPACE if found[0][0] == "s" else _PUNCTUATION
        elif part[0].isdigit():
            kind = _NUMBER
        elif _LOOKS_LIKE_CODE.search(part) or _touches_code(text, begin, end):
            kind = _IDENTIFIER
        else:
            kind = _RARE
        spans.append((begin, end, kind, part))
    return spans


def _touches_code(text: str, begin: int, end: int) -> bool:
    behind, before = text[end : end + 2], text[max(begin - 2, 0) : begin]
    follows = behind[:1] in ("(", "[") or (behind[:1] == "." and behind[1:].isalpha())
    return follows or (before[1:] == "." and before[:1].isalpha())


def _commonest_half(words: "Counter[str]") -> frozenset[str]:
    """The fewest words that make half of all occurrences; of equally common ones, all or none."""
    counts = sorted(words.values(), reverse=True)
    reached = np.searchsorted(np.cumsum(counts), sum(counts) / 2)
    return (
        frozenset(word for word, count in words.items() if count >= counts[reached])
        if counts
        else frozenset()
    )


def _refine(spans: list[_Span], frequent: frozenset[str]) -> list[_Span]:
    return [
        (begin, end, _FREQUENT if kind == _RARE and word in frequent else kind, word)
        for begin, end, kind, word in spans
    ]


def _kinds_of_tokens(bounds: NDArray[np.int64], content: bytes, spans: list[_Span]) -> NDArray[np.int64]:
    """Each token is what its first character that is no whitespace belongs to."""
    if not spans:
        return np.zeros(len(bounds) - 1, dtype=np.int64)
    of_character = np.repeat([kind for _, _, kind, _ in spans], [end - begin for begin, end, _, _ in spans])
    leads = (np.frombuffer(content, dtype=np.uint8) & 0xC0) != 0x80
    of_byte = of_character[np.minimum(np.cumsum(leads) - 1, len(of_character) - 1)]
    inked = np.flatnonzero(of_byte != _WHITESPACE)
    first = np.append(inked, len(content))[np.searchsorted(inked, bounds[:-1])]
    within = first < bounds[1:]
    kinds: NDArray[np.int64] = np.where(within, np.append(of_byte, _WHITESPACE)[first], _WHITESPACE)
    return kinds
