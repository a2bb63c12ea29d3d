"""The token cache: what it stores, how it is made through kills and damaged images, what is refused."""

import errno
import json
import os
import re
import shutil
import signal

import helpers
import numpy as np
import processes
import pytest
import torch
from helpers import SIZE, TRAIN, VAL, cache_flags, call, contents
from processes import finished

import engine.cache
from engine.cache import encode_views
from models.vqgan import VQModel
from util.folders import list_images, split_folder
from util.images import load_image
from util.token_cache import CacheWriter, DamagedCache, MarCache, TokenCache, open_token_cache, split_cache

# The format.


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 50000, (5, 2, 4))


@pytest.fixture
def small_cache(tmp_path, tokens):
    """Five images of two classes in shards of 2, 2 and 1."""
    return helpers.write_cache(tmp_path / "cache", tokens)


def test_tokens_are_read_back_across_shards_in_any_order(small_cache, tokens):
    cache, rng = TokenCache(small_cache), np.random.default_rng(1)
    for n in (0, 1, 5, 200):
        indices, views = rng.integers(0, 5, n), rng.integers(0, 2, n)
        found = cache.tokens(indices, views)
        assert np.array_equal(found, tokens[indices, views]) and found.dtype == np.int64
    assert cache.labels.tolist() == [0, 0, 1, 1, 1] and len(cache) == 5
    assert np.load(small_cache / "shard-00000.tokens.npy").dtype == np.uint16  # 49,999 is not negative
    for index, view in ((5, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(ValueError, match="invalid entry"):
            cache.tokens([0, index], [0, view])


# Made by main_cache.


def refused(outcome, *words):
    """The outcome must be wrong usage, in one line with these words."""
    assert outcome.status == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert not [word for word in words if str(word) not in outcome.err], outcome.err


def test_cache_has_the_tokenizers_tokens_of_each_image_and_its_mirror_image():
    cache, folder = TokenCache(helpers.token_cache()), list_images(helpers.images() / "train")
    assert (cache.meta.img_size, cache.meta.grid_size, cache.meta.vocab_size) == (SIZE, 4, 64)
    assert (len(cache), cache.meta.num_shards, cache.meta.class_names) == (TRAIN, 3, helpers.CLASSES)
    assert np.array_equal(cache.labels, folder.labels)
    model, _ = VQModel.load(helpers.tokenizer())
    image = load_image(folder.file(8), SIZE)
    for view, pixels in ((0, image), (1, image[:, ::-1])):
        expected = encode_views(model, [pixels], torch.device("cpu"))[:, 0]
        assert np.array_equal(cache.tokens([8], [view]), expected)


def test_cache_of_train_and_val_folders_holds_out_those_of_val():
    train, val = split_cache(TokenCache(helpers.token_cache()))
    expected = list_images(helpers.images() / "val")
    assert len(train) == TRAIN and val.names == list(expected.names)
    assert np.array_equal(val.labels, expected.labels)


def test_cache_of_one_folder_is_split_as_the_folder_is(tmp_path):
    """Nothing is held out of the published reading unasked."""
    data = {"data_path": helpers.images() / "train"}
    finished(call("cache", *cache_flags(tmp_path / "cache", **data)))
    cache = TokenCache(tmp_path / "cache")
    assert cache.meta.reading == "viewer on #ffffff" and not (tmp_path / "cache/val").exists()
    for found, expected in zip(split_cache(cache, 0.3), split_folder(data["data_path"], 0.3), strict=True):
        assert 0 < len(found) < TRAIN and tuple(found.names) == expected.names
        assert np.array_equal(found.labels, expected.labels)
        places, views = [cache.names.index(name) for name in found.names], np.arange(len(found)) % 2
        assert np.array_equal(found.tokens(np.arange(len(found)), views), cache.tokens(places, views))
    finished(call("cache", *cache_flags(tmp_path / "published", **data, published_reading=True)))
    published = TokenCache(tmp_path / "published")
    assert published.meta.reading == "published" and split_cache(published) == (published, None)
    assert len(split_cache(published, 0.3)[1]) > 0


def test_two_processes_make_the_same_cache_as_one(tmp_path):
    outcome = finished(processes.torchrun(2, "cache", *cache_flags(tmp_path / "cache")))
    assert outcome.out.count(f"{TRAIN} images, 3 shards") == 1
    assert contents(tmp_path / "cache") == contents(helpers.token_cache())


KILL_IN_SECOND_SHARD = """
import os, signal, sys
import main_cache
import util.token_cache
plain = util.token_cache._shard_file
def shard_file(folder, shard, kind):
    if kind == "labels.npy" and plain(folder, 1, "tokens.npy").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(folder, shard, kind)
util.token_cache._shard_file = shard_file
main_cache.main(sys.argv[1:])
"""


def test_killed_run_started_again_encodes_only_the_missing_shards(tmp_path, monkeypatch):
    """The kill falls between the tokens and the labels of the second of three shards."""
    killed = processes.forked("-c", KILL_IN_SECOND_SHARD, *cache_flags(tmp_path / "cache"))
    assert killed.status == -signal.SIGKILL
    train = helpers.train_flags(tmp_path / "run", cached_path=tmp_path / "cache")
    refused(call("lpd", *train), "1 of 3 shards")
    encoded = []

    def counting(tokenizer, images, device):
        encoded.append(len(images))
        return encode_views(tokenizer, images, device)

    monkeypatch.setattr(engine.cache, "encode_views", counting)
    finished(call("cache", *cache_flags(tmp_path / "cache")))
    assert sum(encoded) == TRAIN - 7 + VAL  # the first shard of 7 was complete
    assert contents(tmp_path / "cache") == contents(helpers.token_cache())
    again = finished(call("cache", *cache_flags(tmp_path / "cache")))
    assert "complete already: 18 images" in again.out


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"vqgan_path": lambda: helpers.tokenizer(seed=1)}, ["tokenizer_digest"]),
        ({"img_size": lambda: 20}, ["img_size", "16", "20"]),
        ({"data_path": lambda: helpers.images() / "val"}, ["num_images", "18", "6"]),
        ({"bf16": lambda: True}, ["precision", "fp32", "bf16"]),
        ({"published_reading": lambda: True}, ["reading", "published", "viewer on #ffffff"]),
    ],
)
def test_cache_of_something_else_is_refused_and_left_unchanged(tmp_path, changes, words):
    shutil.copytree(helpers.token_cache(), tmp_path / "cache")
    changes = {name: value() for name, value in changes.items()}
    outcome = call("cache", *cache_flags(tmp_path / "cache", **changes))
    refused(outcome, *words, "--cached_path", tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(helpers.token_cache())


def test_bf16_cache_records_it_and_reports_how_many_tokens_differ(tmp_path):
    outcome = finished(call("cache", *cache_flags(tmp_path / "cache", bf16=True)))
    reported = re.search(r"bf16: (.*)% of the tokens of 18 images differ from those of fp32", outcome.out)
    cache, whole = TokenCache(tmp_path / "cache"), TokenCache(helpers.token_cache())
    assert (cache.meta.precision, whole.meta.precision) == ("bf16", "fp32")
    everything = np.arange(TRAIN).repeat(2), np.tile([0, 1], TRAIN)
    differing = (cache.tokens(*everything) != whole.tokens(*everything)).mean()
    assert 0 < differing < 0.2  # bf16 has 8 bits of mantissa; a broken encoder would differ in 63 of 64
    assert float(reported[1]) == pytest.approx(100 * differing, abs=0.006)  # printed with two decimals


def test_full_disk_ends_the_run_in_one_line(tmp_path, monkeypatch):
    """Shards are written in a thread of their own, which must not swallow the error."""

    def full(self, shard, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"shard {shard}")

    monkeypatch.setattr(CacheWriter, "write_shard", full)
    outcome = call("cache", *cache_flags(tmp_path / "cache"))
    assert outcome.status == 1 and outcome.err.splitlines()[-1].startswith("error: [Errno 28] No space left")
    assert not (tmp_path / "cache/meta.json").exists()


UNREADABLE = ("00_bars/3.png", "02_rings/5.png")


@pytest.fixture
def damaged_images(tmp_path):
    """A copy of the shared images in which two files cannot be read."""
    shutil.copytree(helpers.images(), tmp_path / "images")
    for name, content in zip(UNREADABLE, (b"no picture", b""), strict=True):
        (tmp_path / "images/train" / name).write_bytes(content)
    return tmp_path / "images"


def test_unreadable_images_are_named_and_repairing_them_completes_the_cache(tmp_path, damaged_images):
    flags = cache_flags(tmp_path / "cache", data_path=damaged_images)
    outcome = call("cache", *flags)
    assert outcome.status == 1 and "Traceback" not in outcome.err
    assert all(word in outcome.err for word in (*UNREADABLE, "error: 2 unreadable images"))
    assert not (tmp_path / "cache/meta.json").exists()
    for name in UNREADABLE:
        shutil.copy(helpers.images() / "train" / name, damaged_images / "train" / name)
    finished(call("cache", *flags))
    assert contents(tmp_path / "cache") == contents(helpers.token_cache())


def test_images_skipped_on_request_are_listed_and_all_others_cached(tmp_path, damaged_images):
    flags = cache_flags(tmp_path / "cache", data_path=damaged_images, skip_unreadable=True)
    outcome = call("cache", *flags)
    assert outcome.status == 0 and "2 unreadable images left out" in outcome.err
    cache, whole = TokenCache(tmp_path / "cache"), TokenCache(helpers.token_cache())
    assert cache.meta.unreadable == UNREADABLE
    kept, ones = [i for i in range(TRAIN) if i not in (3, 17)], np.ones(16, int)
    assert np.array_equal(cache.labels, whole.labels[kept])
    assert np.array_equal(cache.tokens(np.arange(16), ones), whole.tokens(kept, ones))


def test_names_of_any_kind_are_kept(tmp_path):
    """File names are bytes; those that are not UTF-8 are shown with escapes."""
    helpers.write_images(tmp_path / "images", 2)
    class_name = os.fsdecode(b"caf\xe9 [ {big} ]")
    (tmp_path / "images/01_noise").rename(tmp_path / "images" / class_name)
    data = {"data_path": tmp_path / "images"}
    python = (processes.REPO / "main_cache.py", *cache_flags(tmp_path / "cache", **data))
    assert "6 images" in finished(processes.forked(*python)).out
    assert "complete already" in finished(call("cache", *cache_flags(tmp_path / "cache", **data))).out
    train = helpers.train_flags(tmp_path / "run", cached_path=tmp_path / "cache", epochs=1, val_fraction=0.4)
    finished(call("lpd", *train))
    sample = {"pretrained_ckpt": tmp_path / "run", "classes": [class_name]}
    finished(call("sample", *helpers.sample_flags(tmp_path / "samples", **sample)))
    assert (tmp_path / "samples/images_4_steps" / class_name).is_dir()


def test_shard_truncated_in_training_ends_it_in_one_line(tmp_path):
    """Without a look at its size reading it would end the process by a signal, or give zeros."""
    shutil.copytree(helpers.token_cache(), tmp_path / "cache")
    cache = TokenCache(tmp_path / "cache")
    os.truncate(tmp_path / "cache/shard-00001.tokens.npy", 0)
    assert cache.tokens([0], [0]).shape == (1, 16)
    with pytest.raises(DamagedCache, match="00001.tokens.npy has changed its size"):
        cache.tokens([0, 8], [0, 0])


def test_val_of_another_tokenizer_is_refused(tmp_path):
    shutil.copytree(helpers.token_cache(), tmp_path / "cache")
    edit_meta(tmp_path / "cache/val", tokenizer_digest="0123")
    refused(call("lpd", *helpers.train_flags(tmp_path / "run", cached_path=tmp_path / "cache")), "cache/val",
            "tokenizer_digest 0123", "make")


# The MAR style.


@pytest.fixture
def mar_folder(tmp_path):
    """The shared token cache as a MAR-style folder: one .npz for each image."""
    cache = TokenCache(helpers.token_cache())
    for i, name in enumerate(list_images(helpers.images() / "train").names):
        path = (tmp_path / "mar" / name).with_suffix(".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        both = cache.tokens([i, i], [0, 1]).astype(np.int32)
        np.savez(path, indices=both[0], indices_flip=both[1])
    return tmp_path / "mar"


def mar_flags(mar_folder, cached_path, **changes):
    flags = {"from_mar": mar_folder, "vqgan_path": helpers.tokenizer(), "img_size": SIZE, "shard_size": 7}
    return helpers.words_of({**flags, "cached_path": cached_path, **changes})


def test_mar_folder_is_read_and_converted_as_the_same_tokens_and_labels(tmp_path, mar_folder):
    (mar_folder / ".ipynb_checkpoints").mkdir()
    (mar_folder / "00").mkdir()
    finished(call("cache", *mar_flags(mar_folder, tmp_path / "cache")))
    mar = open_token_cache(mar_folder, vocab_size=64, img_size=SIZE)
    assert isinstance(mar, MarCache)
    expected, indices, views = TokenCache(helpers.token_cache()), np.arange(TRAIN)[::-1], np.arange(TRAIN) % 2
    for cache in (mar, open_token_cache(tmp_path / "cache")):
        assert len(cache) == TRAIN and cache.meta.class_names == expected.meta.class_names
        assert np.array_equal(cache.labels, expected.labels)
        assert np.array_equal(cache.tokens(indices, views), expected.tokens(indices, views))


@pytest.mark.parametrize(
    "arrays",
    [{"indices": np.zeros(16, int)}, {"indices": np.full(16, 64), "indices_flip": np.zeros(16, int)}],
    ids=["one view", "token too large"],
)
def test_damaged_mar_file_ends_the_conversion_by_name(tmp_path, mar_folder, arrays):
    np.savez(mar_folder / "02_rings/3.npz", **arrays)
    outcome = call("cache", *mar_flags(mar_folder, tmp_path / "cache"))
    assert outcome.status == 1 and "Traceback" not in outcome.err
    assert re.search(r"^error: .*02_rings/3.npz", outcome.err.splitlines()[-1])
    assert not (tmp_path / "cache/meta.json").exists()


def test_mar_folder_of_another_grid_is_refused(tmp_path, mar_folder):
    flags = mar_flags(mar_folder, tmp_path / "cache", img_size=32)
    refused(call("cache", *flags), "--img_size is 32, the weights or data have 16")


# What is refused.


def edit_meta(folder, **changes):
    values = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**values, **changes}))


