"""main_cache: both views of every image are encoded once, through kills, damaged images and full disks."""

import errno
import json
import os
import re
import shutil
import signal

import helpers
import numpy as np
import pytest
import torch
from helpers import CLASSES, SIZE, TRAIN, cache_flags, call, contents, finished, train_flags

import engine.cache
from benchmarks import bench_cache
from engine.cache import encode_views
from models.vqgan import VQModel
from util.images import list_images, load_image
from util.token_cache import CacheWriter, TokenCache

DAMAGED = ("00_bars/3.png", "02_rings/5.png")


@pytest.fixture
def damaged_images(tmp_path):
    """A copy of the shared images in which two files, of the first and the last class, cannot be read."""
    shutil.copytree(helpers.images(), tmp_path / "images")
    for name, damage in zip(DAMAGED, (b"no picture", b""), strict=True):
        (tmp_path / "images/train" / name).write_bytes(damage)
    return tmp_path / "images"


def every_token(cache):
    """int64 [2N, L]: both views of every image."""
    return cache.tokens(np.arange(len(cache)).repeat(2), np.tile([0, 1], len(cache)))


def refused(outcome, *words):
    """The outcome must be wrong usage, reported in one line with these words."""
    assert outcome.status == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert all(str(word) in outcome.err for word in words), outcome.err


def test_cache_describes_itself_and_holds_the_tokens_of_each_image_and_its_mirror_image():
    cache, folder = TokenCache(helpers.token_cache()), list_images(helpers.images() / "train")
    meta, labels = cache.meta, folder.labels.tolist()
    assert (meta.img_size, meta.grid_size, meta.vocab_size, meta.precision) == (SIZE, 4, 64, "fp32")
    assert (meta.class_names, meta.num_shards, cache.labels.tolist()) == (CLASSES, 3, labels)
    model, image = VQModel.load(helpers.tokenizer())[0], load_image(folder.root / folder.names[8], SIZE)
    for view, pixels in ((0, image), (1, image[:, ::-1])):
        expected = encode_views(model, [pixels], torch.device("cpu"))[:, 0]
        assert np.array_equal(cache.tokens([8], [view]), expected)
    assert not np.array_equal(cache.tokens([8], [0]), cache.tokens([8], [1]))


KILL_IN_SECOND_SHARD = """
import os, signal, sys
import util.token_cache
shard_file, kinds = util.token_cache._shard_file, []
def kill_at_the_labels(folder, shard, kind):
    if shard == 1 and kind == "labels.npy" and "tokens.npy" in kinds:
        os.kill(os.getpid(), signal.SIGKILL)
    if shard == 1:
        kinds.append(kind)
    return shard_file(folder, shard, kind)
util.token_cache._shard_file = kill_at_the_labels
import main_cache
main_cache.main(sys.argv[1:])
"""


def test_killed_caching_resumes_with_the_missing_shards(tmp_path, monkeypatch):
    """The kill falls between the tokens and the labels of the second of three shards."""
    folder = tmp_path / "cache"
    assert helpers.python("-c", KILL_IN_SECOND_SHARD, *cache_flags(folder)).status == -signal.SIGKILL
    refused(call("lpd", *train_flags(tmp_path / "run", cached_path=folder)), "1 of 3 shards")
    encoded = []

    def counting(tokenizer, images, device):
        encoded.append(len(images))
        return encode_views(tokenizer, images, device)

    monkeypatch.setattr(engine.cache, "encode_views", counting)
    finished(call("cache", *cache_flags(folder)))
    assert sum(encoded) == TRAIN - 7  # the first shard of 7 was complete
    assert contents(folder) == contents(helpers.token_cache())


