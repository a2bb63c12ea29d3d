"""Run a command as a SLURM job through submitit, on each of its machines, requeued until it is done.

    python scripts/cli/run.py -J lpd_l_256 -p PARTITION -A ACCOUNT -N 4 bash scripts/train/lpd_l_256.sh
    python scripts/cli/run.py -J lpd_l_256 --local bash scripts/train/lpd_l_256.sh
    python scripts/cli/run.py status lpd_l_256          also cancel and logs; by name, run folder or number

The command gets NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NGPU and OUTPUT_DIR (the run folder, with the
logs in its folder `jobs`); scripts/common.sh turns them into one torchrun agent per machine.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.cli.attempt import FAILED, FINISHED, records, story
from scripts.cli.job import Job, slurm_state
from util import cli
from util.files import read_json, write_json
from util.logging import COMMIT, git_commit

REPO = Path(__file__).resolve().parents[2]
CODE = (".py", ".sh")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def minutes(text):
    """A time as SLURM writes it (M, M:S, H:M:S, D-H, D-H:M or D-H:M:S) in minutes, rounded up."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of M, M:S, H:M:S, D-H, D-H:M, D-H:M:S")
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, mins, seconds = [*[0] * (not dash and len(parts) < 3), *parts, 0, 0][:3]
    total = math.ceil((int(days or 0) * 24 + hours) * 60 + mins + seconds / 60)
    if not total:
        raise argparse.ArgumentTypeError(f"{text} is not a duration")
    return total


def key_value(text):
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z][a-z-]*", key):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def parse_args(argv=None):
    parser = cli.Parser(description="Run a command as a SLURM job; also `run.py status|cancel|logs JOB`")
    add = parser.add_argument
    add("-J", "--job-name", default="lpd")
    add("-p", "--partition")
    add("-A", "--account")
    add("-N", "--nodes", type=cli.number(int, 1), default=1, help="machines")
    add("--gpus-per-node", type=cli.number(int, 0), default=8, help="0 requests none")
    add("--time", type=minutes, default="4:00:00", help="limit of one attempt: 30, 4:00:00, 2-00:00:00")
    add("--qos")
    add("--constraint")
    add("--sbatch", type=key_value, action="append", metavar="KEY=VALUE", help="any other flag of sbatch")
    add("--grace", type=cli.number(int, 15), help="seconds for a checkpoint; default: 120, or 1/4 of --time")
    add("--max-retry", type=cli.number(int, 0), default=0, help="attempts after failures")
    add("--output-dir", metavar="DIR", help="default: $OUTPUT_DIR, else output/JOB_NAME")
    add("--dry-run", action="store_true", help="print what would be submitted")
    add("--local", action="store_true", help="run here and now, without SLURM")
    add("command", nargs=argparse.REMAINDER, help="what to run")
    return parser.parse_args(argv)


def check(args):
    """Refuse mistakes before anything is submitted; fill in the defaults that depend on other flags."""
    if not re.fullmatch(r"[\w.+-]+", args.job_name):
        raise cli.UsageError(f"--job-name {args.job_name!r}: letters, digits and . _ + - only")
    if args.command[:1] == ["--"]:
        del args.command[0]
    if not args.command:
        raise cli.UsageError("no command to run: give it after the flags")
    program, *words = args.command
    if not shutil.which(program):
        raise cli.UsageError(f"no such program: {program}")
    if Path(program).name in ("bash", "sh") and words and not words[0].startswith("-"):
        cli.existing_file(program, words[0])
    output_dir = args.output_dir or os.environ.get("OUTPUT_DIR") or REPO / "output" / args.job_name
    args.output_dir = cli.writable_folder("--output-dir", Path(output_dir).absolute())
    args.grace = args.grace or min(120, 15 * args.time)
    if args.grace >= 60 * args.time:
        raise cli.UsageError(f"--grace {args.grace} s is all of --time, {60 * args.time} s")
    if args.local and args.nodes > 1:
        raise cli.UsageError(f"--local is this machine alone, not -N {args.nodes}")
    if not (args.local or args.dry_run or shutil.which("sbatch")):
        raise cli.UsageError("SLURM's sbatch is not here: --local runs without it, --dry-run shows the job")


def job_of(args):
    environment = {"OUTPUT_DIR": str(args.output_dir)}
    if args.gpus_per_node and not args.local:  # --local: $NGPU, else all GPUs of this machine
        environment["NGPU"] = str(args.gpus_per_node)
    jobs, directory = str(args.output_dir / "jobs"), dict(args.sbatch or []).get("chdir", os.getcwd())
    return Job(tuple(args.command), environment, jobs, args.max_retry, args.grace, directory)


