"""What all programs share: flags from dataclasses, exit statuses, errors in one line, stop signals."""

import argparse
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass

import helpers
import processes
import pytest
import torch

from engine.generate import OrderChoice
from util import cli
from util.device import COPIES, choose_device
from util.distributed import STOP_SIGNALS, Stopped, StopRequest
from util.images import UnreadableImage

LOST_PEER = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

# Flags.


@dataclass(frozen=True)
class Settings:
    """As TrainConfig: most fields are flags, one comes from the data."""

    num_images: int
    lr: float = cli.setting(0.1, "learning rate", least=0, most=1)
    steps: int = cli.setting(None, "default: all", kind=int, least=1)
    schedule: str = cli.setting("linear", choices=["linear", "cosine"])
    fused: bool = cli.setting(False)


def parse(*words):
    parser = cli.Parser()
    cli.add_settings(parser, Settings)
    parser.add_argument("--img_size", type=int)
    return parser.parse_args(words)


def test_settings_come_from_the_flags_of_their_fields():
    assert cli.settings_from(Settings, parse(), num_images=5) == Settings(5)
    args = parse("--lr", "1e-3", "--steps", "7", "--schedule", "cosine", "--fused")
    assert cli.settings_from(Settings, args, num_images=5) == Settings(5, 1e-3, 7, "cosine", True)
    assert cli.settings_from(Settings, args, num_images=5, steps=9).steps == 9  # what is given wins


@pytest.mark.parametrize(
    "words,message",
    [
        (["--lr", "2"], "--lr: 2 is not in 0..1"),
        (["--lr", "nan"], "--lr: nan is not in 0..1"),
        (["--steps", "0"], "--steps: 0 is not at least 1"),
        (["--num_images", "3"], "unrecognized arguments: --num_images"),
        (["--sched", "linear"], "unrecognized arguments: --sched"),  # no abbreviations
    ],
)
def test_wrong_flag_is_refused_by_name(words, message):
    with pytest.raises(cli.UsageError, match=message):
        parse(*words)


