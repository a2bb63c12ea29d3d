"""Training runs on disk: resumed, on several processes, from images or a cache, and their checkpoints."""

import dataclasses
import signal
import sys
from dataclasses import replace

import helpers
import numpy as np
import processes
import pytest
import torch
from helpers import ALONE, CONFIG, MODEL, call, contents, four_images, same, train_flags
from processes import finished, torchrun

import engine.train
from engine.checkpoint import LAST, PREVIOUS, checkpoint_of, load_checkpoint, save_checkpoint
from engine.data import CachedTokens, EncodedImages, ResidentTokens
from engine.loop import RunSettings, numbered
from engine.train import new_state, train, train_step
from models.lpd import LPD
from models.vqgan import VQModel
from models.weights import read_pth, read_weights, save_weights
from util.folders import list_images
from util.logging import MetricsLog, read_metrics
from util.token_cache import DamagedCache, TokenCache


def steps_of(state, count):
    """Losses of training steps on the four images."""
    forever = iter(four_images, None)
    return [train_step(state, state.model.loss, ALONE, 1, forever)[0].item() for _ in range(count)]


def save(state, path):
    save_checkpoint(path, checkpoint_of(state, {}, ema=state.ema))


def final_state(run):
    """All that training left in a run folder, but the time it took."""
    timed = {"images_per_s", "data_wait", "share_of_matrix_rate"}
    untimed = [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(run)]
    return read_pth(run / LAST), read_weights(run / "lpd.safetensors"), untimed


def from_images():
    """Changes of train_flags for training straight from the images of the shared cache."""
    source = {"data_path": helpers.images(), "vqgan_path": helpers.tokenizer(), "img_size": helpers.SIZE}
    return {"cached_path": None, **source}


def interrupt_step(monkeypatch, step):
    """Training that ends at once, without a checkpoint, at the beginning of a step (from 0)."""

    def interrupted(state, *rest):
        if state.step == step:
            raise KeyboardInterrupt
        return train_step(state, *rest)

    monkeypatch.setattr(engine.train, "train_step", interrupted)


# Resuming.


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_two_steps_a_checkpoint_and_two_steps_equal_four_steps(tmp_path, ema):
    config = dataclasses.replace(CONFIG, ema=ema, model=dataclasses.replace(MODEL, dropout=0.1))
    straight, first, second = (new_state(config, ALONE.device) for _ in range(3))
    steps_of(straight, 4)
    steps_of(first, 2)
    save(first, tmp_path / LAST)
    torch.manual_seed(31)  # the state of the global generator must not matter
    second.load(tmp_path / LAST)
    steps_of(second, 2)
    assert same(checkpoint_of(second, {}, ema=second.ema), checkpoint_of(straight, {}, ema=straight.ema))


KILLED_IN_SEVENTH_STEP = """
import os, signal, sys
import engine.train
plain = engine.train.train_step
def train_step(state, *rest):
    if state.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(state, *rest)
engine.train.train_step = train_step
import main_lpd
main_lpd.main(sys.argv[1:])
"""


def test_killed_run_resumes_by_the_same_command_to_the_same_files(tmp_path):
    """Checkpoints after steps 3 and 5 of 9, so step 6 is taken twice. Dropout is on."""
    flags = {"epochs": 2, "save_last_freq": 0.5, "ema": 0.9}
    killed = processes.forked("-c", KILLED_IN_SEVENTH_STEP, *train_flags(tmp_path / "run", **flags))
    assert killed.status == -signal.SIGKILL
    assert read_pth(tmp_path / "run" / LAST)["step"] == 5
    assert not (tmp_path / "run/lpd.safetensors").exists()
    finished(processes.start("lpd", *train_flags(tmp_path / "run", **flags)))
    finished(call("lpd", *train_flags(tmp_path / "undisturbed", **flags)))
    assert same(final_state(tmp_path / "run"), final_state(tmp_path / "undisturbed"))


