"""Documents of prepared data: read back, sampled, shuffled, compared; and the script that shows them."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from skipmega.data.corpora.readers import Corpus
from skipmega.data.pairs.arrangement import Arrangement, arrange
from skipmega.data.pairs.comparison import describe, differences
from skipmega.data.pairs.documents import Documents, sample_documents
from skipmega.data.tokenizer import Tokenizer
from skipmega.data.tokenizing.prepare import prepare_dataset
from skipmega.errors import DataError

TOOL = Path(__file__).parents[3] / "tools" / "data.py"
TEXTS = [f"Document {number} says {'so ' * number}and ends." for number in range(30)]


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: Tokenizer) -> str:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, " "]))
    prepare_dataset(Corpus([corpus]), tmp_path / "data", tokenizer)
    return str(tmp_path / "data")


def test_documents_are_those_of_the_corpus(prepared: str, tokenizer: Tokenizer) -> None:
    documents = Documents(prepared)
    assert [tokenizer.decode(documents[number].tolist()) for number in range(len(documents))] == TEXTS


def test_samples_of_documents(prepared: str, tokenizer: Tokenizer, other_tokenizer: Tokenizer) -> None:
    samples = sample_documents(prepared, tokenizer, 5, seed=1)
    assert [text for _, text in samples] == [TEXTS[number] for number, _ in samples]
    assert len({number for number, _ in samples}) == 5
    assert sample_documents(prepared, tokenizer, 5, seed=2) != samples
    assert len(sample_documents(prepared, tokenizer, 100, seed=1)) == len(TEXTS)
    with pytest.raises(DataError, match="was made with a tokenizer of SHA-256"):
        sample_documents(prepared, other_tokenizer, 5, seed=1)


def test_what_manifests_say(prepared: str) -> None:
    said = describe(prepared)
    assert "30 documents" in said
    assert "in the corpus's order" in said
    assert "dropped: 1 empty documents, 0 bad records" in said
    assert differences(prepared, prepared) == []
    arrange(Arrangement((prepared,), Path(f"{prepared}-mixed"), seed=7), workers=1)
    named = [line.split(":")[0] for line in differences(prepared, f"{prepared}-mixed")]
    assert named == ["arranged", "SHA-256 of bin", "SHA-256 of idx"]
    assert "shuffled by 7" in describe(f"{prepared}-mixed")
    with pytest.raises(DataError, match=r"nowhere\.manifest\.json is missing"):
        describe("nowhere")


RunTool = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunTool:
    """Runs the script; returns its exit status, what it printed and its error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        return (ended.value.code, *capsys.readouterr())  # type: ignore[return-value]

    return run


def test_the_script(prepared: str, tokenizer: Tokenizer, run_tool: RunTool, tmp_path: Path) -> None:
    assert run_tool("shuffle", prepared, tmp_path / "mixed" / "data-1")[0] == 0
    for name in ("a", "b"):
        run_tool("shuffle", prepared, f"{prepared}-{name}", "--seed", "5")
    assert "3 pairs: 90 documents" in run_tool("info", f"{prepared}*")[1]
    _, said, _ = run_tool("shuffle", f"{prepared}*", tmp_path / "all", "--shards", "4", "--workers", "2")
    assert said.count("shuffled by 0, shard ") == said.count(" of 4 of 3 pairs") == 4
    _, again, _ = run_tool("shuffle", f"{prepared}*", tmp_path / "all", "--shards", "4", "--shard", "2")
    assert again in said
    packed = run_tool("shuffle", f"{tmp_path}/all-*", tmp_path / "packed", "--pack", "64")[1]
    assert ", packed for 64 tokens: " in packed
    assert "error: 0 shards: give at least 1" in run_tool("shuffle", prepared, "x", "--shards", "0")[2]
    assert run_tool("diff", f"{prepared}-a", f"{prepared}-b")[1] == "the same\n"
    assert "arranged: None and seed=5" in run_tool("diff", prepared, f"{prepared}-b")[1]
    _, said, _ = run_tool("sample", prepared, "--tokenizer", tokenizer.path, "--count", "2")
    assert said.count("and ends.") == said.count("--- ") == 2
    assert run_tool("verify", f"{prepared}*")[0] == 0
    content = np.fromfile(f"{prepared}-a.bin", np.uint8)
    content[40] ^= 1
    content.tofile(f"{prepared}-a.bin")
    code, said, error = run_tool("verify", f"{prepared}*")
    assert code == 2
    assert said.count(": sound") == 2
    assert f"{prepared}-a.bin is damaged: its SHA-256 is" in said
    assert "error: 1 pairs are not sound, the first: " in error
