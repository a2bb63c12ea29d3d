"""scripts/export.py: the folder it writes, its model card, and what it refuses."""

import importlib
import mmap
import re

import helpers
import pytest
import torch
from helpers import call_main
from processes import finished

from models.lpd import LPD
from models.vqgan import VQModel
from models.weights import state_digest
from scripts import export
from util.logging import read_metrics
from util.token_cache import open_token_cache


def exported(checkpoint, folder, *flags):
    finished(call_main(export.main, "--checkpoint", checkpoint, "--output_dir", folder, *flags))
    return folder


def test_export_has_the_weights_and_info_of_its_source(tmp_path):
    for Model, source in ((LPD, helpers.trained() / "lpd.safetensors"), (VQModel, helpers.tokenizer())):
        folder = exported(source, tmp_path / Model.__name__)
        (model, info), (copy, copied_info) = Model.load(source), Model.load(folder)
        assert state_digest(copy) == state_digest(model) and copied_info == info


def test_card_has_sizes_digests_and_training_settings(tmp_path):
    text = (exported(helpers.trained(), tmp_path / "small", "--license", "mit") / "README.md").read_text()
    model, info = LPD.load(helpers.trained() / "lpd.safetensors")
    assert text.startswith("---\nlicense: mit\n---\n")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for value in (f"{parameters:,}", "16x16 px", info["tokenizer_digest"], state_digest(model)):
        assert value in text
    assert all(name in text for name in info["class_names"])
    assert "| epochs | 4.0 |" in text and "| global_batch | 4 |" in text
    assert str(tmp_path) not in text


def test_card_invents_no_training_settings_for_released_weights(tmp_path, tiny_lpd):
    info = {"config": vars(tiny_lpd.config)}
    torch.save({"model": tiny_lpd.state_dict(), "info": info}, tmp_path / "a.pth")
    text = (exported(tmp_path / "a.pth", tmp_path / "small") / "README.md").read_text()
    assert "does not record how it was trained" in text and "license" not in text


@pytest.mark.parametrize("source", [helpers.trained, helpers.tokenizer])
def test_command_of_the_card_is_valid(source, tmp_path):
    text = (exported(source(), tmp_path / "small") / "README.md").read_text()
    program, flags = re.search(r"```bash\npython (main_\w+)\.py (.*)\n", text).groups()
    args = importlib.import_module(program).parse_args(flags.split())
    assert "hf://OWNER/small" in vars(args).values()


def test_earlier_export_is_replaced_only_with_overwrite(tmp_path):
    folder = exported(helpers.tokenizer(), tmp_path / "vq")
    argv = ["--checkpoint", helpers.tokenizer(seed=1), "--output_dir", folder]
    outcome = call_main(export.main, *argv)
    assert outcome.status == 2 and f"--output_dir {folder} is not empty" in outcome.err
    finished(call_main(export.main, *argv, "--overwrite"))
    expected = VQModel.load(helpers.tokenizer(seed=1))[0]
    assert state_digest(VQModel.from_pretrained(folder)) == state_digest(expected)


@pytest.mark.parametrize("flags, message", [
    (["--checkpoint", "{tmp}/absent.pth"], "--checkpoint: no such file: {tmp}/absent.pth"),
    (["--checkpoint", "{tmp}/unsized.pth"], "{tmp}/unsized.pth"),
    (["--license", "my own!"], "--license 'my own!'"),
    (["--output_dir", "{tmp}/unsized.pth"], "{tmp}/unsized.pth is not a folder"),
])
def test_mistake_is_one_line_and_nothing_is_written(flags, message, tmp_path, tiny_lpd):
    torch.save({"model": tiny_lpd.state_dict()}, tmp_path / "unsized.pth")
    argv = {"--checkpoint": helpers.tokenizer(), "--output_dir": tmp_path / "out"}
    argv[flags[0]] = flags[1].format(tmp=tmp_path)
    outcome = call_main(export.main, *[word for pair in argv.items() for word in pair])
    assert outcome.status == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert message.format(tmp=tmp_path) in outcome.err
    assert not (tmp_path / "out").exists()


