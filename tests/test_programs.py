"""The programs end to end: what they promise to write is there, from any folder, and the same again."""

import json
import re

import numpy as np
import programs
import pytest
import torch
from PIL import Image
from programs import CLASSES, SIZE, call, contents, finished, sample_flags, start, train_flags

import engine.train_tokenizer
from engine.checkpoint import load_checkpoint, load_lpd, load_tokenizer, read_weights, save_weights
from util.logging import read_metrics
from util.token_cache import TokenCache

KNOWN_FLAGS = {  # those people already use with the published programs
    "lpd": """
        --model --img_size --vqgan_path --vqgan_stride --vqgan_vocab_size --pretrained_ckpt --group_sizes_list
        --epochs --batch_size --lr --blr --min_lr --lr_schedule --warmup_epochs --lr_decay_start_epoch --bf16
        --weight_decay --grad_checkpointing --grad_clip --proj_dropout --label_drop_prob --output_dir --resume
        --save_last_freq --save_intermediate_freq --device --seed --data_path --use_cached --cached_path
        --class_num --num_workers --evaluate --online_eval --eval_freq --eval_bsz --num_images --cfg
        --cfg_schedule --lpd_order_file --generation_steps --group_sizes --order --temperature --top_k --top_p
        --use_wandb --wandb_project --wandb_run_name""",
    "cache": """--img_size --vqgan_path --vqgan_vocab_size --batch_size --data_path --cached_path --device
        --num_workers""",
    "tokenizer": "--data_path --img_size --output_dir",
    "sample": "--pretrained_ckpt --vqgan_path --classes --output_dir",
    "edit": """--image --class --mask --box --outpaint --variations --generation_steps --seed --num
        --output_dir""",
}


@pytest.mark.parametrize("program", KNOWN_FLAGS)
def test_help_tells_every_known_flag(program):
    outcome = call(program, "--help")
    assert outcome.status == 0 and outcome.err == ""
    told = set(re.findall(r"--\w+", outcome.out))
    assert not set(KNOWN_FLAGS[program].split()) - told


