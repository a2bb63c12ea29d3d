"""A user's mistakes: each is told in one line that names the flag or the file, before anything is written.

Every case is a command that works but for one change. Damage to token caches is in test_token_cache.py, to
weights in test_checkpoint.py, to order files in test_orders.py; here the programs meet one of each kind.
"""

import errno
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from PIL import Image
from programs import SIZE, TOKENS, call, finished

from engine.checkpoint import load_lpd, load_tokenizer, save_checkpoint, save_weights
from engine.metrics import save_statistics
from models.lpd import LPD, LPDConfig

NONE = object()  # takes a flag out of a command


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the cases name in braces: sound files and damaged ones, by name."""
    root = tmp_path_factory.mktemp("bad")
    run = programs.trained()
    made = {
        "root": root, "absent": root / "absent", "empty": root / "empty", "file": root / "file.txt",
        "run": run, "lpd": run / "lpd.safetensors", "tokenizer": programs.tokenizer(),
        "other_tokenizer": programs.tokenizer(seed=1), "tokenizer_32": programs.tokenizer(vocab_size=32),
        "cache": programs.token_cache(), "images": programs.images(), "inception": programs.inception(),
    }  # fmt: skip
    made["empty"].mkdir()
    made["file"].write_text("no folder, no weights\n")

    def new(name, make):
        made[name.split(".")[0]] = path = root / name
        make(path)

    new("no_images", lambda p: (p / "cats").mkdir(parents=True))
    new("unfinished", lambda p: shutil.copytree(programs.token_cache(), p))
    (made["unfinished"] / "meta.json").unlink()
    (made["unfinished"] / "shard-00002.labels.npy").unlink()
    weights, checkpoint = made["lpd"].read_bytes(), (run / "checkpoint-last.pth").read_bytes()
    new("cut_weights.safetensors", lambda p: p.write_bytes(weights[: len(weights) // 2]))
    new("cut_checkpoint.pth", lambda p: p.write_bytes(checkpoint[: len(checkpoint) // 2]))
    new("hostile.pth", lambda p: p.write_bytes(pickle.dumps({"model": Hostile(root / "ran")}, 2)))
    new("cut_run", lambda p: p.mkdir())
    shutil.copy(made["cut_checkpoint"], made["cut_run"] / "checkpoint-last.pth")
    small = LPD(LPDConfig(grid_size=4, vocab_size=32, num_classes=3, embed_dim=32, depth=1, num_heads=2))
    new("small.safetensors", lambda p: save_weights(p, small))
    new("unnamed.pth", lambda p: save_checkpoint(p, {"model": small.state_dict()}))
    new("weights_run", lambda p: save_checkpoint(p / "checkpoint-last.pth", {"model": small.state_dict()}))
    orders = np.stack([np.random.default_rng(i).permutation(TOKENS) for i in range(6)]).astype(np.uint16)
    new("six_orders.npy", lambda p: np.save(p, orders))
    new("two_orders.npy", lambda p: np.save(p, orders[:2]))
    new("orders_of_9.npy", lambda p: np.save(p, orders[:, :9]))
    new("repeating_orders.npy", lambda p: np.save(p, np.where(orders == 3, 4, orders)))
    mu, sigma = np.zeros(2048), np.zeros((2048, 2048), np.float32)
    new("no_sigma.npz", lambda p: np.savez(p, mu=mu))
    sound = {"mu": mu, "sigma": sigma, "n": 9}
    new("of_32_px.npz", lambda p: save_statistics(p, sound, extractor="inception", img_size=32))
    new("of_other_inception.npz", lambda p: save_statistics(p, sound, extractor_digest="0123"))
    new("of_lite0.npz", lambda p: save_statistics(p, sound, extractor="efficientnet_lite0"))
    new("of_64.npz", lambda p: np.savez(p, mu=mu[:64], sigma=sigma[:64, :64]))
    new("lopsided.npz", lambda p: np.savez(p, mu=mu, sigma=sigma[:64, :64]))
    images = np.zeros((4, SIZE, SIZE, 3), np.uint8)
    new("batch.npz", lambda p: np.savez(p, arr_0=images))
    new("float_batch.npz", lambda p: np.savez(p, arr_0=images / 255))
    new("grey_batch.npz", lambda p: np.savez(p, arr_0=images[..., :1]))
    new("one_image.npz", lambda p: np.savez(p, arr_0=images[:1]))
    new("cut_batch.npz", lambda p: p.write_bytes(made["batch"].read_bytes()[:999]))
    for name, result in (("other_result", '{"seed": 1}'), ("cut_result", '{"seed": ')):
        new(name, lambda p: p.mkdir())
        (made[name] / "lpd_steps4_cfg1_seed0_n6.json").write_text(result)
    model, info = load_lpd(made["lpd"])
    model.head.weight.data[0, 0] = torch.nan
    new("nan_weights.safetensors", lambda p: save_weights(p, model, **info))
    new("vq_folder", lambda p: load_tokenizer(made["tokenizer"]).save_pretrained(p))
    new("vq_folder_cut", lambda p: shutil.copytree(made["vq_folder"], p))
    (made["vq_folder_cut"] / "config.json").write_text('{"config": {')
    new("vq_folder_hostile", lambda p: shutil.copytree(made["vq_folder"], p))
    shutil.copy(made["hostile"], made["vq_folder_hostile"] / "model.safetensors")
    new("two_names.txt", lambda p: p.write_text("cat\ndog\n"))
    picture = programs.images() / "val/02_rings/1.png"
    made["picture"] = picture
    new("cut_picture.png", lambda p: p.write_bytes(picture.read_bytes()[:99]))
    new("huge_picture.png", lambda p: p.write_bytes(huge_png(picture.read_bytes())))
    new("black_mask.png", lambda p: Image.new("L", (SIZE, SIZE)).save(p))
    new("large_mask.png", lambda p: Image.new("L", (SIZE + 9, SIZE), 255).save(p))
    new("wide_picture.png", lambda p: Image.new("RGB", (3 * SIZE, SIZE)).save(p))
    return made


def huge_png(png):
    """A sound PNG file that claims 50,000 x 50,000 pixels."""
    header = b"IHDR" + struct.pack(">II", 50_000, 50_000) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


COMMANDS = {
    "train": ("lpd", {
        "model": "lpd_tiny", "use_cached": True, "cached_path": "{cache}", "output_dir": "{out}", "epochs": 4,
        "batch_size": 4, "lr_schedule": "constant", "warmup_epochs": 0,
    }),
    "images": ("lpd", {
        "model": "lpd_tiny", "data_path": "{images}", "vqgan_path": "{tokenizer}", "img_size": SIZE,
        "output_dir": "{out}", "epochs": 4, "batch_size": 4, "lr_schedule": "constant", "warmup_epochs": 0,
    }),
    "evaluate": ("lpd", {
        "evaluate": True, "pretrained_ckpt": "{lpd}", "vqgan_path": "{tokenizer}", "output_dir": "{out}",
        "num_images": 6,
    }),
    "measured": ("lpd", {
        "evaluate": True, "pretrained_ckpt": "{lpd}", "vqgan_path": "{tokenizer}", "output_dir": "{out}",
        "num_images": 6, "generation_steps": 4, "inception": "{inception}",
    }),
    "stats": ("stats", {"reference_batch": "{batch}", "output_file": "{out}/s.npz"}),
    "cache": ("cache", {
        "img_size": SIZE, "vqgan_path": "{tokenizer}", "data_path": "{images}", "cached_path": "{out}",
    }),
    "tokenizer": ("tokenizer", {
        "data_path": "{images}", "output_dir": "{out}", "img_size": SIZE, "base_width": 32,
        "multipliers": [1, 2], "num_res_blocks": 1, "vocab_size": 64, "epochs": 1,
    }),
    "sample": ("sample", {
        "pretrained_ckpt": "{lpd}", "vqgan_path": "{tokenizer}", "output_dir": "{out}", "num_per_class": 1,
    }),
    "edit": ("edit", {
        "pretrained_ckpt": "{lpd}", "vqgan_path": "{tokenizer}", "output_dir": "{out}", "image": "{picture}",
        "class": "rings", "box": [0, 0, 8, 8], "num": 1,
    }),
}  # fmt: skip

CASES = [  # command, what is changed in it, what the message must have; all end with exit status 2
    # Flags alone.
    ("train", {"modle": "lpd_l"}, ["--modle"]),
    ("train", {"model": NONE}, ["--model is needed"]),
    ("train", {"model": "lpd_huge"}, ["--model", "'lpd_huge'", "lpd_xl"]),
    ("train", {"output_dir": NONE}, ["--output_dir is needed"]),
    ("train", {"epochs": -1}, ["--epochs", "-1", "0"]),
    ("train", {"epochs": "many"}, ["--epochs", "'many'"]),
    ("train", {"epochs": "nan"}, ["--epochs", "nan"]),
    ("train", {"batch_size": 0}, ["--batch_size", "0 is not at least 1"]),
    ("train", {"accum_iter": 0}, ["--accum_iter", "0 is not at least 1"]),
    ("train", {"lr": -0.1}, ["--lr", "-0.1"]),
    ("train", {"label_drop_prob": 1.5}, ["--label_drop_prob", "1.5"]),
    ("train", {"seed": -1}, ["--seed", "-1"]),
    ("train", {"seed": 2**40}, ["--seed", str(2**40), str(2**31 - 1)]),
    ("train", {"epochs": 0}, ["--epochs 0", "no step of 4"]),
    ("train", {"lr_schedule": "cosine", "warmup_epochs": 9}, ["--warmup_epochs 9", "--epochs 4"]),
    ("train", {"lr_schedule": "constant+cosine", "lr_decay_start_epoch": 9},
     ["--lr_decay_start_epoch 9", "--epochs 4"]),
    ("train", {"device": "cuda"}, ["--device cuda", "no CUDA GPU"]),
    ("train", {"device": "tpu"}, ["--device", "'tpu'"]),
    ("train", {"sample_freq": 1}, ["--sample_freq", "--vqgan_path"]),
    ("train", {"group_sizes_list": [8, 40]}, ["--group_sizes_list", "40", "16"]),
    ("train", {"group_sizes_list": [1]}, ["--group_sizes_list", "1 steps", "16"]),
    # What to train on.
    ("train", {"use_cached": NONE}, ["--use_cached", "--data_path"]),
    ("train", {"data_path": "{images}"}, ["--use_cached", "--data_path"]),
    ("train", {"cached_path": NONE}, ["--cached_path is needed"]),
    ("train", {"cached_path": "{absent}"}, ["--cached_path", "{absent}"]),
    ("train", {"cached_path": "{file}"}, ["--cached_path", "{file}"]),
    ("train", {"cached_path": "{empty}"}, ["{empty}", "no token cache"]),
    ("train", {"cached_path": "{unfinished}"}, ["{unfinished}", "2 of 3 shards", "main_cache.py"]),
    ("train", {"img_size": 32}, ["--img_size is 32", "{cache}", "16 px"]),
    ("train", {"class_num": 10}, ["--class_num is 10", "3 classes"]),
    ("train", {"vqgan_vocab_size": 100}, ["--vqgan_vocab_size is 100", "{cache}", "64"]),
    ("train", {"vqgan_path": "{other_tokenizer}"}, ["--vqgan_path", "{other_tokenizer}", "{cache}"]),
    ("train", {"vqgan_path": "{tokenizer}", "vqgan_stride": 16}, ["--vqgan_stride is 16", "4"]),
    ("images", {"vqgan_path": NONE}, ["--vqgan_path is needed"]),
    ("images", {"vqgan_path": "{absent}"}, ["--vqgan_path", "{absent}"]),
    ("images", {"vqgan_path": "{lpd}"}, ["{lpd}", "no tokenizer weights"]),
    ("images", {"vqgan_path": "{hostile}"}, ["{hostile}", "refused"]),
    ("images", {"data_path": "{absent}"}, ["--data_path", "{absent}"]),
    ("images", {"data_path": "{empty}"}, ["{empty}", "no class sub-folders"]),
    ("images", {"data_path": "{no_images}"}, ["{no_images}", "no images"]),
    ("images", {"img_size": 18}, ["--img_size 18", "stride 4"]),
    # Where to write, what to go on with.
    ("train", {"output_dir": "{file}"}, ["--output_dir", "{file}", "not a folder"]),
    ("train", {"output_dir": "{file}/run"}, ["--output_dir", "{file}", "not a folder"]),
    ("train", {"output_dir": "{run}", "lr": 1e-3, "seed": 5}, ["checkpoint-last.pth", "seed 0", "5"]),
    ("train", {"output_dir": "{run}", "lr": 1e-3, "ema": 0.9}, ["checkpoint-last.pth", "ema 0.0", "0.9"]),
    ("train", {"output_dir": "{cut_run}"}, ["{cut_run}/checkpoint-last.pth", "cut short"]),
    ("train", {"output_dir": "{weights_run}"}, ["{weights_run}/checkpoint-last.pth", "--pretrained_ckpt"]),
    ("train", {"resume": "{empty}"}, ["--resume", "{empty}"]),
    ("train", {"pretrained_ckpt": "{absent}"}, ["--pretrained_ckpt", "{absent}"]),
    ("train", {"pretrained_ckpt": "{empty}"}, ["--pretrained_ckpt", "{empty}/checkpoint-last.pth"]),
    ("train", {"pretrained_ckpt": "{hostile}"}, ["{hostile}", "refused"]),
    ("train", {"pretrained_ckpt": "{cut_checkpoint}"}, ["{cut_checkpoint}", "cut short"]),
    ("train", {"pretrained_ckpt": "{small}"}, ["{small}", "weights missing"]),
    # Evaluation.
    ("evaluate", {"pretrained_ckpt": NONE}, ["--pretrained_ckpt is needed"]),
    ("evaluate", {"pretrained_ckpt": "{empty}"}, ["--pretrained_ckpt", "{empty}"]),
    ("evaluate", {"pretrained_ckpt": "{file}"}, ["{file}", "refused"]),
    ("evaluate", {"pretrained_ckpt": "{cut_weights}"}, ["{cut_weights}", "cut short"]),
    ("evaluate", {"pretrained_ckpt": "{hostile}"}, ["{hostile}", "refused"]),
    ("evaluate", {"pretrained_ckpt": "{tokenizer}"}, ["{tokenizer}", "no LPD weights"]),
    ("evaluate", {"pretrained_ckpt": "{unnamed}"}, ["{unnamed}", "--model"]),
    ("evaluate", {"pretrained_ckpt": "{unnamed}", "model": "lpd_tiny"}, ["{unnamed}", "width 32", "192"]),
    ("evaluate", {"pretrained_ckpt": "{small}"}, ["32 codes", "{tokenizer}", "64"]),
    ("evaluate", {"vqgan_path": NONE}, ["--vqgan_path is needed"]),
    ("evaluate", {"vqgan_path": "{other_tokenizer}"}, ["--pretrained_ckpt", "{other_tokenizer}"]),
    ("evaluate", {"vqgan_vocab_size": 16384}, ["--vqgan_vocab_size is 16384", "{tokenizer}", "64"]),
    ("evaluate", {"img_size": 256}, ["--img_size is 256", "16 px"]),
    ("evaluate", {"class_num": 1000}, ["--class_num is 1000", "3 classes"]),
    ("evaluate", {"num_images": 1}, ["--num_images", "1 is not at least 2"]),
    ("evaluate", {"group_sizes": [1, 2, 3]}, ["group sizes sum to 6", "16"]),
    ("evaluate", {"group_sizes": [2, 14]}, ["group sizes must start with 1, not 2"]),
    ("evaluate", {"group_sizes": [1, -1, 16]}, ["group sizes", "-1"]),
    ("evaluate", {"generation_steps": 20}, ["20 steps for 16 tokens"]),
    ("evaluate", {"generation_steps": 3, "group_sizes": [1, 15]}, ["--group_sizes has 2", "is 3"]),
    ("evaluate", {"lpd_order_file": "{absent}"}, ["--lpd_order_file", "{absent}"]),
    ("evaluate", {"lpd_order_file": "{two_orders}"}, ["{two_orders}", "2 orders", "6"]),
    ("evaluate", {"lpd_order_file": "{orders_of_9}"}, ["{orders_of_9}", "9 positions", "16 tokens"]),
    ("evaluate", {"lpd_order_file": "{repeating_orders}"}, ["{repeating_orders}", "row 0", "permutation"]),
    ("evaluate", {"top_p": 2}, ["--top_p", "2 is not in 0..1"]),
    ("evaluate", {"top_k": -3}, ["--top_k", "-3"]),
    ("evaluate", {"temperature": -1}, ["--temperature", "-1"]),
    ("evaluate", {"cfg": "strong"}, ["--cfg", "'strong'"]),
    ("evaluate", {"order": "spiral"}, ["--order", "'spiral'"]),
    ("evaluate", {"fid_stats": "{absent}"}, ["--fid_stats", "{absent}"]),
    ("evaluate", {"fid_stats": "{no_sigma}"}, ["{no_sigma}", "sigma"]),
    ("evaluate", {"fid_stats": "{file}"}, ["{file}", "no statistics"]),
    ("evaluate", {"fid_stats": "{lopsided}"}, ["{lopsided}", "[2048]", "[64, 64]"]),
    ("evaluate", {"inception": "{absent}"}, ["{absent}", "--inception", "LPD_INCEPTION"]),
    ("evaluate", {"inception": "{tokenizer}"}, ["{tokenizer}"]),
    ("evaluate", {"inception": "{unnamed}"}, ["{unnamed}", "Inception"]),
    ("evaluate", {"inception": "{hostile}"}, ["{hostile}", "refused"]),
    ("evaluate", {"pretrained_ckpt": "{nan_weights}"}, ["{nan_weights}", "head.weight is not finite"]),
    ("evaluate", {"output_dir": NONE}, ["--output_dir is needed"]),
    ("evaluate", {"features": "vgg"}, ["--features", "'vgg'"]),
    ("evaluate", {"seeds": [0, 1, 0]}, ["--seeds names one twice: 0 1 0"]),
    ("evaluate", {"sweep_cfg": [2, 2.0]}, ["--sweep_cfg names one twice"]),
    ("evaluate", {"sweep_steps": [4, 40]}, ["40 steps for 16 tokens"]),
    ("evaluate", {"sweep_order": ["spiral"]}, ["--sweep_order", "'spiral'"]),
    ("evaluate", {"sweep_steps": [2, 4], "lpd_order_file": "{two_orders}"},
     ["--lpd_order_file", "--sweep_steps"]),
    ("evaluate", {"sweep_steps": [2, 4], "final_images": 9}, ["--final_images needs --fid_stats"]),
    ("evaluate", {"final_images": 9, "fid_stats": "{of_64}"}, ["--final_images needs", "several settings"]),
    ("evaluate", {"sweep_cfg": [1, 2], "final_images": 6, "fid_stats": "{of_64}"},
     ["--final_images 6", "--num_images 6"]),
    ("evaluate", {"sweep_cfg": [1, 2], "final_images": 9, "fid_stats": "{of_64}",
                  "lpd_order_file": "{six_orders}"}, ["{six_orders}", "6 orders", "9"]),
    ("evaluate", {"seeds": [0, 1], "save_images": "{empty}"}, ["--save_images", "one evaluation"]),
    ("evaluate", {"save_images": "{file}/x"}, ["--save_images", "{file}", "not a folder"]),
    ("evaluate", {"save_npz": "{out}/images.txt"}, ["--save_npz", "images.txt", ".npz"]),
    ("train", {"save_npz": "{out}/images.npz"}, ["--save_npz", "--evaluate"]),
    ("measured", {"fid_stats": "{of_64}"}, ["--fid_stats", "[64]", "2048"]),
    ("measured", {"fid_stats": "{of_32_px}"}, ["--fid_stats", "32 px", "16 px"]),
    ("measured", {"fid_stats": "{of_lite0}"}, ["--fid_stats", "efficientnet_lite0", "inception"]),
    ("measured", {"fid_stats": "{of_other_inception}"}, ["--fid_stats", "inception weights 0123"]),
    ("measured", {"kid": True}, ["--kid", "--fid_stats", "--save_features"]),
    ("measured", {"save_images": "{run}"}, ["--save_images", "{run}", "not empty"]),
    ("measured", {"save_npz": "{no_sigma}"}, ["--save_npz", "{no_sigma}", "exists"]),
    ("measured", {"output_dir": "{other_result}"},
     ["{other_result}", "grid_size None, now it is 4", "--output_dir"]),
    ("measured", {"output_dir": "{cut_result}"}, ["{cut_result}", "no readable JSON"]),
    # Reference statistics.
    ("stats", {"output_file": NONE}, ["--output_file is needed"]),
    ("stats", {"output_file": "{out}/s.pth"}, ["--output_file", ".npz"]),
    ("stats", {"output_file": "{no_sigma}"}, ["--output_file", "{no_sigma}", "--overwrite"]),
    ("stats", {"output_file": "{file}/s.npz"}, ["--output_file", "{file}", "not a folder"]),
    ("stats", {"reference_batch": NONE}, ["--data_path", "--reference_batch"]),
    ("stats", {"data_path": "{images}"}, ["--data_path", "--reference_batch"]),
    ("stats", {"reference_batch": NONE, "data_path": "{absent}"}, ["--data_path", "{absent}"]),
    ("stats", {"reference_batch": NONE, "data_path": "{empty}"}, ["{empty}", "no class sub-folders"]),
    ("stats", {"reference_batch": "{absent}"}, ["--reference_batch", "{absent}"]),
    ("stats", {"reference_batch": "{cut_batch}"}, ["{cut_batch}", "arr_0"]),
    ("stats", {"reference_batch": "{no_sigma}"}, ["{no_sigma}", "no array arr_0"]),
    ("stats", {"reference_batch": "{float_batch}"}, ["--reference_batch", "float64", "uint8"]),
    ("stats", {"reference_batch": "{grey_batch}"}, ["--reference_batch", "[4, 16, 16, 1]"]),
    ("stats", {"reference_batch": "{one_image}"}, ["1 images", "at least 2"]),
    ("stats", {"img_size": 256}, ["--img_size is 256", "{batch}", "16 px"]),
    ("stats", {"inception": "{absent}"}, ["{absent}", "--inception"]),
    # Caching.
    ("cache", {"vqgan_path": NONE}, ["--vqgan_path is needed"]),
    ("cache", {"cached_path": NONE}, ["--cached_path is needed"]),
    ("cache", {"data_path": NONE}, ["--data_path is needed"]),
    ("cache", {"data_path": "{absent}"}, ["--data_path", "{absent}"]),
    ("cache", {"data_path": "{empty}"}, ["{empty}", "no class sub-folders"]),
    ("cache", {"data_path": "{no_images}"}, ["{no_images}", "no images"]),
    ("cache", {"cached_path": "{file}"}, ["--cached_path", "{file}"]),
    ("cache", {"img_size": 18}, ["--img_size 18", "stride 4"]),
    ("cache", {"vqgan_path": "{cut_weights}"}, ["{cut_weights}", "cut short"]),
    ("cache", {"vqgan_path": "{tokenizer_32}", "cached_path": "{cache}"}, ["{cache}", "vocab_size", "32"]),
    ("cache", {"vqgan_vocab_size": 70000}, ["--vqgan_vocab_size", "70000", "65536"]),
    ("cache", {"from_mar": "{absent}"}, ["--from_mar", "{absent}"]),
    ("cache", {"from_mar": "{empty}"}, ["{empty}"]),
    ("cache", {"from_mar": "{empty}", "bf16": True}, ["--bf16", "--from_mar"]),
    # Tokenizer training.
    ("tokenizer", {"data_path": NONE}, ["--data_path is needed"]),
    ("tokenizer", {"data_path": "{empty}"}, ["{empty}", "no class sub-folders"]),
    ("tokenizer", {"output_dir": "{file}"}, ["--output_dir", "{file}"]),
    ("tokenizer", {"img_size": 17}, ["--img_size 17", "stride 2"]),
    ("tokenizer", {"base_width": 48}, ["base_width", "32", "48"]),
    ("tokenizer", {"vocab_size": 70000}, ["--vocab_size", "70000", "65536"]),
    ("tokenizer", {"multipliers": [1, 0]}, ["--multipliers", "0 is not at least 1"]),
    ("tokenizer", {"output_dir": "{cut_run}"}, ["{cut_run}/checkpoint-last.pth", "cut short"]),
    ("tokenizer", {"output_dir": "{run}"}, ["{run}/checkpoint-last.pth"]),
    ("tokenizer", {"output_dir": "{weights_run}"}, ["{weights_run}/checkpoint-last.pth"]),
    # Sampling.
    ("sample", {"pretrained_ckpt": NONE}, ["--pretrained_ckpt is needed"]),
    ("sample", {"pretrained_ckpt": "{absent}"}, ["--pretrained_ckpt", "{absent}"]),
    ("sample", {"pretrained_ckpt": "{unnamed}", "model": "lpd_huge"}, ["--model", "lpd_huge"]),
    ("sample", {"vqgan_path": "{tokenizer_32}"}, ["--pretrained_ckpt", "{tokenizer_32}"]),
    # Names on the hub, which is offline and whose cache is empty, and folders like a repository.
    ("sample", {"pretrained_ckpt": "hf://o/repo"}, ["--pretrained_ckpt: hf://o/repo", "HF_HUB_OFFLINE"]),
    ("sample", {"lpd_order_file": "hf://owner/repo@v1/o.npy"}, ["--lpd_order_file: hf://owner/repo@v1/o.npy"]),
    ("sample", {"lpd_order_file": "{absent}"}, ["--lpd_order_file", "{absent}"]),
    ("sample", {"lpd_order_file": "hf://owner/repo"}, ["--lpd_order_file", "hf://owner/repo", ".npy"]),
    ("sample", {"vqgan_path": "hf://owner/repo/vq.pkl"}, ["--vqgan_path: hf://owner/repo/vq.pkl", ".pth"]),
    ("cache", {"vqgan_path": "hf://owner"}, ["--vqgan_path", "hf://owner"]),
    ("cache", {"vqgan_path": "hf://owner/repo"}, ["--vqgan_path: hf://owner/repo", "HF_HUB_OFFLINE"]),
    ("cache", {"vqgan_path": "{empty}"}, ["--vqgan_path", "{empty}/checkpoint-last.pth"]),
    ("cache", {"vqgan_path": "{vq_folder_cut}"}, ["{vq_folder_cut}/config.json", "no readable JSON"]),
    ("cache", {"vqgan_path": "{vq_folder_hostile}"}, ["{vq_folder_hostile}/model.safetensors", "cut short"]),
    ("train", {"pretrained_ckpt": "hf://owner/repo"}, ["--pretrained_ckpt: hf://owner/repo"]),
    ("train", {"pretrained_ckpt": "hf://owner/repo", "lr_schedule": "cosine", "warmup_epochs": 9},
     ["--warmup_epochs 9"]),
    ("evaluate", {"pretrained_ckpt": "{vq_folder}"}, ["{vq_folder}/model.safetensors", "no LPD weights"]),
    ("evaluate", {"vqgan_path": "hf://a--b/repo"}, ["--vqgan_path", "hf://a--b/repo"]),
    ("sample", {"classes": [0, 3]}, ["--classes", "3", "0..2"]),
    ("sample", {"classes": ["unicorn"]}, ["--classes", "'unicorn'", "rings"]),
    ("sample", {"class_names": "{two_names}"}, ["--class_names", "2 names", "3 classes"]),
    ("sample", {"num_per_class": 0}, ["--num_per_class", "0 is not at least 1"]),
    ("sample", {"compare_steps": 17}, ["17 steps for 16 tokens"]),
    ("sample", {"lpd_order_file": "{two_orders}"}, ["{two_orders}", "2 orders", "3"]),
    ("sample", {"output_dir": "{run}"}, ["--output_dir", "{run}", "not empty", "--overwrite"]),
    ("sample", {"output_dir": "{run}", "overwrite": True}, ["--output_dir", "{run}", "not overwritten"]),
    ("sample", {"output_dir": "{file}"}, ["--output_dir", "{file}", "not a folder"]),
    # Editing.
    ("edit", {"image": NONE}, ["--image is needed"]),
    ("edit", {"class": NONE}, ["--class is needed"]),
    ("edit", {"box": NONE}, ["--mask", "--box", "--outpaint", "--variations"]),
    ("edit", {"variations": 0.5}, ["--box", "--variations"]),
    ("edit", {"image": "{absent}"}, ["--image", "{absent}"]),
    ("edit", {"image": "{file}"}, ["--image", "{file}"]),
    ("edit", {"image": "{cut_picture}"}, ["--image", "{cut_picture}"]),
    ("edit", {"image": "{huge_picture}"}, ["--image", "{huge_picture}", "2500000000 pixels"]),
    ("edit", {"class": "unicorn"}, ["--class", "'unicorn'", "rings"]),
    ("edit", {"class": 3}, ["--class", "3", "0..2"]),
    ("edit", {"num": 0}, ["--num", "0 is not at least 1"]),
    ("edit", {"paste": -1}, ["--paste", "-1 is not at least 0"]),
    ("edit", {"box": [0, 0, 17, 8]}, ["--box 0 0 17 8", "16x16"]),
    ("edit", {"box": [4, 8, 12, 8]}, ["--box 4 8 12 8", "Y0 < Y1"]),
    ("edit", {"box": [-1, 0, 8, 8]}, ["--box", "-1"]),
    ("edit", {"box": [0, 0, 8]}, ["--box", "expected 4"]),
    ("edit", {"image": "{wide_picture}"}, ["outside the centre of 16 pixels"]),
    ("edit", {"box": NONE, "mask": "{absent}"}, ["--mask", "{absent}"]),
    ("edit", {"box": NONE, "mask": "{file}"}, ["--mask", "{file}"]),
    ("edit", {"box": NONE, "mask": "{large_mask}"}, ["--mask is 25x16", "--image is 16x16"]),
    ("edit", {"box": NONE, "mask": "{black_mask}"}, ["--mask {black_mask}", "no white pixel"]),
    ("edit", {"box": NONE, "outpaint": [0, 0, 0, 0]}, ["--outpaint 0 0 0 0", "nothing to generate"]),
    ("edit", {"box": NONE, "outpaint": [8, 0, 8, 0]}, ["--outpaint 8 0 8 0", "16x16"]),
    ("edit", {"box": NONE, "outpaint": [7, 7, 6, 6]}, ["--outpaint", "no whole cell of 4 pixels"]),
    ("edit", {"box": NONE, "variations": 0.01}, ["--variations 0.01 of 16 cells"]),
    ("edit", {"box": NONE, "variations": 1.5}, ["--variations", "1.5 is not in 0..1"]),
    ("edit", {"generation_steps": 1}, ["1 steps for 4 tokens"]),
    ("edit", {"group_sizes": [1, 15]}, ["group sizes sum to 16", "4"]),
    ("edit", {"lpd_order_file": "{six_orders}"}, ["--lpd_order_file", "not for editing"]),
    ("edit", {"vqgan_path": "{other_tokenizer}"}, ["--pretrained_ckpt", "{other_tokenizer}"]),
    ("edit", {"img_size": 256}, ["--img_size is 256", "16 px"]),
    ("edit", {"output_dir": "{run}"}, ["--output_dir", "{run}", "not empty", "--overwrite"]),
    ("edit", {"output_dir": "{run}", "overwrite": True}, ["--output_dir", "{run}", "no edit.json"]),
]  # fmt: skip


def command_line(command, changes, places):
    """The program and the words of a command with changes."""
    program, flags = COMMANDS[command]
    words = []
    for name, value in {**flags, "device": "cpu", "num_workers": 0, **changes}.items():
        if value is NONE:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(v).format(**places) for v in values)]
    return program, words


def files(*folders):
    """Path, size and time of change of every file."""
    found = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def name_of(case):
    command, changes, _ = case
    return f"{command} " + " ".join(
        f"{k}={'none' if v is NONE else v}".replace("{", "").replace("}", "") for k, v in changes.items()
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_mistake_is_told_in_one_line_and_nothing_is_written(case, places, tmp_path, monkeypatch):
    command, changes, words = case
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights here"))
    monkeypatch.delenv("LPD_INCEPTION", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no cache here"))
    places = {**places, "out": tmp_path / "out"}
    program, argv = command_line(command, changes, places)
    before = files(places["root"], programs.workspace())
    outcome = call(program, *argv)
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert outcome.status == 2 and outcome.out == ""
    for word in words:
        assert word.format(**places) in outcome.err
    assert not list(tmp_path.iterdir())
    assert files(places["root"], programs.workspace()) == before


@pytest.mark.parametrize("command", ["train", "images", "cache", "tokenizer", "sample", "edit"])
def test_command_of_the_table_works_when_nothing_is_changed(command, places, tmp_path):
    """Otherwise a case could fail for another reason than its change."""
    quick = {"epochs": 0.2} if command in ("train", "images", "tokenizer") else {}
    program, argv = command_line(command, quick, {**places, "out": tmp_path / "out"})
    finished(call(program, *argv))
    assert any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("command", ["train", "cache", "tokenizer", "sample", "edit"])
def test_folder_that_may_not_be_written_is_named(command, places, tmp_path, monkeypatch):
    """The refusal of the file system is played: root may write anywhere."""

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    program, argv = command_line(command, {}, {**places, "out": tmp_path / "locked/out"})
    outcome = call(program, *argv)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert f"cannot write into {tmp_path}: Permission denied" in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["images", "tokenizer"])
def test_unreadable_image_ends_training_by_its_name(command, places, tmp_path):
    """Seen only when it is read, so this is a failure (exit status 1), not wrong usage."""
    shutil.copytree(programs.images(), tmp_path / "images")
    (tmp_path / "images/train/02_rings/4.png").write_bytes(b"no picture")
    changes = {"data_path": tmp_path / "images", "epochs": 1}
    program, argv = command_line(command, changes, {**places, "out": tmp_path / "out"})
    outcome = call(program, *argv)
    last = outcome.err.splitlines()[-1]
    assert outcome.status == 1 and "Traceback" not in outcome.err
    assert last.startswith("error: ") and "02_rings/4.png" in last
