"""Weights on disk: names, formats, released files, and what is refused. There is no network here."""

import argparse
import contextlib
import errno
import io
import os
import re
import shlex
import socket
import uuid
from collections import defaultdict
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath, PureWindowsPath

import helpers
import numpy as np
import processes
import pytest
import torch
from helpers import call
from processes import finished
from safetensors.torch import save, save_file

from models.lpd import LPD, LPD_CONFIGS, LPDConfig, resize_pos_embed
from models.vqgan import VQConfig, VQModel
from models.weights import ORDER_SUFFIXES, find, load_state, read_weights, save_weights, state_digest

COMMIT, OLDER = "1" * 40, "2" * 40


def save_pth(path, model, **info):
    """A training checkpoint, as far as readers of weights are concerned."""
    info["config"] = vars(model.config)
    torch.save({"model": model.state_dict(), "info": info, "step": 3}, path)


SAVERS = {".pth": save_pth, ".safetensors": save_weights}


@pytest.fixture(params=list(SAVERS))
def suffix(request):
    return request.param


@pytest.fixture
def weights(suffix, tmp_path, tiny_lpd):
    """`tiny_lpd` in a file of each format."""
    path = tmp_path / f"weights{suffix}"
    SAVERS[suffix](path, tiny_lpd)
    return path


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal(a, b):
    return a.config == b.config and equal_states(a.state_dict(), b.state_dict())


def assert_refused(read, path, match):
    """`read(path)` is a ValueError of one line that names the file."""
    with pytest.raises(ValueError, match=match) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# There and back.


@pytest.mark.parametrize("kind", ["tiny_lpd", "tiny_vq"])
def test_model_returns_from_a_file_with_its_config_in_eval_mode(tmp_path, request, kind, suffix):
    model = request.getfixturevalue(kind).train()
    SAVERS[suffix](tmp_path / f"a{suffix}", model, class_names=["a", "b"], tokenizer_digest="0123")
    loaded, info = type(model).load(tmp_path / f"a{suffix}")
    assert equal(loaded, model) and not loaded.training
    assert info["class_names"] == ["a", "b"] and info["tokenizer_digest"] == "0123"


@pytest.mark.parametrize("kind", ["tiny_lpd", "tiny_vq"])
def test_model_returns_from_its_folder(tmp_path, request, kind):
    model, folder = request.getfixturevalue(kind).train(), tmp_path / "new" / "folder"
    model.save_pretrained(folder, class_names=["a", "b"])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = type(model).from_pretrained(folder)
    assert equal(loaded, model) and not loaded.training
    assert type(model).load(folder)[1]["class_names"] == ["a", "b"]


def test_folder_of_a_run_gives_its_last_checkpoint(tmp_path, tiny_lpd):
    save_pth(tmp_path / "checkpoint-last.pth", tiny_lpd)
    assert equal(LPD.load(tmp_path)[0], tiny_lpd)


def test_config_file_is_read_only_for_a_model_safetensors_without_a_header(tmp_path, tiny_lpd):
    """A run folder has a config.json of another kind beside its lpd.safetensors."""
    tiny_lpd.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "lpd.safetensors")
    assert read_weights(tmp_path / "lpd.safetensors")[1] == {}
    save_weights(tmp_path / "model.safetensors", tiny_lpd, class_names=["a", "b"])
    assert read_weights(tmp_path / "model.safetensors")[1]["class_names"] == ["a", "b"]


def behind(prefix, state):
    return {f"{prefix}{name}": weight for name, weight in state.items()}


def averaged(state):
    return {name: weight + 1 for name, weight in state.items()}