def sbatch_settings(args, code=REPO):
    """Keyword arguments of submitit's `update_parameters`; the job imports from the folder `code`."""
    after_failure = [sys.executable, "-m", "scripts.cli.attempt", str(args.output_dir / "jobs")]
    chosen = {
        "job_name": args.job_name, "partition": args.partition, "account": args.account, "nodes": args.nodes,
        "ntasks_per_node": 1, "gpus_per_node": args.gpus_per_node or None, "time": args.time, "qos": args.qos,
        "constraint": args.constraint, "signal_delay_s": args.grace,
        "additional_parameters": {"requeue": True, **dict(args.sbatch or [])},
        "srun_args": ["--kill-on-bad-exit=1", "--cpu-bind=none"],
        "setup": [f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"],
        "teardown": [f"status=$?; ((status == 0)) || exec {shlex.join(after_failure)} $status"],
    }
    return {name: value for name, value in chosen.items() if value is not None}


def copy_code(source, target):
    """Copy Python and shell programs with their folders; what else is there, such as weights, is linked."""
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        place = target / path.name
        if path.is_file() and path.suffix in CODE:
            shutil.copy2(path, place)
        elif path.is_dir() and any(each.suffix in CODE for each in path.iterdir()):
            copy_code(path, place)
        elif path.name not in (".git", "__pycache__"):
            place.symlink_to(path)


def code_of_job(args):
    """Copy the code to where edits do not reach it; the Job whose command runs that copy, and its folder."""
    code = Path(tempfile.mkdtemp(prefix="code-", dir=args.output_dir / "jobs"))
    copy_code(REPO, code)
    (code / COMMIT).write_text(git_commit())

    def moved(word):
        path = Path(word).resolve()
        is_ours = path.suffix in CODE and path.is_file() and REPO in path.parents
        return str(code / path.relative_to(REPO)) if is_ours else word

    return dataclasses.replace(job_of(args), command=tuple(map(moved, args.command))), code


def submit(args):
    import submitit

    jobs = args.output_dir / "jobs"
    for record in sorted(jobs.glob("*_submitted.json")):
        job_id = read_json(record)["job_id"]
        state = slurm_state(job_id)
        if state and not state.startswith(ENDED):
            raise cli.UsageError(f"--output-dir: {args.output_dir} is used by job {job_id}, which is {state}")
    jobs.mkdir(parents=True, exist_ok=True)
    job, code = code_of_job(args)
    executor = submitit.SlurmExecutor(jobs)
    settings = sbatch_settings(args, code)
    settings["additional_parameters"]["chdir"] = str(code)
    executor.update_parameters(**settings)
    if unused := sorted(name for name in os.environ if name.startswith("SBATCH_")):
        print(f"not used: {', '.join(unused)} of the environment, only flags are", file=sys.stderr)
    kept = {name: os.environ[name] for name in ("SLURM_CONF", "SLURM_JWT") if name in os.environ}
    try:
        with submitit.helpers.clean_env(("CUDA_VISIBLE_DEVICES",)):  # of the job that this may run in
            os.environ.update(kept)
            job = executor.submit(job)
    except submitit.core.utils.FailedJobError:  # sbatch has printed the reason
        raise cli.Failure("sbatch refused the job: nothing was submitted") from None
    record = {"job_id": job.job_id, "job_name": args.job_name, "command": args.command}
    write_json(jobs / f"{job.job_id}_submitted.json", record)
    print(f"job {job.job_id} submitted; logs in {jobs}")
    print(f"python scripts/cli/run.py status {args.output_dir}")


def find_job(text):
    """(folder `jobs`, job id) of a job given by its number, run folder or name."""
    output, own, number = REPO / "output", Path(os.environ.get("OUTPUT_DIR", "")), "*"
    folders = [Path(text)] if Path(text).is_dir() else [output / text]
    if text.isdecimal():
        folders, number = [*output.glob("*"), own], text
    found = [record for folder in folders for record in folder.glob(f"jobs/{number}_submitted.json")]
    if not found:
        raise cli.UsageError(f"no submitted job {text!r}: give its number, run folder or name")
    record = max(found, key=lambda path: path.stat().st_mtime)
    return record.parent.absolute(), read_json(record)["job_id"]


def status(jobs, job_id):
    """Print the state of a job and the story of its attempts."""
    state = slurm_state(job_id)
    if state is None:  # SLURM has forgotten it: the job's own records remain
        causes = [record["cause"] for record in records(jobs, job_id)] or [None]
        state = {FINISHED: "COMPLETED", FAILED: "FAILED"}.get(causes[-1], "UNKNOWN")
    print(f"job {job_id}: {state}", *story(jobs, job_id), f"logs in {jobs}", sep="\n")


def cancel(jobs, job_id):
    """Cancel a job; SLURM leaves the command half a minute to write a checkpoint."""
    done = subprocess.run(["scancel", job_id], capture_output=True, text=True)
    if done.returncode:
        raise cli.Failure(done.stderr.strip())


def logs(jobs, job_id):
    """Print the logs of all machines."""
    paths = sorted(jobs.glob(f"{job_id}_*_log.*"))
    if not paths:
        raise cli.Failure(f"no logs of job {job_id} in {jobs} yet")
    subprocess.run(["tail", "-n", "+1", *map(str, paths)], check=True)


QUERIES = {"status": status, "cancel": cancel, "logs": logs}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in QUERIES:
        if len(argv) != 2:
            raise cli.UsageError(f"usage: run.py {argv[0]} JOB")
        return QUERIES[argv[0]](*find_job(argv[1]))
    args = parse_args(argv)
    check(args)
    if args.dry_run:
        job = job_of(args)
        settings = {} if args.local else sbatch_settings(args)
        shown = {"sbatch": settings, "environment": job.environment, "max_retry": job.max_retry}
        print(json.dumps({**shown, "command": job.command}, indent=2))
    elif args.local:
        (args.output_dir / "jobs").mkdir(parents=True, exist_ok=True)
        sys.exit(job_of(args).run_here())
    else:
        submit(args)


if __name__ == "__main__":
    cli.run(main)