def test_help_shows_defaults_but_not_those_that_say_nothing(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "learning rate (default: 0.1)" in text and "(default: linear)" in text
    assert "None" not in text and "False" not in text


def test_stated_value_must_be_the_actual_one():
    cli.check_stated(parse("--img_size", "16"), img_size=16, class_num=3)
    with pytest.raises(cli.UsageError, match="--img_size is 16, the weights or data have 32"):
        cli.check_stated(parse("--img_size", "16"), img_size=32)


def test_output_is_overwritten_only_on_request_and_if_it_is_the_programs_own(tmp_path):
    plain, overwrite = (
        argparse.Namespace(output_dir=tmp_path / "out", overwrite=overwrite) for overwrite in (False, True)
    )
    cli.prepare_output(plain, "result.json")  # no folder yet
    (tmp_path / "out/images").mkdir(parents=True)
    for args, message in ((plain, "not empty: give another or --overwrite"), (overwrite, "no result.json")):
        with pytest.raises(cli.UsageError, match=message):
            cli.prepare_output(args, "result.json")
    (tmp_path / "out/result.json").touch()
    cli.prepare_output(overwrite, "result.json")
    assert os.listdir(tmp_path / "out") == ["result.json"]


# How a program ends.


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher, whatever started the tests."""
    for name in ("TORCHELASTIC_ERROR_FILE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def end(error):
    """The exit status of a program whose `main` raises this."""

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    return ended.value.code


@pytest.mark.parametrize("kind", [cli.UsageError, cli.Failure, UnreadableImage, OSError, ZeroDivisionError])
def test_expected_error_is_one_line_and_a_bug_keeps_its_traceback(kind, capsys):
    assert end(kind("what happened")) == (2 if kind is cli.UsageError else 1)
    printed = capsys.readouterr().err
    if kind is ZeroDivisionError:
        assert printed.startswith("Traceback") and printed.endswith("ZeroDivisionError: what happened\n")
    else:
        assert printed == "error: what happened\n"


TROUBLE = errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.ENOSPC, errno.ENODEV, errno.ENOTCONN
MISTAKES = errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG


@pytest.mark.parametrize("status,numbers", [(1, TROUBLE), (2, MISTAKES)])
def test_checks_tell_trouble_of_the_machine_from_mistakes_of_the_user(status, numbers, capsys):
    for number in numbers:
        with pytest.raises((OSError, cli.UsageError)) as raised, cli.checking("--flag: "):
            raise OSError(number, os.strerror(number), "a.file")
        assert end(raised.value) == status
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and f"{os.strerror(number)}: 'a.file'" in printed
        assert ("--flag" in printed) == (status == 2)


def test_flags_have_defaults_where_the_system_does_not_tell_the_usable_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    parser = cli.Parser()
    cli.add_device_flags(parser)
    assert 1 <= parser.parse_args([]).num_workers <= 4


@pytest.mark.parametrize("variable", COPIES)
def test_copies_of_a_program_that_would_do_the_same_work_are_refused(variable, monkeypatch):
    monkeypatch.setenv(variable, "2")
    outcome = helpers.call("cache", *helpers.cache_flags("nowhere"))
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert outcome.err.startswith(f"error: {variable} is 2: that many copies")
    for name in ("RANK", "SLURM_PTY_PORT"):  # torchrun's process; a shell on one of several tasks
        with monkeypatch.context() as patch:
            patch.setenv(name, "0")
            choose_device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_gpu_that_is_not_here_is_this_machines_trouble(tmp_path):
    outcome = helpers.call("cache", *helpers.cache_flags(tmp_path / "out"), "--device", "cuda")
    assert outcome.status == 1
    assert outcome.err == f"error: [Errno {errno.ENODEV}] no such GPU is available here: '--device cuda'\n"


PROGRAMS = [  # but the measurements: no benchmarks, no gpu_day.py
    path for pattern in ("main_*.py", "demo/*.py", "orders/*.py", "scripts/**/*.py")
    for path in sorted(processes.REPO.glob(pattern))
    if "cli.run(main)" in path.read_text() and path.name != "gpu_day.py"
]


def test_every_program_names_a_working_directory_that_is_deleted(tmp_path):
    """torch cannot be imported there and does not say why."""
    wrong = {}
    for program in PROGRAMS:
        here = tmp_path / "gone"
        here.mkdir()
        words = f'rmdir {here}; exec "{sys.executable}" {program} --help'
        done = subprocess.run(["bash", "-c", words], cwd=here, capture_output=True, text=True)
        message = "error: the working directory is deleted: cd to one that exists\n"
        if (done.returncode, done.stderr) != (2, message):
            wrong[program.name] = done.stderr
    assert len(PROGRAMS) > 12 and not wrong


FULL = "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 9999 /dev/zero >/dev/shm/full;"


@pytest.mark.long
def test_full_shared_memory_is_named(tmp_path):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    words = [processes.REPO / "main_cache.py", *helpers.cache_flags(tmp_path / "out"), "--num_workers", 1]
    command = f"{FULL} exec {shlex.join([sys.executable, *map(str, words)])}"
    words = ["unshare", "-m", "bash", "-c", command]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device: '/dev/shm'"


def test_stopped_run_ends_with_the_status_of_its_signal_and_the_first_process_reports(capsys, monkeypatch):
    for rank, printed in (("0", "stopped: SIGUSR1: step 3 is saved\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert end(Stopped(signal.SIGUSR1, "step 3 is saved")) == 138
        assert capsys.readouterr().err == printed


@pytest.fixture
def error_file(tmp_path, monkeypatch):
    """As for a worker of torchrun, which prints what the first worker to fail writes there."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    return tmp_path / "error.json"


def test_worker_writes_its_error_for_the_launcher_and_prints_nothing(error_file, capsys):
    for error, status, beginning in ((cli.UsageError("x"), 2, "error: x"), (ValueError("x"), 1, "Traceback")):
        assert end(error) == status
        written = json.loads(error_file.read_text())["message"]
        assert written["message"].startswith(beginning)
        assert written["extraInfo"]["py_callstack"] == written["message"]
        assert int(written["extraInfo"]["timestamp"]) > 0
    assert capsys.readouterr().err == ""


def test_worker_that_lost_its_peer_may_be_ended_while_it_finds_out_which(error_file, capsys, monkeypatch):
    handlers, handler = [], signal.getsignal(signal.SIGTERM)

    def describe(error):
        handlers.append(signal.getsignal(signal.SIGTERM))
        assert not error_file.exists()
        return "process 0 waited"

    monkeypatch.setattr(cli, "describe_loss", describe)
    assert end(LOST_PEER) == cli.PEER_LOST
    signal.signal(signal.SIGTERM, handler)
    assert handlers == [signal.SIG_DFL]
    assert json.loads(error_file.read_text())["message"]["message"] == "error: process 0 waited"
    assert capsys.readouterr().err == ""


# Stop signals.


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_signal_is_noted_and_the_handler_restored(number):
    handler = signal.getsignal(number)
    with StopRequest() as request:
        assert request.number == 0
        signal.raise_signal(number)
        assert request.number == number
    assert signal.getsignal(number) == handler


def test_closed_terminal_does_not_stop_what_nohup_started():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as request:
        signal.raise_signal(signal.SIGHUP)
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN and request.number == 0


def test_second_interrupt_ends_at_once_and_a_second_of_another_kind_does_not():
    with StopRequest() as request:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert request.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_stopping_process_is_silent_about_a_lost_peer_but_not_about_its_own_error():
    for error, raised in ((LOST_PEER, KeyboardInterrupt), (RuntimeError("its own"), RuntimeError)):
        with pytest.raises(raised), StopRequest():
            signal.raise_signal(signal.SIGINT)
            raise error


PUBLISHED_WAYS = {
    "[1, 1, 2]": [1, 1, 2],
    "[1]*4": [1, 1, 1, 1],
    "[1, 2] * 2": [1, 2, 1, 2],
}


@pytest.mark.parametrize("text", PUBLISHED_WAYS)
def test_group_sizes_may_be_written_as_published_scripts_do(text):
    parser = cli.Parser()
    cli.add_settings(parser, OrderChoice)
    assert parser.parse_args(["--group_sizes", text]).group_sizes == PUBLISHED_WAYS[text]
    assert parser.parse_args(["--group_sizes", "1", "3"]).group_sizes == [1, 3]


@pytest.mark.parametrize("text", ["[1", "1; 2", "[1]*x", "__import__('os')", "[1]**9"])
def test_group_sizes_are_parsed_and_never_evaluated(text):
    parser = cli.Parser()
    cli.add_settings(parser, OrderChoice)
    with pytest.raises(cli.UsageError, match="--group_sizes: .* is not a list of numbers"):
        parser.parse_args(["--group_sizes", text])


def test_schedules_are_step_counts_or_a_file_of_lists(tmp_path):
    parser = cli.Parser()
    parser.add_argument("--group_sizes_list", action=cli.Schedules, nargs="+")
    (tmp_path / "lists.json").write_text("[[1, 3], [1, 1, 2]]")
    assert parser.parse_args(["--group_sizes_list", "2", "4"]).group_sizes_list == [2, 4]
    lists = parser.parse_args(["--group_sizes_list", str(tmp_path / "lists.json")]).group_sizes_list
    assert lists == [[1, 3], [1, 1, 2]]
    with pytest.raises(cli.UsageError, match="--group_sizes_list: no such file"):
        parser.parse_args(["--group_sizes_list", "absent.json"])
