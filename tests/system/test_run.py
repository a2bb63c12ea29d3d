"""scripts/cli/run.py and job.py without SLURM: what would be submitted, what is refused, local runs, signals,
retries, and how scripts/common.sh finds its machines."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from argparse import ArgumentTypeError

import helpers
import processes
import pytest
from processes import REPO, WAIT, wait_for
from submitit.core.utils import DelayedSubmission

from scripts.cli import job, run
from scripts.cli.attempt import MAX_LOST, Attempt, records
from scripts.cli.job import Job


@pytest.fixture
def no_slurm(monkeypatch):
    """No sbatch, and none of the variables that a run sets."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "NNODES", "NGPU", "NODE_RANK", "MASTER_", "OUTPUT_DIR")):
            monkeypatch.delenv(name)
    absent = ("sbatch", "no_such")
    monkeypatch.setattr(run.shutil, "which", lambda name: None if name in absent else f"/bin/{name}")


def call(*argv):
    return helpers.call_main(run.main, *argv)


# Flags.


def test_time_has_the_formats_of_slurm():
    expected = {"30": 30, "0:30": 1, "90:00": 90, "4:00:00": 240, "2-00:00:00": 2880, "1-12:30": 2190}
    assert {text: run.minutes(text) for text in expected} == expected
    for text in ("", "0", "4h", "1:2:3:4", "-5"):
        with pytest.raises(ArgumentTypeError):
            run.minutes(text)


def test_dry_run_prints_the_job_and_writes_nothing(tmp_path, no_slurm):
    command = ["bash", str(REPO / "scripts/train/lpd_l_256.sh"), "--seed", "3"]
    words = (
        f"-J lpd_l_256 -p gpu -A paper -N 4 --gpus-per-node 4 --time 2-00:00:00 --qos high --constraint a100 "
        f"--max-retry 5 --sbatch mem=0 --output-dir {tmp_path}/out --dry-run"
    )
    outcome = call(*words.split(), *command)
    assert (outcome.status, outcome.err) == (0, "")
    job = json.loads(outcome.out)
    expected = {
        "job_name": "lpd_l_256", "partition": "gpu", "account": "paper", "nodes": 4, "ntasks_per_node": 1,
        "gpus_per_node": 4, "time": 2880, "qos": "high", "constraint": "a100", "signal_delay_s": 120,
        "additional_parameters": {"requeue": True, "mem": "0"},
    }
    assert expected.items() <= job["sbatch"].items()
    assert job["environment"] == {"OUTPUT_DIR": f"{tmp_path}/out", "NGPU": "4"}
    assert job["command"] == command and job["max_retry"] == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words,message",
    [
        ("", "no command to run"),
        ("-J a/b true", "--job-name 'a/b'"),
        ("--time 1 --grace 60 true", "--grace 60 s is all of --time, 60 s"),
        ("--local bash no_such.sh", "bash: no such file: no_such.sh"),
        ("--local no_such", "no such program: no_such"),
        ("true", "sbatch is not here: --local runs without it"),
        ("status no_such_job", "no submitted job 'no_such_job'"),
        ("cancel", "usage: run.py cancel JOB"),
    ],
)
def test_mistake_is_one_line_before_anything_is_submitted(words, message, no_slurm):
    outcome = call(*words.split())
    assert outcome.status == 2 and outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and message in outcome.err


# Here, without SLURM.


@pytest.fixture
def local(tmp_path, capfd):
    """A function that runs a shell command by `run.py --local`; returns (status, output)."""

    def act(script, *flags):
        status = call("--local", "--output-dir", tmp_path / "out", *flags, "bash", "-c", script).status
        return status, capfd.readouterr().out

    return act


def test_local_run_sets_the_variables_and_writes_the_log(local, tmp_path):
    script = "echo $NNODES $NODE_RANK $MASTER_ADDR $OUTPUT_DIR; echo also >&2; ((MASTER_PORT > 0))"
    expected = f"1 0 127.0.0.1 {tmp_path}/out\nalso\n"
    assert local(script) == (0, expected)
    (log,) = (tmp_path / "out/jobs").glob("local_*_log.out")
    assert log.read_text() == expected


