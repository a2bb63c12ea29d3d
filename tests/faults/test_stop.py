"""Training that ends early and in good order: by a signal, a lost process, or steps that cannot be taken."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import helpers
import processes
import pytest
from helpers import TRAIN, call, contents, same, tokenizer_flags, train_flags
from processes import finished

import engine.train
import engine.train_tokenizer
from engine.checkpoint import LAST
from engine.data import ImageStream
from engine.train import train_step
from models.lpd import LPD
from models.weights import read_pth
from util.logging import read_metrics

STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]
plain_loss, plain_losses = LPD.loss, engine.train_tokenizer.losses


# Signals.


def signal_in_step(monkeypatch, number, at):
    """Training that receives a signal in a step (from 0)."""

    def step(state, *rest):
        if state.step == at:
            os.kill(os.getpid(), number)
        return train_step(state, *rest)

    monkeypatch.setattr(engine.train, "train_step", step)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_signal_ends_training_with_a_checkpoint_of_that_step_and_its_status(number, tmp_path, monkeypatch):
    signal_in_step(monkeypatch, number, 3)
    handler = signal.getsignal(number)
    outcome = call("lpd", *train_flags(tmp_path, save_last_freq=0))
    assert outcome.status == 128 + number
    assert outcome.err.splitlines()[-1] == f"stopped: {number.name}: {LAST} holds step 4 of 18"
    assert read_pth(tmp_path / LAST)["step"] == 4
    assert not (tmp_path / "lpd.safetensors").exists()
    assert signal.getsignal(number) == handler


def test_stopped_run_resumes_to_the_checkpoint_of_an_undisturbed_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 7)
        assert call("lpd", *train_flags(tmp_path, save_last_freq=0)).status == 143
    finished(call("lpd", *train_flags(tmp_path, save_last_freq=0)))
    assert same(*(read_pth(run / LAST) for run in (tmp_path, helpers.trained())))


def test_signal_in_the_last_step_does_not_prevent_the_end(tmp_path, monkeypatch):
    signal_in_step(monkeypatch, signal.SIGTERM, 4)
    finished(call("lpd", *train_flags(tmp_path, epochs=1)))
    assert (tmp_path / "lpd.safetensors").exists()


def test_stopped_tokenizer_training_resumes_to_the_same_files(tmp_path, monkeypatch):
    finished(call("tokenizer", *tokenizer_flags(tmp_path / "undisturbed")))

    def losses(*tensors):
        os.kill(os.getpid(), signal.SIGUSR2)
        return plain_losses(*tensors)

    with monkeypatch.context() as patch:
        patch.setattr(engine.train_tokenizer, "losses", losses)
        assert call("tokenizer", *tokenizer_flags(tmp_path / "run")).status == 128 + signal.SIGUSR2
    assert read_pth(tmp_path / "run" / LAST)["step"] == 1
    finished(call("tokenizer", *tokenizer_flags(tmp_path / "run")))
    assert same(*(read_pth(tmp_path / run / LAST) for run in ("run", "undisturbed")))


# Steps without a usable gradient; that one changes nothing is in tests/core/test_train.py.


def non_finite_losses(monkeypatch, steps):
    """NaN losses in some steps (counted from 0 over the calls)."""
    calls = []

    def loss(*args):
        calls.append(None)
        return plain_loss(*args) * (math.nan if len(calls) - 1 in steps else 1)

    monkeypatch.setattr(LPD, "loss", loss)


def test_nine_bad_steps_in_a_row_are_skipped_counted_and_left_out_of_the_means(tmp_path, monkeypatch):
    non_finite_losses(monkeypatch, range(2, 11))
    finished(call("lpd", *train_flags(tmp_path)))
    log = read_metrics(tmp_path)
    assert [line["skipped"] for line in log] == [0, 0, *range(1, 10), *[9] * 7]
    assert [line["step"] for line in log if "loss" not in line] == list(range(3, 12))
    assert all(math.isfinite(line["loss"]) for line in log if "loss" in line)
    assert read_pth(tmp_path / LAST)["skipped"] == 9


@pytest.mark.parametrize("last", [11, 17])
def test_ten_bad_steps_in_a_row_end_the_run_and_record_their_images(last, tmp_path, monkeypatch):
    """Also if the tenth is the last step of the run. A checkpoint is due after every step."""
    non_finite_losses(monkeypatch, range(last - 9, last + 1))
    outcome = call("lpd", *train_flags(tmp_path, save_last_freq=0.1, seed=3))
    assert outcome.status == 1 and "Traceback" not in outcome.err
    reported = f"error: no finite loss or gradient in steps {last - 9}..{last}, 10 in a row (seed 3)"
    assert outcome.err.splitlines()[-1].startswith(reported)
    record = json.loads((tmp_path / "nonfinite_step.json").read_text())
    assert record["seed"] == 3 and [step["step"] for step in record["steps"]] == [*range(last - 9, last + 1)]
    first, (images, views) = record["steps"][0], ImageStream(TRAIN, 3, 4).images(last - 9)
    assert first["images"] == [[images.tolist()]] and first["views"] == [[views.tolist()]]
    assert {"group_sizes", "lr"} <= first.keys()
    assert all(weight.isfinite().all() for weight in read_pth(tmp_path / LAST)["model"].values())
    assert not (tmp_path / "lpd.safetensors").exists()


def test_ten_bad_steps_end_tokenizer_training(tmp_path, monkeypatch):
    def losses(*tensors):
        return {name: value * math.nan for name, value in plain_losses(*tensors).items()}

    monkeypatch.setattr(engine.train_tokenizer, "losses", losses)
    outcome = call("tokenizer", *tokenizer_flags(tmp_path, epochs=4))
    assert outcome.status == 1 and "steps 0..9, 10 in a row" in outcome.err.splitlines()[-1]
    assert len(json.loads((tmp_path / "nonfinite_step.json").read_text())["steps"]) == 10


def test_non_finite_weights_are_never_saved(tmp_path, monkeypatch):
    """As after an update that is too large, whose loss and gradient were finite."""

    def step(state, *rest):
        result = train_step(state, *rest)
        if state.step == 7:
            state.model.head.weight.data[3, 3] = math.inf
        return result

    monkeypatch.setattr(engine.train, "train_step", step)
    outcome = call("lpd", *train_flags(tmp_path, save_last_freq=0.1))
    assert outcome.status == 1 and "weights head.weight are not finite" in outcome.err.splitlines()[-1]
    assert read_pth(tmp_path / LAST)["step"] == 6


# Two processes.

EVENTFUL = """
import json, math, os, signal, sys
import engine.train, main_lpd
from engine.data import CachedTokens
from engine.train import train_step
from models.lpd import LPD
from util import cli
rank, batches_of, loss_of, calls = os.environ["RANK"], CachedTokens.batches, LPD.loss, []
def batches(self, plan):
    def seen():
        for indices, views in plan:
            with open(f"{sys.argv[1]}-{rank}", "a") as file:
                print(json.dumps(indices.tolist()), file=file)
            yield indices, views
    return batches_of(self, seen())
