"""Everything that waits for a GPU, in pieces of under ten minutes, alone and in any order, without a network.

    bash scripts/gpu_day.sh --list                   what each piece needs, and how many minutes to plan
    bash scripts/gpu_day.sh tests generate_lpd_l_256
    bash scripts/gpu_day.sh                          all pieces that have no result yet

A piece writes gpu_NAME.json into --output_dir and what it printed into gpu_NAME.log beside it, then prints
its line of the README's table. --tiny rehearses all pieces on a CPU with tiny models (give
`fashion_mnist_16x16` a few images with --data_path).
"""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import record
from util import cli
from util.device import choose_device
from util.files import read_json, write_json
from util.logging import read_metrics

REPO = Path(__file__).resolve().parents[1]
FASHION = "data/fashion_mnist"
LIMIT = 590  # seconds
TINY = {  # what --tiny appends to a command; of a flag given twice the last counts
    "bench_generate": "--model lpd_tiny --grid_size 4 --generation_steps 3 --batch_sizes 1 2 --n 1",
    "bench_train": "--model lpd_tiny --img_size 64 --vocab_size 64 --batch_size 2 --n 1 --attention bool",
    "bench_evaluate": "--model lpd_tiny --grid_size 4 --generation_steps 3 --num_images 3 --eval_bsz 2",
    "pytest": "tests/system/test_fast.py -k packed -m not\\ gpu", "fashion_mnist_16x16": "",
}
EPOCHS = {True: ("0.1", "0.1"), False: ("2", "10")}  # of tokenizer and LPD; True: --tiny


def all_pieces():
    """Name -> (command, minutes to plan, what it needs), in the order of their worth."""
    pieces = {"tests": ("python -m pytest -m gpu", 8, "a GPU, requirements-dev.txt")}
    for model, px in (("lpd_l", 256), ("lpd_xl", 256), ("lpd_xxl", 256), ("lpd_l", 512)):
        flags = f"--model {model} --grid_size {px // 16} --batch_sizes 1 64 --bf16"
        command = f"python benchmarks/bench_generate.py {flags} --against plain"
        pieces[f"generate_{model}_{px}"] = command, 6, "a GPU"
        pieces[f"generate_{model}_{px}_fused"] = f"{command} --fused_decoder", 9, "a GPU"
    recipes = [("lpd_l", 256, 64), ("lpd_xl", 256, 32), ("lpd_xxl", 256, 16), ("lpd_l", 512, 16)]
    for model, px, batch in [*recipes, ("lpd_xl", 512, 8)]:  # the micro-batches of scripts/train
        flags = f"benchmarks/bench_train.py --model {model} --img_size {px} --batch_size {batch} --bf16"
        for attention in ("additive", "flex"):
            command = f"python {flags} --attention {attention}"
            pieces[f"train_{model}_{px}_{attention}"] = command, 5, "a GPU of 80 GB"
        pieces[f"train_{model}_{px}_plain"] = f"python {flags} --variants plain", 4, "a GPU of 80 GB"
        launch = "scripts/cli/agent.py --master_addr 127.0.0.1 --master_port 29533 --nproc_per_node auto"
        command = f"python {launch} -- {flags}"
        pieces[f"train_{model}_{px}_all_gpus"] = command, 6, "several GPUs of 80 GB"
    command = "python benchmarks/bench_evaluate.py --model lpd_l --num_images 10000 --bf16"
    pieces["evaluate_lpd_l_256"] = command, 5, "a GPU"
    needs = f"a GPU, {FASHION} (made by scripts/data/fashion_mnist.sh, which needs a network)"
    return {**pieces, "fashion_mnist_16x16": ("bash scripts/fashion_mnist_16x16.sh", 9, needs)}


def parse_args(argv=None):
    parser = cli.Parser(description="Everything that waits for a GPU, in pieces")
    add = parser.add_argument
    add("pieces", nargs="*", metavar="PIECE", help="without names: all that have no result yet")
    add("--list", action="store_true", help="what each piece needs, and how many minutes to plan")
    add("--tiny", action="store_true", help="rehearse on a CPU with tiny models")
    add("--data_path", metavar="DIR", default=str(REPO / FASHION), help="the images of Fashion-MNIST")
    add("--output_dir", metavar="DIR", type=Path, help="default: benchmarks/results, or output/gpu_day_tiny")
    args = parser.parse_args(argv)
    unknown = set(args.pieces) - set(all_pieces())
    if unknown:
        raise cli.UsageError(f"no piece is called {min(unknown)}: see --list")
    args.output_dir = args.output_dir or REPO / ("output/gpu_day_tiny" if args.tiny else "benchmarks/results")
    return args