AVERAGES = {  # what training code of others saves: a function of the weights; the name of the average
    "MAR": (lambda w: {"model": w, "model_ema": averaged(w), "epoch": 3}, "model_ema"),
    "DiT": (lambda w: {"model": w, "ema": averaged(w), "opt": {"state": {0: {"exp_avg": w}}}}, "ema"),
    "timm": (lambda w: {"state_dict": w, "state_dict_ema": behind("module.", averaged(w))},
             "state_dict_ema.module"),
    "ema-pytorch": (lambda w: {"model": w, "ema": behind("online_model.", w)
                               | behind("ema_model.", averaged(w))}, "ema.ema_model"),
    "Lightning": (lambda w: {"state_dict": behind("net.", w) | {"ema_net.n_averaged": torch.tensor(3)}
                             | behind("ema_net.module.", averaged(w))}, "state_dict.ema_net.module"),
}
PLAIN = {
    "no average yet": lambda w: {"model": w, "ema": {}},
    "compiled": lambda w: {"model": behind("_orig_mod.", w)},
    "DDP": lambda w: behind("module.", w),
    "DDP of compiled": lambda w: {"model": behind("module._orig_mod.", w)},
    "compiled DDP": lambda w: {"model": behind("_orig_mod.module.", w)},
    "compiled blocks": lambda w: {"model": {re.sub(r"(s\.\d)", r"\1._orig_mod", n): w[n] for n in w}},
    "Lightning, no average": lambda w: {"state_dict": behind("model.", w), "hyper_parameters": {"lr": 1}},
    "DeepSpeed": lambda w: {"module": w, "dtype": torch.float16, "optimizer": None},
}


@pytest.mark.parametrize("maker", [*AVERAGES, *PLAIN])
def test_weights_are_found_wherever_they_lie_and_an_average_is_said(maker, tmp_path, tiny_lpd, capsys):
    state, path = tiny_lpd.state_dict(), tmp_path / "a.ckpt"
    content, average = AVERAGES.get(maker) or (PLAIN[maker], None)
    torch.save(content(state), path)
    assert equal_states(read_weights(path, LPD)[0], averaged(state) if average else state)
    assert capsys.readouterr().out == (f"{path}: the moving average {average} is used\n" if average else "")
    save_file(behind("module.", state), tmp_path / "b.safetensors")
    assert equal_states(read_weights(tmp_path / "b.safetensors", VQModel, LPD)[0], state)


@pytest.mark.parametrize("content, message", [
    (lambda w: {"ema_0.99": w, "ema_0.9999": w, "model": w}, "several weights, ema_0.99 and ema_0.9999"),
    (lambda w: {**w, **behind("teacher.", w)}, "several weights, those without a prefix and teacher"),
    (lambda w: {"net": {"a": w["norm.bias"]}, "epoch": 3}, "pos_embed is missing; there are net"),
    (lambda w: {"model": {"a": [1]}}, "no LPD weights: pos_embed is missing; there are no tensors"),
])
def test_file_of_several_weights_or_none_is_refused_with_what_is_there(tmp_path, tiny_lpd, content, message):
    torch.save(content(tiny_lpd.state_dict()), tmp_path / "a.pth")
    assert_refused(LPD.load, tmp_path / "a.pth", message)


@pytest.mark.parametrize("around", [lambda content: content, lambda content: {"state": content}])
def test_moving_average_of_unknown_form_is_named(tmp_path, tiny_lpd, capsys, around):
    state = tiny_lpd.state_dict()
    torch.save(around({"model": state, "ema": {"shadow_params": [*state.values()]}}), tmp_path / "a.pth")
    assert equal_states(read_weights(tmp_path / "a.pth", LPD)[0], state)
    assert "ema.shadow_params.0 is of a moving average in an unknown form" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lpd_l_256.pth", "pytorch_model.bin", "last.ckpt"])
def test_only_weights_of_a_folder_or_repository_are_found_by_any_name(cache, tmp_path, tiny_lpd, name):
    snapshot = publish(cache, "owner/repo", tiny_lpd)
    (snapshot / "model.safetensors").unlink()
    for folder, place in ((tmp_path / "folder", tmp_path / "folder"), (snapshot, "hf://owner/repo")):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").touch()
        with pytest.raises(FileNotFoundError, match=f"{place}.* has no file that ends in .safetensors, .pth"):
            LPD.load(place)
        save_pth(folder / name, tiny_lpd)
        assert equal(LPD.load(place)[0], tiny_lpd)
        save_pth(folder / "other.pth", tiny_lpd)
        with pytest.raises((ValueError, OSError), match=f"{place}.* several files.* {name}"):
            LPD.load(place)


def test_digest_depends_on_the_weights_alone(weights, tiny_lpd):
    digest = state_digest(tiny_lpd)
    assert state_digest(LPD.load(weights)[0]) == digest
    with torch.no_grad():
        tiny_lpd.head.weight[3, 5] += 1e-3
    assert state_digest(tiny_lpd) != digest


