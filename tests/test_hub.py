"""Weights and orders by name: a cache laid out as the hub's, folders like a repository, scripts/export.py.

There is no network here. What the library does with one is its own; what it keeps on disk `publish` makes.
"""

import importlib.util
import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from programs import call, call_main, finished
from test_hostile_files import bare, safetensors, torch_zip

from engine.checkpoint import (
    load_either,
    load_lpd,
    load_tokenizer,
    read_weights,
    save_checkpoint,
    save_weights,
    state_digest,
)
from models.lpd import LPD
from models.vqgan import VQModel
from util import cli, hub

spec = importlib.util.spec_from_file_location("export", programs.REPO / "scripts/export.py")
export = importlib.util.module_from_spec(spec)
spec.loader.exec_module(export)

COMMIT, OLDER = "1" * 40, "2" * 40


def publish(cache, repo, files, commit=COMMIT, ref="main"):
    """Lay files (name -> path) out as huggingface_hub does: blobs, a snapshot of links to them, its ref."""
    root = cache / f"models--{repo.replace('/', '--')}"
    for name, source in files.items():
        blob, link = root / "blobs" / f"{commit[0]}-{Path(name).name}", root / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, blob)
        link.symlink_to(Path(*[".."] * len(link.relative_to(root).parent.parts), "blobs", blob.name))
    (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache in the place of the user's, for this process and those it starts; offline."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("the network was asked"))
    return folder


def saved(model, folder, **info):
    """The files of a model saved into a folder, as `publish` takes them."""
    model.save_pretrained(folder, **info)
    return {path.name: path for path in folder.iterdir()}


def found(name, orders=False):
    return hub.local_path(hub.parse(name, hub.ORDER_FILES if orders else hub.WEIGHT_FILES))


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Folders.


@pytest.mark.parametrize("kind", ["tiny_lpd", "tiny_vq"])
def test_model_comes_back_from_its_folder_bit_for_bit_in_eval_mode(tmp_path, request, kind):
    model = request.getfixturevalue(kind)
    model.train().save_pretrained(tmp_path / "new" / "folder")
    back = type(model).from_pretrained(tmp_path / "new" / "folder")
    assert type(back) is type(model) and back.config == model.config
    assert equal(back, model) and not back.training


def test_a_folder_is_two_files_that_anyone_may_read(tmp_path, tiny_lpd):
    tiny_lpd.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_failed_save_leaves_the_files_that_were_there(tmp_path, tiny_lpd, monkeypatch):
    tiny_lpd.save_pretrained(tmp_path)
    before = programs.contents(tmp_path)
    torch.nn.init.zeros_(tiny_lpd.head.weight)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        tiny_lpd.save_pretrained(tmp_path)
    assert programs.contents(tmp_path) == before


def test_programs_read_a_folder_with_what_its_config_says(tmp_path, tiny_lpd):
    """Weights without a word in their header: class names and config are those of config.json."""
    tiny_lpd.save_pretrained(tmp_path, class_names=list("abcde"), tokenizer_digest="0123")
    model, info = load_lpd(cli.weights_file("--pretrained_ckpt", tmp_path))
    assert equal(model, tiny_lpd) and info["class_names"] == list("abcde")
    assert info["tokenizer_digest"] == "0123" and model.config == tiny_lpd.config


def test_the_header_of_weights_goes_before_a_config_beside_them(tmp_path, tiny_lpd):
    save_weights(tmp_path / "model.safetensors", tiny_lpd, class_names=list("abcde"))
    (tmp_path / "config.json").write_text('{"config": {"depth": 1}}')
    assert load_lpd(tmp_path / "model.safetensors")[1]["class_names"] == list("abcde")


def test_config_beside_other_weights_is_not_theirs(tmp_path, tiny_lpd):
    """A run folder has a config.json of another kind beside lpd.safetensors."""
    tiny_lpd.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "lpd.safetensors")
    assert read_weights(tmp_path / "lpd.safetensors")[1] == {}