@pytest.mark.parametrize("retries,exit_status,tries", [(0, 7, 1), (2, 7, 3), (2, 2, 1)])
def test_failure_is_retried_but_wrong_usage_is_not(retries, exit_status, tries, local):
    assert local(f"echo try; exit {exit_status}", "--max-retry", retries) == (exit_status, "try\n" * tries)


# What is submitted, with a stand-in for SLURM's programs.


def test_job_runs_the_code_of_its_submission_and_nothing_of_the_job_it_comes_from(tmp_path, monkeypatch):
    repo, out = tmp_path / "repo", tmp_path / "out"
    for name in ("scripts/train/a.sh", "scripts/common.sh", "main_a.py", "data/1.png", "scripts/notes.txt"):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text("submitted")
    (repo / "scripts/train/a.sh").write_text('cat "${0%/*}"/../{common.sh,notes.txt,../data/1.png}')
    for name, script in {"sbatch": "env >$0.env; echo Submitted batch job 7", "srun": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    caller = {"SLURM_CPUS_PER_TASK", "SLURM_MEM_PER_CPU", "SBATCH_PARTITION", "CUDA_VISIBLE_DEVICES", "RANK"}
    for name in (*caller, "SLURM_CONF"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(run, "REPO", repo)
    monkeypatch.setattr(run, "slurm_state", lambda job_id: None)
    monkeypatch.chdir(repo)
    outcome = processes.finished(call("--output-dir", out, "bash", "scripts/train/a.sh", "data/1.png"))
    assert outcome.err == "not used: SBATCH_PARTITION of the environment, only flags are\n"
    names = {line.split("=")[0] for line in (tmp_path / "sbatch.env").read_text().splitlines()}
    assert "SLURM_CONF" in names and not caller & names
    for path in (repo / "scripts/common.sh", repo / "data/1.png"):
        path.write_text("edited")
    submitted = DelayedSubmission.load(out / "jobs/7_submitted.pkl").function
    (code,) = (out / "jobs").glob("code-*")
    assert submitted.directory == str(repo) and submitted.command[2] == "data/1.png"
    done = subprocess.run(submitted.command, cwd=repo, capture_output=True, text=True)
    assert done.stdout == "submittedsubmittededited"
    assert f"#SBATCH --chdir={code}\n" in next((out / "jobs").glob("*.sh")).read_text()


# Signals for the command.

HANDLES = """
import os, signal, sys, time
signal.signal(signal.{name}, lambda *_: sys.exit("handled"))
os.write(1, b"ready\\n")
signal.pause()
"""


def signalled(command, number, **rest):
    """Run a command and signal this process, its job, once it prints `ready`; returns (status, first signal,
    output)."""
    read, write = os.pipe()
    text = []

    def when_ready():
        text.append(os.read(read, 6))
        if text[0]:  # else the command has ended without a word
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=when_ready)
    thread.start()
    try:
        status, received = job.run_command(command, dict(os.environ), output=write, **rest)
    finally:
        os.close(write)
        thread.join()
    with os.fdopen(read, "rb") as file:
        return status, received, b"".join([*text, file.read()]).decode()


def test_shell_survives_a_signal_that_its_program_handles(tmp_path):
    """In a script that does not `exec` the program, whose handler replaces the inherited SIG_IGN."""
    (tmp_path / "program.py").write_text(HANDLES.format(name="SIGUSR2"))
    script = f'"{sys.executable}" {tmp_path}/program.py; echo after $?'
    expected = (0, signal.SIGUSR2, "ready\nhandled\nafter 1\n")
    assert signalled(["bash", "-c", script], signal.SIGUSR2) == expected


def test_command_that_ignores_the_signal_is_killed_with_its_children():
    nap = f"sleep 1234.{os.getpid()}"
    script = f"setsid {nap} & echo ready; {nap}"
    status, received, _ = signalled(["bash", "-c", script], signal.SIGUSR2, kill_after=1)
    assert (status, received) == (128 + signal.SIGKILL, signal.SIGUSR2)
    wait_for(lambda: subprocess.run(["pgrep", "-fx", nap]).returncode == 1, "end of the children")


# On a machine of a SLURM job, with a stand-in for SLURM.


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A function that calls a Job as submitit does on machine `rank` of two and returns its exit status; its
    `requeued` lists the commands given to scontrol."""
    requeued = []

    def act(command, *, rank=0, attempt=0, number=0, state="RUNNING", **rest):
        class Place:
            job_id, num_nodes, global_rank, hostnames = "42", 2, rank, ["first", "second"]
            paths = type("Paths", (), {"stderr": tmp_path / f"42_{rank}_log.err"})

        Place.paths.stderr.write_text("noise\r  5%|\nerror: what happened\nmore\n")
        monkeypatch.setattr("submitit.JobEnvironment", Place)
        monkeypatch.setenv("SLURM_JOB_ID", "42")
        monkeypatch.setenv("SLURMD_NODENAME", "no such machine")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))
        shown = subprocess.CompletedProcess([], 0, f"JobId=42 JobState={state} Restarts={attempt}")

        def run(words, **_):
            if words[1] == "requeue":
                requeued.append(words)
            return shown

        monkeypatch.setattr(job.subprocess, "run", run)
        monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
        if number:
            monkeypatch.setattr(job, "run_command", lambda *a, **k: (140, number))
        try:
            return Job(tuple(command), {}, **{"folder": str(tmp_path), **rest})()
        except SystemExit as end:
            return end.code

    act.requeued = requeued
    return act


def test_command_gets_its_machine(place, tmp_path):
    script = f"echo $NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT > {tmp_path}/seen"
    assert place(["bash", "-c", script], rank=1) is None
    assert (tmp_path / "seen").read_text() == "2 1 first 20042\n"


def test_first_machine_requeues_the_job_at_the_time_limit_but_not_when_cancelled(place):
    assert place(["true"], number=signal.SIGTERM) == 140 and place.requeued == []
    assert place(["true"], rank=1, number=signal.SIGUSR2) is None and place.requeued == []
    assert place(["true"], rank=0, number=signal.SIGUSR2) == 140
    assert place.requeued == [["scontrol", "requeue", "42"]]


def test_failed_job_is_requeued_once_for_all_machines(place, tmp_path):
    fail = ["bash", "-c", "exit 5"]
    assert place(fail, rank=1, max_retry=1) == 5 and place(fail, rank=0, max_retry=1) == 5
    assert len(place.requeued) == 1
    with pytest.raises(RuntimeError, match="exit status 5: error: what happened"):
        place(fail, attempt=1, max_retry=1)
    assert len(place.requeued) == 1
    first, second = records(tmp_path, "42")
    assert first["cause"] == second["cause"] == "failed"
    assert first["reason"] == "exit status 5: error: what happened"


def test_lost_attempts_do_not_count_as_failures_but_ten_without_progress_end_the_job(place, tmp_path):
    """Progress is a new file in the run folder here, after five attempts."""
    lose = ["bash", "-c", f"exit {job.PEER_LOST}"]
    folder = {"folder": str(tmp_path / "jobs")}
    (tmp_path / "jobs").mkdir()
    for attempt in range(5 + MAX_LOST - 1):
        if attempt == 5:
            (tmp_path / "image").touch()
        assert place(lose, attempt=attempt, **folder) == job.PEER_LOST
    assert len(place.requeued) == 5 + MAX_LOST - 1
    with pytest.raises(RuntimeError):
        place(lose, attempt=5 + MAX_LOST - 1, **folder)
    with pytest.raises(RuntimeError, match="10 attempts in a row were lost without progress"):
        place(["true"], attempt=5 + MAX_LOST, **folder)
    assert len(place.requeued) == 5 + MAX_LOST - 1


def test_wrong_usage_is_retried_unless_it_is_wrong_on_every_machine_from_the_start(place, tmp_path):
    """On one alone, or after an earlier attempt, it is that machine's trouble, such as a disk not mounted."""
    wrong = ["bash", "-c", "exit 2"]
    assert place(wrong, max_retry=9) == 1 and len(place.requeued) == 1
    assert place(wrong, attempt=1, max_retry=9) == 1 and len(place.requeued) == 2
    for record in tmp_path.glob("42_*_0.json"):
        record.unlink()
    with pytest.raises(RuntimeError, match="exit status 2: error: what happened"):
        place(wrong, rank=1, max_retry=9)
    assert len(place.requeued) == 2


@pytest.mark.parametrize("state,attempt", [("COMPLETING", 0), ("RUNNING", 1)])
def test_cancelled_or_earlier_attempt_decides_nothing(state, attempt, place, tmp_path, monkeypatch):
    monkeypatch.setattr(Attempt, "of_this_process", lambda folder: Attempt(folder, "42", 0))
    assert place(["bash", "-c", "exit 5"], state=state, attempt=attempt, max_retry=3) == 5
    assert place.requeued == [] == records(tmp_path, "42")


def test_error_of_a_log_is_its_last_error_line_or_its_last_line(tmp_path):
    logs = {"a\nerror: b\nc\n": "error: b", "a\nOSError: b\n\n": "OSError: b", "x\r 9%|": " 9%|", "": ""}
    for log, expected in logs.items():
        (tmp_path / "log").write_text(log)
        assert job.last_error(tmp_path / "log") == expected


def test_status_uses_the_records_when_slurm_has_forgotten_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "slurm_state", lambda job_id: None)
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    (jobs / "7_submitted.json").write_text('{"job_id": "7"}')
    assert call("status", tmp_path).out.splitlines()[0] == "job 7: UNKNOWN"
    Attempt(str(jobs), "7", 0).begin(["m", "n"])
    Attempt(str(jobs), "7", 0).end("failed", "exit status 1: error: e")
    expected = r"job 7: FAILED\nattempt 0 on m, n, \S+ \S+: failed, \S+ \S+: exit status 1: error: e\n"
    assert re.match(expected, call("status", tmp_path).out)
    Attempt(str(jobs), "7", 1).end("finished", "")
    assert call("status", tmp_path).out.splitlines()[0] == "job 7: COMPLETED"


