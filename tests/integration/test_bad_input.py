"""What a user gets wrong, through the scripts: exit code 2, one line with the mend, and nothing lost."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from skipmega import exit_codes
from skipmega.checkpoint.store import Checkpoint
from skipmega.config import load_config
from skipmega.data.corpora.readers import Corpus
from skipmega.data.tokenizer import train_tokenizer
from skipmega.data.tokenizing.prepare import prepare_dataset
from skipmega.launch.cli import run_script
from skipmega.launch.run import build_data, resolve

ROOT = Path(__file__).resolve().parents[2]
PREPARE, PRETRAIN = ROOT / "tools" / "prepare_data.py", ROOT / "pretrain" / "pretrain.py"
EXPORT, EVALUATE = ROOT / "tools" / "export_hf.py", ROOT / "tools" / "evaluate.py"
# all paths relative, so that a copy of the folder is another workplace
CONFIG = {
    "run_dir": "run",
    "model": {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64},
    "routing": {"group_size": 16},
    "data": {"tokenizer": "tokenizer.model", "train": [{"path": "data"}], "sequence_length": 32},
    "training": {
        "steps": 2, "global_batch_size": 2, "micro_batch_size": 1, "eval_interval": 0, "eval_sequences": 2,
    },
}  # fmt: skip
# more than any other file of the run, less than its checkpoint's tensors: in units of 1024 bytes
FILE_SIZE_LIMIT = 64


def start(*command: str | Path, cwd: Path, file_size_limit: int | None = None) -> tuple[int, str, str]:
    """Run Python with ``command`` in a process of its own: its exit code, stdout and stderr."""
    limit = f"ulimit -f {file_size_limit}; " if file_size_limit else ""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        ["bash", "-c", f'{limit}exec "$@"', "bash", sys.executable, *map(str, command)],
        cwd=cwd, capture_output=True, text=True, timeout=150, check=False,
        env=inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def error_line(stderr: str) -> str:
    """The only error in ``stderr``, which is also its last line."""
    assert "Traceback" not in stderr, stderr
    (line,) = (line for line in stderr.splitlines() if line.startswith("error: "))
    assert stderr.splitlines()[-1] == line
    return line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus, tokenizers, a data set and the configuration of a run."""
    home = tmp_path_factory.mktemp("prepared")
    texts = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (json, textwrap)]
    (home / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (home / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    train_tokenizer(texts, home / "smaller.model", 500)
    tokenizer = train_tokenizer(texts, home / "tokenizer.model", 600)
    prepare_dataset(Corpus([home / "corpus.jsonl"]), home / "data", tokenizer)
    return home


@pytest.fixture(scope="module")
def half_way(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of ``prepared`` whose run stopped, with a checkpoint, after the first of its two steps."""
    home = shutil.copytree(prepared, tmp_path_factory.mktemp("half_way"), dirs_exist_ok=True)
    code, _, stderr = start(PRETRAIN, "config.yaml", "training.stop_after=1", cwd=home)
    assert code == 0, stderr
    return home


Workplace = Callable[[Path], Path]


@pytest.fixture
def enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """Copies a folder for this test alone and makes the copy the working directory."""

    def copy(source: Path) -> Path:
        home = shutil.copytree(source, tmp_path / "home")
        monkeypatch.chdir(home)
        return home

    return copy


Refused = Callable[[Callable[[], object]], str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs what exits, and checks that it refuses and touches no file; returns its error line."""

    def run(script: Callable[[], object]) -> str:
        before = contents(Path.cwd())
        with pytest.raises(SystemExit) as ended:
            script()
        assert ended.value.code == 2
        assert contents(Path.cwd()) == before
        return error_line(capsys.readouterr().err)

    return run


def run_file(monkeypatch: pytest.MonkeyPatch, script: Path, *arguments: str) -> Callable[[], object]:
    """``script`` with ``arguments`` as a program, in this process."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    return lambda: runpy.run_path(str(script), run_name="__main__")


def launch(monkeypatch: pytest.MonkeyPatch, processes: int, *overrides: str) -> Callable[[], object]:
    """The first of ``processes`` that a launcher starts."""
    launcher = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
    for name, value in (launcher | {"MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    return run_file(monkeypatch, PRETRAIN, "config.yaml", *overrides)


def test_a_missing_corpus(prepared: Path) -> None:
    before = contents(prepared)
    arguments = ("gone.jsonl", "--output", "new", "--tokenizer", "tokenizer.model")
    code, _, stderr = start(PREPARE, *arguments, cwd=prepared)
    assert code == 2, stderr
    assert error_line(stderr) == "error: corpus gone.jsonl does not exist"
    assert contents(prepared) == before


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        (b"", (), "the corpus is empty: 1 files with 0 bytes (bad.jsonl)"),
        (b'{"text": "  "}\n\n{"text": ""}\n', (), "1 files gave 2 empty documents"),
        (b'{"text": "a"}\n\n{"text": "b\n', (), "bad.jsonl:3: not a line of JSON"),
        (b'{"text": "a"}\n{"content": "b"}\n', (), "bad.jsonl:2: no field 'text', only 'content'; mend the"),
        (b'{"text": "a"}\n', ("--tokenizer", "gone.model"), "cannot read tokenizer gone.model: No such file"),
        (b'{"text": "a"}\n', ("--tokenizer", "corpus.jsonl"), "corpus.jsonl is not a sentencepiece model"),
    ],
    ids=["empty", "blank", "corrupt", "field", "no-tokenizer", "not-a-tokenizer"],
)
def test_a_corpus_that_cannot_be_prepared_leaves_the_data_that_it_was_to_replace(
    prepared: Path,
    enter: Workplace,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    corpus: bytes,
    options: tuple[str, ...],
    message: str,
) -> None:
    (enter(prepared) / "bad.jsonl").write_bytes(corpus)
    arguments = ("bad.jsonl", "--overwrite", "--output", "data", "--tokenizer", "tokenizer.model", *options)
    assert message in refused(run_file(monkeypatch, PREPARE, *arguments))


def test_data_is_replaced_only_on_demand(
    prepared: Path, enter: Workplace, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(prepared)
    arguments = ("corpus.jsonl", "--output", "data", "--tokenizer", "tokenizer.model")
    assert "data.bin exists: choose another output" in refused(run_file(monkeypatch, PREPARE, *arguments))


def truncate_tokens(home: Path) -> None:
    os.truncate(home / "data.bin", (home / "data.bin").stat().st_size - 2)


def forget_manifest(home: Path) -> None:
    (home / "data.manifest.json").unlink()


def truncate_tokens_without_manifest(home: Path) -> None:
    truncate_tokens(home)
    forget_manifest(home)


def overwrite_index(home: Path) -> None:
    index = home / "data.idx"
    index.write_bytes(bytes(index.stat().st_size))


def nothing(home: Path) -> None:
    """Nothing is wrong with the files."""


@pytest.mark.parametrize(
    ("damage", "override", "message"),
    [
        (nothing, "data.train=[{path: gone}]", "cannot read gone.idx: No such file or directory; a data set"),
        (nothing, "data.tokenizer=smaller.model", "data was made with a tokenizer of SHA-256 "),
        (forget_manifest, "data.tokenizer=smaller.model", "but smaller.model has 500 ids (0..499): use the"),
        (truncate_tokens, "", "bytes, its manifest says "),
        (truncate_tokens_without_manifest, "", "one of the two is truncated or belongs to another data set"),
        (overwrite_index, "", "data.idx is not a megatron-core index: it starts with b'\\x00"),
        (nothing, "data.sequence_length=65536", "data is too small: its train part has "),
    ],
    ids=["missing", "other-tokenizer", "ids-outside", "truncated", "unlisted", "foreign-index", "small"],
)
def test_data_that_a_run_cannot_use(
    prepared: Path,
    enter: Workplace,
    refused: Refused,
    damage: Callable[[Path], None],
    override: str,
    message: str,
) -> None:
    damage(enter(prepared))

    def check_data() -> None:
        build_data(*resolve(load_config("config.yaml", [override] if override else []), world_size=1))

    assert message in refused(lambda: run_script(check_data))


@pytest.mark.parametrize(
    ("processes", "override", "message"),
    [
        (3, "parallel.tensor_parallel=3", "model.num_attention_heads=2 is not divisible by parallel.tensor_"),
        (4, "parallel.pipeline_parallel=4", "model.num_layers=3 are fewer than parallel.pipeline_parallel=4"),
        (1, "parallel.layers_per_stage=[2]", "parallel.layers_per_stage=[2] is not 1 numbers (parallel.pi"),
        (
            3,
            "parallel.tensor_parallel=2",
            "3 processes cannot hold parallel.tensor_parallel=2: start a multiple of 2",
        ),
        (2, "parallel.data_parallel=4", "is 4 processes, but 2 were started: start that many, or leave"),
        (2, "training.global_batch_size=3", "training.global_batch_size=3 is not a multiple of training.mi"),
    ],
    ids=["heads", "layers", "stages", "world", "replicas", "batch"],
)
def test_a_grid_that_does_not_fit(
    prepared: Path,
    enter: Workplace,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    override: str,
    message: str,
) -> None:
    enter(prepared)
    assert message in refused(launch(monkeypatch, processes, override))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_layers=4"], "run_dir=run holds another run: model.num_layers is 3 there and 4 here; "),
        (
            ["routing.router=always"],
            "routing.router is 'quantile' there and 'always' here; choose another run",
        ),
        (["training.seed=7"], "run_dir=run holds another run: training.seed is 1234 there and 7 here; "),
        (["checkpoint.resume=never"], "run_dir=run already holds a run: choose another run_dir, or check"),
        (["run_dir=notes"], "run_dir=notes is not empty and holds no run (found to_do.txt): choose another"),
        (
            ["run_dir=new", "checkpoint.resume=run", "model.hidden_size=64"],
            "step-00000001 holds another run: model.hidden_size is 32 there and 64 here; ",
        ),
        (["run_dir=new", "checkpoint.resume=notes"], "notes holds no complete checkpoint: give a checkpoint"),
    ],
    ids=["layers", "router", "seed", "never", "foreign", "other-checkpoint", "no-checkpoint"],
)
def test_a_run_folder_that_cannot_be_continued(
    half_way: Path,
    enter: Workplace,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    message: str,
) -> None:
    home = enter(half_way)
    (home / "notes").mkdir()
    (home / "notes" / "to_do.txt").write_text("buy milk")
    assert message in refused(launch(monkeypatch, 1, *overrides))


@pytest.mark.parametrize(
    ("script", "arguments"), [(EXPORT, ("run", "out")), (EVALUATE, ("run", "--tasks", "piqa"))]
)
def test_a_density_that_is_none(
    half_way: Path, enter: Workplace, script: Path, arguments: tuple[str, ...]
) -> None:
    home = enter(half_way)
    before = contents(home)
    code, _, stderr = start(script, *arguments, "--eval-density", "1.5", cwd=home)
    assert code == 2, stderr
    assert "Traceback" not in stderr
    first, second = stderr.splitlines()[-2:]
    assert first == "error: eval_density=1.5 is not a valid configuration:"
    assert second.startswith(
        "  routing.eval_density: 1.5 is no density: give a share greater than 0 and less"
    )
    assert contents(home) == before


def test_the_density_of_an_export_is_fixed(
    tmp_path: Path, enter: Workplace, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = tmp_path / "work" / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text('{"model_type": "skipmega"}')
    enter(tmp_path / "work")
    arguments = ("export", "--tasks", "piqa", "--eval-density", "0.5")
    assert "export is an export: export again with tools/export_hf.py --eval-density" in refused(
        run_file(monkeypatch, EVALUATE, *arguments)
    )


def test_no_space_for_a_checkpoint_costs_only_the_steps_since_the_last(
    half_way: Path, enter: Workplace
) -> None:
    """Writes really fail, past a limit of the operating system; without the limit the run goes on."""
    home = enter(half_way)
    good = home / "run" / "checkpoints" / "step-00000001"
    before = contents(good)
    code, _, stderr = start(
        PRETRAIN, "config.yaml", "checkpoint.retries=0", cwd=home, file_size_limit=FILE_SIZE_LIMIT
    )
    assert code == exit_codes.STOPPED_BY_FAULT, stderr
    line = error_line(stderr)
    assert line.startswith("error: could not save checkpoint run/checkpoints/step-00000002: process 0: ")
    assert "File too large" in line
    assert line.endswith("; the last good checkpoint is run/checkpoints/step-00000001")
    assert [path.name for path in good.parent.iterdir()] == [good.name]
    assert contents(good) == before

    code, stdout, stderr = start(PRETRAIN, "config.yaml", cwd=home)
    assert code == 0, stderr
    assert "attempt 3, from run/checkpoints/step-00000001" in stdout
    assert Checkpoint.open(home / "run").state["step"] == 2


def test_what_the_first_process_finds_ends_all_of_them(prepared: Path, enter: Workplace) -> None:
    """They say the same, with no traceback, and none waits for another."""
    home = enter(prepared)
    truncate_tokens(home)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=0")
    logs = ("--log-dir=logs", "--redirects=3")
    code, _, stderr = start(*launcher, *logs, PRETRAIN, "config.yaml", cwd=home)
    assert code == 1, "the launcher's own"
    assert "exitcode  : 2" in stderr
    said = [path.read_text() for path in home.glob("logs/**/stderr.log")]
    assert len(said) == 2
    # the launcher may end the second process while it is about to say it
    (line,) = {error_line(text) for text in said if "error: " in text}
    assert "data.bin has " in line
    assert not any("Traceback" in text for text in said)
    assert not (home / "run").exists(), "a start that failed is no run"