@pytest.mark.parametrize("text, told", [
    ("{", "no readable JSON"), ("[" * 10**5, "no readable JSON"), ("[]", "damaged"), ("{}", "does not say"),
    ('{"config": {"depth": 10}}', "weights missing"), ('{"config": {"depth": 1000000}}', "depth"),
    ('{"config": {"code_dim": 4}}', "code_dim"), ('{"config": {"embed_dim": 1e9}}', "embed_dim"),
    ('{"config": 3}', "none of LPDConfig"), ('{"class_names": 3, "config": {}}', "damaged"),
    ('{"x": "' + "x" * 2**24 + '"}', "bytes of JSON"),
], ids=lambda text: text[:24])  # fmt: skip
def test_config_that_says_something_else_is_refused_in_one_line(tmp_path, tiny_lpd, text, told):
    tiny_lpd.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=told) as caught:
        LPD.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_from_pretrained_refuses_what_load_lpd_refuses(tmp_path, tiny_lpd):
    """A number that is none, and a weight too many."""
    with torch.no_grad():
        tiny_lpd.head.weight[0, 0] = torch.nan
    tiny_lpd.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="head.weight is not finite"):
        LPD.from_pretrained(tmp_path)
    tiny_lpd.register_buffer("zoo", torch.zeros(1))
    tiny_lpd.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="0 weights missing, 1 unknown, first zoo"):
        LPD.from_pretrained(tmp_path)


def test_folder_of_the_other_kind_is_refused(tmp_path, tiny_lpd, tiny_vq):
    tiny_vq.save_pretrained(tmp_path / "vq")
    tiny_lpd.save_pretrained(tmp_path / "lpd")
    with pytest.raises(ValueError, match="its config is none of LPDConfig"):
        LPD.from_pretrained(tmp_path / "vq")
    with pytest.raises(ValueError, match="its config is none of VQConfig"):
        VQModel.from_pretrained(tmp_path / "lpd")


@pytest.mark.parametrize("content", [bare, torch_zip, safetensors], ids=lambda make: make.__name__)
def test_code_in_the_place_of_weights_does_not_run(tmp_path, tiny_lpd, content):
    tiny_lpd.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content(tmp_path / "ran"))
    with pytest.raises(ValueError, match="model.safetensors"):
        LPD.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


# Names on the hub.


def test_a_repository_means_its_weights_with_their_config(cache, tmp_path, tiny_lpd):
    publish(cache, "owner/repo", saved(tiny_lpd, tmp_path / "a", class_names=list("abcde")))
    path = found("hf://owner/repo")
    assert path.name == "model.safetensors" and path.is_symlink()
    model, info = load_lpd(path)
    assert equal(model, tiny_lpd) and info["class_names"] == list("abcde")


def test_a_file_of_a_folder_of_a_repository_is_found(cache, tmp_path, tiny_vq):
    files = saved(tiny_vq, tmp_path / "a")
    publish(cache, "owner/repo", {f"vq/{name}": path for name, path in files.items()})
    assert equal(load_tokenizer(found("hf://owner/repo/vq/model.safetensors")), tiny_vq)


@pytest.mark.parametrize("revision", ["v1", "refs/pr/3", "two%2Fparts", OLDER])
def test_revision_is_the_one_named(cache, tmp_path, tiny_lpd, revision):
    publish(cache, "owner/repo", saved(tiny_lpd, tmp_path / "new"))
    torch.nn.init.zeros_(tiny_lpd.head.weight)
    older = saved(tiny_lpd, tmp_path / "old")
    publish(cache, "owner/repo", older, commit=OLDER, ref=revision.replace("%2F", "/"))
    assert equal(load_lpd(found(f"hf://owner/repo@{revision}"))[0], tiny_lpd)
    assert equal(load_lpd(found(f"hf://owner/repo@{revision}/model.safetensors"))[0], tiny_lpd)
    assert not equal(load_lpd(found("hf://owner/repo"))[0], tiny_lpd)


def test_from_pretrained_takes_a_name_and_a_revision(cache, tmp_path, tiny_vq):
    publish(cache, "owner/repo", saved(tiny_vq, tmp_path / "a"), commit=OLDER, ref="v1")
    for name in ("owner/repo", "hf://owner/repo"):
        assert equal(VQModel.from_pretrained(name, revision="v1"), tiny_vq)
    with pytest.raises(FileNotFoundError, match="owner/repo: no folder, and not to be had from the hub"):
        VQModel.from_pretrained("owner/repo")


def test_orders_are_found_by_name(cache, tmp_path):
    np.save(tmp_path / "o.npy", np.arange(4))
    publish(cache, "owner/orders", {"o.npy": tmp_path / "o.npy"})
    assert np.array_equal(np.load(found("hf://owner/orders/o.npy", orders=True)), np.arange(4))