def command_of(args, command, result, work):
    """The words to run and the environment."""
    words = shlex.split(command)
    kind = next(kind for kind in TINY if kind in command)
    if args.tiny:
        words += [*shlex.split(TINY[kind]), *(["--device", "cpu"] if kind.startswith("bench") else [])]
    if kind.startswith("bench"):
        words += ["--output_file", str(result)]
    if kind == "fashion_mnist_16x16":
        words += [args.data_path, str(work)]
    if words[0] == "python":
        words[0] = sys.executable
    tokenizer_epochs, lpd_epochs = EPOCHS[args.tiny]
    env = {**os.environ, "PYTHONPATH": str(REPO), "TOKENIZER_EPOCHS": tokenizer_epochs}
    env |= {"LPD_EPOCHS": lpd_epochs, "LPD_MODEL": "lpd_micro" if args.tiny else "lpd_tiny"}
    if args.tiny:
        env |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return ["timeout", str(LIMIT), *words], env


def summary(name, report):
    """What the README's table says of a report, in words."""
    if name.startswith("generate"):
        rows = [row for row in report["rows"] if row["path"].endswith("images")]
        return "; ".join(
            f"{row['path']}, batch {row['batch']}: {1000 * row['seconds']:.1f} ms, "
            f"{row['images_per_second']:.1f} images/s (floor {1000 * row['floor_seconds']:.1f} ms)"
            for row in rows
        )
    if name.startswith("train"):
        (steps,) = report["variants"].values()
        rate = f"{steps['images_per_s']} images/s on {report['processes']}, {steps['share_of_floor']:.0%}"
        return f"{rate} of the rate of a matrix product, {report['peak_device_memory_gb']} GB"
    if name.startswith("evaluate"):
        share = report["share_of_features_and_metrics"]
        return f"{report['images_per_second']} images/s, features and metrics take {share:.1%}"
    return report["outcome"]


def outcome(name, log, work):
    """The outcome of a piece that writes no report itself."""
    if name == "tests":
        return re.findall(r"\d+ (?:passed|failed|skipped|error|deselected)[^\n]* in [\d.]+s", log)[-1]
    last = [line for line in read_metrics(work / "lpd") if "val_loss" in line][-1]
    return f"{last['epoch']:.1f} epochs, loss on held-out images {last['val_loss']:.3f} nats per token"


def run_piece(args, name):
    """Run a piece; prints its line. Returns whether it succeeded."""
    command, minutes, _ = all_pieces()[name]
    result, log = (args.output_dir / f"gpu_{name}{suffix}" for suffix in (".json", ".log"))
    work = args.output_dir / f"gpu_{name}"
    words, env = command_of(args, command, result, work)
    print(f"{name}: up to {minutes} minutes", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    with log.open("w") as file:
        status = subprocess.run(words, env=env, cwd=REPO, stdout=file, stderr=subprocess.STDOUT).returncode
    seconds = round(time.perf_counter() - begin, 1)
    if status:
        why = f"stopped after {LIMIT} s" if status == 124 else f"exit status {status}"
        print(f"error: {name}: {why}, see {log}", file=sys.stderr)
        return False
    if not result.exists():
        device = choose_device("cpu" if args.tiny else "auto")
        write_json(result, record(device, seconds=seconds, outcome=outcome(name, log.read_text(), work)))
    report = read_json(result)
    print(f"| {name.replace('_', ' ')} | {report['device']} | {summary(name, report)} |", flush=True)
    return True


def main(argv=None):
    args = parse_args(argv)
    pieces = all_pieces()
    if args.list:
        for name, (_, minutes, needs) in pieces.items():
            print(f"{name:<28}{minutes:>3} min  {needs}")
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    left = [name for name in pieces if not (args.output_dir / f"gpu_{name}.json").exists()]
    failed = [name for name in args.pieces or left if not run_piece(args, name)]
    if failed:
        raise cli.Failure(f"{len(failed)} pieces failed: {' '.join(failed)}")


if __name__ == "__main__":
    cli.run(main)
