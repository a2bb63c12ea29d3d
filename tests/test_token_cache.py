"""The token cache: what it holds, how it is made through kills and damaged images, what is refused."""

import errno
import json
import os
import re
import shutil
import signal

import numpy as np
import programs
import pytest
import torch
from PIL import Image
from programs import SIZE, TOKENS, TRAIN, cache_flags, call, contents, finished

import engine.cache
from engine.cache import encode_views
from engine.checkpoint import load_tokenizer
from util.images import list_images, load_image
from util.token_cache import (
    CacheMeta,
    CacheWriter,
    DamagedCache,
    MarCache,
    TokenCache,
    names_digest,
    open_token_cache,
)

META = CacheMeta(
    img_size=8, grid_size=2, vocab_size=50000, class_names=("cat", "dog"), tokenizer_digest="0123",
    num_images=5, shard_size=2, names_digest=names_digest([f"{i}.png" for i in range(5)]),
)  # fmt: skip
NAMES = [f"{i}.png" for i in range(5)]
LABELS = np.array([0, 0, 1, 1, 1])


def write_cache(folder, tokens):
    """A complete token cache of tokens [5, 2, 4], in shards of 2, 2 and 1 images."""
    writer = CacheWriter(folder, META)
    writer.begin()
    for shard in range(META.num_shards):
        mine = list(writer.shard_range(shard))
        writer.write_shard(shard, tokens[mine], LABELS[mine], [NAMES[i] for i in mine])
    writer.finish(NAMES)
    return folder


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 50000, (5, 2, 4))


@pytest.fixture
def small_cache(tmp_path, tokens):
    return write_cache(tmp_path / "cache", tokens)


@pytest.fixture
def damaged_images(tmp_path):
    """A copy of the shared images in which two files, of the first and the last class, cannot be read."""
    root = tmp_path / "images"
    shutil.copytree(programs.images(), root)
    (root / "train/00_bars/3.png").write_bytes(b"no picture")
    (root / "train/02_rings/5.png").write_bytes(b"")
    return root


