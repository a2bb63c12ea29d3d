"""scripts/cli/run.py, util/job.py and scripts/setups without SLURM: what would be submitted, what is refused,
what runs here, and how a command hears signals and is tried again."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentTypeError

import programs
import pytest
from programs import REPO

from util import job
from util.job import Job

RUN = REPO / "scripts/cli/run.py"
spec = importlib.util.spec_from_file_location("run", RUN)
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


@pytest.fixture
def no_slurm(monkeypatch):
    """An environment without SLURM's programs and without what a run sets."""
    bare = {"PATH": f"{os.path.dirname(sys.executable)}:/bin", "HOME": "/"}
    for name in list(os.environ):
        if name.startswith(("SLURM", "NNODES", "NGPU", "NODE_RANK", "MASTER_", "OUTPUT_DIR")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(run.shutil, "which", lambda name: None if name == "sbatch" else f"/bin/{name}")
    return bare


def call(*argv):
    """Run the program in this process."""
    return programs.call_main(run.main, *argv)


# Flags.


@pytest.mark.parametrize(
    "text,expected",
    [("30", 30), ("0:30", 1), ("90:00", 90), ("4:00:00", 240), ("2-00:00:00", 2880), ("1-12", 2160),
     ("1-12:30", 2190), ("365-00:00:00", 525600), ("0:00:01", 1), ("100:00:00", 6000)],
)  # fmt: skip
def test_time_is_written_as_for_slurm_and_has_no_upper_limit(text, expected):
    assert run.minutes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "4h", "1:2:3:4", "-5", "1-", "1-2:3:4:5"])
def test_other_times_are_refused(text):
    with pytest.raises(ArgumentTypeError):
        run.minutes(text)


def test_dry_run_prints_all_that_would_be_submitted_and_writes_nothing(tmp_path, no_slurm):
    command = ["bash", str(REPO / "scripts/train/lpd_l_256.sh"), "--seed", "3"]
    words = (
        f"-J lpd_l_256 -p gpu -A paper -N 4 --gpus-per-node 4 --time 2-00:00:00 --qos high --constraint a100 "
        f"--max-retry 5 --sbatch mem=0 --output-dir {tmp_path}/out --dry-run"
    )
    outcome = call(*words.split(), *command)
    assert (outcome.status, outcome.err) == (0, "")
    told = json.loads(outcome.out)
    expected = {
        "job_name": "lpd_l_256", "partition": "gpu", "account": "paper", "nodes": 4, "ntasks_per_node": 1,
        "gpus_per_node": 4, "time": 2880, "qos": "high", "constraint": "a100", "signal_delay_s": 120,
        "additional_parameters": {"requeue": True, "mem": "0"},
    }  # fmt: skip
    assert expected.items() <= told["sbatch"].items()
    assert told["environment"] == {"OUTPUT_DIR": f"{tmp_path}/out", "NGPU": "4"}
    assert told["command"] == command and told["max_retry"] == 5
    assert list(tmp_path.iterdir()) == []


def test_settings_are_those_submitit_knows(tmp_path, no_slurm):
    """Its own writer of sbatch files takes them; nothing is asked of SLURM."""
    from submitit.slurm.slurm import _make_sbatch_string

    words = f"-p gpu --output-dir {tmp_path} --sbatch mem=0 --dry-run true"
    args = run.parse_args(words.split())
    run.check(args)
    text = _make_sbatch_string(command="x", folder=tmp_path, **run.sbatch_settings(args))
    for line in ["requeue", "mem=0", "partition=gpu", "time=240", "signal=USR2@120", "gpus-per-node=8"]:
        assert f"#SBATCH --{line}\n" in text


@pytest.mark.parametrize(
    "words,message",
    [
        ("", "no command to run"),
        ("-J a/b true", "--job-name 'a/b'"),
        ("-N 0 true", "0 is not at least 1"),
        ("-N 2 --local true", "--local is this machine alone, not -N 2"),
        ("--time 4h true", "'4h' is none of"),
        ("--time 1 --grace 60 true", "--grace 60 s is all of --time, 60 s"),
        ("--max-retry -1 true", "-1 is not at least 0"),
        ("--sbatch mem true", "'mem' is no KEY=VALUE"),
        ("--output-dir /proc/no true", "--output-dir"),
        ("--local bash no_such.sh", "bash: no such file: no_such.sh"),
        ("true", "sbatch is not here: --local runs without it"),
        ("--time 4:00:00 -Z true", "-Z"),
        ("status no_such_job", "no submitted job 'no_such_job'"),
        ("cancel", "usage: run.py cancel JOB"),
        ("logs 123456", "no submitted job '123456'"),
    ],
)
def test_wrong_usage_is_told_in_one_line_before_anything_is_submitted(words, message, no_slurm):
    outcome = call(*words.split())
    assert outcome.status == 2 and outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and message in outcome.err


