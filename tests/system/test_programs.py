"""The programs end to end: from images to samples, from any folder, and reproducibly."""

import argparse
import json
import re
import shutil

import helpers
import numpy as np
import processes
import pytest
import torch
from helpers import CLASSES, ON_CPU, SIZE, call, contents, picture, sample_flags, train_flags
from PIL import Image
from processes import finished

from models.lpd import LPD
from models.weights import read_pth, save_weights
from util import cli, pictures
from util.logging import read_metrics

PUBLISHED_FLAGS = {
    "lpd": """--model --img_size --vqgan_path --vqgan_stride --vqgan_vocab_size --pretrained_ckpt
        --group_sizes_list --epochs --batch_size --lr --blr --min_lr --lr_schedule --warmup_epochs
        --lr_decay_start_epoch --bf16 --weight_decay --grad_checkpointing --grad_clip --proj_dropout
        --label_drop_prob --output_dir --resume --save_last_freq --save_intermediate_freq --device --seed
        --data_path --use_cached --cached_path --class_num --num_workers --evaluate --online_eval --eval_freq
        --eval_bsz --num_images --cfg --cfg_schedule --lpd_order_file --generation_steps --group_sizes --order
        --temperature --top_k --top_p --use_wandb --wandb_project --wandb_run_name""",
    "cache": """--img_size --vqgan_path --vqgan_vocab_size --batch_size --data_path --cached_path --device
        --num_workers""",
}


@pytest.mark.parametrize("program", PUBLISHED_FLAGS)
def test_flags_of_the_published_programs_are_accepted(program):
    accepted = re.findall(r"--\w+", finished(call(program, "--help")).out)
    assert set(PUBLISHED_FLAGS[program].split()) <= set(accepted)


@pytest.mark.parametrize("program", ["cache", "edit", "lpd", "sample", "stats", "tokenizer"])
def test_help_shows_every_default(program):
    flags = re.split(r"\n +(?=--)", finished(call(program, "--help")).out.split("options:")[1])[1:]
    assert len(flags) > 10
    assert [flag for flag in flags if "default" not in flag or re.search("None|False", flag)] == []


def test_programs_lead_from_images_to_samples(tmp_path):
    """Each is started from another working directory, with paths relative to it."""
    (tmp_path / "data").symlink_to(helpers.images())

    def start(program, words):
        return finished(processes.start(program, *words.split(), *ON_CPU, cwd=tmp_path))

    small = "--base_width 32 --multipliers 1 2 2 --num_res_blocks 1 --z_channels 32 --vocab_size 64"
    flags = f"--data_path data --img_size 16 {small} --code_dim 4 --epochs 1 --batch_size 6 --output_dir vq"
    outcome = start("tokenizer", flags)
    assert "parameters" in outcome.out and f"on {helpers.VAL} held-out images" in outcome.out
    report = json.loads((tmp_path / "vq/report.json").read_text())
    assert report["images"] == "held-out images" and report["n"] == helpers.VAL
    assert report["psnr"] > 0 and 0 < report["codebook_use"] <= 1
    assert picture(tmp_path / "vq/reconstructions.png").std() > 0
    assert picture(tmp_path / "vq/loss.png").std() > 0

    vq = "--vqgan_path vq/tokenizer.safetensors"
    start("cache", f"--img_size 16 {vq} --data_path data --cached_path cache")
    flags = f"--model lpd_tiny --use_cached --cached_path cache {vq} --output_dir run --batch_size 6"
    rate = "--epochs 2 --lr 1e-3 --lr_schedule cosine --warmup_epochs 1"
    often = "--sample_freq 1 --save_intermediate_freq 1 --log_every 1"
    start("lpd", f"{flags} {rate} {often} --generation_steps 4")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    for name in ("loss.png", "samples/epoch-0001.00.png", "samples/epoch-0002.00.png"):
        assert picture(tmp_path / "run" / name).std() > 0
    assert read_pth(tmp_path / "run/checkpoint-1.pth")["step"] == 3
    assert LPD.load(tmp_path / "run")[1]["class_names"] == list(CLASSES)

    flags = f"--pretrained_ckpt run/lpd.safetensors {vq} --output_dir out --cfg 2 --classes rings 00_bars"
    outcome = start("sample", f"{flags} --num_per_class 2 --generation_steps 4 --compare_steps 16")
    assert re.search(r"alone: .* s in 4 steps, .* s in 16: .*\dx\nin_batch: .*\dx\n", outcome.out)
    names = ("00_bars/00002.png", "00_bars/00003.png", "02_rings/00000.png", "02_rings/00001.png")
    names = [f"images_{steps}_steps/{name}" for steps in (16, 4) for name in names]
    tables = ["comparison.png", "film.gif", "grid.png"]
    assert list(contents(tmp_path / "out")) == [*tables, *names, "order.png", "sample.json"]
    assert picture(tmp_path / "out" / names[0]).shape == (SIZE, SIZE, 3)
    with Image.open(tmp_path / "out/film.gif") as film:
        assert film.n_frames == 1 + 4  # all grey, then one for each step


