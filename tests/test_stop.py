"""Runs that end before their time, in good order: by a signal, a lost process, another run in the folder, or
steps that cannot be taken."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import programs
import pytest
import torch
from programs import REPO, TRAIN, call, finished, train_flags
from test_train import ALONE, CONFIG, four_images, same

import engine.guard
import engine.train
import engine.train_tokenizer
from engine.batches import step_images
from engine.checkpoint import load_checkpoint
from engine.guard import Guard
from engine.train import lpd_loss, new_state, train_step
from util import cli, dist, files, signals
from util.logging import read_metrics

ASKING = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


# Signals.


def signal_in_step(monkeypatch, number, at):
    """Training that gets a signal in the midst of a step (from 0)."""

    def step(state, *rest):
        if state.step == at:
            os.kill(os.getpid(), number)
        return train_step(state, *rest)

    monkeypatch.setattr(engine.train, "train_step", step)


@pytest.mark.parametrize("number", ASKING, ids=lambda number: number.name)
def test_signal_ends_training_with_a_checkpoint_of_that_step_and_a_status_that_tells_which(
    number, tmp_path, monkeypatch
):
    signal_in_step(monkeypatch, number, 3)
    handler = signal.getsignal(number)
    outcome = call("lpd", *train_flags(tmp_path, save_last_freq=0))
    assert outcome.status == 128 + number
    assert outcome.err.splitlines()[-1] == f"stopped: {number.name}: checkpoint-last.pth holds step 4 of 18"
    assert load_checkpoint(tmp_path / "checkpoint-last.pth")["step"] == 4
    assert not (tmp_path / "lpd.safetensors").exists()
    assert signal.getsignal(number) == handler


def test_run_that_was_stopped_goes_on_to_the_weights_of_one_undisturbed_bit_for_bit(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 7)
        assert call("lpd", *train_flags(tmp_path, save_last_freq=0)).status == 143
    finished(call("lpd", *train_flags(tmp_path, save_last_freq=0)))
    stopped, undisturbed = (
        load_checkpoint(run / "checkpoint-last.pth") for run in (tmp_path, programs.trained())
    )
    assert same(stopped, undisturbed)


def test_signal_in_the_last_step_does_not_keep_a_run_from_its_end(tmp_path, monkeypatch):
    signal_in_step(monkeypatch, signal.SIGTERM, 4)
    finished(call("lpd", *train_flags(tmp_path, epochs=1)))
    assert (tmp_path / "lpd.safetensors").exists()


def test_signal_ends_tokenizer_training_too(tmp_path, monkeypatch):
    plain = engine.train_tokenizer.losses

    def losses(*tensors):
        os.kill(os.getpid(), signal.SIGUSR2)
        return plain(*tensors)

    monkeypatch.setattr(engine.train_tokenizer, "losses", losses)
    assert call("tokenizer", *tokenizer_flags(tmp_path)).status == 128 + signal.SIGUSR2
    assert load_checkpoint(tmp_path / "checkpoint-last.pth")["step"] == 1


def tokenizer_flags(output_dir, epochs=1):
    return [
        "--data_path", programs.images(), "--img_size", 16, "--base_width", 32, "--multipliers", 1, 2,
        "--num_res_blocks", 1, "--z_channels", 32, "--vocab_size", 64, "--batch_size", 6, "--epochs", epochs,
        "--output_dir", output_dir, *programs.ON_CPU,
    ]  # fmt: skip


def test_second_interrupt_ends_at_once_and_a_second_of_another_kind_does_not():
    with signals.StopRequest() as request:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert request.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_process_that_was_asked_to_end_says_nothing_of_a_connection_lost_then():
    """torchrun has asked it to, because of the process that is lost: that one's error is the one to tell."""
    with pytest.raises(KeyboardInterrupt):
        with signals.StopRequest():
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(ArithmeticError):
        with signals.StopRequest():
            signal.raise_signal(signal.SIGINT)
            raise ArithmeticError("an error of its own")


# Steps without a usable gradient.