def test_missing_program_is_refused(no_slurm, monkeypatch):
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    assert "no such program: no_such" in call("--local", "no_such").err


# Here, without SLURM.


@pytest.fixture
def local(tmp_path, capfd):
    """A function that runs a shell command by `run.py --local`; returns its status and what it printed."""

    def act(script, *flags):
        status = call("--local", "--output-dir", tmp_path / "out", *flags, "bash", "-c", script).status
        return status, capfd.readouterr().out

    return act


def test_local_run_gives_the_command_its_machine_and_keeps_the_log(local, tmp_path):
    told = "echo $NNODES $NODE_RANK $MASTER_ADDR $OUTPUT_DIR; echo also >&2; ((MASTER_PORT > 0))"
    expected = f"1 0 127.0.0.1 {tmp_path}/out\nalso\n"
    assert local(told) == (0, expected)
    (log,) = (tmp_path / "out/jobs").glob("local_*_log.out")
    assert log.read_text() == expected


@pytest.mark.parametrize("retries,exit_status,tries", [(0, 7, 1), (2, 7, 3), (2, 2, 1)])
def test_failure_is_tried_again_as_often_as_asked_but_never_wrong_usage(retries, exit_status, tries, local):
    assert local(f"echo try; exit {exit_status}", "--max-retry", retries) == (exit_status, "try\n" * tries)


def test_success_after_a_failure_ends_the_tries(local):
    once = "echo try; [[ -e $OUTPUT_DIR/once ]] || { touch $OUTPUT_DIR/once; exit 1; }"
    assert local(once, "--max-retry", 9) == (0, "try\n" * 2)


# Signals on their way to a command.

HEARS = """
import os, signal, sys, time
signal.signal(signal.{name}, lambda *_: sys.exit("heard"))
os.write(1, b"ready\\n")
time.sleep(30)
"""


def signalled(command, number, **rest):
    """Run a command; when it says `ready`, this process, its job, gets a signal.

    Returns:
        (status, first signal, what it printed)
    """
    read, write = os.pipe()
    text = []

    def at_ready(*_):
        text.append(os.read(read, 6))
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGVTALRM, at_ready)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGVTALRM))  # the command has been started
    timer.start()
    try:
        status, asked = job.run_command(command, dict(os.environ), output=write, **rest)
    finally:
        timer.join()
        signal.signal(signal.SIGVTALRM, before)
        os.close(write)
    with os.fdopen(read, "rb") as file:
        return status, asked, b"".join([*text, file.read()]).decode()


def test_signal_is_passed_on_and_the_status_handed_back():
    hears = [sys.executable, "-c", HEARS.format(name="SIGTERM")]
    assert signalled(hears, signal.SIGTERM) == (1, signal.SIGTERM, "ready\nheard\n")


def test_shell_survives_the_signal_that_a_program_in_it_hears(tmp_path):
    """In a script that does not `exec` the program, whose handler counts although USR2 was ignored before."""
    (tmp_path / "hears.py").write_text(HEARS.format(name="SIGUSR2"))
    script = f'"{sys.executable}" {tmp_path}/hears.py; echo after $?'
    assert signalled(["bash", "-c", script], signal.SIGUSR2) == (0, signal.SIGUSR2, "ready\nheard\nafter 1\n")


def test_command_that_does_not_hear_is_killed_with_all_it_started():
    start = time.monotonic()
    script = "setsid sleep 1234.5 & echo ready; sleep 1234.5"
    status, asked, _ = signalled(["bash", "-c", script], signal.SIGUSR2, patience=1)
    assert (status, asked) == (128 + signal.SIGKILL, signal.SIGUSR2) and time.monotonic() - start < 10
    left = subprocess.run(["pgrep", "-f", "sleep 1234[.]5"], capture_output=True, text=True)
    assert left.stdout == ""


