"""scripts/own_images.py: what it chooses, the commands it prints, and a run from images to samples."""

import contextlib
import importlib
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
from helpers import call, call_main, picture
from processes import finished

from models.lpd import LPD, LPD_CONFIGS
from models.vqgan import VQModel
from models.weights import state_digest
from scripts import own_images, plan
from util.files import read_json, write_json
from util.folders import split_folder

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Steps are not timed: they take half a second, on processors of which half is busy."""
    monkeypatch.setattr(plan, "faster", lambda make_step, device: (False, 0.5, 0.5))
    for module in (own_images, plan):
        monkeypatch.setattr(module, "free_share", lambda device: 0.5)


def program_and_words(line):
    """`main_NAME.py` and what follows it in the words of a command, whose launcher may be torchrun's."""
    programs = [Path(word).name for word in line]
    start = next(i for i, name in enumerate(programs) if name.startswith("main_"))
    return [programs[start], *line[start + 1 :]]


def commands(text):
    """The programs and their words in what was printed."""
    lines = text.replace("\\\n", " ").splitlines()
    return [program_and_words(shlex.split(line)) for line in lines if line.startswith(("python ", "env "))]


def test_printed_commands_are_those_of_the_four_programs(quick, tmp_path):
    words = ["--no_mirror", "--background", "red", "--img_size", 32, "--model", "lpd_micro"]
    out = finished(call_main(own_images.main, helpers.images(), tmp_path / "out", "--dry_run", *words)).out
    programs = [importlib.import_module(words[0].removesuffix(".py")) for words in commands(out)]
    tokenizer, cache, lpd, sample = (
        program.parse_args(words[1:]) for program, words in zip(programs, commands(out), strict=True)
    )
    assert tokenizer.no_mirror and lpd.no_mirror and lpd.lr == 2.5e-3 and lpd.model == "lpd_micro"
    assert tokenizer.background == cache.background == (255, 0, 0)
    assert tokenizer.img_size == cache.img_size == lpd.img_size == 32
    starts = tokenizer.pretrained_ckpt, lpd.pretrained_ckpt
    assert starts == tuple(str(own_images.COLOUR / f"{name}.safetensors") for name in ("tokenizer", "lpd"))
    assert tokenizer.keep_tokens
    assert tokenizer.data_path == cache.data_path == str(helpers.images())
    assert cache.cached_path == lpd.cached_path and sample.pretrained_ckpt == lpd.output_dir
    assert f"{tokenizer.output_dir}/tokenizer.safetensors" == cache.vqgan_path == lpd.vqgan_path
    assert "busy processors, 50% for this" in out and not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a training is one process")