def test_save_on_a_full_disk_leaves_the_old_files_unchanged(tmp_path, tiny_lpd, monkeypatch):
    tiny_lpd.save_pretrained(tmp_path)
    before = helpers.contents(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
    torch.nn.init.zeros_(tiny_lpd.head.weight)
    for save_again in (save_weights, lambda path, model: model.save_pretrained(path.parent)):
        with pytest.raises(OSError, match="No space left"):
            save_again(tmp_path / "model.safetensors", tiny_lpd)
        assert helpers.contents(tmp_path) == before


# Released files, which do not record their config.


@pytest.fixture
def released_size(monkeypatch, tiny_config):
    """The name of a size with `tiny_config`'s width and depth, but the published grid, codes and classes."""
    c = tiny_config
    size = LPDConfig(embed_dim=c.embed_dim, depth=c.depth, num_heads=c.num_heads)
    monkeypatch.setitem(LPD_CONFIGS, "released", size)
    return "released"


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "plain.safetensors"])
def test_released_weights_load(tmp_path, tiny_lpd, released_size, name):
    """Grid, codes and classes come from the shapes, width and depth from the named size. A released `.pth`
    holds a pickled Namespace."""
    state, args = tiny_lpd.state_dict(), argparse.Namespace(lr=1e-4)
    if name == "plain.safetensors":
        save_file(state, tmp_path / name)
    else:
        content, zipped = {"model": state, "args": args, "epoch": 449}, name == "zip.pth"
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    model, info = LPD.load(tmp_path / name, released_size)
    assert equal(model, tiny_lpd) and info == {}


def test_weights_without_a_config_need_the_name_of_their_size(tmp_path, tiny_lpd):
    path = tmp_path / "a.pth"
    torch.save({"model": tiny_lpd.state_dict()}, path)
    assert_refused(LPD.load, path, "give --model")
    assert_refused(lambda path: LPD.load(path, "lpd_l"), path, "width 32, --model lpd_l has 1024")


def test_recorded_size_must_be_the_named_one(weights):
    named = "width 32 and depth 2, --model lpd_l has 1024 and 24"
    assert_refused(lambda path: LPD.load(path, "lpd_l"), weights, named)