def test_film_shows_the_cells_that_are_decoded_and_the_latest_step_of_each_order():
    """Two white images of 2x2 cells, the second in the reverse order, after two of four steps."""
    images, steps = np.full((2, 96, 96, 3), 255, np.uint8), np.array([[[1, 2], [3, 4]], [[4, 3], [2, 1]]])
    frame = pictures.film_frame(2, images, steps, ["cat", "dog"])
    sheet = frame[-198:, :, :].astype(int)  # images, then their orders
    centres = np.array([26, 74, 124, 172])
    seen = sheet[np.ix_([26, 74], centres)][..., 0] == 255
    assert np.array_equal(seen, [[True, True, False, False], [False, False, True, True]])
    latest = (sheet[np.ix_([124, 172], centres)] == pictures.LATEST).all(axis=-1)
    assert np.array_equal(latest, [[False, True, False, False], [False, False, True, False]])
    large, many = images.repeat(3, axis=1).repeat(3, axis=2).repeat(5, axis=0), steps.repeat(5, axis=0)
    assert pictures.film_frame(0, large, many, ["a"] * 10).shape[1] < 1300


def test_training_at_a_larger_size_starts_from_weights_of_a_smaller(tmp_path):
    """What the small model has learned is there from the first step on."""
    finished(call("cache", *helpers.cache_flags(tmp_path / "cache", img_size=32)))
    flags = {"cached_path": tmp_path / "cache", "epochs": 0.2, "proj_dropout": 0, "lr": 0}
    finished(call("lpd", *train_flags(tmp_path / "scratch", **flags)))
    finished(call("lpd", *train_flags(tmp_path / "resized", pretrained_ckpt=helpers.trained(), **flags)))
    scratch, resized = (read_metrics(tmp_path / run)[0]["loss"] for run in ("scratch", "resized"))
    assert resized < scratch - 1


def test_bf16_training_follows_fp32(tmp_path):
    finished(call("lpd", *train_flags(tmp_path, epochs=1, bf16=True)))
    losses, expected = ([line["loss"] for line in read_metrics(run)] for run in (tmp_path, helpers.trained()))
    assert losses == pytest.approx(expected[:5], abs=0.1) and losses != expected[:5]
    assert read_pth(tmp_path / "checkpoint-last.pth")["model"]["head.weight"].dtype == torch.float32


@pytest.mark.parametrize("program", ["lpd", "tokenizer"])
def test_unreadable_image_ends_training_by_its_name(program, tmp_path):
    shutil.copytree(helpers.images(), tmp_path / "images")
    (tmp_path / "images/train/02_rings/4.png").write_bytes(b"no picture")
    flags = {"data_path": tmp_path / "images", "epochs": 1, "img_size": SIZE}
    if program == "lpd":
        words = train_flags(tmp_path / "out", cached_path=None, vqgan_path=helpers.tokenizer(), **flags)
    else:
        words = helpers.tokenizer_flags(tmp_path / "out", **flags)
    outcome = call(program, *words)
    assert outcome.status == 1 and "Traceback" not in outcome.err
    assert re.search(r"error: .*02_rings/4.png.*$", outcome.err)


