"""Training: what is learned, what is drawn, what is averaged, and that an interrupted run ends as another.

The golden losses are made anew, after a change that is meant to alter them, by
`PYTHONPATH=. python tests/test_train.py`.
"""

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from programs import call, finished, train_flags

import engine.train
from engine.batches import own_part
from engine.checkpoint import load_checkpoint, load_tokenizer, read_weights, save_checkpoint
from engine.generate import generate_tokens
from engine.train import (
    CachedTokens,
    EncodedImages,
    TrainConfig,
    draw_step,
    learning_rate,
    new_state,
    train_step,
)
from models.lpd import LPDConfig
from util.dist import World
from util.images import list_images
from util.logging import read_metrics
from util.token_cache import TokenCache

ALONE = World(0, 1, torch.device("cpu"))
GOLDEN = Path(__file__).with_name("golden_losses.json")
MODEL = LPDConfig(
    grid_size=4, vocab_size=16, num_classes=4, embed_dim=64, depth=2, num_heads=4, dropout=0.0,
    label_drop_prob=0.0,
)  # fmt: skip
CONFIG = TrainConfig(
    model=MODEL, num_images=4, schedules=((1,) * 16, (1, 3, 4, 8), (1, 1, 2, 2, 4, 6)), epochs=120,
    global_batch=4, lr=3e-3, lr_schedule="constant", warmup_epochs=0,
)  # fmt: skip


def four_images():
    """Tokens int64 [4, 16] of 16 codes and the labels 0..3."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 16, (4, 16))), torch.arange(4)


def steps_of(state, config, count, micro_batch=None):
    """Take training steps on the four images.

    Returns:
        list of losses.
    """
    forever = iter(lambda: micro_batch or four_images(), None)
    return [train_step(state, state.model, config, ALONE, 1, forever)[0].item() for _ in range(count)]


def same(first, second):
    """Whether two nested values of dicts, lists, tensors and numbers are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def final_state(run):
    """All that training left in a run folder, but the time it took."""
    untimed = [{k: v for k, v in line.items() if k != "images_per_s"} for line in read_metrics(run)]
    return load_checkpoint(run / "checkpoint-last.pth"), read_weights(run / "lpd.safetensors"), untimed


# What is learned.


def test_four_images_are_learned_by_heart_and_greedy_decoding_gives_them_back():
    """Loss under 0.1 nats per token, where guessing costs log 16 = 2.8, in every schedule of the training."""
    state = new_state(CONFIG, ALONE.device)
    losses = steps_of(state, CONFIG, 120)
    assert losses[0] > 2.5 and max(losses[-20:]) < 0.1
    tokens, labels = four_images()
    order = draw_step(CONFIG, 12345).orders
    for group_sizes in CONFIG.schedules:
        decoded = generate_tokens(state.model.eval(), labels, order, group_sizes, temperature=0)
        assert torch.equal(decoded, tokens)


def golden_losses():
    """The losses of 20 steps with every default of the recipe but its sizes, and no dropout of activations,
    whose random stream torch does not promise to keep."""
    model = dataclasses.replace(MODEL, label_drop_prob=0.1)
    config = TrainConfig(
        model=model, num_images=4, schedules=CONFIG.schedules, epochs=20, global_batch=4, lr=1e-3,
        warmup_epochs=5, lr_decay_start_epoch=10, ema=0.99, seed=7,
    )  # fmt: skip
    return steps_of(new_state(config, ALONE.device), config, 20)


def test_first_losses_of_a_fixed_seed_are_the_golden_ones():
    """1e-4: another order of the sums, by other kernels or threads, moves a loss near 3 by some 1e-6 at once
    and by under 1e-5 after 20 steps; another draw, order, rate or mask moves it by 1e-2 or more."""
    assert golden_losses() == pytest.approx(json.loads(GOLDEN.read_text()), abs=1e-4)


def plain_descent(config):
    """A new state whose optimizer is SGD: AdamW makes steps of full size of the rounding errors that stand
    where a gradient is zero by symmetry (biases of keys)."""
    state = new_state(config, ALONE.device)
    state.optimizer = torch.optim.SGD(state.model.parameters())
    return state