@pytest.mark.parametrize("config", [
    VQConfig(), VQConfig(vocab_size=4096, multipliers=(1, 2, 2, 4)),
    VQConfig(64, 4, base_width=32, multipliers=(1, 3), num_res_blocks=1, z_channels=48),
], ids=["VQ-16", "VQ-8", "small"])
def test_tokenizer_without_a_config_has_the_sizes_of_its_shapes(tmp_path, config):
    """Zeros of these shapes under the key `model`; expanded, so that the file is small. A file may lack the
    buffer `codebook_used`."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VQModel(config).state_dict().items()}
    zeros = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    if config != VQConfig():
        del zeros["quantize.codebook_used"]
    torch.save({"model": zeros}, tmp_path / "vq.pt")
    model = VQModel.load(tmp_path / "vq.pt")[0]
    assert model.config == config and not model.quantize.codebook_used.any()


# Starting a model of a larger grid.


def test_256_px_weights_start_a_512_px_model(weights, tiny_lpd):
    """Twice the grid: position embeddings are resized, all else is copied."""
    model = LPD(replace(tiny_lpd.config, grid_size=8))
    model.start_from(weights)
    expected = tiny_lpd.state_dict() | {"pos_embed": resize_pos_embed(tiny_lpd.pos_embed.detach(), 8)}
    assert equal_states(model.state_dict(), expected)


@pytest.mark.parametrize("known, kept, said", [
    ("abcde", {0: 4, 2: 0}, "2 classes, found by name, keep their embedding; new: z"),
    ("vwxyo", {}, "0 classes, found by name, keep their embedding; new: e, z, a"),
    (None, {}, "0 classes, found by name, keep their embedding; new: e, z, a"),
    ("eza", {0: 0, 1: 1, 2: 2}, None), ("zae", {0: 2, 1: 0, 2: 1}, "3 classes, .* new: none"),
])
def test_classes_found_by_name_keep_their_embedding(suffix, tmp_path, tiny_lpd, capsys, known, kept, said):
    """Weights of classes `known` (None: not recorded) start a model of the classes e, z and a."""
    old = LPD(replace(tiny_lpd.config, num_classes=len(known or "abcde")))
    SAVERS[suffix](tmp_path / f"a{suffix}", old, **({"class_names": [*known]} if known else {}))
    model = LPD(replace(tiny_lpd.config, num_classes=3))
    expected = old.fake_latent.detach().repeat(3, 1)  # new ones begin as the unconditional branch
    for label, its_old in kept.items():
        expected[label] = old.class_emb.weight[its_old]
    model.start_from(tmp_path / f"a{suffix}", ["e", "z", "a"])
    assert torch.equal(model.class_emb.weight, expected) and torch.equal(model.pos_embed, old.pos_embed)
    assert re.search(said or "^$", capsys.readouterr().out)


def test_classes_of_another_number_without_names_do_not_start_a_model(weights, tiny_lpd):
    model = LPD(replace(tiny_lpd.config, num_classes=7))
    shapes = r"class_emb.weight has shape \[5, 32\], the model \[7, 32\]"
    assert_refused(model.start_from, weights, shapes)


# Names on the hub.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty, offline hub cache instead of the user's, for this process and those it starts."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("the network was used"))
    return folder


def publish(cache, repo, model, folder="", commit=COMMIT, ref="main", **info):
    """Save a model where huggingface_hub caches it: files are links to blobs in the snapshot of a commit."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    model.save_pretrained(snapshot / folder, **info)
    for path in list((snapshot / folder).iterdir()):
        blob = root / "blobs" / f"{commit[0]}-{path.name}"
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        path.symlink_to(blob)
    (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    return snapshot


def test_repository_name_means_its_weights_with_their_config(cache, tiny_config, tiny_lpd):
    publish(cache, "owner/repo", tiny_lpd, class_names=["a", "b"])
    model, info = LPD.load("hf://owner/repo")
    assert equal(model, tiny_lpd) and info["class_names"] == ["a", "b"]
    model = LPD(tiny_config)
    model.start_from("hf://owner/repo")
    assert equal(model, tiny_lpd)


@pytest.mark.parametrize("revision", ["v1", "refs/pr/3", "two%2Fparts", OLDER])
def test_named_revision_and_file_are_used(cache, tiny_lpd, revision):
    publish(cache, "owner/repo", tiny_lpd)
    torch.nn.init.zeros_(tiny_lpd.head.weight)
    ref = revision.replace("%2F", "/")
    publish(cache, "owner/repo", tiny_lpd, folder="small", commit=OLDER, ref=ref)
    assert equal(LPD.load(f"hf://owner/repo@{revision}/small/model.safetensors")[0], tiny_lpd)
    assert not equal(LPD.load("hf://owner/repo")[0], tiny_lpd)


def test_from_pretrained_takes_a_name_and_a_revision(cache, tiny_vq):
    publish(cache, "owner/repo", tiny_vq, commit=OLDER, ref="v1")
    for name in ("owner/repo", "hf://owner/repo"):
        assert equal(VQModel.from_pretrained(name, revision="v1"), tiny_vq)


@pytest.mark.parametrize(
    "name", ["hf://owner/other", "hf://owner/repo@v9", "hf://owner/repo/other.pth", "/no/such/file.pth"]
)
def test_weights_that_are_not_there_are_named_in_one_line(cache, tiny_lpd, name):
    publish(cache, "owner/repo", tiny_lpd)
    for read in (LPD.load, LPD.from_pretrained):
        with pytest.raises(FileNotFoundError, match=re.escape(name)) as caught:
            read(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [
    "hf://owner/repo/weights.h5", "hf://owner/repo/model.py", "hf://owner/repo/../../x.safetensors",
    "hf://owner", "hf://", "hf://datasets/owner/repo/x.safetensors", "hf://owner/repo/orders.npy",
])
def test_name_of_anything_but_weights_is_refused_before_it_is_fetched(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(ValueError, match=re.escape(name)):
        find(name)


def test_programs_take_names_from_the_hub(cache, tmp_path):
    """main_sample as a process of its own: weights and orders by name, the tokenizer from a folder."""
    model, info = LPD.load(helpers.trained() / "lpd.safetensors")
    snapshot = publish(cache, "owner/lpd", model, **info)
    VQModel.load(helpers.tokenizer())[0].save_pretrained(tmp_path / "vq")
    orders = np.stack([np.random.default_rng(i).permutation(16) for i in range(3)]).astype(np.uint16)
    np.save(snapshot / "o.npy", orders)
    assert find("hf://owner/lpd/o.npy", ORDER_SUFFIXES) == snapshot / "o.npy"
    names = {
        "pretrained_ckpt": "hf://owner/lpd", "vqgan_path": tmp_path / "vq",
        "lpd_order_file": "hf://owner/lpd/o.npy",
    }
    finished(call("sample", *helpers.sample_flags(tmp_path / "a", lpd_order_file=snapshot / "o.npy")))
    words = processes.REPO / "main_sample.py", *helpers.sample_flags(tmp_path / "b", **names)
    finished(processes.python(*words))  # where the hub's cache lies is read when its package is imported
    images = [helpers.contents(tmp_path / run / "images_4_steps") for run in "ab"]
    assert images[0] == images[1] and len(images[0]) == 3


# What does not fit.


def test_missing_and_unknown_weights_are_counted_and_the_first_is_named(tiny_lpd):
    state = tiny_lpd.state_dict() | {"zoo": torch.zeros(1), "zap": torch.zeros(1)}
    with pytest.raises(ValueError, match="some.pth: 0 weights missing, 2 unknown, first zap"):
        load_state(tiny_lpd, state, "some.pth")
    del state["head.weight"]
    with pytest.raises(ValueError, match="some.pth: 1 weights missing, 2 unknown, first head.weight"):
        load_state(tiny_lpd, state, "some.pth")


def test_wrong_shape_is_refused_and_leaves_the_model_unchanged(tiny_lpd):
    before = state_digest(tiny_lpd)
    state = {name: tensor + 1 for name, tensor in tiny_lpd.state_dict().items()}
    with pytest.raises(ValueError, match=r"some.pth: head.weight has shape \[31, 32\], the model \[32, 32\]"):
        load_state(tiny_lpd, state | {"head.weight": torch.zeros(31, 32)}, "some.pth")
    assert state_digest(tiny_lpd) == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_weight_is_refused_by_name(tmp_path, tiny_lpd, suffix, value):
    with torch.no_grad():
        tiny_lpd.head.weight[0, 0] = value
    path = tmp_path / f"a{suffix}"
    SAVERS[suffix](path, tiny_lpd)
    for read in (LPD.load, tiny_lpd.start_from):
        assert_refused(read, path, "head.weight is not finite")


def test_weights_of_the_other_kind_are_refused(tmp_path, tiny_lpd, tiny_vq, suffix):
    lpd, vq = tmp_path / f"lpd{suffix}", tmp_path / f"vq{suffix}"
    SAVERS[suffix](lpd, tiny_lpd)
    SAVERS[suffix](vq, tiny_vq)
    assert_refused(LPD.load, vq, "no LPD weights: pos_embed is missing")
    assert_refused(VQModel.load, lpd, "no VQModel weights: quantize.embedding.weight is missing")
    assert_refused(tiny_lpd.start_from, vq, "no LPD weights: pos_embed is missing")
    for shape in ((1, 16, 32), (16, 32), (1, 0, 32), (1, 17, 16)):
        torch.save({**tiny_lpd.state_dict(), "pos_embed": torch.zeros(shape)}, tmp_path / "odd.pth")
        assert_refused(tiny_lpd.start_from, tmp_path / "odd.pth", "pos_embed has shape")


@pytest.mark.parametrize("config", [
    {"heads": 3}, {"depth": 10}, {"embed_dim": 64}, {"num_heads": 0}, {"num_heads": "1"}, {"depth": None},
    [1], "text",
], ids=str)
def test_config_that_does_not_fit_the_weights_is_refused(tmp_path, tiny_lpd, config):
    recorded = vars(tiny_lpd.config) | config if isinstance(config, dict) else config
    torch.save({"model": tiny_lpd.state_dict(), "info": {"config": recorded}}, tmp_path / "a.pth")
    assert_refused(LPD.load, tmp_path / "a.pth", "a.pth: ")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": {"depth": 1}}', '{"config": {"code_dim": 4}}'])
def test_folder_with_a_damaged_or_wrong_config_is_refused(tmp_path, tiny_lpd, text):
    tiny_lpd.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert_refused(LPD.load, tmp_path, "(config.json|model.safetensors): ")


# Damaged files.


@pytest.mark.parametrize("part", [0, 0.001, 0.5, 0.999, "text"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_or_foreign_file_is_refused(tmp_path, tiny_lpd, kind, part):
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pth")
    if kind == "safetensors":
        save_weights(path, tiny_lpd)
    else:
        torch.save({"model": tiny_lpd.state_dict()}, path, _use_new_zipfile_serialization=kind == "zip")
    if part == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n" * 100)
    else:
        os.truncate(path, int(part * path.stat().st_size))
    lines = "damaged|refused" if part != "text" else "no readable weights .but a text: version https://git-lfs"
    assert_refused(read_weights, path, lines)


def test_turned_bit_in_a_checkpoint_is_noticed(tmp_path, tiny_lpd):
    path = tmp_path / "a.pth"
    save_pth(path, tiny_lpd)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert_refused(read_weights, path, "damaged .*checksum")


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], {"model": [1]}, {"model": {"a": 1}}, {"model": {}, "info": 1}], ids=str
)
def test_checkpoint_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    assert_refused(LPD.load, tmp_path / "a.pth", "a.pth: ")


# Files with more than tensors in them, and with code (tests/helpers.py).

HARMLESS = [
    np.float64(3), {np.int64(1): np.bool_(True)}, np.random.default_rng(0).bit_generator.state, np.arange(3),
    Path("a/b"), PureWindowsPath("a"), {PurePosixPath("a")}, datetime.now(timezone.utc), uuid.uuid4(),
    defaultdict(list, {"a": [1]}), argparse.Namespace(out=Path("a"), seed=np.int64(1)), np.float32,
]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_harmless_objects_beside_the_weights_do_not_keep_them_from_loading(tmp_path, tiny_lpd, zipped):
    state, path = tiny_lpd.state_dict(), tmp_path / "a.pth"
    for thing in HARMLESS:
        content = {"model": defaultdict(list, state), "best": thing}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert equal_states(read_weights(path, LPD)[0], state), thing


@pytest.mark.parametrize("content", [lambda m: {"model": m.state_dict(), "config": m.config}, lambda m: m])
def test_refused_file_comes_with_the_command_that_strips_it(tmp_path, tiny_lpd, content):
    path = tmp_path / "it's \"mine\".pth"
    torch.save(content(tiny_lpd), path)
    with pytest.raises(ValueError, match="not plain weights.*GLOBAL models.lpd.LPD") as refusal:
        read_weights(path, LPD)
    program, flag, code = shlex.split(str(refusal.value).partition("tensors alone with: ")[2])
    assert (program, flag) == ("python", "-c")
    exec(code, {})
    assert equal_states(read_weights(f"{path}.plain.pth", LPD)[0], tiny_lpd.state_dict())


def in_a_namespace(marker):
    """An old-style checkpoint whose allowed Namespace holds code."""
    file, content = io.BytesIO(), {"model": {}, "args": argparse.Namespace(lr=helpers.Marks(marker))}
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def in_a_safetensors_header(marker):
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    return save({"x": torch.zeros(1)}, metadata={"lpd": code, "__reduce__": code})


CODE = [helpers.hostile_pickle, helpers.hostile_checkpoint, in_a_namespace]


@pytest.mark.parametrize("name", ["a.pth", "vq.pt", "model.safetensors"])
@pytest.mark.parametrize("content", [*CODE, in_a_safetensors_header])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, tiny_lpd, content, name):
    marker, path = tmp_path / "ran", tmp_path / name
    path.write_bytes(content(marker))
    match = "damaged" if name == "model.safetensors" else "refused, not plain weights"
    for read in (read_weights, LPD.load, VQModel.load, tiny_lpd.start_from):
        assert_refused(read, path, match)
    assert not marker.exists()


@pytest.mark.parametrize("content", CODE)
def test_the_code_in_these_files_would_run(tmp_path, content):
    with contextlib.suppress(RuntimeError):  # a bare pickle, which runs before it is refused
        torch.load(io.BytesIO(content(tmp_path / "ran")), weights_only=False)
    assert (tmp_path / "ran").exists()