@pytest.mark.parametrize("fused", [False, True])
def test_step_with_a_loss_that_is_no_number_changes_nothing(fused, monkeypatch):
    """Not even if its gradient is one."""
    state = new_state(CONFIG, ALONE.device)
    for group in state.optimizer.param_groups:
        group["fused"], group["foreach"] = fused, False
    forever = iter(four_images, None)

    def step():
        return train_step(state, state.model, CONFIG, ALONE, 1, forever)

    step()
    kept = snapshot(state)
    with monkeypatch.context() as patch:
        patch.setattr(engine.train, "lpd_loss", lambda *tensors: lpd_loss(*tensors) + math.inf)
        step()
    assert same(snapshot(state), kept)
    assert (state.step, int(state.guard.skipped), int(state.guard.row)) == (2, 1, 1)
    step()
    assert not same(snapshot(state), kept)
    assert (int(state.guard.skipped), int(state.guard.row)) == (1, 0)


def snapshot(state):
    """A copy of weights and optimizer state."""
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf,
        [state.model.state_dict(), state.optimizer.state_dict()["state"]],
    )


def broken_losses(monkeypatch, steps):
    """Losses that are no numbers in some steps (counted from 0 over the calls)."""
    calls = []

    def loss(*tensors):
        calls.append(None)
        return lpd_loss(*tensors) * (math.nan if len(calls) - 1 in steps else 1)

    monkeypatch.setattr(engine.train, "lpd_loss", loss)


def test_nine_bad_steps_in_a_row_are_skipped_counted_and_left_out_of_the_means(tmp_path, monkeypatch):
    broken_losses(monkeypatch, range(2, 11))
    finished(call("lpd", *train_flags(tmp_path)))
    log = read_metrics(tmp_path)
    assert [line["skipped"] for line in log] == [0, 0, *range(1, 10), *[9] * 7]
    assert [line["step"] for line in log if "loss" not in line] == list(range(3, 12))
    assert all(math.isfinite(line["loss"]) for line in log if "loss" in line)
    assert load_checkpoint(tmp_path / "checkpoint-last.pth")["skipped"] == 9


@pytest.mark.parametrize("last", [11, 17])
def test_ten_bad_steps_in_a_row_end_the_run_and_tell_their_seed_and_images(last, tmp_path, monkeypatch):
    """Also when the tenth is the last step of the run. A checkpoint is due after every step."""
    broken_losses(monkeypatch, range(last - 9, last + 1))
    outcome = call("lpd", *train_flags(tmp_path, save_last_freq=0.1, seed=3))
    assert outcome.status == 1 and "Traceback" not in outcome.err
    told = f"error: no finite loss or gradient in steps {last - 9}..{last}, 10 in a row (seed 3)"
    assert outcome.err.splitlines()[-1].startswith(told)
    record = json.loads((tmp_path / "nonfinite_step.json").read_text())
    assert record["seed"] == 3 and [step["step"] for step in record["steps"]] == [*range(last - 9, last + 1)]
    first = record["steps"][0]
    images, views = step_images(TRAIN, 3, 4, last - 9)
    assert first["images"] == [[images.tolist()]] and first["views"] == [[views.tolist()]]
    assert {"group_sizes", "lr"} <= first.keys()
    checkpoint = load_checkpoint(tmp_path / "checkpoint-last.pth")
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())
    assert not (tmp_path / "lpd.safetensors").exists()


def test_ten_bad_steps_of_tokenizer_training_end_it(tmp_path, monkeypatch):
    plain = engine.train_tokenizer.losses
    monkeypatch.setattr(
        engine.train_tokenizer, "losses", lambda *t: {k: v * math.nan for k, v in plain(*t).items()}
    )
    outcome = call("tokenizer", *tokenizer_flags(tmp_path, epochs=4))
    assert outcome.status == 1 and "steps 0..9, 10 in a row" in outcome.err.splitlines()[-1]
    assert len(json.loads((tmp_path / "nonfinite_step.json").read_text())["steps"]) == 10


def test_gradient_that_is_no_number_skips_the_step_of_a_loss_that_is_one(tmp_path, monkeypatch):
    """sqrt has an infinite gradient at 0: the loss stays a number, the weights would not."""
    monkeypatch.setattr(
        engine.train, "lpd_loss", lambda logits, *rest: lpd_loss(logits, *rest) + (0 * logits.sum()).sqrt()
    )
    outcome = call("lpd", *train_flags(tmp_path))
    assert outcome.status == 1 and "10 in a row" in outcome.err.splitlines()[-1]


