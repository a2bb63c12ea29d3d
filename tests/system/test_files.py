"""Files are whole or absent, damaged ones are refused by name, and one program at a time writes a folder."""

import os
import resource
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest

from engine.metrics import save_statistics
from models.vqgan import VQModel
from models.weights import read_pth, save_weights
from orders.order_file import save_orders
from util import files
from util.logging import MetricsLog, read_metrics


def test_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), files.atomic(path) as partial:
        partial.write_text("after")
        _ = 1 / 0
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_temporary_files_of_dead_processes_are_removed_and_of_living_ones_left(tmp_path):
    """No process has the number 999999999; process 1 always lives. Which live elsewhere is not known, unless
    nobody else may write there."""
    here, dead = socket.gethostname(), 999999999
    names = [f".a.{dead}-{here}", f".a.1-{here}", f".a.{dead}-there", f".b.{dead}-{here}"]
    gone, *others = (tmp_path / f"{name}.tmp" for name in names)
    for left in (gone, *others):
        left.write_text("half")
    write_a(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a", *others])
    with files.sole_writer(tmp_path):
        write_a(tmp_path)
    assert sorted(tmp_path.glob(".*.tmp")) == others[-1:]


def test_a_file_costs_no_list_of_its_folder_and_no_change_of_the_umask(tmp_path, monkeypatch):
    """Threads write thousands of images into one folder."""
    lists, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (lists.append(path), scandir(path))[1])
    monkeypatch.setattr(os, "umask", None)
    for name in "abc":
        with files.atomic(tmp_path / name) as partial:
            partial.write_text("whole")
            partial.chmod(0o600)  # as safetensors
    assert len(lists) == 1 and (tmp_path / "c").stat().st_mode & 0o777 == 0o666 & ~files.UMASK


def write_a(folder):
    with files.atomic(folder / "a") as partial:
        partial.write_text("whole")


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint of lpd_tiny and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_training_on_a_full_disk_fails_in_one_line_and_keeps_the_last_checkpoint(small_disk):
    """The first checkpoint is due after step 3; the disk has no room for the second."""
    flags = helpers.train_flags(small_disk / "run", model="lpd_tiny", save_last_freq=0.5)
    outcome = helpers.call("lpd", *flags)
    assert outcome.status == 1
    last_line = outcome.err.splitlines()[-1]
    assert last_line.startswith("error: [Errno 28] No space left on device: ")
    assert "checkpoint-last.pth" in last_line
    assert [path.name for path in small_disk.rglob("*.pth")] == ["checkpoint-last.pth"]


HOLD = """
import signal, sys
from util.files import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    signal.pause()
"""


def test_folder_in_use_is_refused_by_its_writers_name_and_free_once_that_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        message = rf"^{tmp_path} is in use by process {holder.pid} on \S+$"
        with pytest.raises(files.FolderInUse, match=message), files.sole_writer(tmp_path):
            pass
        holder.kill()
    with files.sole_writer(tmp_path):
        pass


STALE = """
import sys, time
from util.files import FolderInUse, sole_writer, write_json
from util.logging import MetricsLog
with sole_writer(sys.argv[1]):
    log = MetricsLog(sys.argv[1])
    log.write(1, loss=1.0)
    print("held", flush=True)
    sys.stdin.readline()
    for write in (lambda: log.write(2, loss=2.0), lambda: write_json(sys.argv[1] + "/late.json", 2)):
        try:
            write()
        except FolderInUse as error:
            print(error, flush=True)
"""


