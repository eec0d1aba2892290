"""The quickstart's corpus: the same documents in the same order, no duplicates, a budget."""

import json
from pathlib import Path

import pytest

from skipmega.data.corpora.python_corpus import python_documents, write_python_corpus
from skipmega.data.corpora.readers import Corpus
from skipmega.errors import DataError


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    """Twenty modules, and what must be left out."""
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    for n in range(10):
        for root in (library, packages / "some"):
            root.mkdir(parents=True, exist_ok=True)
            (root / f"module{n}.py").write_text(f"# {root.name} {n} é\n" * 40, encoding="utf-8")
    (library / "duplicate.py").write_bytes((library / "module3.py").read_bytes())
    (library / "latin.py").write_bytes(b"# \xe9\n" * 100)
    (library / "short.py").write_text("pass\n")
    (library / "long.py").write_text("x = 1\n" * 50_000)
    (library / "test").mkdir()
    (library / "test" / "test_x.py").write_text("# a test\n" * 100)
    return {"stdlib": library, "packages": packages}


def test_which_documents_and_in_which_order(roots: dict[str, Path]) -> None:
    documents = list(python_documents(roots))
    names = [document.where for document in documents]
    expected = {f"{root}module{n}.py" for root in ("stdlib/", "packages/some/") for n in range(10)}
    assert len(names) == 20
    assert set(names) - {"stdlib/duplicate.py"} <= expected
    assert names != sorted(names)
    assert [document.where for document in python_documents(roots)] == names


def test_the_order_does_not_depend_on_where_python_is(roots: dict[str, Path], tmp_path: Path) -> None:
    names = [document.where for document in python_documents(roots)]
    (tmp_path / "lib").rename(tmp_path / "moved")
    moved = {"stdlib": tmp_path / "moved", "packages": tmp_path / "moved" / "site-packages"}
    assert [document.where for document in python_documents(moved)] == names


def test_the_budget_is_kept(roots: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    written = write_python_corpus(path, 2_000, roots)
    documents = [document.text for document in Corpus([path])]
    sizes = [len(text.encode()) for text in documents]
    assert sum(sizes) == written >= 2_000 > sum(sizes[:-1])
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])["source"].endswith(".py")


def test_too_little_source_is_an_error(roots: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    with pytest.raises(DataError, match=r"found only \d+ bytes in 20 Python files"):
        write_python_corpus(path, 50_000_000, roots)
    assert not path.exists()


def test_this_interpreter_has_enough(tmp_path: Path) -> None:
    assert 1_000_000 <= write_python_corpus(tmp_path / "corpus.jsonl", 1_000_000) < 1_200_000