@pytest.mark.parametrize("threads, processes", [(1, 1), (2, 2), (12, 4)])
def test_processors_are_shared_by_processes_and_these_share_a_batch(
    quick, monkeypatch, tmp_path, threads, processes
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(plan, "threads_of", lambda processes: contextlib.nullcontext())
    words = helpers.images(), tmp_path / "out", "--dry_run", "--device", "cpu"
    out = finished(call_main(own_images.main, *words)).out
    trainings = [words for words in commands(out) if "--batch_size" in words]
    batches = [int(words[words.index("--batch_size") + 1]) for words in trainings]
    assert batches == [8 // processes, 16 // processes]
    launcher = f"env OMP_NUM_THREADS={threads // processes} python scripts/cli/agent.py"
    assert out.count(launcher) == out.count(f"--nproc_per_node {processes}") == (2 if processes > 1 else 0)


def plan_for(minutes, output="out", images=1808, decibels=20.0):
    """The plan of a recipe whose steps take half a second."""
    tokenizer, lpd = own_images.choose(own_images.parse_args(["data"]), images, CPU)
    tokenizer["bf16"] = lpd["bf16"] = False
    recipe = {"made_for": {"images": images}, "tokenizer": tokenizer, "lpd": lpd}
    recipe |= {"rates": {"tokenizer": 16.0, "lpd": 64.0}, "processes": 2, "decibels": decibels}
    tokenizer["epochs"] = plan.tuning_epochs(recipe, own_images.TUNING, 60 * minutes)
    return plan.Plan(recipe, Path(output), 60.0 * minutes)


def trained(folder, step, images_per_s, starts=1):
    """Leave what a training leaves in its folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    line = json.dumps({"step": step, "images_per_s": images_per_s})
    Path(folder, "metrics.jsonl").write_text(f"{line}\n")
    Path(folder, "runs.jsonl").write_text("{}\n" * starts)


def test_size_of_the_model_follows_images_and_device():
    args = own_images.parse_args(["data", "--model", "lpd_l"])
    assert own_images.choose(args, 10**6, torch.device("cuda"))[1]["model"] == "lpd_l"
    args.model = None
    assert own_images.choose(args, 10**6, CPU)[1]["model"] == "lpd_micro"
    args.model = "lpd_tiny"  # nothing of that size ships: the tokenizer may change
    tokenizer, lpd = own_images.choose(args, 10**6, CPU)
    assert not tokenizer["keep_tokens"] and "pretrained_ckpt" not in lpd
    args.img_size = 60
    with pytest.raises(ValueError, match="--img_size 60 is not a multiple of the 8"):
        own_images.choose(args, 100, CPU)


def test_shipped_weights_are_a_pair():
    tokenizer, _ = VQModel.load(own_images.COLOUR / "tokenizer.safetensors")
    lpd, info = LPD.load(own_images.COLOUR / "lpd.safetensors")
    assert info["tokenizer_digest"] == state_digest(tokenizer)
    assert lpd.config.vocab_size == tokenizer.config.vocab_size
    assert lpd.config.embed_dim == LPD_CONFIGS[own_images.SHIPPED].embed_dim


def test_tokenizer_is_tuned_for_a_quarter_of_little_time_and_no_longer_than_that_helps():
    shares = [plan_for(m).tuning() / 60 / m for m in (1, 60, 300)]
    assert shares == pytest.approx([plan.SHARE, plan.SHARE, 0.09], rel=0.05)
    epochs = [plan_for(m).epochs() for m in (5, 60, 10**6)]
    assert epochs[0] < epochs[1] < epochs[2] == plan.MOST_EPOCHS


def test_what_to_expect_is_said_of_as_many_steps_as_fit(capsys):
    for minutes, steps, expected in ((1, 27, 20.0), (30, 814, 20.6)):
        own_images.say_what_to_expect(plan_for(minutes))
        tokenizer, decibels, lpd = capsys.readouterr().out.splitlines()
        assert f"{steps} steps" in tokenizer and lpd.startswith("lpd: about ")
        assert f"{expected} dB, 20.0 now" in decibels
    own_images.say_what_to_expect(plan_for(1, decibels=18.9))
    assert "blurred below 19 dB" in capsys.readouterr().out


def test_poor_pictures_are_announced_with_the_minutes_that_would_do(capsys):
    """Of too few steps of LPD, or images: few in all, or of a class."""
    labels = [0] * 1000 + [1] * 808
    own_images.warn_of_poor_pictures(plan_for(3), labels)
    out = capsys.readouterr().out
    assert "poor below 1,000 steps of LPD: give --minutes " in out and "are few" not in out
    enough = plan_for(int(out.split("--minutes ")[1]))
    own_images.warn_of_poor_pictures(enough, labels)
    assert capsys.readouterr().out == ""
    for few in ([0] * 99, [0] * 1800 + [1] * 8):
        own_images.warn_of_poor_pictures(enough, few)
        counts = f"{len(few):,} images, {few.count(few[-1])} of the smallest class, are few"
        assert counts in capsys.readouterr().out


def test_plan_grows_with_the_rate_in_the_log(tmp_path):
    """It begins with half of what seems to fit; a machine that becomes free gets more epochs."""
    made = plan_for(10, tmp_path)
    fits, flags = made.epochs(), made.recipe["lpd"]
    made.update()
    assert flags["epochs"] == fits / 2 and not made.room()
    trained(tmp_path / "lpd", step=100, images_per_s=160)
    assert made.room()
    made.update()
    assert flags["epochs"] > 1.9 * fits and not made.room()
    trained(tmp_path / "lpd", step=100, images_per_s=32)  # planned epochs are never fewer
    planned = flags["epochs"]
    made.update()
    assert flags["epochs"] == planned


def test_more_minutes_continue_a_finished_run(tmp_path):
    made = plan_for(14, tmp_path)
    made.recipe["lpd"]["epochs"] = 12
    trained(tmp_path / "tokenizer", 900, images_per_s=16)
    trained(tmp_path / "lpd", step=678, images_per_s=80)
    (tmp_path / "cache").mkdir()
    assert not made.room() and replace(made, seconds=20 * 60).room()


def test_precision_is_the_one_of_less_processor_time(monkeypatch):
    """Wall time may be another program's; an emulated precision is tried once."""
    times = {False: [(9.0, 3.0)], True: [(2.0, 4.0)]}  # wall, processor
    monkeypatch.setattr(plan, "seconds", lambda step, device: step())
    found = plan.faster(lambda bf16: iter(times[bf16] * 10**6).__next__, CPU, least=1e-3)
    assert found == (False, 9, 3)
    slow = {False: [(1.0, 1.0)] * 10**6, True: [(50.0, 50.0)]}
    assert not plan.faster(lambda bf16: iter(slow[bf16]).__next__, CPU, least=1e-3)[0]


def test_recipe_serves_the_images_that_it_was_made_for(quick, tmp_path):
    helpers.write_images(tmp_path / "data", per_class=9)
    train, out = split_folder(tmp_path / "data")[0], tmp_path / "out"
    words = [tmp_path / "data", out, "--dry_run"]
    args = own_images.parse_args([str(word) for word in words])
    write_json(out / "recipe.json", own_images.new_recipe(args, train, None, CPU))
    finished(call_main(own_images.main, *words, "--minutes", 99))
    (train.root / train.names[0]).unlink()
    outcome = call_main(own_images.main, *words, "--no_mirror")
    changes = f"no_mirror False, now it is True; images {len(train)}, now it is {len(train) - 1}"
    assert outcome.status == 2 and changes in outcome.err and "give another OUTPUT" in outcome.err


@pytest.fixture
def small(quick, monkeypatch):
    """16 tokens and small models for a few steps."""
    tokenizer, lpd = own_images.choose(own_images.parse_args(["data", "--model", "lpd_micro"]), 18, CPU)
    tokenizer |= {"img_size": 16, "pretrained_ckpt": str(helpers.tokenizer()), "batch_size": 6}
    lpd = {"model": lpd["model"], "batch_size": 6, "lr": 1e-3}  # from nothing
    monkeypatch.setattr(own_images, "choose", lambda *_: (dict(tokenizer), dict(lpd)))
    monkeypatch.setattr(own_images, "SAMPLING", {**own_images.SAMPLING, "generation_steps": 8})


def run_here(due, words):
    """As `run_until`, in this process."""
    program, *words = program_and_words(words)
    return finished(call(Path(program).stem.removeprefix("main_"), *words)).status, False


def test_images_become_samples_and_the_recipe_is_kept(small, monkeypatch, tmp_path):
    monkeypatch.setattr(own_images, "run_until", run_here)
    words = helpers.images(), tmp_path, "--device", "cpu", "--minutes", "0.1"
    out = finished(call_main(own_images.main, *words)).out
    assert "loss: " in out and "held-out images" in out
    for name in ("tokenizer/reconstructions.png", "tokenizer/loss.png", "lpd/loss.png", "samples/grid.png"):
        assert picture(tmp_path / name).std() > 0
    kept = read_json(tmp_path / "recipe.json")
    assert kept["decibels"] == pytest.approx(read_json(tmp_path / "tokenizer/report.json")["psnr"], abs=1)
    again = finished(call_main(own_images.main, *words, "--dry_run")).out
    last = {words[0]: words for words in commands(out)}  # a training may have grown
    assert len(last) == 4 and commands(again) == [*last.values()][1:]
    assert read_json(tmp_path / "recipe.json") == kept


@pytest.mark.long
def test_two_processes_share_the_trainings(small, monkeypatch, tmp_path):
    monkeypatch.setattr(own_images, "num_processes", lambda device: 2)
    finished(call_main(own_images.main, helpers.images(), tmp_path, "--device", "cpu", "--minutes", "0.1"))
    for name in ("tokenizer", "lpd"):
        runs = [json.loads(line) for line in (tmp_path / name / "runs.jsonl").read_text().splitlines()]
        assert {(run["processes"], "--batch_size 3" in run["command"]) for run in runs} == {(2, True)}
    assert picture(tmp_path / "samples/grid.png").std() > 0