@pytest.fixture
def mar_folder(tmp_path):
    """The shared token cache as a MAR-style folder: an .npz for each image."""
    cache = TokenCache(programs.token_cache())
    names = list_images(programs.images() / "train").names
    for i, name in enumerate(names):
        path = (tmp_path / "mar" / name).with_suffix(".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        both = [cache.tokens([i], [view])[0].astype(np.int32) for view in (0, 1)]
        np.savez(path, indices=both[0], indices_flip=both[1])
    return tmp_path / "mar"


def refused(outcome, *words):
    """The outcome must be wrong usage told in one line that has the words."""
    assert outcome.status == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert str(word) in outcome.err
    return outcome


# The format.


def test_what_is_written_is_read_back_in_any_order_of_indices(small_cache, tokens):
    cache = TokenCache(small_cache)
    indices, views = np.array([4, 0, 3, 3, 1]), np.array([0, 1, 1, 0, 0])
    assert np.array_equal(cache.tokens(indices, views), tokens[indices, views])
    assert cache.tokens(indices, views).dtype == np.int64  # uint16 on disk: 49,999 must not become negative
    assert cache.labels.tolist() == LABELS.tolist() and len(cache) == 5
    assert cache.meta == META


def test_tokens_lie_on_disk_as_two_bytes_each(small_cache, tokens):
    shards = [np.load(small_cache / f"shard-0000{s}.tokens.npy") for s in range(3)]
    assert all(shard.dtype == np.uint16 for shard in shards)
    assert np.array_equal(np.concatenate(shards), tokens)


def test_many_shards_in_any_order_are_read_as_one_array(small_cache, tokens):
    cache, rng = TokenCache(small_cache), np.random.default_rng(1)
    for n in (0, 1, 5, 200):
        indices, views = rng.integers(0, 5, n), rng.integers(0, 2, n)
        assert np.array_equal(cache.tokens(indices, views), tokens[indices, views])


@pytest.mark.parametrize("index,view", [(5, 0), (-1, 0), (0, 2), (0, -1)])
def test_index_or_view_out_of_range_is_refused(small_cache, index, view):
    with pytest.raises(IndexError, match="outside 0.."):
        TokenCache(small_cache).tokens([0, index], [0, view])


def test_odd_names_of_images_are_kept_and_make_no_folders(tmp_path, tokens):
    odd = ["a/b c.png", "ü.png", "\n.png", "..png", "a/..b/x"]
    writer = CacheWriter(tmp_path / "cache", META)
    writer.begin()
    for shard in range(META.num_shards):
        mine = list(writer.shard_range(shard))
        writer.write_shard(shard, tokens[mine], LABELS[mine], [odd[i] for i in mine])
    writer.finish(odd)
    assert TokenCache(tmp_path / "cache").meta.unreadable == ()  # all were found again
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/passwd", "a\0b", "", 3, None, ["x"]])
def test_name_that_leaves_the_folder_is_refused_by_writer_and_reader(tmp_path, tokens, name):
    with pytest.raises(ValueError, match="a name that is no text|leaves its folder"):
        CacheWriter(tmp_path / "new", META).write_shard(0, tokens[:2], LABELS[:2], ["x.png", name])
    assert not (tmp_path / "new").exists()
    folder = write_cache(tmp_path / "cache", tokens)
    (folder / "shard-00001.names.json").write_text(json.dumps(["x.png", name]))
    with pytest.raises(DamagedCache, match="shard-00001.names.json"):
        CacheWriter(folder, META).finish(NAMES)
    _edit_meta(folder, unreadable=[name])
    with pytest.raises(ValueError, match="meta.json"):
        TokenCache(folder)


# Made by main_cache.


def test_both_views_are_the_tokenizers_own_tokens_of_the_image_and_its_mirror_image():
    cache = TokenCache(programs.token_cache())
    folder = list_images(programs.images() / "train")
    model = load_tokenizer(programs.tokenizer())
    image = load_image(folder.root / folder.names[8], SIZE)
    for view, pixels in ((0, image), (1, image[:, ::-1])):
        expected = encode_views(model, [pixels], torch.device("cpu"))[:, 0]
        assert np.array_equal(cache.tokens([8], [view]), expected)
    assert not np.array_equal(cache.tokens([8], [0]), cache.tokens([8], [1]))


def test_cache_describes_itself():
    cache = TokenCache(programs.token_cache())
    meta = cache.meta
    assert (meta.img_size, meta.grid_size, meta.vocab_size) == (SIZE, 4, 64)
    assert meta.class_names == programs.CLASSES and meta.unreadable == ()
    assert (meta.num_images, meta.num_shards, meta.num_tokens) == (TRAIN, 3, TOKENS)
    assert cache.labels.tolist() == list_images(programs.images() / "train").labels.tolist()


KILL_IN_SECOND_SHARD = """
import os, signal, sys
import engine.cache, util.token_cache
plain, calls = util.token_cache._shard_file, []
def shard_file(folder, shard, kind):
    if shard == 1 and kind == "labels.npy" and calls.count("tokens of 1"):
        os.kill(os.getpid(), signal.SIGKILL)
    if shard == 1 and kind == "tokens.npy":
        calls.append("tokens of 1")
    return plain(folder, shard, kind)
util.token_cache._shard_file = shard_file
import main_cache
main_cache.main(sys.argv[1:])
"""


def test_killed_and_started_again_it_encodes_what_is_missing_and_nothing_twice(tmp_path, monkeypatch):
    """The kill falls between the tokens and the labels of the second of three shards."""
    killed = programs.python("-c", KILL_IN_SECOND_SHARD, *cache_flags(tmp_path / "cache"))
    assert killed.status == -signal.SIGKILL
    refused(
        call("lpd", *programs.train_flags(tmp_path / "run", cached_path=tmp_path / "cache")), "1 of 3 shards"
    )
    encoded = []

    def counting(tokenizer, images, device):
        encoded.append(len(images))
        return encode_views(tokenizer, images, device)

    monkeypatch.setattr(engine.cache, "encode_views", counting)
    finished(call("cache", *cache_flags(tmp_path / "cache")))
    assert sum(encoded) == TRAIN - 7  # the first shard of 7 was whole
    assert contents(tmp_path / "cache") == contents(programs.token_cache())


def test_complete_cache_is_left_as_it_is(tmp_path, monkeypatch):
    shutil.copytree(programs.token_cache(), tmp_path / "cache")
    monkeypatch.setattr(engine.cache, "encode_views", lambda *_: pytest.fail("encoded again"))
    assert "complete already: 18 images" in finished(call("cache", *cache_flags(tmp_path / "cache"))).out
    assert contents(tmp_path / "cache") == contents(programs.token_cache())


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"vqgan_path": "other tokenizer"}, ["tokenizer_digest"]),
        ({"img_size": 20}, ["img_size", "16", "20"]),
        ({"shard_size": 6}, ["shard_size", "7", "6"]),
        ({"data_path": "val"}, ["num_images", "18", "6"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_cache_of_something_else_is_refused_and_left_as_it_is(tmp_path, changes, words):
    shutil.copytree(programs.token_cache(), tmp_path / "cache")
    if "vqgan_path" in changes:
        changes = {"vqgan_path": programs.tokenizer(seed=1)}
    if "data_path" in changes:
        changes = {"data_path": programs.images() / "val"}
    outcome = call("cache", *cache_flags(tmp_path / "cache", **changes))
    refused(outcome, *words, "--cached_path", tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(programs.token_cache())


def test_cache_in_bf16_says_so_and_how_many_tokens_differ(tmp_path):
    outcome = finished(call("cache", *cache_flags(tmp_path / "cache"), "--bf16"))
    told = re.search(r"bf16: (.*)% of the tokens of 18 images differ from those of fp32", outcome.out)
    cache, whole = TokenCache(tmp_path / "cache"), TokenCache(programs.token_cache())
    assert (cache.meta.precision, whole.meta.precision) == ("bf16", "fp32")
    everything = np.arange(TRAIN).repeat(2), np.tile([0, 1], TRAIN)
    differing = (cache.tokens(*everything) != whole.tokens(*everything)).mean()
    assert 0 < differing < 0.2  # bf16 has 8 bits of mantissa; a broken encoder would differ in 63 of 64
    assert float(told[1]) == pytest.approx(100 * differing, abs=0.006)  # printed with two decimals


def test_cache_begun_in_another_precision_is_not_gone_on_with(tmp_path):
    shutil.copytree(programs.token_cache(), tmp_path / "cache")
    for name in ("meta.json", "shard-00002.labels.npy"):
        (tmp_path / "cache" / name).unlink()
    before = contents(tmp_path / "cache")
    outcome = call("cache", *cache_flags(tmp_path / "cache"), "--bf16")
    refused(outcome, "precision is fp32", "now it would be bf16", "--cached_path")
    assert contents(tmp_path / "cache") == before


def test_cache_from_before_precision_was_written_down_is_of_fp32(small_cache):
    values = json.loads((small_cache / "meta.json").read_text())
    del values["precision"]
    (small_cache / "meta.json").write_text(json.dumps(values))
    assert TokenCache(small_cache).meta.precision == "fp32"


def test_disk_that_fails_while_a_shard_is_written_ends_the_run_by_name(tmp_path, monkeypatch):
    """Shards are written beside the encoding: the error must come back from there."""

    def full(self, shard, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"shard {shard}")

    monkeypatch.setattr(CacheWriter, "write_shard", full)
    outcome = call("cache", *cache_flags(tmp_path / "cache"))
    assert outcome.status == 1 and "error: " in outcome.err and "No space left" in outcome.err
    assert not (tmp_path / "cache/meta.json").exists()


# Images that cannot be read.


def test_unreadable_images_are_named_and_the_cache_is_not_complete(tmp_path, damaged_images):
    outcome = call("cache", *cache_flags(tmp_path / "cache", data_path=damaged_images))
    assert outcome.status == 1
    assert "00_bars/3.png" in outcome.err and "02_rings/5.png" in outcome.err
    assert "error: 2 unreadable images" in outcome.err and "Traceback" not in outcome.err
    run = call("lpd", *programs.train_flags(tmp_path / "run", cached_path=tmp_path / "cache"))
    refused(run, "1 of 3 shards")


def test_after_mending_the_images_the_same_command_completes_the_cache(tmp_path, damaged_images):
    flags = cache_flags(tmp_path / "cache", data_path=damaged_images)
    assert call("cache", *flags).status == 1
    for name in ("00_bars/3.png", "02_rings/5.png"):
        shutil.copy(programs.images() / "train" / name, damaged_images / "train" / name)
    finished(call("cache", *flags))
    assert contents(tmp_path / "cache") == contents(programs.token_cache())


def test_images_left_out_on_request_are_listed_and_the_others_are_all_there(tmp_path, damaged_images):
    flags = cache_flags(tmp_path / "cache", data_path=damaged_images)
    outcome = call("cache", *flags, "--skip_unreadable")
    assert outcome.status == 1 and "error: 2 unreadable images, left out" in outcome.err
    cache, whole = TokenCache(tmp_path / "cache"), TokenCache(programs.token_cache())
    assert cache.meta.unreadable == ("00_bars/3.png", "02_rings/5.png")
    kept = [i for i in range(TRAIN) if i not in (3, 17)]
    assert np.array_equal(cache.labels, whole.labels[kept])
    for view in (0, 1):
        assert np.array_equal(
            cache.tokens(np.arange(16), np.full(16, view)), whole.tokens(kept, np.full(16, view))
        )


# The MAR style.


def test_mar_folder_is_read_as_the_same_tokens_and_labels(mar_folder):
    mar, cache = (
        open_token_cache(mar_folder, vocab_size=64, img_size=SIZE),
        TokenCache(programs.token_cache()),
    )
    assert isinstance(mar, MarCache) and len(mar) == TRAIN
    assert mar.meta.class_names == cache.meta.class_names and mar.meta.grid_size == 4
    assert np.array_equal(mar.labels, cache.labels)
    indices, views = np.arange(TRAIN)[::-1], np.arange(TRAIN) % 2
    assert np.array_equal(mar.tokens(indices, views), cache.tokens(indices, views))


def mar_flags(mar_folder, cached_path, img_size=SIZE):
    return [
        "--from_mar", mar_folder, "--vqgan_path", programs.tokenizer(), "--img_size", img_size,
        "--cached_path", cached_path, "--shard_size", 7,
    ]  # fmt: skip


def test_mar_folder_is_converted_without_a_change(tmp_path, mar_folder):
    finished(call("cache", *mar_flags(mar_folder, tmp_path / "cache")))
    new, old = TokenCache(tmp_path / "cache"), TokenCache(programs.token_cache())
    assert np.array_equal(new.labels, old.labels)
    for view in (0, 1):
        everything = np.arange(TRAIN), np.full(TRAIN, view)
        assert np.array_equal(new.tokens(*everything), old.tokens(*everything))


MAR_DAMAGE = {
    "no archive": lambda path: path.write_bytes(b"PK"),
    "no mirrored view": lambda path: np.savez(path, indices=np.zeros(TOKENS, int)),
    "fewer tokens": lambda path: np.savez(path, indices=np.zeros(9, int), indices_flip=np.zeros(9, int)),
    "floats": lambda path: np.savez(path, indices=np.zeros(TOKENS), indices_flip=np.zeros(TOKENS)),
    "token too large": lambda path: np.savez(
        path, indices=np.full(TOKENS, 64), indices_flip=np.zeros(TOKENS, int)
    ),
    "token negative": lambda path: np.savez(
        path, indices=np.full(TOKENS, -1), indices_flip=np.zeros(TOKENS, int)
    ),
}


@pytest.mark.parametrize("damage", MAR_DAMAGE)
def test_damaged_mar_file_ends_the_conversion_by_name(tmp_path, mar_folder, damage):
    MAR_DAMAGE[damage](mar_folder / "02_rings/3.npz")
    outcome = call("cache", *mar_flags(mar_folder, tmp_path / "cache"))
    assert outcome.status == 1 and "Traceback" not in outcome.err
    error = outcome.err.splitlines()[-1]
    assert error.startswith("error: ") and "02_rings/3.npz" in error
    assert not (tmp_path / "cache/meta.json").exists()


def test_mar_folder_of_another_grid_is_refused(tmp_path, mar_folder):
    flags = mar_flags(mar_folder, tmp_path / "cache", img_size=32)
    refused(call("cache", *flags), "--from_mar", "16 tokens", "--img_size 32", "64")
    MAR_DAMAGE["fewer tokens"](mar_folder / "00_bars/0.npz")
    refused(call("cache", *mar_flags(mar_folder, tmp_path / "cache")), "9 tokens")
    assert not (tmp_path / "cache").exists()


# Refused.


def _cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def _save(path, array):
    np.save(path, array, allow_pickle=True)


def _claim(path, images):
    """The same file, whose header says so many images."""
    with path.open("wb") as file:
        header = {"descr": "<u2", "fortran_order": False, "shape": (images, 2, 4)}
        np.lib.format.write_array_header_1_0(file, header)


def _edit_meta(folder, **changes):
    values = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**values, **changes}))


