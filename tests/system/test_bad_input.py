"""Mistakes of users: each ends a program in one line that names the flag or the file; nothing is written."""

import errno
import os
from pathlib import Path

import helpers
import numpy as np
import pytest
from helpers import call
from PIL import Image

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
    names = ("absent", "empty", "file", "cut.pth", "code.pth", "two.npy", "of_64.npz", "mask.png")
    paths |= {name.split(".")[0]: root / name for name in names}
    paths["empty"].mkdir()
    paths["file"].write_text("neither a folder\nnor weights\n")
    checkpoint = (run / "checkpoint-last.pth").read_bytes()
    paths["cut"].write_bytes(checkpoint[: len(checkpoint) // 2])
    paths["code"].write_bytes(helpers.hostile_checkpoint(root / "the code ran"))
    np.save(paths["two"], np.tile(np.arange(16, dtype=np.uint16), (2, 1)))
    np.savez(paths["of_64"], mu=np.zeros(64), sigma=np.zeros((64, 64)))
    Image.new("L", (25, 16)).save(paths["mask"])
    return paths


CASES = [  # command, changed flags, words of the error
    ("train", {"model": None}, ["--model is needed"]),
    ("train", {"cached_path": None}, ["--use_cached", "--data_path"]),
    ("train", {"cached_path": "{absent}"}, ["{absent}"]),
    ("train", {"cached_path": None, "data_path": "{empty}", "vqgan_path": "{tokenizer}"}, ["{empty}"]),
    ("train", {"vqgan_path": "{other_tokenizer}"}, ["{cache}", "tokenizer_digest", "--vqgan_path"]),
    ("train", {"img_size": 256}, ["--img_size is 256", "16"]),
    ("train", {"class_num": 4}, ["--class_num is 4", "3"]),
    ("train", {"group_sizes_list": [17]}, ["--group_sizes_list", "17 steps for 16 tokens"]),
    ("train", {"lr_schedule": "cosine", "warmup_epochs": 9}, ["--warmup_epochs 9", "--epochs 4"]),
    ("train", {"epochs": 0}, ["--epochs 0", "18 images", "no step of 4"]),
    ("train", {"sample_freq": 1}, ["--sample_freq", "--vqgan_path"]),
    ("train", {"save_npz": "x.npz"}, ["--save_npz", "--evaluate"]),
    ("train", {"pretrained_ckpt": "{tokenizer}"}, ["{tokenizer}", "no LPD weights"]),
    ("train", {"out": "{file}"}, ["--output_dir", "{file}", "not a folder"]),
    ("train", {"out": "{run}", "lr": 1}, ["{run}", "lr 0.001", "1.0"]),
    ("train", {"resume": "{absent}"}, ["--resume", "{absent}/checkpoint-last.pth"]),
    ("evaluate", {"pretrained_ckpt": None}, ["--pretrained_ckpt is needed"]),
    ("evaluate", {"pretrained_ckpt": "{absent}"}, ["{absent}"]),
    ("evaluate", {"pretrained_ckpt": "{cut}"}, ["{cut}", "damaged"]),
    ("evaluate", {"pretrained_ckpt": "{code}"}, ["{code}", "refused"]),
    ("evaluate", {"model": "lpd_l"}, ["{lpd}", "--model lpd_l", "128", "1024"]),
    ("evaluate", {"vqgan_path": "{other_tokenizer}"}, ["--pretrained_ckpt", "--vqgan_path"]),
    ("evaluate", {"vqgan_path": "{lpd}"}, ["{lpd}", "VQModel"]),
    ("evaluate", {"vqgan_stride": 16}, ["--vqgan_stride is 16", "4"]),
    ("evaluate", {"lpd_order_file": "{two}"}, ["{two}", "2 orders", "6"]),
    ("evaluate", {"group_sizes": [1, 5], "generation_steps": None}, ["group sizes sum to 6", "16"]),
    ("evaluate", {"inception": None}, ["--inception", "LPD_INCEPTION"]),
    ("evaluate", {"fid_stats": "{absent}"}, ["{absent}"]),
    ("evaluate", {"fid_stats": "{of_64}"}, ["--fid_stats", "[64]", "2048"]),
    ("evaluate", {"kid": True}, ["--kid", "--save_features"]),
    ("evaluate", {"save_images": "{run}"}, ["--save_images", "{run}", "not empty"]),
    ("evaluate", {"save_npz": "{root}/x.txt"}, ["--save_npz", "x.txt", ".npz"]),
    ("sample", {"generation_steps": 17}, ["17 steps for 16 tokens"]),
    ("sample", {"classes": [0, 3]}, ["--classes", "3", "0..2"]),
    ("sample", {"classes": ["unicorn"]}, ["--classes", "'unicorn'", "rings"]),
    ("sample", {"class_names": "{file}"}, ["--class_names", "2 names", "3 classes"]),
    ("sample", {"out": "{run}"}, ["--output_dir", "{run}", "not empty", "--overwrite"]),
    ("edit", {"class": None}, ["--class is needed"]),
    ("edit", {"image": "{file}"}, ["{file}"]),
    ("edit", {"box": [0, 0, 17, 8]}, ["--box 0 0 17 8", "(16, 16)"]),
    ("edit", {"box": None, "mask": "{mask}"}, ["--mask", "(25, 16)", "(16, 16)"]),
    ("edit", {"box": None, "mask": "{mask}", "image": "{mask}"}, ["nothing to generate"]),
    ("edit", {"box": None, "outpaint": [8, 0, 8, 0]}, ["8 0 8 0", "16x16"]),
    ("edit", {"box": None, "outpaint": [7, 7, 6, 6]}, ["--outpaint", "a whole cell of 4 pixels"]),
    ("edit", {"box": None, "variations": 0.01}, ["nothing to generate"]),
    ("cache", {"background": "see-through"}, ["--background", "see-through", "not a colour"]),
    ("cache", {"data_path": "{empty}"}, ["{empty}", "no class sub-folders"]),
    ("cache", {"out": "{file}"}, ["--cached_path", "{file}"]),
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
    before = files(places["root"], helpers.workspace())
    outcome = run(command, changes, places, tmp_path / "out")
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert outcome.status == 2
    for word in words:
        assert word.format(**places) in outcome.err
    assert not list(tmp_path.iterdir()) and files(places["root"], helpers.workspace()) == before


@pytest.mark.parametrize("command", list(COMMANDS))
def test_folder_that_may_not_be_written_is_named(command, places, tmp_path, monkeypatch):
    def refuse(path, *_):  # as the file system would: but root may write anywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    outcome = run(command, {}, places, tmp_path / "locked/out")
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert f"cannot write into {tmp_path}: Permission denied" in outcome.err
