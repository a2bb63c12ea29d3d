"""From a folder of images to samples: a tokenizer, a token cache and an LPD model that fit the number of
images, the device and the time, made by the four programs, whose commands are printed.

    bash scripts/own_images.sh DATA [OUTPUT] [--minutes 30]

DATA has CLASS/IMAGE, or train/ and val/ with such folders. What was chosen is kept in OUTPUT/recipe.json; the
same command again resumes, and one for other images or another time needs another OUTPUT.
"""

from util import cli  # isort: skip
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from engine import train, train_tokenizer
from models.lpd import LPD_CONFIGS
from models.vqgan import VQConfig
from orders.schedule import training_steps
from scripts.cli.job import run_command
from util import folders
from util.device import choose_device, is_cuda, synchronize
from util.distributed import World, say
from util.files import read_json, refuse_changes, write_json
from util.images import image_loader, in_order
from util.logging import read_metrics
from util.token_cache import names_digest

REPO = Path(__file__).resolve().parents[1]
FEW_IMAGES = 5000  # below: smaller steps, and a model that memorises less
TOKENIZER_SHARE = 0.35  # of the time
OVERHEAD = 1.2  # a run by its steps alone: data, validation, samples and checkpoints take the rest
TOKENIZER_SIZES = ("vocab_size", "base_width", "multipliers", "num_res_blocks", "z_channels")
SAMPLING = {"generation_steps": 32, "cfg": 3.0, "top_p": 0.9}
MOST_EPOCHS = {"tokenizer": 100, "lpd": 300}  # more do not help


def parse_args(argv=None):
    parser = cli.Parser(description="Train on a folder of images and generate more")
    add = parser.add_argument
    add("data", metavar="DATA", help="CLASS/IMAGE folders, or a folder with train/ and val/; or archives")
    add("output", metavar="OUTPUT", nargs="?", default="output/own_images", help="default: output/own_images")
    add("--minutes", type=cli.number(float, 0.1), default=30.0, help="time to train for")
    add("--no_mirror", action="store_true", help="never mirror images, such as text or flags")
    add("--skip_unreadable", action="store_true", help="leave unreadable images out")
    cli.add_device_flag(parser)
    add("--dry_run", action="store_true", help="choose, print the commands and stop")
    return parser.parse_args(argv)


def choose(num_images, device):
    """Sizes and rates for a data set as flags of main_tokenizer.py and main_lpd.py, but for epochs and
    precision. A token is 8x8 pixels: 8x8 of them on a CPU, 16x16 on a GPU."""
    few, gpu = num_images < FEW_IMAGES, is_cuda(device)
    model, rate = ("lpd_tiny", 1.5e-3) if few or not gpu else ("lpd_small", 7.5e-4)
    tokenizer = {
        "img_size": 128 if gpu else 64, "vocab_size": 512 if few else 1024, "base_width": 64 if gpu else 32,
        "multipliers": (1, 1, 2, 2), "num_res_blocks": 1, "z_channels": 64, "batch_size": 16 if few else 64,
        "lr": 1e-3,
    }
    return tokenizer, {"model": model, "batch_size": 32 if few else 64, "lr": rate, "lr_schedule": "cosine"}


# How long a step takes here.


def seconds(step, device, least=3.0):
    """The time of a step, from as many as fill `least` seconds, after two more."""
    step(), step()
    synchronize(device)
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < least:
        step()
        count += 1
    synchronize(device)
    return (time.perf_counter() - start) / count


def tokenizer_step(flags, bf16, device):
    """A function that takes a training step of the tokenizer on random pixels."""
    size, batch = flags["img_size"], flags["batch_size"]
    model = VQConfig(**{name: flags[name] for name in TOKENIZER_SIZES})
    config = train_tokenizer.TokenizerTrainConfig(model, size, batch_size=batch, bf16=bf16, warmup_steps=0)
    state = train_tokenizer.new_state(config, device)
    pixels = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    return lambda: train_tokenizer.train_step(state, state.model, pixels, 10**6)


def lpd_step(tokenizer, flags, bf16, device):
    """A function that takes a training step of LPD on random tokens."""
    batch, grid, codes = flags["batch_size"], tokenizer["img_size"] // 8, tokenizer["vocab_size"]
    model = replace(LPD_CONFIGS[flags["model"]], grid_size=grid, vocab_size=codes, num_classes=1)
    config = train.TrainConfig(model, batch, training_steps(grid**2), global_batch=batch, bf16=bf16)
    state, world = train.new_state(config, device), World(0, 1, device)
    tokens, labels = torch.randint(codes, (batch, grid**2)), torch.zeros(batch, dtype=torch.long)
    return lambda: train.train_step(state, state.model.loss, world, 1, iter([(tokens, labels)]))


# The recipe: a dict of program -> flags.