def test_complete_cache_is_neither_encoded_again_nor_overwritten_by_another(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    shutil.copytree(helpers.token_cache(), folder)
    monkeypatch.setattr(engine.cache, "encode_views", lambda *_: pytest.fail("encoded again"))
    assert "complete already: 18 images" in finished(call("cache", *cache_flags(folder))).out
    for changes, words in (
        ({"vqgan_path": helpers.tokenizer(seed=1)}, ["tokenizer_digest"]),
        ({"img_size": 20}, ["img_size", "16", "20"]),
        ({"shard_size": 6}, ["shard_size", "7", "6"]),
        ({"data_path": helpers.images() / "val"}, ["num_images", "18", "6"]),
        ({"bf16": True}, ["precision", "fp32", "bf16"]),
    ):
        refused(call("cache", *cache_flags(folder, **changes)), *words, "--cached_path", folder)
    assert contents(folder) == contents(helpers.token_cache())


def test_bf16_caching_reports_how_many_tokens_differ(tmp_path):
    outcome = finished(call("cache", *cache_flags(tmp_path / "cache"), "--bf16"))
    reported = re.search(r"bf16: (.*)% of the tokens of 18 images differ from those of fp32", outcome.out)
    cache, exact = TokenCache(tmp_path / "cache"), TokenCache(helpers.token_cache())
    assert cache.meta.precision == "bf16"
    differing = (every_token(cache) != every_token(exact)).mean()
    assert 0 < differing < 0.2  # bf16 has 8 bits of mantissa; a broken encoder would differ in 63 of 64
    assert float(reported[1]) == pytest.approx(100 * differing, abs=0.006)  # printed with two decimals


def test_full_disk_ends_the_run_in_one_line(tmp_path, monkeypatch):
    """Shards are written by another thread: the error must come back from there."""

    def full(self, shard, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"shard {shard}")

    monkeypatch.setattr(CacheWriter, "write_shard", full)
    outcome = call("cache", *cache_flags(tmp_path / "cache"))
    assert outcome.status == 1 and "error: " in outcome.err and "No space left" in outcome.err
    assert "Traceback" not in outcome.err and not (tmp_path / "cache/meta.json").exists()


def test_unreadable_images_are_named_and_the_same_command_resumes_after_repair(tmp_path, damaged_images):
    flags = cache_flags(tmp_path / "cache", data_path=damaged_images)
    outcome = call("cache", *flags)
    assert outcome.status == 1 and all(name in outcome.err for name in DAMAGED)
    assert "error: 2 unreadable images" in outcome.err and "Traceback" not in outcome.err
    refused(call("lpd", *train_flags(tmp_path / "run", cached_path=tmp_path / "cache")), "1 of 3 shards")
    for name in DAMAGED:
        shutil.copy(helpers.images() / "train" / name, damaged_images / "train" / name)
    finished(call("cache", *flags))
    assert contents(tmp_path / "cache") == contents(helpers.token_cache())


def test_skipped_images_are_listed_and_all_others_are_cached(tmp_path, damaged_images):
    flags = cache_flags(tmp_path / "cache", data_path=damaged_images, skip_unreadable=True)
    outcome = call("cache", *flags)
    assert outcome.status == 1 and "error: 2 unreadable images, left out" in outcome.err
    cache, whole = TokenCache(tmp_path / "cache"), TokenCache(helpers.token_cache())
    kept = [i for i in range(TRAIN) if i not in (3, 17)]
    assert cache.meta.unreadable == DAMAGED and np.array_equal(cache.labels, whole.labels[kept])
    assert np.array_equal(every_token(cache), every_token(whole).reshape(TRAIN, 2, -1)[kept].reshape(32, -1))


def test_mar_folder_is_converted_unchanged_or_refused_by_name(tmp_path):
    cache, names = TokenCache(helpers.token_cache()), list_images(helpers.images() / "train").names
    for i, name in enumerate(names):
        path = (tmp_path / "mar" / name).with_suffix(".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        image, mirrored = cache.tokens([i, i], [0, 1])
        np.savez(path, indices=image, indices_flip=mirrored)
    flags = {"from_mar": tmp_path / "mar", "data_path": None}
    finished(call("cache", *cache_flags(tmp_path / "cache", **flags)))
    converted = TokenCache(tmp_path / "cache")
    assert np.array_equal(converted.labels, cache.labels)
    assert np.array_equal(every_token(converted), every_token(cache))
    outcome = call("cache", *cache_flags(tmp_path / "b", **flags, **{"img_size": 32}))
    refused(outcome, "--from_mar", "16 tokens", "--img_size 32", "64")
    (tmp_path / "mar/02_rings/3.npz").write_bytes(b"PK")
    outcome = call("cache", *cache_flags(tmp_path / "b", **flags))
    error = outcome.err.splitlines()[-1]
    assert outcome.status == 1 and error.startswith("error: ") and "02_rings/3.npz" in error
    assert not (tmp_path / "b/meta.json").exists()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_benchmark_of_the_cache_writes_consistent_figures(tmp_path, device):
    flags = {
        "cache_images": 50, "shard_size": 20, "read_batch": 8, "reads": 5, "n": 1, "encode_images": 6,
        "vqgan_path": helpers.tokenizer(), "data_path": helpers.images(), "img_size": SIZE, "batch_size": 4,
        "bf16": True, "device": device, "num_workers": 0, "output_file": tmp_path / "result.json",
    }
    bench_cache.main(helpers.words_of(flags))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["reading"]["shards"] == 3 and result["reading"]["samples_per_s"] > 0
    share = result["caching"]["caching_images_per_s"] / result["caching"]["encoder_images_per_s"]
    assert result["caching"]["caching_share_of_encoder"] == pytest.approx(share, rel=0.01)  # rounded figures