@pytest.mark.long
def test_port_in_use_does_not_matter_on_one_machine_and_is_named_on_several(tmp_path):
    (tmp_path / "program.py").write_text("print('runs')")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["--master_addr", "127.0.0.1", "--master_port", port, tmp_path / "program.py"]
        agent = (REPO / "scripts/cli/agent.py", "--node_rank", 0)
        alone, several = (processes.python(*agent, "--nnodes", n, *words) for n in (1, 2))
    assert alone.status == 0 and alone.out == "runs\n"
    assert several.status == 1 and "Traceback" not in several.err
    assert several.err.splitlines()[-1].startswith(f"error: 127.0.0.1:{port}: ")


# The machines and processes that scripts/common.sh finds.


def environment(tmp_path, **variables):
    """The finished process that prints the variables, with a stand-in for scontrol."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/bash\n[[ $* == "show hostnames n[7-8]" ]] && echo n7 && echo n8\n')
    scontrol.chmod(0o755)
    shown = "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT $NGPU"
    script = f"source {REPO}/scripts/common.sh; set_processes; echo {shown}"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NGPU": "2", **variables}
    return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)


STEP = {
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "30005", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "n[7-8]",
}
OWN = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "me", "MASTER_PORT": "9"}


def test_machines_come_from_a_job_step_unless_they_are_set(tmp_path):
    assert environment(tmp_path, SLURM_JOB_ID="5").stdout == "1 0 127.0.0.1 29500 2\n"  # not in a job step
    assert environment(tmp_path, **STEP).stdout == "2 1 n7 20005 2\n"
    assert environment(tmp_path, **STEP, **OWN).stdout == "3 2 me 9 2\n"
    alone = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}
    alone = {**STEP, **alone, "SLURM_STEP_NODELIST": "no scontrol knows it"}
    assert environment(tmp_path, **alone).stdout == "1 0 127.0.0.1 29500 2\n"
    done = environment(tmp_path, **{**STEP, "SLURM_STEP_NUM_TASKS": "16"})
    assert done.returncode == 2 and "16 tasks on 2 machines" in done.stderr


def test_a_command_is_stopped_once_something_is_due(tmp_path):
    obeys = "import os, signal, sys, time; signal.signal(10, lambda *_: os._exit(7)); " \
        f"open(sys.argv[1], 'w').close(); time.sleep({WAIT})"
    command = [sys.executable, "-S", "-c", obeys, str(tmp_path / "ready")]
    assert job.run_until((tmp_path / "ready").exists, command, every=0.05) == (7, True)
    assert job.run_until(lambda: False, ["sh", "-c", "exit 3"], every=0.01) == (3, False)
