"""What training says of a run and of images it does not learn from: validation loss, record, continuation."""

import dataclasses
import json
import re

import helpers
import numpy as np
import pytest
import torch
from helpers import ALONE, CONFIG, call, picture, tokenizer_flags, train_flags
from processes import finished, torchrun

from engine import train_tokenizer
from engine.checkpoint import LAST, recorded_settings
from engine.data import ImageStream
from engine.likelihood import token_nll
from engine.report import points
from engine.train import TrainConfig, new_state, validation
from engine.train_tokenizer import TokenizerTrainConfig
from models.vqgan import VQModel
from models.weights import read_pth
from util.files import read_json
from util.logging import read_metrics


class Source:
    """Four images of 16 tokens: two for the first schedule, one for each of the others."""

    num_images = 4
    tokens, labels = helpers.four_images()

    def batches(self, plan):
        for indices, views in plan:
            assert indices.shape == views.shape == (len(indices),) and not views.any()
            yield self.tokens[indices], self.labels[indices]


def test_validation_loss_is_the_likelihood_of_each_image_by_a_schedule_of_its_own():
    """Image i has schedule i modulo their number, and the i-th of fixed random orders."""
    model = new_state(CONFIG, ALONE.device).model.eval()
    orders = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    expected = [
        token_nll(model, *(x[i : i + 1] for x in (Source.tokens, Source.labels, orders)), sizes).mean().item()
        for i, sizes in enumerate([*CONFIG.group_sizes, CONFIG.group_sizes[0]])
    ]
    found = validation(Source(), CONFIG, ALONE)(model)
    assert found == pytest.approx(np.mean(expected), abs=1e-5)
    worlds = [dataclasses.replace(ALONE, rank=rank, size=5) for rank in range(5)]
    parts = [validation(Source(), CONFIG, world)(model) for world in worlds]
    assert sum(parts) == pytest.approx(found, abs=1e-12)  # each is its share, the rest zeros


def test_validation_loss_is_logged_plotted_and_the_same_on_two_processes(tmp_path):
    flags = {"epochs": 1, "lr": 0, "proj_dropout": 0, "val_freq": 0.5}
    finished(torchrun(2, "lpd", *train_flags(tmp_path / "two", batch_size=2, **flags)))
    finished(call("lpd", *train_flags(tmp_path / "one", batch_size=4, **flags)))
    one, two = ([line.get("val_loss") for line in read_metrics(tmp_path / run)] for run in ("one", "two"))
    assert one == two and [value is not None for value in one] == [False, False, True, False, True]
    assert picture(tmp_path / "one/loss.png").std() > 0


def test_validation_takes_the_images_there_are(tmp_path):
    """One image, and more schedules than images."""
    for case, loss in (("1", 0), ("4", 3)):
        source = type("Few", (Source,), {"num_images": int(case)})()
        config = dataclasses.replace(CONFIG, schedules=(*CONFIG.schedules, 5, 6, 7))
        assert validation(source, config, ALONE)(new_state(CONFIG, ALONE.device).model.eval()) > loss


def test_validation_does_not_change_what_is_learned(tmp_path):
    flags = {"epochs": 1, "ema": 0.9}
    for freq in (0, 0.2):
        finished(call("lpd", *train_flags(tmp_path / f"{freq}", val_freq=freq, **flags)))
    first, second = (read_pth(tmp_path / f"{freq}" / LAST) for freq in (0, 0.2))
    assert helpers.same(first, second)


def test_unmirrored_stream_is_the_same_stream_of_originals():
    mirrored, plain = (ImageStream(50, 0, 40, no_mirror=no_mirror) for no_mirror in (False, True))
    (indices, views), (same_indices, originals) = mirrored.images(3), plain.images(3)
    assert np.array_equal(indices, same_indices) and views.any() and not originals.any()


# What a run folder keeps.


