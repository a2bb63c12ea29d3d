"""Files are whole or not there, and killed processes' attempts are cleared away."""

import os
import subprocess

import pytest
from programs import call, train_flags

from engine.checkpoint import load_checkpoint
from util.files import atomic


def test_failed_attempt_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), atomic(path) as partial:
        partial.write_text("after")
        _ = 1 / 0
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_attempts_of_killed_processes_are_removed_and_of_living_ones_kept(tmp_path):
    """A process number beyond the largest is of none that lives; 1 always lives."""
    dead, living, of_another = (tmp_path / f".{name}.tmp" for name in ("a.999999999", "a.1", "b.999999999"))
    for left in (dead, living, of_another):
        left.write_text("half")
    with atomic(tmp_path / "a") as partial:
        partial.write_text("whole")
        assert str(os.getpid()) in partial.name
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a", living, of_another])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for one checkpoint of `train_flags` and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_training_on_a_full_disk_says_so_and_keeps_the_last_good_checkpoint(small_disk):
    flags = train_flags(small_disk / "run", save_last_freq=0.5)
    outcome = call("lpd", *flags)
    assert outcome.status == 1
    assert outcome.err.splitlines()[-1].startswith("error: [Errno 28] No space left on device: ")
    assert "checkpoint-last.pth" in outcome.err.splitlines()[-1]
    (good,) = small_disk.rglob("*.pth")
    assert load_checkpoint(good)["step"] == 3