def _only_a_plan_of_absurdly_many(folder):
    _edit_meta(folder, num_images=10**15)
    (folder / "meta.json").rename(folder / "plan.json")


DAMAGE = {
    "meta missing, one shard missing": (
        lambda f: [(f / "meta.json").unlink(), (f / "shard-00002.labels.npy").unlink()], "2 of 3 shards"),
    "tokens cut short": (lambda f: _cut(f / "shard-00001.tokens.npy"), "shard-00001.tokens.npy"),
    "labels cut short": (lambda f: _cut(f / "shard-00001.labels.npy"), "shard-00001.labels.npy"),
    "tokens missing": (lambda f: (f / "shard-00001.tokens.npy").unlink(), "shard-00001.tokens.npy"),
    "tokens of another grid": (
        lambda f: _save(f / "shard-00000.tokens.npy", np.zeros((2, 2, 9), np.uint16)), "[2, 2, 9]"),
    "tokens of another type": (
        lambda f: _save(f / "shard-00000.tokens.npy", np.zeros((2, 2, 4))), "float64"),
    "pickled labels": (
        lambda f: _save(f / "shard-00000.labels.npy", np.array([print, 1], object)), "00000.labels.npy"),
    "an image too few": (
        lambda f: _save(f / "shard-00000.tokens.npy", np.zeros((1, 2, 4), np.uint16)), "4 images"),
    "label too large": (
        lambda f: _save(f / "shard-00000.labels.npy", np.array([0, 2], np.int32)), "outside 0..1"),
    "label negative": (
        lambda f: _save(f / "shard-00000.labels.npy", np.array([-1, 0], np.int32)), "outside 0..1"),
    "meta empty": (lambda f: (f / "meta.json").write_text(""), "meta.json"),
    "meta a list": (lambda f: (f / "meta.json").write_text("[]"), "meta.json"),
    "meta of another format": (lambda f: _edit_meta(f, format=2), "format 2"),
    "meta with a number as text": (lambda f: _edit_meta(f, num_images="5"), "num_images"),
    "meta with a shard of nothing": (lambda f: _edit_meta(f, shard_size=0), "shard_size"),
    "meta without images": (lambda f: _edit_meta(f, num_images=0), "num_images"),
    "meta nested without an end": (lambda f: (f / "meta.json").write_text("[" * 10**6), "meta.json"),
    "meta of absurdly many images": (lambda f: _edit_meta(f, num_images=10**18), "num_images"),
    "meta of absurdly many shards": (
        lambda f: _edit_meta(f, num_images=10**9, shard_size=1), "1000000000 shards, at most 100000"),
    "meta of more codes than tokens have bits": (lambda f: _edit_meta(f, vocab_size=65537), "vocab_size"),
    "plan of absurdly many shards, no meta": (_only_a_plan_of_absurdly_many, "num_images"),
    "tokens that claim more than there is": (
        lambda f: _claim(f / "shard-00000.tokens.npy", 10**12), "it claims 16000000000000 bytes, it has 0"),
    "tokens behind a header of gigabytes": (
        lambda f: (f / "shard-00000.tokens.npy").write_bytes(b"\x93NUMPY\2\0" + b"\xff" * 9), "tokens.npy"),
    "meta without a field": (
        lambda f: (f / "meta.json").write_text('{"class_names": [], "unreadable": []}'), "meta.json"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_refused_in_one_line(tmp_path, small_cache, damage):
    harm, word = DAMAGE[damage]
    harm(small_cache)
    flags = programs.train_flags(tmp_path / "run", cached_path=small_cache)
    refused(call("lpd", *flags), word, small_cache)
    assert not (tmp_path / "run").exists()


def test_token_beyond_the_vocabulary_ends_training_by_name(tmp_path, small_cache):
    _edit_meta(small_cache, vocab_size=16)
    outcome = call("lpd", *programs.train_flags(tmp_path / "run", cached_path=small_cache))
    assert outcome.status == 1 and "Traceback" not in outcome.err
    error = outcome.err.splitlines()[-1]
    assert error.startswith("error: ") and str(small_cache) in error and "16 codes" in error


def test_folder_that_is_no_cache_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="no token cache"):
        open_token_cache(tmp_path)