def test_run_is_described_at_its_start_and_in_its_folder(tmp_path):
    out = finished(call("lpd", *train_flags(tmp_path, epochs=1, bf16=True))).out
    assert re.search(r"LPD: [\d,]+ parameters; cpu, 1 threads; bfloat16\n5 steps, learning rate 0.001\n", out)
    (line,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert line["step"] == 0 and line["precision"] == "bfloat16" and line["data"]["names_digest"]
    assert line["versions"]["torch"] and line["commit"] and line["command"] and line["device"]
    config = (tmp_path / "config.json").read_text()
    assert config.count("\n") < 40 and read_json(tmp_path / "config.json")["schedules"] == [16, 8, 4]


def test_settings_of_an_old_checkpoint_are_read_as_written_today():
    """Before, schedules were written out, and there was no `no_mirror`."""
    old = dataclasses.asdict(CONFIG) | {"schedules": CONFIG.group_sizes}
    del old["no_mirror"]
    assert recorded_settings(CONFIG, old) == dataclasses.asdict(CONFIG)
    assert recorded_settings(CONFIG, {"seed": 3}) == {"seed": 3}


def test_schedules_are_kept_as_numbers_of_steps_where_these_say_it_all():
    schedules = (8, (1,) * 16, (1, 3, 4, 8), (1, 15))
    config = TrainConfig(CONFIG.model, 4, schedules, epochs=450)
    assert config.schedules == (8, 16, (1, 3, 4, 8), 2)
    assert [sum(sizes) for sizes in config.group_sizes] == [16] * 4


def test_epochs_of_the_schedule_are_in_proportion_to_those_of_the_run():
    given = {"warmup_epochs": None, "lr_decay_start_epoch": None, "lr_schedule": "constant+cosine"}
    for epochs, phases in ((450.0, (50.0, 400.0)), (4.5, (0.5, 4.0))):
        config = dataclasses.replace(CONFIG, epochs=epochs, **given)
        assert (config.warmup_epochs, config.lr_decay_start_epoch) == phases


def test_finished_run_continues_with_more_epochs_and_has_a_checkpoint_of_each_fraction(tmp_path):
    """Two steps an epoch; the schedule is that of the longer run."""
    flags = {"warmup_epochs": None, "lr_schedule": None, "batch_size": 9, "save_intermediate_freq": 0.5}
    finished(call("lpd", *train_flags(tmp_path, epochs=1, **flags)))
    finished(call("lpd", *train_flags(tmp_path, epochs=2, **flags)))
    numbered = {path.name: read_pth(path)["step"] for path in tmp_path.glob("checkpoint-[0-9]*.pth")}
    assert numbered == {f"checkpoint-{step / 2:g}.pth": step for step in (1, 2, 3, 4)}
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    for change in ({"epochs": 1}, {"epochs": 2, "warmup_epochs": 1}, {"epochs": 3, "lr": 1e-4}):
        outcome = call("lpd", *train_flags(tmp_path, **{**flags, **change}))
        assert outcome.status == 2 and f"made with {[*change][-1]} " in outcome.err


# Tokenizers.


def test_tokenizer_has_weights_with_its_checkpoint_and_continues_for_more_epochs(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("main_tokenizer.write_results", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            call("tokenizer", *tokenizer_flags(tmp_path))
    state, weights = read_pth(tmp_path / LAST), VQModel.load(tmp_path / "tokenizer.safetensors")[0]
    assert state["step"] == 3 and helpers.same(state["model"], dict(weights.state_dict()))
    finished(call("tokenizer", *tokenizer_flags(tmp_path, epochs=2)))
    assert [line["step"] for line in read_metrics(tmp_path)][-1] == read_pth(tmp_path / LAST)["step"] == 6
    outcome = call("tokenizer", *tokenizer_flags(tmp_path, epochs=1))
    assert outcome.status == 2 and "made with epochs 2.0, now it is 1.0" in outcome.err
    starts = [json.loads(line)["step"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert starts == [0, 3]


def test_tokenizer_trains_2000_steps_where_two_epochs_are_fewer():
    config = TokenizerTrainConfig(helpers.VQ, batch_size=64)
    assert config.for_images(1569).num_steps(1569) == 2000
    assert config.for_images(1_281_167).num_steps(1_281_167) == -(-2 * 1_281_167 // 64)
    assert dataclasses.replace(config, epochs=4.0).for_images(1569).warmup_steps == 9


def test_tokenizer_starts_from_weights_whose_sizes_count(tmp_path):
    """No epochs judge them as they are."""
    sizes = dict.fromkeys(("vocab_size", "base_width", "multipliers", "num_res_blocks", "z_channels"))
    flags = {**sizes, "pretrained_ckpt": helpers.tokenizer(), "epochs": 0}
    finished(call("tokenizer", *tokenizer_flags(tmp_path / "a", **flags)))
    assert read_json(tmp_path / "a/report.json")["psnr"] > 5
    expected, _ = VQModel.load(helpers.tokenizer())
    found, _ = VQModel.load(tmp_path / "a/tokenizer.safetensors")
    assert helpers.same(dict(found.state_dict()), dict(expected.state_dict()))
    outcome = call("tokenizer", *tokenizer_flags(tmp_path / "b", **{**flags, "vocab_size": 32}))
    assert outcome.status == 2 and "made with vocab_size 64, now it is 32" in outcome.err


def test_networks_of_patches_have_one_width(tmp_path):
    flags = tokenizer_flags(tmp_path, patch=8, base_width=None, multipliers=None, groups=1, epochs=0)
    finished(call("tokenizer", *flags))
    outcome = call("tokenizer", *flags, "--multipliers", 1, 2)
    assert outcome.status == 2 and "--multipliers: networks of patches are --z_channels wide" in outcome.err


def test_tokens_are_kept_while_the_decoder_learns(tmp_path):
    """No code is revived either, and a tokenizer to start from must be given."""
    config = TokenizerTrainConfig(helpers.VQ, keep_tokens=True, revive_every=1, warmup_steps=0)
    state, pixels = train_tokenizer.new_state(config, ALONE.device), torch.rand(2, 3, 16, 16)
    before = {name: weight.clone() for name, weight in state.model.state_dict().items()}
    losses = [train_tokenizer.train_step(state, state.model, pixels, 10)["reconstruction"] for _ in range(3)]
    after = state.model.state_dict()
    changed = {name.split(".")[0] for name, weight in before.items() if not weight.equal(after[name])}
    assert changed == {"post_quant_conv", "decoder"} and losses[2] < losses[0]
    outcome = call("tokenizer", *tokenizer_flags(tmp_path), "--keep_tokens")
    assert outcome.status == 2 and "--keep_tokens needs a tokenizer to start from" in outcome.err


def test_unused_codes_move_to_latents_of_the_batch():
    state = train_tokenizer.new_state(TokenizerTrainConfig(helpers.VQ), ALONE.device)
    codebook = state.model.quantize
    state.code_use[:44] = 1
    before = codebook(torch.arange(64)).clone()
    latents = torch.nn.functional.normalize(torch.randn(100, 4), dim=-1)
    latents[::2] = torch.nan
    train_tokenizer.revive_dead_codes(state, latents)
    after = codebook(torch.arange(64))
    moved = (after != before).any(dim=1)
    assert 0 < moved[44:].sum() < 20 and not moved[:44].any() and not state.code_use.any()
    assert all((latents[1::2] - code).square().sum(dim=1).min() < 1e-9 for code in after[moved])


def test_loss_curve_joins_what_the_log_cuts_short_at_the_end_of_an_epoch():
    losses = {50: 4.0, 51: 1.0, 101: 3.0}
    lines = [{"step": step, "epoch": step / 100, "loss": loss} for step, loss in losses.items()]
    lines += [{"step": 200, "epoch": 2.0, "loss": 2.0, "val_loss": 2.5}]
    assert points(lines, "loss") == [(0.5, 4.0), (1.01, pytest.approx((1 + 50 * 3) / 51)), (2.0, 2.0)]
    assert points(lines, "val_loss") == [(2.0, 2.5)]