def test_weights_that_are_no_numbers_are_never_saved(tmp_path, monkeypatch):
    """As after an update that is too large, whose loss and gradient were sound."""

    def step(state, *rest):
        result = train_step(state, *rest)
        if state.step == 7:
            state.model.head.weight.data[3, 3] = math.inf
        return result

    monkeypatch.setattr(engine.train, "train_step", step)
    outcome = call("lpd", *train_flags(tmp_path, save_last_freq=0.1))
    assert outcome.status == 1 and "weights head.weight are not finite" in outcome.err.splitlines()[-1]
    assert load_checkpoint(tmp_path / "checkpoint-last.pth")["step"] == 6


def test_count_is_read_late_but_no_row_is_missed():
    guard = Guard()
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    bad = []
    for step in range(1, 31):
        guard.step(optimizer, torch.tensor(math.nan if 5 <= step < 15 else 1.0))
        bad.append(guard.bad_row(step))
    found = [rows for rows in bad if rows]
    assert found == [range(4, 14)] and bad.index(found[0]) == 14 - 1 + engine.guard.LAG


# Two processes.

EVENTFUL = """
import json, math, os, signal, sys
import engine.train
from engine.train import CachedTokens, lpd_loss, train_step
rank, plain, calls = os.environ["RANK"], CachedTokens.batches, []
def batches(self, plan):
    def seen():
        for indices, views in plan:
            with open(f"{sys.argv[1]}-{rank}", "a") as file:
                print(json.dumps(indices.tolist()), file=file)
            yield indices, views
    return plain(self, seen())
def loss(*tensors):
    calls.append(None)
    return lpd_loss(*tensors) + (math.inf if rank == "1" and len(calls) == 3 else 0)
def step(state, *rest):
    if rank == "1" and state.step == 5:
        os.kill(os.getpid(), signal.SIGUSR2)
    return train_step(state, *rest)
CachedTokens.batches, engine.train.lpd_loss, engine.train.train_step = batches, loss, step
import main_lpd
from util import cli
cli.run(lambda: main_lpd.main(sys.argv[2:]))
"""


def agent(processes, *words):
    """Run a program's processes under scripts/cli/agent.py."""
    return programs.python(
        REPO / "scripts/cli/agent.py", "--nproc_per_node", processes, "--master_addr", "127.0.0.1",
        "--master_port", programs.free_port(), *words,
    )  # fmt: skip


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    """A training by two processes, of which the second alone has a bad loss in step 2, a signal in step 5."""
    folder = tmp_path_factory.mktemp("eventful")
    (folder / "train.py").write_text(EVENTFUL)
    flags = train_flags(folder / "run", batch_size=2, save_last_freq=0)
    return folder, agent(2, folder / "train.py", folder / "seen", *flags)


def test_signal_to_one_process_stops_all_at_the_same_step(eventful):
    """One step later than alone: it is agreed upon while the next step is under way."""
    folder, outcome = eventful
    assert outcome.status == 128 + signal.SIGUSR2, outcome.err
    assert "stopped: SIGUSR2: checkpoint-last.pth holds step 7 of 18" in outcome.err
    assert outcome.err.count("stopped: ") == 1 and "Traceback" not in outcome.err
    assert load_checkpoint(folder / "run/checkpoint-last.pth")["step"] == 7


def test_bad_loss_of_one_process_skips_the_step_on_all(eventful):
    """Had only one skipped it, the logged norms of the averaged gradients would be no numbers, or the weights
    of the two would differ and DDP's average with them."""
    folder, _ = eventful
    log = read_metrics(folder / "run")
    assert [line["skipped"] for line in log] == [0, 0, 1, 1, 1, 1, 1]
    assert [line["step"] for line in log if "loss" not in line] == [3]


