"""What a cleaning does: the YAML file of tools/clean_data.py."""

from typing import Any, Literal

from pydantic import Field

from skipmega.config.base import Section

RuleName = Literal["c4", "fineweb", "gopher_quality", "gopher_repetition"]


class FilterConfig(Section):
    """Rules that a document must pass, tried in the order in which they are listed.

    They are datatrove's filters of that name; what stands below a name are arguments of that filter
    (``gopher_quality: {min_doc_words: 20}``). ``c4`` also removes lines. ``language`` is an ISO 639-3 code
    and decides how text is cut into words.
    """

    language: str = "eng"
    rules: dict[RuleName, dict[str, Any]] = Field(default_factory=dict)


class DeduplicateConfig(Section):
    """Of equal documents the first stays.

    ``exact``: equal but for case, white space and Unicode's compatible forms. ``near``: MinHash over
    ``shingle`` words; two documents of which a share s of the shingles is common are found with probability
    1 - (1 - s^rows)^bands. ``partitions`` are compared one by one, each in about 600 bytes of memory for
    every (document / partitions).
    """

    exact: bool = True
    near: bool = True
    shingle: int = Field(5, ge=1)
    bands: int = Field(14, ge=1)
    rows: int = Field(8, ge=1)
    partitions: int = Field(16, ge=1)


class EvaluationSet(Section):
    """JSON lines of an evaluation set, and which of their ``fields`` hold text.

    Fields that are strings are read in that order as one text, each entry of a field that is a list as one
    of its own. Strings to ``ignore`` ("Question:") are not in the text that would have leaked.
    """

    path: str
    fields: list[str] = Field(min_length=1)
    ignore: list[str] = Field(default_factory=list)


class DecontaminateConfig(Section):
    """Documents are dropped that have ``ngram`` words in a row with an evaluation set in common.

    A text with fewer words, but at least ``shortest``, is searched for as a whole.
    """

    ngram: int = Field(13, ge=2)
    shortest: int = Field(8, ge=2)
    sets: dict[str, EvaluationSet] = Field(default_factory=dict)


class CleaningConfig(Section):
    """A cleaning: ``input`` are files and folders, ``output`` a folder of its own.

    ``shards`` are the files of its result, of about the same size, and the tasks that work side by side; an
    input file is not cut. ``skip_bad`` counts records without usable text instead of ending with an error.
    """

    input: list[str] = Field(min_length=1)
    output: str
    text_field: str = "text"
    skip_bad: bool = False
    shards: int = Field(1, ge=1)
    filter: FilterConfig = Field(default_factory=FilterConfig)
    deduplicate: DeduplicateConfig = Field(default_factory=DeduplicateConfig)
    decontaminate: DecontaminateConfig = Field(default_factory=DecontaminateConfig)