DAMAGE = {
    "tokens truncated": (lambda f: os.truncate(f / "shard-00001.tokens.npy", 140), "shard-00001.tokens.npy"),
    "pickled labels": (
        lambda f: np.save(f / "shard-00000.labels.npy", np.array([print, 1], object)), "00000.labels.npy"),
    "tokens of another grid": (
        lambda f: np.save(f / "shard-00000.tokens.npy", np.zeros((2, 2, 9), np.uint16)), r"\[2, 2, 9\]"),
    "an image too few": (
        lambda f: np.save(f / "shard-00000.tokens.npy", np.zeros((1, 2, 4), np.uint16)), "4 images"),
    "label too large": (
        lambda f: np.save(f / "shard-00000.labels.npy", np.array([0, 2], np.int32)), "outside 0..1"),
    "meta truncated": (lambda f: os.truncate(f / "meta.json", 99), "meta.json"),
    "meta of another format": (lambda f: edit_meta(f, format=2), "format 2"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_refused_by_name(small_cache, damage):
    harm, message = DAMAGE[damage]
    harm(small_cache)
    with pytest.raises(ValueError, match=message) as error:
        open_token_cache(small_cache)
    assert str(small_cache) in str(error.value) and "\n" not in str(error.value)


def test_token_outside_the_vocabulary_ends_training_by_name(tmp_path, small_cache):
    edit_meta(small_cache, vocab_size=16)
    outcome = call("lpd", *helpers.train_flags(tmp_path / "run", cached_path=small_cache))
    assert outcome.status == 1 and "Traceback" not in outcome.err
    assert re.search(f"^error: {small_cache}: token .* 16 codes", outcome.err.splitlines()[-1])


def test_folder_without_a_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a token cache"):
        open_token_cache(tmp_path)