def recipe(args, folder, device):
    """Choose the flags of the four programs and print what was chosen, and the time that it should take."""
    tokenizer, lpd = choose(len(folder), device)
    some = range(0, len(folder), max(1, len(folder) // 32))
    plan, size = list(in_order(some, 32)), tokenizer["img_size"]
    reading = seconds(lambda: list(image_loader(folder, size, plan, 0)), device, least=0) / len(some)
    expected, n = 0.0, len(folder)
    shares = {"tokenizer": TOKENIZER_SHARE, "lpd": 1 - TOKENIZER_SHARE}
    for name, flags, make_step, extra in (
        ("tokenizer", tokenizer, lambda bf16: tokenizer_step(tokenizer, bf16, device), reading),
        ("lpd", lpd, lambda bf16: lpd_step(tokenizer, lpd, bf16, device), 0),
    ):
        step, flags["bf16"] = min((seconds(make_step(bf16), device), bf16) for bf16 in (True, False))
        epoch = OVERHEAD * n * (step / flags["batch_size"] + extra)
        fitting = round(60 * args.minutes * shares[name] / epoch)
        flags["epochs"] = min(MOST_EPOCHS[name], max(1, fitting))
        flags["no_mirror"] = args.no_mirror
        expected += epoch * flags["epochs"]
        print(
            f"{name}: {flags['epochs']} epochs of {n} images, {epoch * flags['epochs'] / 60:.0f} minutes at "
            f"{n / epoch:.1f} images a second, {'bfloat16' if flags['bf16'] else 'float32'}"
        )
    print(f"expected time: {expected / 60:.0f} minutes and a little more for samples")
    lpd |= {"warmup_epochs": lpd["epochs"] / 20, "sample_freq": max(1, lpd["epochs"] // 4)}
    return {"made_for": made_for(args, folder), "tokenizer": tokenizer, "lpd": lpd, "sampling": SAMPLING}


def made_for(args, folder):
    """What a recipe must not be used without."""
    return {
        "minutes": args.minutes, "no_mirror": args.no_mirror, "images": len(folder),
        "names_digest": names_digest(folder.names),
    }


def commands(args, flags):
    """The command lines of the four programs, each a list of words, without Python."""
    out, tokenizer, lpd = args.output, flags["tokenizer"], flags["lpd"]
    vq, device = f"{out}/tokenizer/tokenizer.safetensors", {"device": args.device}
    skip = {"skip_unreadable": args.skip_unreadable}
    cached = {"img_size": tokenizer["img_size"], "vqgan_path": vq, "data_path": args.data}
    from_cache = {"use_cached": True, "cached_path": f"{out}/cache", "vqgan_path": vq}
    weights = {"pretrained_ckpt": f"{out}/lpd", "vqgan_path": vq, **flags["sampling"]}
    programs = {
        "main_tokenizer.py": {"data_path": args.data, **tokenizer, **skip, "output_dir": f"{out}/tokenizer"},
        "main_cache.py": {**cached, **skip, "cached_path": f"{out}/cache"},
        "main_lpd.py": {**from_cache, **lpd, **flags["sampling"], "output_dir": f"{out}/lpd"},
        "main_sample.py": {**weights, "output_dir": f"{out}/samples", "overwrite": True},
    }
    return [[program, *words({**given, **device})] for program, given in programs.items()]


def words(flags):
    """A dict of flags as the words of a command line."""
    line = []
    for name, value in flags.items():
        if value is not False and value != "auto":
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            line += [f"--{name}", *map(str, values)]
    return line


def print_results(output):
    """What the tokenizer reached, the first and last losses, and where the pictures are."""
    report = read_json(f"{output}/tokenizer/report.json")
    quality = f"{report['psnr']:.1f} dB, {report['codebook_use']:.0%} of the codes used"
    print(f"tokenizer: {quality}, {report['images']}")
    log = [line for line in read_metrics(f"{output}/lpd") if "loss" in line]
    held_out = [line["val_loss"] for line in log if "val_loss" in line]
    print(f"loss: {log[0]['loss']:.2f} -> {log[-1]['loss']:.2f} nats per token, training images")
    if held_out:
        print(f"      {held_out[0]:.2f} -> {held_out[-1]:.2f} (least {min(held_out):.2f}), held-out images")
    tokenizer = ("tokenizer/reconstructions.png", "tokenizer/loss.png")
    for place in (*tokenizer, "lpd/loss.png", "samples/grid.png", "samples/film.gif"):
        print(f"{output}/{place}")


def main(argv=None):
    args = parse_args(argv)
    cli.existing_images("DATA", args.data)
    kept = Path(cli.writable_folder("OUTPUT", args.output)) / "recipe.json"
    with cli.checking():
        device = choose_device(args.device)
        beside = None if args.dry_run else kept.parent / "cache"  # where main_cache.py looks for it
        train_images, held_out = folders.split_folder(args.data, beside=beside)
        left_out = train_images.left_out
        say(folders.summary(args.data, train_images.class_names, train_images, held_out, left_out))
        flags = read_json(kept) if kept.exists() else recipe(args, train_images, device)
        refuse_changes(kept, flags.get("made_for"), made_for(args, train_images), "give another OUTPUT")
    if not args.dry_run:
        write_json(kept, flags)
    for line in commands(args, flags):
        print("\npython", shlex.join(line).replace(" --", " \\\n    --"), end="\n\n", flush=True)
        if not args.dry_run:
            status, _ = run_command([sys.executable, str(REPO / line[0]), *line[1:]])
            if status:
                sys.exit(status)
    if not args.dry_run:
        print_results(args.output)


if __name__ == "__main__":
    cli.run(main)