def test_accumulated_micro_batches_are_one_batch():
    """1e-5: the same sums in another order."""
    config = dataclasses.replace(CONFIG, lr=0.1)
    tokens, labels = four_images()
    whole, parts = plain_descent(config), plain_descent(config)
    halves = iter([(tokens[:2], labels[:2]), (tokens[2:], labels[2:])] * 3)
    for _ in range(3):
        (loss,) = steps_of(whole, config, 1)
        accumulated, _ = train_step(parts, parts.model, config, ALONE, 2, halves)
        assert accumulated.item() == pytest.approx(loss, abs=1e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    """The same kernels run on the same numbers and with the same dropout, so nothing at all may differ."""
    flags = {"epochs": 1, "proj_dropout": 0.2}
    finished(call("lpd", *train_flags(tmp_path / "plain", **flags)))
    finished(call("lpd", *train_flags(tmp_path / "check", **flags), "--grad_checkpointing"))
    assert same(final_state(tmp_path / "plain"), final_state(tmp_path / "check"))


def test_weight_decay_acts_on_matrices_and_never_on_vectors():
    config = dataclasses.replace(CONFIG, lr=1e-2, weight_decay=0.5)
    state = new_state(config, ALONE.device)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    assert sum(len(group["params"]) for group in state.optimizer.param_groups) == len(before)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()  # with no gradient, decay is all that moves a weight
    for name, parameter in state.model.named_parameters():
        factor = 1 - 1e-2 * 0.5 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


# Schedules, draws, the moving average.


@pytest.mark.parametrize(
    "schedule,rates",
    [
        ("constant", {0: 0.0, 1: 0.5, 2: 1.0, 6: 1.0, 10: 1.0}),
        ("cosine", {0: 0.0, 1: 0.5, 2: 1.0, 4: 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 6: 0.55, 10: 0.1}),
        ("constant+cosine", {0: 0.0, 1: 0.5, 2: 1.0, 6: 1.0, 8: 0.55, 10: 0.1}),
    ],
)
def test_learning_rate_by_hand(schedule, rates):
    """2 epochs of warm-up to 1.0, 10 epochs in all, least rate 0.1, decay of constant+cosine from epoch 6."""
    config = dataclasses.replace(
        CONFIG, lr=1.0, min_lr=0.1, epochs=10, warmup_epochs=2, lr_decay_start_epoch=6, lr_schedule=schedule
    )
    assert {epoch: learning_rate(config, epoch) for epoch in rates} == pytest.approx(rates)


def test_learning_rate_of_the_optimizer_follows_the_epoch():
    config = dataclasses.replace(CONFIG, num_images=8, epochs=10, warmup_epochs=2, lr=1.0)
    state = new_state(config, ALONE.device)
    rates = []
    for _ in range(5):  # two steps of 4 images an epoch
        steps_of(state, config, 1)
        rates.append({group["lr"] for group in state.optimizer.param_groups})
    assert rates == [{0.0}, {0.25}, {0.5}, {0.75}, {1.0}]


def test_draws_of_a_step_depend_on_seed_and_step_alone():
    first = draw_step(CONFIG, 5)
    torch.manual_seed(99)
    torch.rand(7)
    again = draw_step(CONFIG, 5)
    assert first.group_sizes == again.group_sizes and torch.equal(first.orders, again.orders)
    for other in (draw_step(CONFIG, 6), draw_step(dataclasses.replace(CONFIG, seed=1), 5)):
        assert not torch.equal(first.orders, other.orders)
    # all ranks draw this one batch and take parts of it that together are the whole
    parts = torch.cat([own_part(first.orders, rank, 2, 1)[0] for rank in range(2)])
    assert torch.equal(parts, first.orders)


def test_each_image_draws_a_permutation_and_each_schedule_its_turn():
    draws = [draw_step(CONFIG, step) for step in range(60)]
    everywhere = torch.cat([d.orders for d in draws])
    assert torch.equal(everywhere.sort(dim=1).values, torch.arange(16).expand(240, 16))
    assert len(everywhere.unique(dim=0)) == 240
    assert {d.group_sizes for d in draws} == set(
        CONFIG.schedules
    )  # missed with probability 3 (2/3)^60 < 1e-10


def test_moving_average_by_hand():
    config = dataclasses.replace(CONFIG, ema=0.75)
    state = new_state(config, ALONE.device)
    expected = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    for _ in range(3):
        steps_of(state, config, 1)
        for name, parameter in state.model.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * parameter.detach()
    for name, average in state.ema.items():
        torch.testing.assert_close(average, expected[name], msg=name)


def test_moving_average_is_what_is_exported_and_what_is_read_from_a_checkpoint(tmp_path):
    finished(call("lpd", *train_flags(tmp_path / "run", epochs=1, ema=0.5)))
    checkpoint = load_checkpoint(tmp_path / "run/checkpoint-last.pth")
    assert not same(checkpoint["ema"], checkpoint["model"])
    for name in ("lpd.safetensors", "checkpoint-last.pth"):
        assert same(read_weights(tmp_path / "run" / name)[0], checkpoint["ema"])


# Stop and go on.


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_four_steps_are_two_a_checkpoint_and_two_more_bit_for_bit(tmp_path, ema):
    config = dataclasses.replace(CONFIG, ema=ema, model=dataclasses.replace(MODEL, dropout=0.1))
    straight, first, second = (new_state(config, ALONE.device) for _ in range(3))
    steps_of(straight, config, 4)
    steps_of(first, config, 2)
    first.save(tmp_path / "checkpoint-last.pth", config, {})
    torch.manual_seed(31)  # the state of the global generator must not matter
    second.load(tmp_path / "checkpoint-last.pth", config)
    steps_of(second, config, 2)
    assert second.step == straight.step == 4
    assert same(second.model.state_dict(), straight.model.state_dict())
    assert same(second.optimizer.state_dict(), straight.optimizer.state_dict())
    assert same(second.ema, straight.ema)


KILL_IN_SEVENTH_STEP = """
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


def test_killed_run_goes_on_by_the_same_command_to_the_same_weights_bit_for_bit(tmp_path):
    """Checkpoints after steps 3 and 5 of 9; killed in step 7, so that one is taken twice. Dropout is on."""
    flags = {"epochs": 2, "save_last_freq": 0.5, "ema": 0.9}
    killed = programs.python("-c", KILL_IN_SEVENTH_STEP, *train_flags(tmp_path / "run", **flags))
    assert killed.status == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "run/checkpoint-last.pth")["step"] == 5
    assert not (tmp_path / "run/lpd.safetensors").exists()
    finished(programs.start("lpd", *train_flags(tmp_path / "run", **flags)))
    finished(call("lpd", *train_flags(tmp_path / "undisturbed", **flags)))
    assert same(final_state(tmp_path / "run"), final_state(tmp_path / "undisturbed"))


def test_finished_run_started_again_stays_as_it_is(tmp_path):
    finished(call("lpd", *train_flags(tmp_path, epochs=1)))
    before = programs.contents(tmp_path)
    finished(call("lpd", *train_flags(tmp_path, epochs=1)))
    assert programs.contents(tmp_path) == before


def test_run_resumed_from_another_folder_goes_on_in_its_own(tmp_path, monkeypatch):
    """--resume A --output_dir B, killed and started again, goes on from the newer checkpoint in B."""
    steps, stop_at = [], [6]

    def stopping_step(state, *rest):
        if state.step == stop_at[0]:
            raise KeyboardInterrupt
        steps.append(state.step)
        return train_step(state, *rest)

    monkeypatch.setattr(engine.train, "train_step", stopping_step)
    assert call("lpd", *train_flags(tmp_path / "a", save_last_freq=1)).status == 130
    flags = train_flags(tmp_path / "b", save_last_freq=1, resume=tmp_path / "a")
    stop_at[0] = 12
    assert call("lpd", *flags).status == 130
    stop_at[0] = None
    finished(call("lpd", *flags))
    assert steps == [*range(6), *range(5, 12), *range(9, 18)]  # checkpoints after the steps 5 and 9
    assert same(
        read_weights(tmp_path / "b/lpd.safetensors")[0],
        read_weights(programs.trained() / "lpd.safetensors")[0],
    )


@pytest.mark.parametrize(
    "change,words",
    [
        ({"seed": 3}, "seed 0, now it is 3"),
        ({"lr": 1e-4}, "lr 0.001, now it is 0.0001"),
        ({"epochs": 9}, "epochs 4.0, now it is 9.0"),
        ({"batch_size": 2}, "global_batch 4, now it is 2"),
        ({"proj_dropout": 0.3}, "model"),
        ({"group_sizes_list": 4}, "schedules"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_run_resumed_with_another_setting_is_refused_by_its_name(change, words):
    before = programs.contents(programs.trained())
    outcome = call("lpd", *train_flags(programs.trained(), **change))
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert words in outcome.err and "checkpoint-last.pth" in outcome.err
    assert programs.contents(programs.trained()) == before


# Where the tokens come from.


def test_training_from_images_is_training_from_their_cache(tmp_path):
    """Mirrored views included: the losses of all steps agree to the rounding of the log."""
    from_images = {"cached_path": None, "data_path": programs.images(), "vqgan_path": programs.tokenizer()}
    flags = train_flags(tmp_path, img_size=programs.SIZE, **from_images)
    finished(call("lpd", *flags))
    losses, expected = (
        [line["loss"] for line in read_metrics(run)] for run in (tmp_path, programs.trained())
    )
    assert losses == pytest.approx(expected, abs=1e-4)


def test_run_from_images_that_is_resumed_is_as_one_undisturbed(tmp_path, monkeypatch):
    """Bit for bit, with dropout on: starting the readers again must not shift the random stream."""
    from_images = {"cached_path": None, "data_path": programs.images(), "vqgan_path": programs.tokenizer()}
    flags = {"img_size": programs.SIZE, "epochs": 1, **from_images}
    finished(call("lpd", *train_flags(tmp_path / "straight", **flags)))

    def stopping_step(state, *rest):
        if state.step == 3:
            raise KeyboardInterrupt
        return train_step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine.train, "train_step", stopping_step)
        assert call("lpd", *train_flags(tmp_path / "run", **flags, save_last_freq=0.2)).status == 130
    finished(call("lpd", *train_flags(tmp_path / "run", **flags, save_last_freq=0.2)))
    assert same(final_state(tmp_path / "run"), final_state(tmp_path / "straight"))


def test_batches_from_images_and_from_the_cache_are_the_same_tokens_and_labels():
    cache = CachedTokens(TokenCache(programs.token_cache()))
    folder = list_images(programs.images() / "train")
    encoded = EncodedImages(folder, load_tokenizer(programs.tokenizer()), programs.SIZE, 0, "cpu")
    plan = [(np.array([3, 17, 3]), np.array([0, 1, 1])), (np.array([8]), np.array([0]))]
    for ours, theirs in zip(cache.batches(iter(plan)), encoded.batches(iter(plan)), strict=True):
        assert same(ours, theirs)


@pytest.mark.parametrize("missing", ["model", "optimizer", "ema", "step"])
def test_checkpoint_without_one_of_its_parts_is_refused_by_name(tmp_path, missing):
    path, state = tmp_path / "checkpoint-last.pth", new_state(CONFIG, torch.device("cpu"))
    state.save(path, CONFIG, {})
    checkpoint = load_checkpoint(path)
    del checkpoint[missing]
    save_checkpoint(tmp_path / "cut.pth", checkpoint)
    with pytest.raises(ValueError, match=f"cut.pth: no checkpoint of this training, {missing} is missing"):
        state.load(tmp_path / "cut.pth", CONFIG)


def test_checkpoint_with_weights_of_another_shape_is_refused_by_name(tmp_path):
    state = new_state(CONFIG, torch.device("cpu"))
    state.save(tmp_path / "checkpoint-last.pth", CONFIG, {})
    checkpoint = load_checkpoint(tmp_path / "checkpoint-last.pth")
    checkpoint["model"]["mask_token"] = torch.zeros(3)
    save_checkpoint(tmp_path / "other.pth", checkpoint)
    with pytest.raises(ValueError, match=r"other.pth: mask_token has shape \[3\]"):
        state.load(tmp_path / "other.pth", CONFIG)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps([round(loss, 6) for loss in golden_losses()]) + "\n")