def picture(path):
    """A picture file as an array; reading it proves that it is whole."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_from_a_folder_of_images_to_pictures_by_the_real_programs(tmp_path):
    """Each is started from another working directory, with paths relative to that."""
    (tmp_path / "data").symlink_to(programs.images())
    device = ["--device", "cpu", "--num_workers", "0"]

    small = (
        "--base_width 32 --multipliers 1 2 2 --num_res_blocks 1 --z_channels 32 --vocab_size 64 --code_dim 4"
    )
    words = f"--data_path data --img_size 16 {small} --epochs 1 --batch_size 6 --output_dir vq"
    outcome = finished(start("tokenizer", *words.split(), *device, cwd=tmp_path))
    report = json.loads(outcome.out)
    assert json.loads((tmp_path / "vq/report.json").read_text()) == report
    assert report["n"] == programs.VAL and report["steps"] == 3
    assert report["psnr"] > 0 and 0 < report["codebook_use"] <= 1
    assert picture(tmp_path / "vq/reconstructions.png").std() > 0
    assert load_tokenizer(tmp_path / "vq/tokenizer.safetensors").config.stride == 4

    vq = "--vqgan_path vq/tokenizer.safetensors"
    words = f"--img_size 16 {vq} --data_path data --cached_path cache"
    finished(start("cache", *words.split(), *device, cwd=tmp_path))
    assert len(TokenCache(tmp_path / "cache")) == programs.TRAIN

    words = (
        f"--model lpd_tiny --use_cached --cached_path cache {vq} --output_dir run --epochs 2 --batch_size 6 "
        "--lr 1e-3 --lr_schedule cosine --warmup_epochs 1 --sample_freq 1 --save_intermediate_freq 1 "
        "--generation_steps 4 --log_every 1"
    )
    finished(start("lpd", *words.split(), *device, cwd=tmp_path))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["num_classes"] == 3
    for name in ("loss.png", "samples/epoch-0001.00.png", "samples/epoch-0002.00.png"):
        assert picture(tmp_path / "run" / name).std() > 0
    assert load_checkpoint(tmp_path / "run/checkpoint-1.pth")["step"] == 3
    assert load_checkpoint(tmp_path / "run/checkpoint-last.pth")["step"] == 6
    _, info = load_lpd(tmp_path / "run/lpd.safetensors")
    assert info["class_names"] == list(CLASSES)

    words = (
        f"--pretrained_ckpt run/lpd.safetensors {vq} --output_dir out --classes rings 00_bars 1 "
        "--num_per_class 2 --generation_steps 4 --compare_steps 16 --cfg 2"
    )
    outcome = finished(start("sample", *words.split(), *device, cwd=tmp_path))
    assert re.search(r"lpd order +4 .*\n.* 16 .*1\.0x", outcome.out)
    made = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    images = [
        f"images_{steps}_steps/{name}"
        for steps in (16, 4)
        for name in ("00_bars/00002.png", "00_bars/00003.png", "01_noise/00004.png", "01_noise/00005.png",
                     "02_rings/00000.png", "02_rings/00001.png")
    ]  # fmt: skip
    assert made == sorted(["comparison.png", "film.gif", "grid.png", "order.png", "sample.json", *images])
    for name in images:
        assert picture(tmp_path / "out" / name).shape == (SIZE, SIZE, 3)
    with Image.open(tmp_path / "out/film.gif") as film:
        assert film.n_frames == 1 + 4  # all grey, then one for each step


# Training.


def test_tokenizer_training_that_was_stopped_goes_on_to_the_same_weights_bit_for_bit(tmp_path, monkeypatch):
    """Stopped in step 6 of 9 behind the checkpoint of step 4; codes are revived in steps 3 and 6, the second
    time by their use from step 4 on."""
    flags = [
        "--data_path", programs.images(), "--img_size", 16, "--base_width", 32, "--multipliers", 1, 2,
        "--num_res_blocks", 1, "--z_channels", 32, "--vocab_size", 64, "--epochs", 3, "--batch_size", 6,
        "--warmup_steps", 2, "--save_every", 4, *programs.ON_CPU,
    ]  # fmt: skip
    plain, calls = engine.train_tokenizer.losses, []
    config = engine.train_tokenizer.TokenizerTrainConfig
    monkeypatch.setattr("main_tokenizer.TokenizerTrainConfig", lambda **kw: config(**kw, revive_every=3))
    finished(call("tokenizer", *flags, "--output_dir", tmp_path / "straight"))

    def stopping_losses(*tensors):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return plain(*tensors)

    monkeypatch.setattr(engine.train_tokenizer, "losses", stopping_losses)
    assert call("tokenizer", *flags, "--output_dir", tmp_path / "run").status == 130
    assert load_checkpoint(tmp_path / "run/checkpoint-last.pth")["step"] == 4
    assert not (tmp_path / "run/tokenizer.safetensors").exists()
    finished(call("tokenizer", *flags, "--output_dir", tmp_path / "run"))
    assert len(calls) == 6 + 5
    runs = (tmp_path / "straight", tmp_path / "run")
    first, second = (read_weights(run / "tokenizer.safetensors")[0] for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("report.json", "reconstructions.png"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()


def test_training_at_a_larger_size_starts_from_the_weights_of_a_smaller(tmp_path):
    """The position embeddings are resized from 4x4 to 8x8, the rest is taken as it is: what the small model
    has learned, 2 nats of the loss, is there from the first step on."""
    finished(call("cache", *programs.cache_flags(tmp_path / "cache", img_size=32)))
    flags = {"cached_path": tmp_path / "cache", "epochs": 0.2, "proj_dropout": 0, "lr": 0}
    finished(call("lpd", *train_flags(tmp_path / "scratch", **flags)))
    flags["pretrained_ckpt"] = programs.trained() / "lpd.safetensors"
    finished(call("lpd", *train_flags(tmp_path / "resized", **flags)))
    losses = [read_metrics(tmp_path / run)[0]["loss"] for run in ("scratch", "resized")]
    assert losses[1] < losses[0] - 1


def test_bf16_training_follows_fp32(tmp_path):
    """0.1 nats: bfloat16 keeps three digits, and the first losses are near 4."""
    finished(call("lpd", *train_flags(tmp_path, epochs=1), "--bf16"))
    losses, expected = (
        [line["loss"] for line in read_metrics(run)] for run in (tmp_path, programs.trained())
    )
    assert losses == pytest.approx(expected[:5], abs=0.1) and losses != expected[:5]
    assert load_checkpoint(tmp_path / "checkpoint-last.pth")["model"]["head.weight"].dtype == torch.float32


# Sampling.


def images_of(folder, steps=4):
    return {name: picture(folder / name) for name in contents(folder) if name.startswith(f"images_{steps}_")}


def equal(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """An output folder of main_sample: one image of each class."""
    folder = tmp_path_factory.mktemp("sampled") / "out"
    finished(call("sample", *sample_flags(folder)))
    return folder


def test_class_by_index_name_and_plain_name_give_the_same_picture(tmp_path):
    for name in ("2", "02_rings", "rings"):
        finished(call("sample", *sample_flags(tmp_path / name), "--classes", name))
    by_index = images_of(tmp_path / "2")
    assert list(by_index) == ["images_4_steps/02_rings/00000.png"]
    assert equal(by_index, images_of(tmp_path / "02_rings"))
    assert equal(by_index, images_of(tmp_path / "rings"))


def test_pictures_are_the_same_again_and_for_any_batch_size_and_others_for_another_seed(tmp_path, sampled):
    finished(call("sample", *sample_flags(tmp_path / "a", batch_size=2)))
    finished(call("sample", *sample_flags(tmp_path / "b", seed=1)))
    first, again, other = (images_of(folder) for folder in (sampled, tmp_path / "a", tmp_path / "b"))
    assert len(first) == 3
    for name, image in first.items():
        # one grey level: the decoder's convolutions may sum in another order in another batch
        assert np.abs(image.astype(int) - again[name]).max() <= 1
        assert np.abs(image.astype(int) - other[name]).max() > 1


def test_overwriting_replaces_an_earlier_run_of_ours_and_nothing_else(tmp_path, sampled):
    folder = tmp_path / "out"
    finished(call("sample", *sample_flags(folder, compare_steps=8), "--classes", "bars"))
    (folder / "notes.txt").write_text("mine")
    finished(call("sample", *sample_flags(folder), "--overwrite"))
    assert equal(images_of(folder), images_of(sampled))
    assert not images_of(folder, steps=8)
    assert (folder / "notes.txt").read_text() == "mine"


def test_class_names_in_weights_never_lead_out_of_the_output_folder(tmp_path):
    model, info = load_lpd(programs.trained() / "lpd.safetensors")
    info["class_names"] = ["..", "../../up", "/root/x"]
    info.pop("config")
    save_weights(tmp_path / "hostile.safetensors", model, **info)
    before = contents(tmp_path)
    flags = sample_flags(tmp_path / "in/out", pretrained_ckpt=tmp_path / "hostile.safetensors")
    finished(call("sample", *flags))
    outside = {name: digest for name, digest in contents(tmp_path).items() if not name.startswith("in/out/")}
    assert outside == before
    assert len(images_of(tmp_path / "in/out")) == 3