def test_resumed_by_another_number_of_processes_each_image_comes_once_an_epoch(eventful, monkeypatch):
    folder, _ = eventful
    lines = [(folder / f"seen-{rank}").read_text().splitlines() for rank in "01"]
    parts = [[json.loads(line) for line in own] for own in lines]
    stream = [image for step in zip(*parts, strict=True) for part in step for image in part][: 7 * 4]
    plain = engine.train.CachedTokens.batches

    def batches(self, plan):
        def seen():
            for indices, views in plan:
                stream.extend(indices.tolist())
                yield indices, views

        return plain(self, seen())

    monkeypatch.setattr(engine.train.CachedTokens, "batches", batches)
    finished(call("lpd", *train_flags(folder / "run", batch_size=4, save_last_freq=0)))
    assert len(stream) == 18 * 4
    epochs = [stream[start : start + TRAIN] for start in range(0, 4 * TRAIN, TRAIN)]
    assert all(sorted(epoch) == list(range(TRAIN)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    expected = [step_images(TRAIN, 0, 4, step)[0].tolist() for step in range(18)]
    assert stream == sum(expected, [])


DYING = """
import os, pathlib, signal, sys, time
import engine.train
from engine.train import train_step
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
import main_lpd
from util import cli
cli.run(lambda: main_lpd.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "how,status,line",
    [
        ("kill", 128 + 9, "error: process 1 was killed by SIGKILL, the others are ended"),
        ("raise", 1, "ArithmeticError: the first error"),
    ],
)
def test_process_that_dies_takes_the_others_down_and_its_error_is_told_once(how, status, line, tmp_path):
    """Within a minute: the agent asks the others to end, and kills what has not after half a minute."""
    (tmp_path / "train.py").write_text(DYING)
    outcome = agent(2, tmp_path / "train.py", how, *train_flags(tmp_path / "run", batch_size=2))
    assert time.time() - float((tmp_path / "when").read_text()) < 60
    assert outcome.status == status
    assert outcome.err.count(line) == 1
    assert len(re.findall(r"(?:^|\]: )\w*[Ee]rror: ", outcome.err, re.M)) == 1, outcome.err
    assert outcome.err.count("Traceback") == (how == "raise")


def test_agent_passes_a_signal_on_and_ends_with_its_status(tmp_path):
    """It gets it in step 2 and waits for the checkpoint; the processes hear it then or a step later."""
    (tmp_path / "train.py").write_text(DYING)
    outcome = agent(2, tmp_path / "train.py", "stop", *train_flags(tmp_path / "run", batch_size=2))
    assert outcome.status == 128 + signal.SIGTERM
    assert outcome.err.count("stopped: SIGTERM: ") == 1 and "Traceback" not in outcome.err
    assert load_checkpoint(tmp_path / "run/checkpoint-last.pth")["step"] in (4, 5)


def test_error_of_a_lost_connection_is_told_from_others():
    assert dist.is_echo(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert not dist.is_echo(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not dist.is_echo(ValueError("gloo"))


# Two runs in one folder.

HOLD = """
import sys, time
from util.files import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """A folder that another process writes into, and that process."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, cwd=REPO, text=True
    )
    assert holder.stdout.readline() == "held\n"
    yield tmp_path / "run", holder
    holder.kill()
    holder.wait()


def test_second_run_in_a_folder_is_refused_and_told_whose_it_is(held):
    folder, holder = held
    before = programs.contents(folder)
    programs_and_flags = [
        ("lpd", train_flags(folder)),
        ("tokenizer", tokenizer_flags(folder)),
        ("cache", programs.cache_flags(folder)),
        ("lpd", programs.evaluate_flags(folder, inception=programs.inception())),
    ]
    for program, flags in programs_and_flags:
        outcome = call(program, *flags)
        assert outcome.status == 2
        assert re.search(
            rf"^error: --\w+: {folder} is in use by process {holder.pid} on \S+$", outcome.err, re.M
        ), outcome.err
    assert programs.contents(folder) == before


def test_folder_of_a_killed_run_is_free(held):
    folder, holder = held
    with pytest.raises(files.FolderInUse):
        with files.sole_writer(folder):
            pass
    holder.kill()
    holder.wait()
    with files.sole_writer(folder):
        pass


# What a program says of its end.


def test_stopped_program_ends_with_the_status_of_its_signal(capsys):
    def main():
        raise signals.Stopped(signal.SIGUSR1, "what is done")

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 138
    assert capsys.readouterr().err == "stopped: SIGUSR1: what is done\n"