def loss(*args):
    calls.append(None)
    return loss_of(*args) + (math.inf if rank == "1" and len(calls) == 4 else 0)  # the first is rehearse's
def step(state, *rest):
    if rank == "1" and state.step == 5:
        os.kill(os.getpid(), signal.SIGUSR2)
    return train_step(state, *rest)
CachedTokens.batches, LPD.loss, engine.train.train_step = batches, loss, step
cli.run(lambda: main_lpd.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    """Training on two processes, of which the second alone has a bad loss in step 2, a signal in step 5."""
    folder = tmp_path_factory.mktemp("eventful")
    (folder / "train.py").write_text(EVENTFUL)
    flags = train_flags(folder / "run", batch_size=2, save_last_freq=0, val_freq=0)
    return folder, processes.forked_group(2, folder / "train.py", folder / "seen", *flags)


def test_signal_to_one_process_stops_all_after_the_same_step(eventful):
    """One step later than alone: they agree on it while the next step is under way."""
    folder, outcome = eventful
    assert outcome.status == 128 + signal.SIGUSR2, outcome.err
    assert f"stopped: SIGUSR2: {LAST} holds step 7 of 18" in outcome.err
    assert outcome.err.count("stopped: ") == 1 and "Traceback" not in outcome.err
    assert "FutureWarning" not in outcome.err
    assert read_pth(folder / "run" / LAST)["step"] == 7


def test_bad_loss_of_one_process_skips_the_step_on_all(eventful):
    """If only one skipped it, the weights of the two would differ and later norms not be finite."""
    folder, _ = eventful
    log = read_metrics(folder / "run")
    assert [line["skipped"] for line in log] == [0, 0, 1, 1, 1, 1, 1]
    assert [line["step"] for line in log if "loss" not in line] == [3]


def test_resumed_on_another_number_of_processes_each_image_comes_once_per_epoch(eventful, monkeypatch):
    folder, _ = eventful
    lines = [(folder / f"seen-{rank}").read_text().splitlines() for rank in "01"]
    parts = [[json.loads(line) for line in own] for own in lines]
    images = [image for step in zip(*parts, strict=True) for part in step for image in part][: 7 * 4]
    plain = ImageStream.micro_batches

    def micro_batches(self, steps, world):
        for indices, views in plain(self, steps, world):
            images.extend(indices.tolist())
            yield indices, views

    monkeypatch.setattr(ImageStream, "micro_batches", micro_batches)
    finished(call("lpd", *train_flags(folder / "run", batch_size=4, save_last_freq=0, val_freq=0)))
    assert images == [image for step in range(18) for image in ImageStream(TRAIN, 0, 4).images(step)[0]]


MEMBER = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
signal.alarm(300)  # neither waits longer
if rank == "0":
    (folder / "own").write_text(str(os.getpid()))
    (folder / "own").rename(folder / "pid")
    signal.pause()
while not (folder / "pid").exists():
    time.sleep(0.02)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_agent_ends_the_others_of_a_killed_process_and_reports_it_once(tmp_path):
    (tmp_path / "member.py").write_text(MEMBER)
    outcome = processes.agent(2, tmp_path / "member.py", tmp_path)
    line = "error: process 1 was killed by SIGKILL, the others are ended\n"
    assert outcome == processes.Outcome(128 + 9, "", line)
    assert not processes.running(int((tmp_path / "pid").read_text()))


DYING = """
import os, pathlib, signal, sys, time
import engine.train, main_lpd
from engine.train import train_step
from util import cli
def step(state, *rest):
    if os.environ["RANK"] == "1" and state.step == 2:
        pathlib.Path(sys.argv[0]).with_name("when").write_text(str(time.time()))
        if sys.argv[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "stop":
            os.kill(os.getppid(), signal.SIGTERM)
            return train_step(state, *rest)
        raise ArithmeticError("the first error")
    return train_step(state, *rest)
engine.train.train_step = step
cli.run(lambda: main_lpd.main(sys.argv[2:]))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "how, status, line",
    [
        ("kill", 128 + 9, "error: process 1 was killed by SIGKILL, the others are ended"),
        ("raise", 1, "ArithmeticError: the first error"),
    ],
)
def test_training_process_that_dies_ends_the_others_and_is_reported_once(how, status, line, tmp_path):
    """The agent asks the others to end, and kills them after half a minute; they need not wait for their own
    limit, which is ten."""
    (tmp_path / "train.py").write_text(DYING)
    outcome = processes.agent(2, tmp_path / "train.py", how, *train_flags(tmp_path / "run", batch_size=2))
    assert time.time() - float((tmp_path / "when").read_text()) < 300
    assert outcome.status == status
    assert outcome.err.count(line) == 1
    assert len(re.findall(r"(?:^|\]: )\w*[Ee]rror: ", outcome.err, re.M)) == 1, outcome.err
    assert outcome.err.count("Traceback") == (how == "raise")


@pytest.mark.long
def test_agent_forwards_a_signal_and_ends_with_its_status(tmp_path):
    """It receives it in step 2 and waits for the checkpoint; the processes notice it then or a step later."""
    (tmp_path / "train.py").write_text(DYING)
    outcome = processes.agent(2, tmp_path / "train.py", "stop", *train_flags(tmp_path / "run", batch_size=2))
    assert outcome.status == 128 + signal.SIGTERM
    assert outcome.err.count("stopped: SIGTERM: ") == 1 and "Traceback" not in outcome.err
    assert read_pth(tmp_path / "run" / LAST)["step"] in (4, 5)


STOPPED = """
import functools, os, signal, sys
import engine.train_tokenizer, main_tokenizer
from engine.train_tokenizer import DistributedDataParallel, train_step
from util import cli
def step(state, *rest):
    if sys.argv[1] == "stop" and os.environ["RANK"] == "1" and state.step == 4:
        os.kill(os.getpid(), signal.SIGUSR2)
    return train_step(state, *rest)
engine.train_tokenizer.train_step = step
engine.train_tokenizer.DistributedDataParallel = functools.partial(DistributedDataParallel, bucket_cap_mb=0.1)
cli.run(lambda: main_tokenizer.main(sys.argv[2:]))
"""


@pytest.mark.long
def test_tokenizer_resumed_on_three_processes_has_the_weights_of_an_undisturbed_one(tmp_path):
    """Two would not do: their sums do not depend on the order. The model takes several of DDP's buckets."""
    (tmp_path / "train.py").write_text(STOPPED)

    def run(how, folder):
        flags = tokenizer_flags(tmp_path / folder, batch_size=2, epochs=4)
        return processes.forked_group(3, tmp_path / "train.py", how, *flags)

    finished(run("go", "plain"))
    assert run("stop", "stopped").status == 128 + signal.SIGUSR2
    finished(run("go", "stopped"))
    assert same(*(read_pth(tmp_path / folder / LAST) for folder in ("plain", "stopped")))


# Two runs in one folder; the lock itself is tested in tests/system/test_files.py.

HOLD = """
import signal, sys
from util.files import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    signal.pause()
"""


def test_second_run_in_a_folder_is_refused_by_every_program(tmp_path):
    commands = [
        ("lpd", train_flags(tmp_path)),
        ("lpd", helpers.evaluate_flags(tmp_path, inception=helpers.inception())),
        ("tokenizer", tokenizer_flags(tmp_path)),
        ("cache", helpers.cache_flags(tmp_path)),
    ]
    holding = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(holding, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        before = contents(tmp_path)
        outcomes = [call(program, *flags) for program, flags in commands]
        holder.kill()
    for outcome in outcomes:
        message = rf"^error: --\w+: {tmp_path} is in use by process {holder.pid} on \S+$"
        assert outcome.status == 2 and re.search(message, outcome.err, re.M), outcome.err
    assert contents(tmp_path) == before
