"""The log of a run: `metrics.jsonl` first, TensorBoard and wandb as optional listeners; and `runs.jsonl`:
what was started, where, by which command, with which versions."""

import json
import platform
import secrets
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from util.files import atomic, check_owner, naming, value_digest

COMMIT = "COMMIT"  # the file of a copy of the code that names its commit
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors")


class MetricsLog:
    """Appends one JSON line per call to FOLDER/metrics.jsonl and passes it on to the listeners.

    A run that resumes from step n drops the lines after n which an earlier, killed run had written.
    """

    def __init__(self, folder, *, resume_step=0, listeners=()):
        self.path = Path(folder) / "metrics.jsonl"
        self.listeners = listeners
        if self.path.exists():
            kept = [line for line in read_metrics(folder) if line["step"] <= resume_step]
            with atomic(self.path) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step, **values):
        """Log floats and strings at a step."""
        check_owner(self.path)
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for listener in self.listeners:
            listener(step, {k: v for k, v in values.items() if isinstance(v, (int, float))})


def read_metrics(folder):
    """The lines of FOLDER/metrics.jsonl as a list of dicts, without those damaged by a kill or a disk."""
    lines = []
    for text in (Path(folder) / "metrics.jsonl").read_text(errors="replace").splitlines():
        with suppress(ValueError, TypeError, LookupError):  # not JSON, or without the number of a step
            lines += [line] if (line := json.loads(text))["step"] >= 0 else []
    return lines


def tensorboard_listener(folder, resume_step):
    """A listener that writes TensorBoard events (needs the package tensorboard), those after a step again."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder, purge_step=resume_step + 1)
    return lambda step, values: [writer.add_scalar(k, v, step) for k, v in values.items()]


def wandb_listener(folder, project, name, config):
    """A listener that logs to Weights & Biases (needs the package wandb): to one run, however often it is
    started here. The first line of runs.jsonl identifies it."""
    import wandb

    run_id = value_digest((Path(folder) / "runs.jsonl").read_text().splitlines()[0])
    run = wandb.init(project=project, name=name, config=config, id=run_id, resume="allow")
    return lambda step, values: run.log(values, step=step)


def git_commit():
    """The commit of this repository, with -dirty after it if files differ; "unknown" outside of git."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    root = Path(__file__).resolve().parents[1]
    if (root / COMMIT).exists():
        return (root / COMMIT).read_text()
    try:
        return subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def record_start(folder, **facts):
    """Append to FOLDER/runs.jsonl the time, command line, commit and versions of this run, and `facts`."""
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv), "directory": str(Path.cwd()), "commit": git_commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": platform.node(), "id": secrets.token_hex(8), **facts,
    }
    path = Path(folder) / "runs.jsonl"
    with naming(path), path.open("a") as file:
        file.write(json.dumps(line) + "\n")