# On a machine of a SLURM job, with SLURM played.


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A function that calls a Job as submitit does on machine `rank` of two; it returns how that ended, and
    `requeued` counts what was asked of scontrol."""
    requeued = []

    def act(command, *, rank=0, attempt=0, number=0, **rest):
        class Place:
            job_id, num_nodes, global_rank, hostnames = "42", 2, rank, ["first", "second"]
            paths = type("Paths", (), {"stderr": tmp_path / f"42_{rank}_log.err"})

        Place.paths.stderr.write_text("noise\r  5%|\nerror: what happened\nmore\n")
        monkeypatch.setattr("submitit.JobEnvironment", Place)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))
        monkeypatch.setattr(job.subprocess, "run", lambda words, **_: requeued.append(words))
        monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
        if number:
            monkeypatch.setattr(job, "run_command", lambda *a, **k: (140, number))
        try:
            return Job(tuple(command), {}, str(tmp_path), **rest)()
        except SystemExit as end:
            return end.code

    act.requeued = requeued
    return act


def test_machine_of_a_job_tells_the_command_where_it_is(place, tmp_path):
    script = f"echo $NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT > {tmp_path}/told"
    assert place(["bash", "-c", script], rank=1) is None
    assert (tmp_path / "told").read_text() == "2 1 first 20042\n"


def test_at_the_time_limit_the_first_machine_queues_the_job_again_and_the_others_wait(place):
    assert place(["true"], rank=1, number=signal.SIGUSR2) is None and place.requeued == []
    assert place(["true"], rank=0, number=signal.SIGUSR2) == 140
    assert place.requeued == [["scontrol", "requeue", "42"]]


def test_cancelled_job_is_not_queued_again(place):
    assert place(["true"], number=signal.SIGTERM) == 140 and place.requeued == []


def test_failed_job_is_queued_again_once_for_all_machines_and_only_as_often_as_asked(place, tmp_path):
    fail = ["bash", "-c", "exit 5"]
    assert place(fail, rank=1, max_retry=1) == 5 and place(fail, rank=0, max_retry=1) == 5
    assert len(place.requeued) == 1
    with pytest.raises(RuntimeError, match="exit status 5: error: what happened"):
        place(fail, attempt=1, max_retry=1)
    assert len(place.requeued) == 1
    record = json.loads((tmp_path / "42_failed_0.json").read_text())
    assert record["rank"] == 1 and record["status"] == 5 and record["error"] == "error: what happened"


@pytest.mark.parametrize(
    "log,expected",
    [("a\nerror: b\nc\n", "error: b"), ("a\nOSError: b\n\n", "OSError: b"), ("x\r 9%|", " 9%|"), ("", "")],
)
def test_error_of_a_log_is_its_last_line_that_says_so(log, expected, tmp_path):
    (tmp_path / "log").write_text(log)
    assert job.last_error(tmp_path / "log") == expected


def test_state_is_that_of_the_records_where_slurm_has_forgotten_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "slurm_state", lambda job_id: None)
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    (jobs / "7_submitted.json").write_text('{"job_id": "7"}')
    assert call("status", tmp_path).out.splitlines()[0] == "job 7: UNKNOWN"
    record = {"attempt": 0, "machine": "m", "rank": 0, "status": 1, "error": "error: e"}
    (jobs / "7_failed_0.json").write_text(json.dumps(record))
    told = "job 7: FAILED\nattempt 0 on m: exit status 1: error: e\n"
    assert call("status", tmp_path).out.startswith(told)
    (jobs / "7_finished.json").write_text("{}")
    assert call("status", tmp_path).out.splitlines()[0] == "job 7: COMPLETED"


# scripts/setups


def environment(tmp_path, **variables):
    """What scripts/setups makes of an environment in which calling SLURM's programs is recorded."""
    (tmp_path / "bin").mkdir()
    for name in ("scontrol", "squeue", "srun", "sinfo", "sacct"):
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/called; echo n7; echo n8\n')
        path.chmod(0o755)
    told = "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT $NGPU"
    script = f"source {REPO}/scripts/common.sh; set_processes; echo {told}"
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "NGPU": "2", **variables}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    called = tmp_path / "called"
    return done, called.read_text() if called.exists() else ""


def test_setup_calls_no_program_of_slurm_outside_of_a_job_step(tmp_path):
    done, called = environment(tmp_path, SLURM_JOB_ID="5")
    assert (done.stdout, done.stderr, called) == ("1 0 127.0.0.1 29500 2\n", "", "")


STEP = {
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "30005", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "n[7-8]",
}  # fmt: skip


def test_setup_takes_machines_from_a_job_step_of_ones_own(tmp_path):
    done, called = environment(tmp_path, **STEP)
    assert (done.stdout, called) == ("2 1 n7 20005 2\n", "scontrol show hostnames n[7-8]\n")


def test_setup_leaves_what_is_set(tmp_path):
    mine = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "me", "MASTER_PORT": "9"}
    done, called = environment(tmp_path, **STEP, **mine)
    assert (done.stdout, called) == ("3 2 me 9 2\n", "")


def test_setup_refuses_several_tasks_on_a_machine(tmp_path):
    done, _ = environment(tmp_path, **{**STEP, "SLURM_STEP_NUM_TASKS": "16"})
    assert done.returncode == 2 and "16 tasks on 2 machines" in done.stderr
