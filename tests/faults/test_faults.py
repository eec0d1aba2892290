"""One fault at a time: the run goes on as if there had been none, or says what is wrong and loses nothing."""

import errno
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from itertools import count
from unittest import mock

import pytest
import torch

from skipmega import exit_codes
from skipmega.checkpoint import store
from skipmega.checkpoint.store import Checkpoint
from skipmega.checkpoint.tensors import _TensorWriter
from skipmega.data.pairs import token_reader
from skipmega.launch import run
from skipmega.training import guard
from skipmega.training.engine import TrainingEngine
from skipmega.training.state import HostBuffers, hold
from support.tiny_run import HALF, records


def before(owner, name, action, at=1):
    """``action()`` runs before the ``at``-th call of ``owner.name`` in this process."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            action()
        return original(*args, **kwargs)

    mock.patch.object(owner, name, wrapped).start()


def send(number):
    os.kill(os.getpid(), number)


def signal_one(owner, name, at, number, rank):
    """Rank 1 gets the signal at that call."""
    if rank == 1:
        before(owner, name, partial(send, number), at)


PHASES = {
    "a step": (TrainingEngine, "apply_gradients", 2),
    "evaluation": (TrainingEngine, "_evaluation_step", 1),
    "a save": (_TensorWriter, "write_data", 2),
}


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("a step", signal.SIGTERM),
        ("a step", signal.SIGUSR1),
        ("evaluation", signal.SIGUSR2),
        ("a save", signal.SIGTERM),
    ],
)
def test_a_signal_to_one_rank_saves_and_asks_for_another_start(disturbed, phase, number):
    name = f"{number.name}-{phase.replace(' ', '-')}"
    attempt = disturbed.attempt(name, spoil=partial(signal_one, *PHASES[phase], number))
    assert attempt.join() == [exit_codes.REQUEUE] * 2, disturbed.said(name)
    assert f"stopped: {number.name} at step" in disturbed.said(name)
    stopped = Checkpoint.open(disturbed.folder / name).state
    assert stopped["step"] < 8
    assert stopped["owes_evaluation"] == (phase == "evaluation")
    disturbed.finish(name)


def signal_family(rank):
    """As a scheduler does: every process of the job, those that read ahead too."""

    def send_all():
        assert multiprocessing.active_children(), "nobody reads ahead"
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGTERM)
        send(signal.SIGTERM)

    before(TrainingEngine, "apply_gradients", send_all, at=2)


def test_a_signal_to_every_process_of_the_job_saves_too(disturbed):
    attempt = disturbed.attempt("family", "data.num_workers=1", spoil=signal_family)
    assert attempt.join() == [exit_codes.REQUEUE] * 2, disturbed.said("family")
    assert "stopped: SIGTERM at step 2 of 8" in disturbed.said("family")
    assert disturbed.attempt("family", "data.num_workers=1").join() == [0, 0], disturbed.said("family")
    disturbed.check("family")


def signal_and_sleep():
    """Together: who leaves first takes the meeting point along, which the other may still need."""
    torch.distributed.barrier()
    send(signal.SIGTERM)
    time.sleep(1000)


def build_for_ever(rank):
    before(run, "build_datasets", signal_and_sleep)


def test_a_signal_while_indices_are_built_ends_it_at_once(disturbed):
    attempt = disturbed.attempt("building", spoil=build_for_ever)
    assert attempt.join() == [exit_codes.REQUEUE] * 2, disturbed.said("building")
    assert "SIGTERM before the first step, nothing to save" in disturbed.said("building")
    disturbed.finish("building")


def test_a_stop_file_is_heeded_once(disturbed):
    stop = disturbed.folder / "file" / "stop"
    stop.parent.mkdir()
    (stop.parent / "attempts").mkdir()
    attempt = disturbed.attempt("file", spoil=partial(touch_at_step, stop))
    assert attempt.join() == [exit_codes.REQUEUE] * 2, disturbed.said("file")
    assert "stopped: a stop file at step 3 of 8" in disturbed.said("file")
    assert not stop.exists()
    disturbed.finish("file")


def touch_at_step(stop, rank):
    before(TrainingEngine, "apply_gradients", stop.touch, at=3)


def test_the_longest_duration_ends_it_after_the_present_step(disturbed):
    attempt = disturbed.attempt("duration", "training.max_duration=0.0001")
    assert attempt.join() == [exit_codes.REQUEUE] * 2, disturbed.said("duration")
    assert "stopped: training.max_duration at step 1 of 8" in disturbed.said("duration")
    disturbed.finish("duration")


def hang(rank):
    if rank == 1:
        before(TrainingEngine, "apply_gradients", partial(time.sleep, 1000), at=3)


def freeze(rank):
    if rank == 1:
        before(TrainingEngine, "apply_gradients", partial(send, signal.SIGSTOP), at=3)


@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (hang, r"rank 1 in step 2, update, for \d s\n(?s:.*)test_faults\.py"),
        (freeze, r"rank 1, last heard of in step \d, "),
    ],
)
def test_a_hung_rank_is_named(disturbed, spoil, culprit):
    name = spoil.__name__
    attempt = disturbed.attempt(name, "training.hang_minutes=0.05", spoil=spoil)
    attempt.processes[0].join()
    attempt.processes[1].join(timeout=5)
    codes = [process.exitcode for process in attempt.processes]
    attempt.kill()
    said = disturbed.said(name)
    assert codes == [exit_codes.HUNG, exit_codes.HUNG if spoil is hang else None], said
    assert re.search(rf"hung: no progress for 3 s; held up by\n{culprit}", said), said
    assert "1 other ranks wait, the furthest is rank 0 in step 2, update" in said
    disturbed.finish(name)


def test_an_older_attempt_that_wakes_up_leaves_the_run_to_the_newer(disturbed):
    older = disturbed.attempt("stale")
    checkpoints = disturbed.folder / "stale" / "checkpoints"
    assert older.until(lambda: any(checkpoints.glob("step-*.tmp")))
    older.signal(signal.SIGSTOP)
    newer = disturbed.attempt("stale")
    assert newer.join() == [0, 0], disturbed.said("stale")
    older.signal(signal.SIGCONT)
    assert older.join() == [exit_codes.FENCED] * 2, disturbed.said("stale")
    assert "error: attempt 2 (host" in disturbed.said("stale")
    disturbed.check("stale")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.parametrize(
    "file", ["tensors/__0_0.distcp", "tensors/__1_0.distcp", "tensors/.metadata", "manifest.json"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(disturbed, file, damage):
    name = f"{damage.__name__}-{file.replace('/', '-')}"
    assert disturbed.attempt(name, f"training.stop_after={HALF}").join() == [0, 0]
    newest = Checkpoint.open(disturbed.folder / name).path
    damage(newest / file)
    disturbed.finish(name)
    assert f"warning: checkpoint {newest} is damaged: " in disturbed.said(name)
    assert f"from {newest.with_name(f'step-{HALF - 1:08d}')}" in disturbed.said(name)


def test_a_run_saved_in_the_first_format_is_continued(disturbed):
    """Its manifest had sizes alone, its state knew neither attempts nor what has been counted since."""
    assert disturbed.attempt("first", f"training.stop_after={HALF}").join() == [0, 0]
    for newest in (disturbed.folder / "first" / "checkpoints").glob("step-*"):
        files = json.loads((newest / "manifest.json").read_text())["files"]
        state = json.loads((newest / "state.json").read_text())
        known = {key: state[key] for key in ("step", "consumed_samples", "optimizer_updates", "versions")}
        (newest / "state.json").write_text(json.dumps(known))
        sizes = {name: (newest / name).stat().st_size for name in files}
        (newest / "manifest.json").write_text(json.dumps({"files": sizes}))
    shutil.rmtree(disturbed.folder / "first" / "attempts")
    disturbed.finish("first")


def test_if_every_checkpoint_is_damaged_the_run_does_not_begin_anew(disturbed):
    assert disturbed.attempt("lost", "training.stop_after=2").join() == [0, 0]
    for file in (disturbed.folder / "lost" / "checkpoints").glob("step-*/tensors/.metadata"):
        flip(file)
    assert disturbed.attempt("lost").join() == [exit_codes.USER_ERROR] * 2
    assert "error: no checkpoint of run_dir=" in disturbed.said("lost")


@pytest.fixture
def small_disk(disturbed):
    """The folder of the run called full-disk, 18 MB of memory."""
    folder = disturbed.folder / "full-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=18m", "none", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def fill(folder, spare, rank):
    """Leave less than a checkpoint free before the third is written; noticed at once, or in the middle."""

    def write():
        if rank == 0:
            (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - 300_000))

    mock.patch.object(store, "_SPARE_BYTES", spare).start()
    before(HostBuffers, "take_share", write, at=3)


def take_any_space(rank):
    mock.patch.object(store, "_SPARE_BYTES", 0).start()


@pytest.mark.parametrize(("spare", "cause"), [(0, "it needs"), (-(10**12), "No space left on device")])
def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(disturbed, small_disk, spare, cause):
    attempt = disturbed.attempt("full-disk", spoil=partial(fill, small_disk, spare))
    assert attempt.join() == [exit_codes.STOPPED_BY_FAULT] * 2, disturbed.said("full-disk")
    said = disturbed.said("full-disk")
    assert re.search(
        rf"error: could not save checkpoint .*step-00000003: .*{cause}.*; the last good check", said
    )
    assert Checkpoint.open(small_disk).state["step"] == 2
    (small_disk / "filler").unlink()
    assert disturbed.attempt("full-disk", spoil=take_any_space).join() == [0, 0], disturbed.said("full-disk")
    disturbed.check("full-disk")


def fail_reads(times, rank):
    """From the second micro-batch on, on rank 1."""
    read, calls = os.preadv, count()

    def failing(descriptor, buffers, offset):
        if rank == 1 and 20 <= next(calls) < 20 + times:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, buffers, offset)

    mock.patch.object(os, "preadv", failing).start()
    mock.patch.object(token_reader, "_FIRST_PAUSE", 0.01).start()


def test_data_that_cannot_be_read_for_a_while_leave_no_trace(disturbed):
    assert disturbed.attempt("reads", spoil=partial(fail_reads, 3)).join() == [0, 0], disturbed.said("reads")
    assert disturbed.said("reads").count("Input/output error; trying again in") == 3
    disturbed.check("reads")


def test_data_that_cannot_be_read_stop_the_run_and_keep_what_was_saved(disturbed):
    attempt = disturbed.attempt("no-reads", spoil=partial(fail_reads, 10**9))
    assert attempt.join()[1] == exit_codes.STOPPED_BY_FAULT, disturbed.said("no-reads")
    assert re.search(
        r"error: cannot read \d+ bytes of \S+/data\.bin at \d+: Input/output error, also after 4 more tries",
        disturbed.said("no-reads"),
    )
    disturbed.finish("no-reads")


def executions(steps, times):
    """A list that is not empty while one of the first ``times`` executions of those steps (0-based) runs."""
    accumulate, done, present = TrainingEngine.accumulate_gradients, Counter(), []

    def accumulated(engine, batches, step, sums):
        present[:] = [step] * (step in steps and done[step] < times)
        done[step] += 1
        accumulate(engine, batches, step, sums)

    mock.patch.object(TrainingEngine, "accumulate_gradients", accumulated).start()
    return present


def spoil_gradients(steps, rank, times=2):
    """Before they are summed over ranks, on rank 1."""
    sum_gradients, present = TrainingEngine._sum_gradients_of_cut_tokens, executions(steps, times)

    def spoiled(engine):
        if present and rank == 1:
            next(engine.stage.parameters()).grad.view(-1)[0] = math.nan
        sum_gradients(engine)

    mock.patch.object(TrainingEngine, "_sum_gradients_of_cut_tokens", spoiled).start()


def raise_loss(steps, times, rank):
    """As all ranks agree on it."""
    agreed, present = guard.mean_loss, executions(steps, times)
    mock.patch.object(guard, "mean_loss", lambda *sums: agreed(*sums) + 10 * bool(present)).start()


def alarms(disturbed, name):
    return [record["message"] for record in records(disturbed.folder / name, "alarm").values()]


def test_a_gradient_that_is_not_finite_once_leaves_no_trace(disturbed):
    attempt = disturbed.attempt("nan-once", spoil=partial(spoil_gradients, [3], times=1))
    assert attempt.join() == [0, 0], disturbed.said("nan-once")
    disturbed.check("nan-once")
    (alarm,) = alarms(disturbed, "nan-once")
    assert alarm.startswith("the gradients of step 4 are not finite (loss ")
    assert alarm.endswith("not so when executed again, which counts: a transient fault")
    assert Checkpoint.open(disturbed.folder / "nan-once").state["transient_faults"] == 1


def test_a_gradient_that_is_not_finite_on_one_rank_updates_none(disturbed):
    attempt = disturbed.attempt("nan", spoil=partial(spoil_gradients, [3]))
    assert attempt.join() == [0, 0], disturbed.said("nan")
    found = records(disturbed.folder / "nan", "train")
    assert list(found) == [1, 2, 3, 5, 6, 7, 8]
    assert [found[step]["discarded_updates"] for step in (3, 5)] == [0, 1]
    expected = records(disturbed.folder / "undisturbed", "train")
    assert [found[step]["loss"] for step in (1, 2, 3)] == [expected[step]["loss"] for step in (1, 2, 3)]
    state = Checkpoint.open(disturbed.folder / "nan").state
    assert (state["step"], state["optimizer_updates"], state["discarded_updates"]) == (8, 7, 1)
    assert alarms(disturbed, "nan") == [
        "the gradients of step 4 are not finite, also when executed again: its update is discarded"
    ]


def test_after_several_in_a_row_the_run_goes_on_from_the_last_good_state(disturbed):
    two = "training.max_discarded=2"
    attempt = disturbed.attempt("nans", two, spoil=partial(spoil_gradients, [3, 4]))
    assert attempt.join() == [0, 0], disturbed.said("nans")
    assert "going on from the state of" in disturbed.said("nans")
    assert list(records(disturbed.folder / "nans", "train")) == [1, 2, 3, 6, 7, 8]
    state = Checkpoint.open(disturbed.folder / "nans").state
    assert (state["step"], state["optimizer_updates"], state["consumed_samples"]) == (8, 6, 64)


@pytest.mark.parametrize(
    ("steps", "cause", "saved"),
    [(range(8), "there is no checkpoint to go back to", None), (range(2, 8), "also after going back to", 2)],
)
def test_numbers_that_stay_out_of_range_stop_the_run(disturbed, steps, cause, saved):
    name = f"nans-from-{steps[0]}"
    attempt = disturbed.attempt(name, "training.max_discarded=2", spoil=partial(spoil_gradients, steps))
    assert attempt.join() == [exit_codes.STOPPED_BY_FAULT] * 2, disturbed.said(name)
    assert re.search(rf"error: 2 updates in a row were discarded, .*{cause}", disturbed.said(name))
    if saved:
        assert Checkpoint.open(disturbed.folder / name).state["step"] == saved


SPIKES = "training.spike_window=4"


def test_a_loss_that_stands_out_once_leaves_no_trace(disturbed):
    attempt = disturbed.attempt("spike-once", SPIKES, spoil=partial(raise_loss, [5], 1))
    assert attempt.join() == [0, 0], disturbed.said("spike-once")
    disturbed.check("spike-once")
    (alarm,) = alarms(disturbed, "spike-once")
    assert re.match(
        r"the loss of step 6, 1\d\.\d+, is a spike: more than \d\.\d+, .*: a transient fault", alarm
    )


def test_a_spike_that_stays_updates_nothing(disturbed):
    attempt = disturbed.attempt("spike", SPIKES, spoil=partial(raise_loss, [5], 2))
    assert attempt.join() == [0, 0], disturbed.said("spike")
    found = records(disturbed.folder / "spike", "train")
    assert list(found) == [1, 2, 3, 4, 5, 7, 8]
    state = Checkpoint.open(disturbed.folder / "spike").state
    assert (state["optimizer_updates"], state["discarded_updates"], state["transient_faults"]) == (7, 1, 0)
    assert state["recent_losses"] == pytest.approx([found[step]["loss"] for step in (4, 5, 7, 8)])


def test_spikes_in_a_row_bring_back_the_last_good_state(disturbed):
    overrides = [SPIKES, "training.max_discarded=2"]
    attempt = disturbed.attempt("spikes", *overrides, spoil=partial(raise_loss, [4, 5], 2))
    assert attempt.join() == [0, 0], disturbed.said("spikes")
    assert "going on from the state of" in disturbed.said("spikes")
    assert list(records(disturbed.folder / "spikes", "train")) == [1, 2, 3, 4, 7, 8]


def flip_weight(part, rank):
    """A bit of one number on rank 1, while its fourth step is executed."""
    kept, accumulate = [], TrainingEngine.accumulate_gradients

    def flipped(engine, batches, step, sums):
        accumulate(engine, batches, step, sums)
        if step == 3 and not kept:
            held = [hold(engine, parameter) for parameter in engine.stage.parameters()]
            kept.append(next(getattr(each, part) for each in held if each.piece.numel()))
            kept[0].detach().view(torch.int32).view(-1)[0] ^= 1 << 20

    if rank == 1:
        mock.patch.object(TrainingEngine, "accumulate_gradients", flipped).start()


def test_a_drifted_copy_is_named_renewed_and_leaves_no_trace(disturbed):
    every = "training.replica_interval=2"
    attempt = disturbed.attempt("drift", every, spoil=partial(flip_weight, "copy"))
    assert attempt.join() == [0, 0], disturbed.said("drift")
    disturbed.check("drift")
    (alarm,) = alarms(disturbed, "drift")
    assert re.match(r"\S+ on rank 1 \(host \S+\): its copy is not its master's .*: a transient fault", alarm)


def test_a_drifted_master_is_named_and_ends_the_run(disturbed):
    every = "training.replica_interval=2"
    attempt = disturbed.attempt("master", every, spoil=partial(flip_weight, "master"))
    assert attempt.join() == [exit_codes.DRIFTED] * 2, disturbed.said("master")
    assert re.search(
        r"error: ranks differ at step 4: \S+ on rank 1 \(host \S+\): its fp32", disturbed.said("master")
    )
    assert Checkpoint.open(disturbed.folder / "master").state["step"] == 3
    disturbed.finish("master")