def test_run_from_images_resumes_to_the_same_files(tmp_path, monkeypatch):
    """With dropout: starting the image readers again must not shift the random stream."""
    flags = {"epochs": 1, "save_last_freq": 0.2, **from_images()}
    finished(call("lpd", *train_flags(tmp_path / "undisturbed", **flags)))
    with monkeypatch.context() as patch:
        interrupt_step(patch, 3)
        assert call("lpd", *train_flags(tmp_path / "run", **flags)).status == 130
    finished(call("lpd", *train_flags(tmp_path / "run", **flags)))
    assert same(final_state(tmp_path / "run"), final_state(tmp_path / "undisturbed"))


def test_finished_run_started_again_is_unchanged(tmp_path):
    finished(call("lpd", *train_flags(tmp_path, epochs=1)))
    before = contents(tmp_path)
    finished(call("lpd", *train_flags(tmp_path, epochs=1)))
    assert contents(tmp_path) == before


def test_run_resumed_from_another_folder_continues_in_its_own(tmp_path, monkeypatch):
    """--resume A --output_dir B, killed and started again, continues from the newer checkpoint in B."""
    with monkeypatch.context() as patch:
        interrupt_step(patch, 6)
        assert call("lpd", *train_flags(tmp_path / "a", save_last_freq=1)).status == 130
        flags = train_flags(tmp_path / "b", save_last_freq=1, resume=tmp_path / "a")
        interrupt_step(patch, 12)
        assert call("lpd", *flags).status == 130
    assert [read_pth(tmp_path / run / LAST)["step"] for run in "ab"] == [5, 9]
    finished(call("lpd", *flags))
    assert same(final_state(tmp_path / "b")[:2], final_state(helpers.trained())[:2])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 3}, "seed 0, now it is 3"),
        ({"lr": 1e-4}, "lr 0.001, now it is 0.0001"),
        ({"batch_size": 2}, "global_batch 4, now it is 2"),
        ({"proj_dropout": 0.3}, "model.dropout 0.1, now it is 0.3"),
        ({"group_sizes_list": 4}, "schedules"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_changed_setting_is_refused_by_its_name(change, words):
    before = contents(helpers.trained())
    outcome = call("lpd", *train_flags(helpers.trained(), **change))
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert words in outcome.err and LAST in outcome.err
    assert contents(helpers.trained()) == before


# What a run does besides its steps.


def test_hooks_are_called_when_due_and_at_the_end_with_averaged_weights(tmp_path):
    """10 steps of half an epoch: every 2 epochs, and every 7 epochs only at the end."""
    config = dataclasses.replace(CONFIG, num_images=8, epochs=5, ema=0.5)
    state, calls = new_state(config, ALONE.device), []

    def hook(state, log):
        assert same(dict(state.model.state_dict()), state.ema) and not state.model.training
        calls.append(state.step)

    source = type("Source", (), {"batches": lambda self, plan: (four_images() for _ in plan)})()
    run = RunSettings(tmp_path, hooks=((2, hook), (7, hook), (0, hook)), save_intermediate_freq=2)
    train(state, [source], run, ALONE, MetricsLog(tmp_path), {"about": "the data"})
    assert calls == [4, 8, 10, 10]
    numbered = {path.name: read_pth(path)["step"] for path in tmp_path.glob("checkpoint-[0-9].pth")}
    assert numbered == {"checkpoint-2.pth": 4, "checkpoint-4.pth": 8}
    weights, info = read_weights(tmp_path / "lpd.safetensors")
    assert same(weights, state.ema) and info["about"] == "the data"
    assert same(read_weights(tmp_path / LAST, LPD)[0], state.ema)  # averaged weights are what readers get


def test_restarted_run_is_one_run_of_wandb_and_another_folder_another(tmp_path, monkeypatch):
    started, logged = [], []
    run = type("Run", (), {"log": lambda self, values, step: logged.append(step)})()
    fake = type("wandb", (), {"init": lambda **given: (started.append(given), run)[1]})
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with monkeypatch.context() as patch:
        interrupt_step(patch, 1)
        call("lpd", *train_flags(tmp_path / "a", use_wandb=True, epochs=0.5))
    for name in "ab":
        finished(call("lpd", *train_flags(tmp_path / name, use_wandb=True, epochs=0.5)))
    first, again, other = (given["id"] for given in started)
    assert first == again != other and all(given["resume"] == "allow" for given in started)


WAITING = """
import torch
from util import cli, distributed
def main():
    distributed.init("cpu", timeout=1)
    barrier = torch.distributed.barrier
    torch.distributed.barrier = lambda group: (print(group.group_name), barrier(group))
    limits = torch.distributed.group.WORLD, distributed._alone_group
    with distributed.main_alone():
        for each in limits:
            print(int(each._get_backend(torch.device("cpu")).options._timeout.seconds))
    print(distributed._alone_group.group_name)
cli.run(main)
"""


def test_the_wait_for_the_main_process_in_a_hook_has_its_own_limit():
    with processes.group(1) as (place,):
        lines = finished(processes.forked("-c", WAITING, places=[place])).out.splitlines()
    assert lines[:2] == ["60", "43200"] and lines[2] == lines[3]


def test_log_says_what_share_of_the_matrix_rate_a_step_reaches(tmp_path, monkeypatch):
    """Counted by hand: lpd_micro has 4 blocks of width 128 and 32 rows; three times the forward pass."""
    monkeypatch.setattr("engine.loop.RATE_AFTER", 0)
    monkeypatch.setattr("engine.loop.matmul_rate", lambda device, dtype: 1e9)
    finished(call("lpd", *train_flags(tmp_path, epochs=1)))
    rows, width, codes = 2 * 16, 128, 64
    linears = 4 * rows * 12 * width**2 + 16 * width * codes
    operations = 3 * 2 * (linears + 4 * 2 * rows**2 * width)
    for line in read_metrics(tmp_path):
        assert 0 <= line["data_wait"] < 1
        share = line["images_per_s"] * operations / 1e9
        assert line["share_of_matrix_rate"] == pytest.approx(share, rel=0.02, abs=1e-3)


# Several processes.


def trainable(path):
    """The weights of a checkpoint but the biases of the attention's keys: these shift all scores of a query
    alike, so their gradient is rounding alone, of which AdamW makes full-size steps."""
    weights = read_pth(path)["model"]
    for name, weight in weights.items():
        if name.endswith("attn.qkv.bias"):
            third = len(weight) // 3
            weight[third : 2 * third] = 0
    return weights


def test_two_processes_with_two_images_train_as_one_with_four(tmp_path):
    """1e-5, a tenth of a step of AdamW at this rate: the same sums in another order. AdamW hides a gradient
    that is summed instead of averaged; its logged norm does not."""
    flags = {"epochs": 1, "lr": 1e-4, "proj_dropout": 0, "label_drop_prob": 0}
    finished(torchrun(2, "lpd", *train_flags(tmp_path / "two", batch_size=1, accum_iter=2, **flags)))
    finished(call("lpd", *train_flags(tmp_path / "one", batch_size=4, **flags)))
    logs = [read_metrics(tmp_path / run) for run in ("one", "two")]
    for name, rounding in (("loss", 2e-5), ("grad_norm", 2e-4)):  # written to 5 and to 4 places
        one, two = ([line[name] for line in log] for log in logs)
        assert len(one) == 5 and two == pytest.approx(one, abs=rounding)
    one, two = (trainable(tmp_path / run / LAST) for run in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5, msg=name)


# Sources.

PLAN = [(np.array([3, 17, 3]), np.array([0, 1, 1])), (np.array([8]), np.array([0]))]


def test_all_sources_give_the_same_batches():
    cache, folder = TokenCache(helpers.token_cache()), list_images(helpers.images() / "train")
    tokenizer, _ = VQModel.load(helpers.tokenizer())
    sources = [
        CachedTokens(cache), ResidentTokens(cache, ALONE.device, images_at_a_time=5),
        EncodedImages(folder, tokenizer, helpers.SIZE, 0, ALONE.device),
    ]
    first, *others = [list(source.batches(iter(PLAN))) for source in sources]
    assert len(first) == 2 and all(same(other, first) for other in others)


def test_resident_tokens_hold_large_codes_and_refuse_a_damaged_cache(tmp_path):
    tokens = np.tile(np.array([0, 32767, 32768, 49999]), (5, 2, 1))
    resident = ResidentTokens(TokenCache(helpers.write_cache(tmp_path / "a", tokens)), ALONE.device)
    ((batch, _),) = resident.batches([(np.array([0]), np.array([1]))])
    assert batch.tolist() == [[0, 32767, 32768, 49999]]
    damaged = TokenCache(helpers.write_cache(tmp_path / "b", tokens + 1))
    with pytest.raises(DamagedCache, match="50000"):
        ResidentTokens(damaged, ALONE.device)


# Checkpoints.


@pytest.mark.parametrize("missing", ["model", "optimizer", "ema", "step", "train_config"])
def test_checkpoint_without_one_of_its_parts_is_refused_by_name(tmp_path, missing):
    state = new_state(CONFIG, ALONE.device)
    checkpoint = checkpoint_of(state, {}, ema={})
    del checkpoint[missing]
    save_checkpoint(tmp_path / "cut.pth", checkpoint)
    with pytest.raises(ValueError, match=f"cut.pth is not a checkpoint of this training: no {missing}"):
        state.load(tmp_path / "cut.pth")


@pytest.mark.parametrize("change", [
    {"fused": True}, {"foreach": True}, {}, {"fused": None, "foreach": False, "maximize": True},
], ids=str)
def test_resuming_takes_this_run_s_way_of_computing_adamw(change, tmp_path):
    state = new_state(CONFIG, ALONE.device)
    checkpoint = checkpoint_of(state, {}, ema={})
    groups = checkpoint["optimizer"]["param_groups"]
    checkpoint["optimizer"]["param_groups"] = [
        group | change if change else {"params": group["params"]} for group in groups
    ]
    save_checkpoint(tmp_path / LAST, checkpoint)
    before = [{**group, "params": 0} for group in state.optimizer.param_groups]
    state.load(tmp_path / LAST)
    assert [{**group, "params": 0} for group in state.optimizer.param_groups] == before
    state.optimizer.step()


def test_moving_average_starts_from_the_weights_that_training_starts_from(tmp_path):
    save_weights(tmp_path / "a.safetensors", LPD(MODEL))
    state = new_state(replace(CONFIG, ema=0.9), ALONE.device)
    state.start_from(tmp_path / "a.safetensors", [*"abcd"])
    weights = read_weights(tmp_path / "a.safetensors")[0]
    assert same(state.ema, weights) and same(weights, dict(state.model.state_dict()))


def save_twice(path):
    for step in (1, 2):
        weights = {"w": torch.full((10000,), float(step))}
        save_checkpoint(path, {"step": step, "model": weights, "train_config": {"seed": 0}})


def damage(path, how):
    """Truncate a checkpoint, or turn one bit in the middle of a tensor."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # PREVIOUS may be the same file by another name
    path.write_bytes(data if how == "one bit" else data[: len(data) // 2])


@pytest.mark.parametrize("how", ["truncated", "one bit"])
def test_previous_checkpoint_replaces_a_damaged_last_one_with_a_warning(how, tmp_path, capsys):
    path = tmp_path / LAST
    save_twice(path)
    assert load_checkpoint(path)["step"] == 2 and capsys.readouterr().err == ""
    damage(path, how)
    assert load_checkpoint(path)["step"] == 1
    message = capsys.readouterr().err
    assert str(path) in message and f"resuming from {tmp_path / PREVIOUS}" in message
    damage(tmp_path / PREVIOUS, how)
    with pytest.raises(ValueError, match=PREVIOUS):
        load_checkpoint(path)


def test_numbered_checkpoints_of_fractions_of_an_epoch_have_names_of_their_own():
    names = [numbered(i / 10, 0.1) for i in (1, 8, 9, 10)]
    assert names == [f"checkpoint-{number}.pth" for number in (0.1, 0.8, 0.9, 1)]