@pytest.mark.parametrize("name", [
    "hf://owner/repo/weights.bin", "hf://owner/repo/model.py", "hf://owner/repo/../../x.safetensors",
    "hf://owner", "hf://", "hf://owner/repo@/model.safetensors", "hf://datasets/owner/repo/x.safetensors",
    "hf://owner/repo/orders.npy", "hf://owner/repo/folder", "hf://own--er/repo",
])  # fmt: skip
def test_name_of_something_else_is_refused_before_anything_is_looked_up(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(ValueError, match=re.escape(name)):
        found(name)


def test_orders_have_no_file_of_their_own_name():
    with pytest.raises(ValueError, match="hf://owner/repo names no file that is taken: .npy, .json"):
        found("hf://owner/repo", orders=True)


def test_what_was_never_fetched_is_not_there_offline(cache, tmp_path, tiny_lpd):
    publish(cache, "owner/repo", saved(tiny_lpd, tmp_path / "a"))
    for name in ("hf://owner/other", "hf://owner/repo@v9", "hf://owner/repo/other.pth"):
        with pytest.raises(FileNotFoundError, match=re.escape(name)) as caught:
            found(name)
        assert "\n" not in str(caught.value)


def test_link_to_a_blob_that_is_gone_is_not_there(cache, tmp_path, tiny_lpd):
    publish(cache, "owner/repo", saved(tiny_lpd, tmp_path / "a"))
    (cache / "models--owner--repo/blobs/1-model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        found("hf://owner/repo")


def test_local_mistake_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "local_path", lambda name: pytest.fail("fetched"))
    flags = {"pretrained_ckpt": "hf://owner/repo", "vqgan_path": tmp_path / "absent"}
    outcome = call("sample", *programs.sample_flags(tmp_path / "out", **flags))
    assert outcome.status == 2 and "--vqgan_path: no such file" in outcome.err


# Programs, from names alone.


def test_images_from_names_are_those_from_files(cache, tmp_path):
    """main_sample as a process of its own: weights and orders by name, the tokenizer from a folder."""
    model, info = load_lpd(programs.trained() / "lpd.safetensors")
    publish(cache, "owner/lpd", saved(model, tmp_path / "lpd", **info))
    load_tokenizer(programs.tokenizer()).save_pretrained(tmp_path / "vq")
    orders = np.stack([np.random.default_rng(i).permutation(16) for i in range(3)]).astype(np.uint16)
    np.save(tmp_path / "o.npy", orders)
    publish(cache, "owner/orders", {"o.npy": tmp_path / "o.npy"})
    files = programs.sample_flags(tmp_path / "a", lpd_order_file=tmp_path / "o.npy")
    names = programs.sample_flags(
        tmp_path / "b", pretrained_ckpt="hf://owner/lpd", vqgan_path=tmp_path / "vq",
        lpd_order_file="hf://owner/orders/o.npy",
    )  # fmt: skip
    finished(call("sample", *files))
    finished(programs.start("sample", *names))
    images = [programs.contents(tmp_path / run / "images_4_steps") for run in "ab"]
    assert images[0] == images[1] and len(images[0]) == 3


def test_token_cache_from_a_tokenizer_by_name(cache, tmp_path):
    publish(cache, "owner/vq", saved(load_tokenizer(programs.tokenizer()), tmp_path / "vq"))
    finished(call("cache", *programs.cache_flags(tmp_path / "cache", vqgan_path="hf://owner/vq")))
    assert programs.contents(tmp_path / "cache") == programs.contents(programs.token_cache())


def test_training_starts_from_weights_by_name(cache, tmp_path):
    """With a rate of 0 what is saved is what was started from."""
    model, info = load_lpd(programs.trained() / "lpd.safetensors")
    publish(cache, "owner/lpd", saved(model, tmp_path / "lpd", **info))
    flags = programs.train_flags(tmp_path / "run", pretrained_ckpt="hf://owner/lpd", epochs=0.2, lr=0)
    finished(call("lpd", *flags))
    assert equal(load_lpd(tmp_path / "run/lpd.safetensors")[0], model)


# The export.


def exported(checkpoint, folder, *flags):
    finished(call_main(export.main, "--checkpoint", checkpoint, "--output_dir", folder, *flags))
    return folder


def test_export_of_a_run_is_its_weights_and_words(tmp_path):
    folder = exported(programs.trained(), tmp_path / "small")
    model, info = load_lpd(programs.trained() / "lpd.safetensors")
    assert equal(LPD.from_pretrained(folder), model)
    assert load_lpd(folder / "model.safetensors")[1] == json.loads(json.dumps(info))


def test_export_of_a_tokenizer_can_be_read_as_one(tmp_path):
    folder = exported(programs.tokenizer(), tmp_path / "vq")
    assert equal(VQModel.from_pretrained(folder), load_tokenizer(programs.tokenizer()))


def test_card_says_sizes_digests_and_training(tmp_path):
    text = (exported(programs.trained(), tmp_path / "small", "--license", "mit") / "README.md").read_text()
    model, info = load_lpd(programs.trained() / "lpd.safetensors")
    assert text.startswith("---\nlicense: mit\n---\n")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    digests = (info["tokenizer_digest"], state_digest(model))
    for value in (f"{parameters:,}", "16x16 px", *digests, *info["class_names"]):
        assert value in text
    assert "| epochs | 4.0 |" in text and "| global_batch | 4 |" in text
    assert str(tmp_path) not in text


def test_card_does_not_invent_how_released_weights_were_trained(tmp_path, tiny_lpd):
    save_checkpoint(
        tmp_path / "a.pth", {"model": tiny_lpd.state_dict(), "info": {"config": vars(tiny_lpd.config)}}
    )
    text = (exported(tmp_path / "a.pth", tmp_path / "small") / "README.md").read_text()
    assert "does not say how these weights were trained" in text and "license" not in text


@pytest.mark.parametrize("kind", ["lpd", "vq"])
def test_commands_and_code_of_the_card_work_once_it_is_on_the_hub(cache, tmp_path, kind):
    source = programs.trained() if kind == "lpd" else programs.tokenizer()
    folder = exported(source, tmp_path / "small")
    publish(cache, "OWNER/small", {path.name: path for path in folder.iterdir()})
    text = (folder / "README.md").read_text()
    words = re.search(r"```bash\npython main_(\w+)\.py (.*)\n", text)
    args = importlib.import_module(f"main_{words[1]}").parse_args(words[2].split())
    if kind == "lpd":
        args.vqgan_path = programs.tokenizer()
    cli.find_files(args)
    module, name = re.search(r"^from (\S+) import (\w+)$", text, re.M).groups()
    place = re.search(rf'^model = {name}.from_pretrained\("(.*)"\)$', text, re.M)[1]
    model = getattr(importlib.import_module(module), name).from_pretrained(place)
    assert equal(model, load_either(cli.weights_file("", source))[0])


def test_export_replaces_only_an_earlier_export_and_when_asked(tmp_path):
    folder = exported(programs.tokenizer(), tmp_path / "vq")
    argv = ["--checkpoint", programs.tokenizer(seed=1), "--output_dir", folder]
    outcome = call_main(export.main, *argv)
    assert outcome.status == 2 and f"--output_dir {folder} is not empty" in outcome.err
    (folder / ".gitattributes").touch()
    finished(call_main(export.main, *argv, "--overwrite"))
    assert equal(VQModel.from_pretrained(folder), load_tokenizer(programs.tokenizer(seed=1)))
    (folder / "notes.txt").touch()
    outcome = call_main(export.main, *argv, "--overwrite")
    assert outcome.status == 2 and f"--output_dir {folder} holds something else: notes.txt" in outcome.err


@pytest.mark.parametrize("flags, told", [
    (["--checkpoint", "{absent}"], "--checkpoint: no such file: {absent}"),
    (["--checkpoint", "{hostile}"], "{hostile}: refused"),
    (["--checkpoint", "{unsaid}"], "{unsaid} does not say its size: give --model"),
    (["--checkpoint", "{odd}"], "{odd}: what it says of its weights is no JSON"),
    (["--license", "my own!"], "--license 'my own!'"),
    (["--output_dir", "{hostile}"], "--output_dir: {hostile} is not a folder"),
])  # fmt: skip
def test_mistake_of_an_export_is_told_in_one_line_and_nothing_is_written(tmp_path, tiny_lpd, flags, told):
    state, info = tiny_lpd.state_dict(), {"config": vars(tiny_lpd.config), "x": torch.zeros(1)}
    places = {name: tmp_path / f"{name}.pth" for name in ("absent", "hostile", "unsaid", "odd")}
    places["hostile"].write_bytes(bare(tmp_path / "ran"))
    save_checkpoint(places["unsaid"], {"model": state})
    save_checkpoint(places["odd"], {"model": state, "info": info})
    argv = {"--checkpoint": programs.tokenizer(), "--output_dir": tmp_path / "out"}
    argv[flags[0]] = flags[1].format(**places)
    outcome = call_main(export.main, *[word for pair in argv.items() for word in pair])
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and outcome.err.startswith("error: ")
    assert told.format(**places) in outcome.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()
