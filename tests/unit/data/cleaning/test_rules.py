"""Rules: datatrove's, with our errors."""

from typing import Any

import pytest

from skipmega.data.cleaning.config import FilterConfig
from skipmega.data.cleaning.rules import Rules
from skipmega.data.corpora.readers import Document
from skipmega.errors import ConfigError, DataError

pytest.importorskip("datatrove", reason="the rules are datatrove's: pip install -e '.[prepare]'")

PROSE = " ".join(
    f"The {n} cats of the house that have to be with their friends went out and came home at {n} o'clock."
    for n in ("nine", "seven", "five", "two", "three", "eleven")
)


def judge(text: str, **rules: dict[str, Any]) -> tuple[str, str | None]:
    return Rules(FilterConfig.model_validate({"rules": rules})).judge(Document(text, "a.jsonl:7"))


def test_the_first_rule_that_is_broken_is_the_reason() -> None:
    assert judge(PROSE, gopher_quality={}) == (PROSE, None)
    short = judge("Too short.", gopher_quality={}, fineweb={})
    assert short == ("Too short.", "gopher_quality: gopher_short_doc")
    lenient = {"min_doc_words": 2, "min_stop_words": 0, "max_non_alpha_words_ratio": 0.5}
    assert judge("Too short.", gopher_quality=lenient)[1] is None
    assert judge("again and again\n" * 40, gopher_repetition={})[1] == "gopher_repetition: dup_line_frac"


def test_c4_removes_lines() -> None:
    text, reason = judge(f"{PROSE}\nno full stop\n{PROSE}", c4={})
    assert reason is None
    assert text == f"{PROSE}\n{PROSE}"


def test_what_a_rule_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"filter\.rules\.gopher_quality\.min_words: no such field; known"):
        judge("", gopher_quality={"min_words": 5})
    with pytest.raises(ConfigError, match=r"filter\.language=none"):
        Rules(FilterConfig.model_validate({"language": "none", "rules": {"fineweb": {}}}))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_rule_that_fails_names_the_document() -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:7: rule gopher_quality fails \(ZeroDivisionError"):
        judge("", gopher_quality={"min_doc_words": None, "min_avg_word_length": None})
