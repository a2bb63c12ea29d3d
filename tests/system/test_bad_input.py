"""Mistakes of users: each ends a program in one line that names the flag or the file; nothing is written."""

import errno
import os
import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import call
from PIL import Image

from models.lpd import LPD
from models.weights import save_weights

COMMANDS = {
    "train": helpers.train_flags,
    "evaluate": lambda out, **changes: helpers.evaluate_flags(
        out, **{"inception": helpers.inception(), **changes}
    ),
    "sample": helpers.sample_flags,
    "edit": lambda out, **changes: helpers.edit_flags(out, [], **{"box": [0, 0, 8, 8], **changes}),
    "cache": helpers.cache_flags,
    "tokenizer": helpers.tokenizer_flags,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Path by name of what the cases write in braces."""
    root = tmp_path_factory.mktemp("bad")
    run = helpers.trained()
    paths = {
        "root": root, "run": run, "lpd": run / "lpd.safetensors", "tokenizer": helpers.tokenizer(),
        "other_tokenizer": helpers.tokenizer(seed=1), "cache": helpers.token_cache(),
        "images": helpers.images(), "inception": helpers.inception(),
    }
    names = ("absent", "empty", "file", "cut.pth", "code.pth", "nan.safetensors", "unfinished", "cut_run")
    files = ("two.npy", "repeating.npy", "of_64.npz", "of_32_px.npz", "mask.png", "huge.png", "two_names")
    paths |= {name.split(".")[0]: root / name for name in (*names, *files)}
    paths["empty"].mkdir()
    paths["file"].write_text("neither a folder nor weights\n")
    checkpoint = (run / "checkpoint-last.pth").read_bytes()
    paths["cut"].write_bytes(checkpoint[: len(checkpoint) // 2])
    paths["cut_run"].mkdir()
    shutil.copy(paths["cut"], paths["cut_run"] / "checkpoint-last.pth")
    paths["code"].write_bytes(helpers.hostile_checkpoint(root / "the code ran"))
    model, info = LPD.load(run)
    torch.nn.init.constant_(model.head.weight, torch.nan)
    save_weights(paths["nan"], model)
    shutil.copytree(helpers.token_cache(), paths["unfinished"])
    (paths["unfinished"] / "meta.json").unlink()
    (paths["unfinished"] / "shard-00002.labels.npy").unlink()
    orders = np.stack([np.random.default_rng(i).permutation(16) for i in range(6)]).astype(np.uint16)
    np.save(paths["two"], orders[:2])
    np.save(paths["repeating"], np.where(orders == 3, 4, orders))
    np.savez(paths["of_64"], mu=np.zeros(64), sigma=np.zeros((64, 64)))
    np.savez(paths["of_32_px"], mu=np.zeros(2048), sigma=np.zeros((2048, 2048), np.float32), img_size=32)
    Image.new("L", (25, 16)).save(paths["mask"])
    Image.new("1", (50000, 50000)).save(paths["huge"])
    paths["two_names"].write_text("bars\nnoise\n")
    return paths


CASES = [  # command, changed flags, words of the error
    ("train", {"model": None}, ["--model is needed"]),
    ("train", {"cached_path": None}, ["--use_cached", "--data_path"]),
    ("train", {"cached_path": "{absent}"}, ["{absent}"]),
    ("train", {"cached_path": "{unfinished}"}, ["{unfinished}"]),
    ("train", {"cached_path": None, "data_path": "{empty}", "vqgan_path": "{tokenizer}"}, ["{empty}"]),
    ("train", {"vqgan_path": "{other_tokenizer}"}, ["{cache}", "tokenizer_digest", "--vqgan_path"]),
    ("train", {"img_size": 256}, ["--img_size is 256", "16"]),
    ("train", {"class_num": 4}, ["--class_num is 4", "3"]),
    ("train", {"group_sizes_list": [17]}, ["--group_sizes_list", "17 steps for 16 tokens"]),
    ("train", {"lr_schedule": "cosine", "warmup_epochs": 9}, ["--warmup_epochs 9", "--epochs 4"]),
    ("train", {"epochs": 0}, ["--epochs 0", "18 images", "no step of 4"]),
    ("train", {"sample_freq": 1}, ["--sample_freq", "--vqgan_path"]),
    ("train", {"save_npz": "x.npz"}, ["--save_npz", "--evaluate"]),
    ("train", {"pretrained_ckpt": "{tokenizer}"}, ["{tokenizer}", "weights missing"]),
    ("train", {"out": "{file}"}, ["--output_dir", "{file}", "not a folder"]),
    ("train", {"out": "{cut_run}"}, ["{cut_run}/checkpoint-last.pth", "damaged"]),
    ("train", {"out": "{run}", "lr": 1}, ["{run}", "lr 0.001", "1.0"]),
    ("train", {"resume": "{absent}"}, ["--resume", "{absent}/checkpoint-last.pth"]),
    ("evaluate", {"pretrained_ckpt": None}, ["--pretrained_ckpt is needed"]),
    ("evaluate", {"pretrained_ckpt": "{absent}"}, ["{absent}"]),
    ("evaluate", {"pretrained_ckpt": "{code}"}, ["{code}", "refused"]),
    ("evaluate", {"pretrained_ckpt": "{nan}"}, ["{nan}", "head.weight is not finite"]),
    ("evaluate", {"model": "lpd_l"}, ["{lpd}", "--model lpd_l", "192", "1024"]),
    ("evaluate", {"vqgan_path": "{other_tokenizer}"}, ["--pretrained_ckpt", "--vqgan_path"]),
    ("evaluate", {"vqgan_path": "{lpd}"}, ["{lpd}", "VQModel"]),
    ("evaluate", {"vqgan_stride": 16}, ["--vqgan_stride is 16", "4"]),
    ("evaluate", {"lpd_order_file": "{two}"}, ["{two}", "2 orders", "6"]),
    ("evaluate", {"lpd_order_file": "{repeating}"}, ["{repeating}"]),
    ("evaluate", {"group_sizes": [1, 5], "generation_steps": None}, ["group sizes sum to 6", "16"]),
    ("evaluate", {"group_sizes": [2, 14], "generation_steps": None}, ["group sizes", "1"]),
    ("evaluate", {"inception": None}, ["--inception", "LPD_INCEPTION"]),
    ("evaluate", {"fid_stats": "{absent}"}, ["{absent}"]),
    ("evaluate", {"fid_stats": "{of_64}"}, ["--fid_stats", "[64]", "2048"]),
    ("evaluate", {"fid_stats": "{of_32_px}"}, ["--fid_stats", "32 px", "16 px"]),
    ("evaluate", {"kid": True}, ["--kid", "--save_features"]),
    ("evaluate", {"save_images": "{run}"}, ["--save_images", "{run}", "not empty"]),
    ("evaluate", {"save_npz": "{root}/x.txt"}, ["--save_npz", "x.txt", ".npz"]),
    ("sample", {"pretrained_ckpt": "hf://owner/repo"}, ["hf://owner/repo", "HF_HUB_OFFLINE"]),
    ("sample", {"generation_steps": 17}, ["17 steps for 16 tokens"]),
    ("sample", {"classes": [0, 3]}, ["--classes", "3", "0..2"]),
    ("sample", {"classes": ["unicorn"]}, ["--classes", "'unicorn'", "rings"]),
    ("sample", {"class_names": "{two_names}"}, ["--class_names", "2 names", "3 classes"]),
    ("sample", {"out": "{run}"}, ["--output_dir", "{run}", "not empty", "--overwrite"]),
    ("sample", {"out": "{run}", "overwrite": True}, ["{run}", "no sample.json"]),
    ("edit", {"class": None}, ["--class is needed"]),
    ("edit", {"image": "{file}"}, ["{file}"]),
    ("edit", {"image": "{huge}"}, ["{huge}", "2500000000 pixels"]),
    ("edit", {"box": [0, 0, 17, 8]}, ["--box 0 0 17 8", "(16, 16)"]),
    ("edit", {"box": None, "mask": "{mask}"}, ["--mask", "(25, 16)", "(16, 16)"]),
    ("edit", {"box": None, "mask": "{mask}", "image": "{mask}"}, ["nothing to generate"]),
    ("edit", {"box": None, "outpaint": [8, 0, 8, 0]}, ["8 0 8 0", "16x16"]),
    ("edit", {"box": None, "outpaint": [7, 7, 6, 6]}, ["--outpaint", "no whole cell of 4 pixels"]),
    ("edit", {"box": None, "variations": 0.01}, ["nothing to generate"]),
    ("edit", {"lpd_order_file": "{two}"}, ["--lpd_order_file", "not for editing"]),
    ("cache", {"data_path": "{empty}"}, ["{empty}", "no class sub-folders"]),
    ("cache", {"img_size": 18}, ["--img_size 18", "stride 4"]),
    ("cache", {"out": "{file}"}, ["--cached_path", "{file}"]),
    ("cache", {"vqgan_path": "{other_tokenizer}", "out": "{cache}"}, ["{cache}", "tokenizer_digest"]),
    ("tokenizer", {"img_size": 17}, ["--img_size 17", "stride 4"]),
    ("tokenizer", {"out": "{run}"}, ["{run}/checkpoint-last.pth"]),
]


def run(command, changes, places, out):
    """Call the program; {NAME} in the value of a flag is a place, and `out` its output folder."""
    changes = {k: v.format(**places) if isinstance(v, str) else v for k, v in changes.items()}
    words = COMMANDS[command](changes.pop("out", out), **changes)
    return call({"train": "lpd", "evaluate": "lpd"}.get(command, command), *words)


def files(*folders):
    found = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize("command, changes, words", CASES, ids=lambda part: str(part)[:60])
def test_mistake_is_one_line_and_nothing_is_written(command, changes, words, places, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights here"))
    monkeypatch.delenv("LPD_INCEPTION", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no cache here"))
    before = files(places["root"], helpers.workspace())
    outcome = run(command, changes, places, tmp_path / "out")
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert outcome.status == 2 and outcome.out == ""
    for word in words:
        assert word.format(**places) in outcome.err
    assert not list(tmp_path.iterdir()) and files(places["root"], helpers.workspace()) == before


@pytest.mark.parametrize("command", ["train", "cache", "tokenizer", "sample", "edit"])
def test_folder_that_may_not_be_written_is_named(command, places, tmp_path, monkeypatch):
    def refuse(path, *_):  # as the file system would: but root may write anywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    outcome = run(command, {}, places, tmp_path / "locked/out")
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert f"cannot write into {tmp_path}: Permission denied" in outcome.err