# Token caches.


def published(tmp_path, *flags):
    """The shared cache, as an export with a val/."""
    made = tmp_path / "cache"
    data = {"data_path": helpers.images(), "shard_size": 7}
    finished(helpers.call("cache", *helpers.cache_flags(made, **data)))
    folder = tmp_path / "small"
    finished(call_main(export.main, "--cached_path", made, "--output_dir", folder, *flags))
    return made, folder


def test_exported_cache_is_the_cache_with_a_card(tmp_path):
    made, folder = published(tmp_path, "--license", "mit")
    files = {name: digest for name, digest in helpers.contents(folder).items() if name != "README.md"}
    plans = {name for name in helpers.contents(made) if name.endswith(("plan.json", ".lock"))}
    assert files == {name: d for name, d in helpers.contents(made).items() if name not in plans}
    text, meta = (folder / "README.md").read_text(), open_token_cache(made).meta
    assert text.startswith("---\nlicense: mit\n---\n") and str(tmp_path) not in text
    for value in ("18, each with", "| held-out images | 6 |", meta.tokenizer_digest, *meta.class_names):
        assert value in text
    program, flags = re.search(r"```bash\npython (main_\w+)\.py (.*)\n", text).groups()
    args = importlib.import_module(program).parse_args(flags.split())
    assert args.cached_path == "hf://datasets/OWNER/small"


def bottom(array):
    """What the memory of an array belongs to."""
    return array if getattr(array, "base", None) is None else bottom(array.base)


@pytest.mark.parametrize("part", ["", "/deep/er"])
def test_cache_on_the_hub_is_read_as_one_in_a_folder(part, tmp_path, monkeypatch):
    """Offline, from where huggingface_hub caches it: links to blobs in the snapshot of a commit."""
    hub, commit = tmp_path / "hub", "1" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    root = hub / "datasets--owner--repo"
    made, folder = published(tmp_path)
    for i, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = root / "snapshots" / commit / part.strip("/") / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        (root / "blobs").mkdir(exist_ok=True)
        link.symlink_to(path.rename(root / f"blobs/{i}"))
    (root / "refs").mkdir()
    (root / "refs/v1").write_text(commit)
    name = f"hf://datasets/owner/repo@v1{part}"
    cache, local = open_token_cache(name), open_token_cache(made)
    assert cache.meta == local.meta and cache.names == local.names
    assert all(isinstance(bottom(shard), mmap.mmap) for *_, shard in cache._shards)
    run = {"cached_path": name, "vqgan_path": helpers.tokenizer(), "epochs": 1}
    for out, path in (("a", name), ("b", made)):
        flags = helpers.train_flags(tmp_path / out, **{**run, "cached_path": path})
        finished(helpers.call("lpd", *flags))
    first, second = (read_metrics(tmp_path / out)[-1]["loss"] for out in "ab")
    assert first == second
    other = helpers.train_flags(tmp_path / "c", **{**run, "vqgan_path": helpers.tokenizer(seed=1)})
    refused = helpers.call("lpd", *other)
    assert refused.status == 2 and f"{name} was made with tokenizer_digest" in refused.err


@pytest.mark.parametrize("name, message", [
    ("hf://owner/repo", "hf://owner/repo is a model"),
    ("hf://datasets/owner/absent", "hf://datasets/owner/absent is not in the hub's cache"),
])
def test_cache_that_is_not_on_the_hub_is_named_in_one_line(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome = helpers.call("lpd", *helpers.train_flags(tmp_path / "run", cached_path=name))
    assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert helpers.call("cache", *helpers.cache_flags(name)).err == (
        f"error: --cached_path: {name} is on the hub, a folder is needed\n"
    )


def test_incomplete_cache_is_not_exported(tmp_path):
    made, folder = published(tmp_path)
    (made / "meta.json").unlink()
    argv = "--cached_path", made, "--output_dir", tmp_path / "out"
    outcome = call_main(export.main, *argv)
    assert outcome.status == 2 and "3 of 3 shards are written" in outcome.err
    assert not (tmp_path / "out").exists()
