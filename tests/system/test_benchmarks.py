"""benchmarks/gpu.sh: its commands are valid, and run on a CPU with tiny models."""

import importlib
import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import helpers
import pytest
import torch
from processes import QUIET, REPO, finished, python
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.without_gpu import cost
from engine.decoding import generate_tokens
from engine.sampling import Sampling
from models.lpd import LPD, LPDConfig
from util.files import read_json

# In place of `timeout`: prints the command, or runs it small.
PRINTS = "#!/bin/bash\nshift\necho \"$*\"\n"
RUNS = """#!/bin/bash
shift
case "$*" in
    *bench_generate*) tiny="--grid_size 4 --generation_steps 3 --batch_sizes 1 2 --n 1" ;;
    *bench_train*) tiny="--img_size 64 --vocab_size 64 --batch_size 2 --n 1 --attention bool" ;;
    *bench_evaluate*) tiny="--grid_size 4 --generation_steps 3 --num_images 3 --eval_bsz 2" ;;
esac
exec "$@" --model lpd_tiny $tiny --device cpu
"""


def gpu_sh(folder, stand_in, *names):
    """What benchmarks/gpu.sh prints, with its results in `folder`."""
    (folder / "timeout").write_text(stand_in)
    (folder / "timeout").chmod(0o755)
    path = {"OUT": str(folder), "PATH": f"{folder}:{os.environ['PATH']}", "TORCHDYNAMO_DISABLE": "1"}
    words, env = ["bash", REPO / "benchmarks/gpu.sh", *names], {**os.environ, **QUIET, **path}
    result = subprocess.run(words, env=env, capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stdout
    return result.stdout.splitlines()


def test_commands_are_valid_and_train_with_the_micro_batches_of_the_scripts(tmp_path):
    trained, lines = set(), gpu_sh(tmp_path, PRINTS)
    for line in lines:
        name, command = re.fullmatch(r"(\w+), exit status 0: (.*)", line).groups()
        program, _, flags = command.partition("benchmarks/")[2].partition(".py ")
        if program:
            args = importlib.import_module(f"benchmarks.{program}").parse_args(flags.split())
            assert Path(args.output_file) == tmp_path / f"gpu_{name}.json"
        if program == "bench_train":
            trained.add((f"{args.model}_{args.img_size}.sh", args.batch_size))
    assert len({line.split(",")[0] for line in lines}) == len(lines) > 20
    scripts = {path.name: path.read_text() for path in (REPO / "scripts/train").glob("*.sh")}
    recipes = {name: re.search(r"^train_lpd \d+ (\d+) ", text, re.M) for name, text in scripts.items()}
    assert trained == {(name, int(recipe[1])) for name, recipe in recipes.items()}


def test_a_command_that_fails_is_shown(tmp_path):
    with pytest.raises(AssertionError, match="card, exit status 7: broken"):
        gpu_sh(tmp_path, "#!/bin/bash\necho broken >&2\nexit 7\n", "card")


@pytest.mark.long
def test_rehearsal_of_one_command_of_each_kind(tmp_path):
    """The programs themselves, as on the GPU but for their sizes."""
    for name in ("generate_lpd_l_256_fused", "train_all_gpus", "evaluate_lpd_l_256"):
        (line,) = gpu_sh(tmp_path, RUNS, name)
        assert line.startswith(f"{name}, exit status 0: cpu: ")
        assert read_json(tmp_path / f"gpu_{name}.json")["torch"]


@pytest.mark.parametrize("table", [
    lambda run: cost.training_table([run], 0.4), lambda run: cost.disk_table([run]),
    lambda run: cost.evaluation_table([run]),
    pytest.param(lambda run: cost.sampling_table([run], 0.4), marks=pytest.mark.long),
], ids=["training", "disk", "evaluation", "sampling"])
def test_the_bill_in_the_docs_is_what_the_command_counts(table):
    page = (REPO / "docs/cost.md").read_text()
    run = next(run for run in cost.runs_of(cost.parse_args([])) if run.name == "lpd_l_256")
    header, _, row = table(run).splitlines()
    assert f"{header}\n" in page and f"{row}\n" in page


@pytest.mark.long
def test_the_command_prints_the_bill_of_a_size_of_your_own():
    flags = ["--model", "lpd_tiny", "--img_size", "64", "--images", "100", "--epochs", "1"]
    program = REPO / "benchmarks/without_gpu/cost.py"
    lines = finished(python(program, *flags, "--micro_batches", "2")).out.splitlines()
    counted = 7 if find_spec("triton") else 5  # tables: GPU memory is counted with Triton
    assert sum(line.startswith("| ---") for line in lines) == counted


@pytest.mark.long
def test_sampling_is_counted_from_one_layer_and_two():
    """Three layers count what one and two foretell."""
    config = LPDConfig(grid_size=4, vocab_size=64, embed_dim=32, depth=3, num_heads=2)
    run = cost.Run("small", config, 1, 1)
    tokens, decoder = cost.sampling_operations(run)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        order = torch.arange(16)[None]
        generate_tokens(LPD(config).eval(), order[:, 0], order, run.group_sizes, Sampling(cfg=3.0))
    assert tokens == counter.get_total_flops() and decoder > 1e9


def test_the_bill_of_a_checkpoint_and_a_token_cache_is_that_of_real_files():
    run = helpers.trained()
    config = LPD.load(run)[0].config
    saved = (run / "checkpoint-last.pth").stat().st_size
    assert cost.checkpoint_bytes(config) == pytest.approx(saved, rel=0.05)
    cached = sum(path.stat().st_size for path in helpers.token_cache().glob("shard*"))
    assert cost.cache_bytes(config, helpers.TRAIN) < cached  # headers weigh more in shards of seven images
