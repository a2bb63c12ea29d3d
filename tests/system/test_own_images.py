"""scripts/own_images.py: what it chooses, the commands it prints, and a run from images to samples."""

import importlib
import shlex

import helpers
import pytest
import torch
from helpers import call_main, picture
from processes import finished, forked

from scripts import own_images
from util.files import read_json, write_json
from util.folders import split_folder


@pytest.fixture
def quick(monkeypatch):
    """Steps are not timed: they take half a second."""
    monkeypatch.setattr(own_images, "seconds", lambda *_, least=0: 0.5)


def commands(text):
    """The programs and their words in what was printed."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


def test_printed_commands_are_those_of_the_four_programs(quick, tmp_path):
    words = helpers.images(), tmp_path / "out", "--dry_run", "--no_mirror"
    out = finished(call_main(own_images.main, *words)).out
    programs = [importlib.import_module(words[0].removesuffix(".py")) for words in commands(out)]
    tokenizer, cache, lpd, sample = (
        program.parse_args(words[1:]) for program, words in zip(programs, commands(out), strict=True)
    )
    assert tokenizer.no_mirror and lpd.no_mirror and lpd.lr == 1.5e-3
    assert tokenizer.data_path == cache.data_path == str(helpers.images())
    assert cache.cached_path == lpd.cached_path and sample.pretrained_ckpt == lpd.output_dir
    assert f"{tokenizer.output_dir}/tokenizer.safetensors" == cache.vqgan_path == lpd.vqgan_path
    assert "expected time" in out and not (tmp_path / "out").exists()


def test_time_decides_the_epochs_and_few_images_a_small_model(quick, tmp_path, monkeypatch):
    device, folder = torch.device("cpu"), own_images.folders.split_folder(helpers.images())[0]

    def epochs(minutes):
        args = own_images.parse_args([str(helpers.images()), "--minutes", str(minutes)])
        flags = own_images.recipe(args, folder, device)
        return flags["tokenizer"]["epochs"], flags["lpd"]["epochs"]

    few, more, most = epochs(0.1), epochs(1), epochs(1e9)
    assert few < more < most == (100, 300)
    assert own_images.choose(10**6, device)[1]["model"] == "lpd_tiny"
    assert own_images.choose(10**6, torch.device("cuda"))[1]["model"] == "lpd_small"
    assert own_images.choose(100, torch.device("cuda"))[1]["model"] == "lpd_tiny"


def test_recipe_serves_the_images_and_the_time_that_it_was_made_for(quick, tmp_path):
    helpers.write_images(tmp_path / "data", per_class=9)
    train, out = split_folder(tmp_path / "data")[0], tmp_path / "out"
    words = [tmp_path / "data", out, "--dry_run", "--minutes"]
    args = own_images.parse_args([str(word) for word in [*words, 1]])
    write_json(out / "recipe.json", own_images.recipe(args, train, torch.device("cpu")))
    finished(call_main(own_images.main, *words, 1))
    (train.root / train.names[0]).unlink()
    outcome = call_main(own_images.main, *words, 2)
    changes = f"minutes 1.0, now it is 2.0; images {len(train)}, now it is {len(train) - 1}"
    assert outcome.status == 2 and changes in outcome.err and "give another OUTPUT" in outcome.err


@pytest.fixture
def small(monkeypatch):
    """16 tokens and small models; steps are timed once, and seem slow; the programs are forked."""
    tokenizer, lpd = own_images.choose(18, torch.device("cpu"))
    tokenizer |= {"img_size": 32, "vocab_size": 64, "z_channels": 32, "multipliers": (1, 1, 1, 1)}
    lpd |= {"model": "lpd_micro"}
    for flags in (tokenizer, lpd):
        flags["batch_size"] = 6
    timed = own_images.seconds

    def run_command(words):
        return finished(forked(*words[1:])).status, 0

    monkeypatch.setattr(own_images, "choose", lambda *_: (dict(tokenizer), dict(lpd)))
    monkeypatch.setattr(own_images, "SAMPLING", {**own_images.SAMPLING, "generation_steps": 8})
    monkeypatch.setattr(own_images, "seconds", lambda step, device, least=0: 4 * timed(step, device, least=0))
    monkeypatch.setattr(own_images, "run_command", run_command)


def test_images_become_samples_and_the_recipe_is_kept(small, tmp_path, monkeypatch):
    words = helpers.images(), tmp_path, "--device", "cpu", "--minutes", "0.1"
    out = finished(call_main(own_images.main, *words)).out
    assert "loss: " in out and "held-out images" in out
    for name in ("tokenizer/reconstructions.png", "tokenizer/loss.png", "lpd/loss.png", "samples/grid.png"):
        assert picture(tmp_path / name).std() > 0
    kept = read_json(tmp_path / "recipe.json")
    monkeypatch.setattr(own_images, "seconds", lambda *_, least=0: 0.001)
    again = finished(call_main(own_images.main, *words, "--dry_run")).out
    assert commands(again) == commands(out) and read_json(tmp_path / "recipe.json") == kept