def samples(folder, **changes):
    """Run main_sample; returns a name -> image dict."""
    finished(call("sample", *sample_flags(folder, **changes)))
    names = [name for name in contents(folder) if name.startswith("images_4")]
    return {name: picture(folder / name).astype(int) for name in names}


def difference(first, second):
    assert first.keys() == second.keys()
    return max(np.abs(first[name] - second[name]).max() for name in first)


def test_class_may_be_an_index_a_name_or_a_plain_name(tmp_path):
    by_index, *others = (samples(tmp_path / name, classes=[name]) for name in ("2", "02_rings", "rings"))
    assert list(by_index) == ["images_4_steps/02_rings/00000.png"]
    assert all(difference(by_index, other) == 0 for other in others)


@pytest.mark.parametrize(
    "text,found",
    [
        ("2", 4), ("10", 1), ("0", 0), ("crane", "3 and 5"), ("ant", 2), ("07", 6), ("7", 6), ("tench", 7),
        ("9", "no class"), ("²", "no class"), ("caf\u00e9", 8),
    ],
)
def test_a_name_of_a_class_wins_over_an_index_and_is_refused_if_it_is_that_of_two(text, found, capsys):
    names = ["1", "10", "3_ant", "crane", "2", "crane", "07", "tench", "cafe\u0301"]
    if isinstance(found, str):
        with pytest.raises(ValueError, match=f"--classes: .*{found}"):
            cli.find_class("--classes", text, names)
    else:
        assert cli.find_class("--classes", text, names) == found
        said = capsys.readouterr().out
        other = {"2": ", 4; class 2 is '3_ant'", "7": ", 6; class 7 is 'tench'"}.get(text.lstrip("0"))
        assert said == (other and f"--classes {text}: the class of that name{other}\n" or "")


@pytest.mark.parametrize("text", ["\ufeffcat\r\ndog\r\n a b \r\n", "cat\ndog\na b\n\n"])
def test_class_names_are_read_as_any_system_writes_them(tmp_path, text):
    (tmp_path / "names.txt").write_bytes(text.encode())
    args = argparse.Namespace(class_names=tmp_path / "names.txt")
    assert cli.class_names(args, 3, {}) == ["cat", "dog", "a b"]
    (tmp_path / "names.txt").write_bytes(text.encode("utf-16"))
    with pytest.raises(cli.UsageError, match="--class_names: .*names.txt is to be saved as UTF-8: "):
        cli.class_names(args, 3, {})


def test_samples_depend_on_the_seed_but_not_on_batch_size_or_compilation(tmp_path):
    """Within one grey level: convolutions may sum in another order."""
    first = samples(tmp_path / "a")
    assert len(first) == 3
    assert difference(first, samples(tmp_path / "b", batch_size=2)) <= 1
    assert difference(first, samples(tmp_path / "c", compile=True)) <= 1
    assert difference(first, samples(tmp_path / "d", seed=1)) > 1


def test_overwriting_replaces_earlier_images_and_nothing_else(tmp_path):
    samples(tmp_path, compare_steps=8, classes=["bars"])
    (tmp_path / "notes.txt").write_text("mine")
    assert len(samples(tmp_path, overwrite=True)) == 3
    assert not (tmp_path / "images_8_steps").exists() and (tmp_path / "notes.txt").read_text() == "mine"


def test_class_names_in_weights_never_lead_out_of_the_output_folder(tmp_path):
    model, info = LPD.load(helpers.trained())
    info = {**info, "class_names": ["..", "../../up", "/root/x"]}
    save_weights(tmp_path / "hostile.safetensors", model, **info)
    samples(tmp_path / "in/out", pretrained_ckpt=tmp_path / "hostile.safetensors")
    outside = {name for name in contents(tmp_path) if not name.startswith("in/out/")}
    assert outside == {"hostile.safetensors"} and not (tmp_path.parent / "up").exists()
