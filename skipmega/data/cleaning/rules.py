"""Whether a document is worth reading: the rules of Gopher, C4 and FineWeb, which are datatrove's."""

import inspect
from importlib import import_module
from typing import Any

from skipmega.data.cleaning.config import FilterConfig
from skipmega.data.corpora.readers import Document
from skipmega.errors import ConfigError, DataError

_CLASSES = {
    "c4": "C4QualityFilter",
    "fineweb": "FineWebQualityFilter",
    "gopher_quality": "GopherQualityFilter",
    "gopher_repetition": "GopherRepetitionFilter",
}
_OURS = ("self", "exclusion_writer", "language")


class Rules:
    """The rules of a configuration.

    Raises:
        ConfigError: datatrove is not installed, or a rule or the language is not as it knows them.
    """

    def __init__(self, config: FilterConfig) -> None:
        self._filters: dict[str, Any] = {}
        if not config.rules:
            return
        try:
            self._filters = {name: _make(name, config) for name in config.rules}
            self._document = import_module("datatrove.data").Document
            tokenizers = import_module("datatrove.utils.word_tokenizers")
            tokenizers.load_word_tokenizer(config.language).word_tokenize("two words")
        except ImportError as error:
            raise ConfigError(
                f"filter.rules needs datatrove and its cutter of words ({error}): "
                "pip install -e '.[prepare]', or leave the rules out"
            ) from None
        except ValueError as error:
            raise ConfigError(f"filter.language={config.language}: {error}") from None

    def judge(self, document: Document) -> tuple[str, str | None]:
        """The text of a document, changed where a rule changes it, and the reason to drop it, or None.

        Raises:
            DataError: a rule fails on it.
        """
        text = document.text
        for name, rule in self._filters.items():
            candidate = self._document(text=text, id=document.where)
            try:
                verdict = rule.filter(candidate)
            except Exception as error:
                raise DataError(f"{document.where}: rule {name} fails ({error!r})") from error
            passed, reason = verdict if isinstance(verdict, tuple) else (verdict, "")
            if not passed:
                return text, f"{name}: {reason}"
            text = candidate.text
        return text, None


def _make(name: str, config: FilterConfig) -> Any:
    rule = getattr(import_module("datatrove.pipeline.filters"), _CLASSES[name])
    known = [field for field in inspect.signature(rule.__init__).parameters if field not in _OURS]
    given = config.rules[name]  # type: ignore[index]
    if unknown := [field for field in given if field not in known]:
        raise ConfigError(f"filter.rules.{name}.{unknown[0]}: no such field; known here: {', '.join(known)}")
    return rule(language=config.language, **given)