@pytest.mark.parametrize("job,attempt", [("17", "1"), ("17", "0"), ("18", "1")])
def test_only_a_later_attempt_of_the_same_job_takes_a_folder_over(job, attempt, tmp_path, monkeypatch):
    """And then the earlier one, which is on a machine that had been cut off, writes nothing more."""
    env = {**os.environ, "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "0"}
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", attempt)
    command = [sys.executable, "-c", STALE, tmp_path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, **pipes) as stale:
        assert stale.stdout.readline() == "held\n"
        if (job, attempt) != ("17", "1"):
            message = "in use by process .*, attempt 0 of SLURM job 17"
            with pytest.raises(files.FolderInUse, match=message), files.sole_writer(tmp_path):
                pass
            stale.kill()
            return
        with files.sole_writer(tmp_path):
            before = helpers.contents(tmp_path)
            said = stale.communicate("go on\n")[0].splitlines()
            assert len(said) == 2 and all(f"taken over by process {os.getpid()}" in line for line in said)
            assert helpers.contents(tmp_path) == before
            write_a(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "a", "metrics.jsonl"]


@pytest.mark.parametrize("remove", [lambda folder: (folder / ".owner").unlink(), shutil.rmtree])
def test_writer_whose_folder_is_deleted_says_what_is_gone(remove, tmp_path):
    with files.sole_writer(tmp_path / "run"):
        remove(tmp_path / "run")
        with pytest.raises(files.FolderInUse, match=rf"^{tmp_path}/run/.owner is gone, .* writes no more$"):
            write_a(tmp_path / "run")


READERS = [files.read_json, files.file_digest, partial(files.read_arrays, keys=["mu"]), read_pth]


@pytest.mark.parametrize("read", READERS)
def test_disk_that_fails_while_reading_is_no_damaged_file(read):
    """/proc/self/mem can be opened, but not read from its beginning."""
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error: '/proc/self/mem'$"):
        read(Path("/proc/self/mem"))


WRITERS = {
    "w.safetensors": lambda path: save_weights(path, VQModel(helpers.VQ)),
    "model.safetensors": lambda path: VQModel(helpers.VQ).save_pretrained(path.parent),
    "o.npy": lambda path: save_orders(path, np.zeros((9, 1000)), {}),
    "o.json": lambda path: save_orders(path, np.zeros((9, 1000)), {}),
    "s.npz": lambda path: save_statistics(path, {"": {"mu": np.zeros(9000)}}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_write_that_fails_midway_is_one_line_naming_the_file(tmp_path, name):
    """The limit on the size of files stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        try:
            WRITERS[name](tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    outcome = helpers.call_main(lambda _: write())
    assert outcome.status == 1 and outcome.err.count("\n") == 1 and "None" not in outcome.err
    assert str(tmp_path / name) in outcome.err and not (tmp_path / name).exists()


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe"], ids=["empty", "truncated", "binary"])
def test_unreadable_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="a.json: damaged or no readable JSON"):
        files.read_json(tmp_path / "a.json")


SAVED = {"model": {"depth": 3, "sizes": [1, 2]}, "lr": 0.1, "long": [*range(99)], "old": True}
NOW = {"model": {"depth": 3, "sizes": (1, 2)}, "lr": 0.1, "long": [*range(99)]}


@pytest.mark.parametrize(
    "change,message",
    [
        ({"lr": 0.2}, "run was made with lr 0.1, now it is 0.2: give another folder"),
        ({"model": {"depth": 4}}, "made with model.depth 3, now it is 4"),
        ({"model": {"sizes": (1,)}}, r"made with model.sizes \[1, 2\], now it is \[1\]"),
        ({"model": {"wide": True}}, "made with model.wide None, now it is True"),
        ({"long": [*range(98), 7]}, r"made with long\[98\] 98, now it is 7"),
        ({"long": [1]}, r"made with long 99 values, now it is \[1\]"),
        ({"new": "x" * 999}, f"made with new None, now it is {'x' * 80}: "),
    ],
)
def test_changed_settings_are_refused_by_the_name_of_the_field(change, message):
    """Tuples equal the lists that JSON makes of them; fields that only an old version had do not count."""
    files.refuse_changes("run", SAVED, NOW, "give another folder")
    with pytest.raises(ValueError, match=message):
        files.refuse_changes("run", SAVED, {**NOW, **change}, "give another folder")


def test_json_is_read_as_it_was_written(tmp_path):
    value = {"steps": [256, 128], "nested": [[1, 2], [{"a": []}]], "text": "[\n1,\n2]"}
    value["names"] = ["a [ 1 ].png", "cat [ big ]", "\udcff"]
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value


IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("array", [IMAGES, np.asfortranarray(IMAGES), np.arange(7.0)], ids=["C", "F", "1d"])
def test_stored_array_is_memory_mapped_and_a_compressed_one_loaded(tmp_path, array):
    np.savez(tmp_path / "stored.npz", other=np.arange(3), arr_0=array)
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=array)
    for name, is_mapped in (("stored", True), ("compressed", False)):
        found = files.map_array(tmp_path / f"{name}.npz", "arr_0")
        assert np.array_equal(found, array) and isinstance(found, np.memmap) == is_mapped


class Hostile:
    """Unpickled, it would make the file `ran` in the working directory."""

    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "arrays,share",
    [({"arr_0": IMAGES}, 0), ({"arr_0": IMAGES}, 0.5), ({"arr_0": IMAGES}, 0.95), ({"mu": IMAGES}, 1),
     ({"arr_0": np.array([Hostile()], object)}, 1)],
    ids=["empty", "half", "nearly all", "array missing", "pickle"],
)
def test_damaged_archive_is_refused_by_name_and_nothing_runs(tmp_path, monkeypatch, save, arrays, share):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npz"
    save(path, **arrays)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    for read in (files.map_array, lambda path, key: files.read_arrays(path, [key])):
        with pytest.raises(ValueError) as error:
            read(path, "arr_0")
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("end", [b'{"step": 4, "lo', b"\xff\0{", b"[4]", b'{"loss": 4}', b'{"step": "4"}'])
def test_resumed_log_drops_a_damaged_line_and_what_came_after_the_resumed_step(end, tmp_path):
    log, seen = MetricsLog(tmp_path), []
    for step in range(4):
        log.write(step, loss=step / 2, note="text")
    with log.path.open("ab") as file:
        file.write(end)  # killed while writing, or the disk's fault
    assert len(read_metrics(tmp_path)) == 4
    resumed = MetricsLog(tmp_path, resume_step=2, listeners=[lambda *line: seen.append(line)])
    resumed.write(3, loss=9.0, note="x")
    losses = {line["step"]: line["loss"] for line in read_metrics(tmp_path)}
    assert losses == {0: 0, 1: 0.5, 2: 1, 3: 9}
    assert seen == [(3, {"loss": 9.0})]  # listeners get the numbers
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
