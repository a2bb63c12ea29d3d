"""From a folder of images to samples: a tokenizer, a token cache and an LPD model that fit the images, the
device and the time, made by the four programs, whose commands are printed.

    bash scripts/own_images.sh DATA [OUTPUT] [--minutes 30]

DATA has CLASS/IMAGE, or train/ and val/ with such folders. What was chosen is kept in OUTPUT/recipe.json; the
same command again resumes, and one with more minutes goes on. On a GPU the published weights are the start.
"""

from util import cli  # isort: skip
import math
import shlex
import sys
from pathlib import Path

import numpy as np

from engine import published
from engine.train_tokenizer import evaluate_tokenizer
from models.vqgan import VQModel
from models.weights import find
from scripts.cli.job import run_until
from scripts.plan import OVERHEAD, Plan, measure
from util import folders
from util.device import choose_device, is_cuda
from util.distributed import say
from util.files import read_json, refuse_changes, write_json
from util.logging import read_metrics
from util.token_cache import names_digest

REPO = Path(__file__).resolve().parents[1]
PROGRAMS = {"tokenizer": "main_tokenizer.py", "lpd": "main_lpd.py"}
FEW_IMAGES = 5000  # below: smaller steps, and a model that memorises less
COLOUR = str(REPO / "assets/colour/tokenizer.safetensors")  # 8 pixels a token, of images of any size
POOR = {"tokenizer": 800, "lpd": 1000}  # steps from nothing; fewer give blots, and textures instead of things
LOOK_AT = 128  # held-out images, of which it is said how well the shipped tokenizer knows them
SAMPLING = {"generation_steps": 32, "cfg": 3.0, "top_p": 0.9}


def parse_args(argv=None):
    parser = cli.Parser(description="Train on a folder of images and generate more")
    add = parser.add_argument
    add("data", metavar="DATA", help="CLASS/IMAGE folders, or a folder with train/ and val/; or archives")
    add("output", metavar="OUTPUT", nargs="?", default="output/own_images", help="default: output/own_images")
    add("--minutes", type=cli.number(float, 0.1), default=30.0, help="time to train for")
    add("--model", choices=sorted(published.MODELS), help="default: lpd_l_256 on a GPU, else one that fits")
    add("--img_size", type=cli.number(int, 8), help="default: 64 on a CPU, 128 on a GPU, 256 for lpd_l_256")
    add("--no_mirror", action="store_true", help="never mirror images, such as text or flags")
    add("--skip_unreadable", action="store_true", help="leave unreadable images out")
    cli.add_reading_flags(parser)
    cli.add_device_flag(parser)
    add("--dry_run", action="store_true", help="choose, print the commands and stop")
    return parser.parse_args(argv)


# What is trained: a dict of program -> flags, but for epochs and precision.


def choose(args, num_images, device):
    """The flags of main_tokenizer.py, none for published weights, and of main_lpd.py."""
    name = args.model or (start_from_published() if is_cuda(device) else None)
    if name in published.PUBLISHED:
        if args.img_size not in (None, published.PUBLISHED[name].img_size):
            raise ValueError(f"--img_size {args.img_size} is not that of {name}")
        return {}, published_flags(name)
    few, gpu, size = num_images < FEW_IMAGES, is_cuda(device), args.img_size
    if size and size % 8:
        raise ValueError(f"--img_size {size} is not a multiple of the 8 pixels of a token")
    model, rate = ("lpd_tiny", 1.5e-3) if few or not gpu else ("lpd_small", 7.5e-4)
    if gpu:
        tokenizer = {
            "img_size": size or 128, "vocab_size": 512 if few else 1024, "z_channels": 64, "base_width": 64,
            "multipliers": (1, 1, 2, 2), "groups": 32, "num_res_blocks": 1, "batch_size": 8 if few else 64,
        }
    else:
        tokenizer = {"img_size": size or 64, "pretrained_ckpt": COLOUR, "batch_size": 8}
    return tokenizer | {"lr": 1e-3}, {"model": name or model, "batch_size": 32 if few else 64, "lr": rate}


def start_from_published(name="lpd_l_256"):
    """The name, if its weights and its tokenizer's are here or can be fetched; else None, and says why."""
    flags = published_flags(name)
    try:
        for weights in (flags["pretrained_ckpt"], flags["vqgan_path"]):
            find(weights)
    except (OSError, ValueError) as error:
        say(f"{name}: {error}; a tokenizer and a model are trained from nothing")
        return None
    return name


def published_flags(name):
    """Flags of main_lpd.py that tune published weights: small steps, since they know images already."""
    known = published.PUBLISHED[name].flags(name)
    kept = {flag: known[flag] for flag in ("pretrained_ckpt", "vqgan_path", "img_size")}
    tuned = {"batch_size": 32, "lr": 1e-4, "grad_checkpointing": True}
    return {"model": published.PUBLISHED[name].size, **kept, **tuned}


def made_for(args, folder):
    """What a recipe must not be used without."""
    given = ("no_mirror", "background", "published_reading", "model", "img_size")
    names = {"images": len(folder), "names_digest": names_digest(folder.names)}
    return {name: getattr(args, name) for name in given} | names


def new_recipe(args, folder, device):
    """What is trained, with precisions and rates as measured now."""
    tokenizer, lpd = choose(args, len(folder), device)
    for flags in filter(None, (tokenizer, lpd)):
        flags |= {"no_mirror": args.no_mirror}
    lpd["lr_schedule"] = "cosine"
    recipe = {"made_for": made_for(args, folder), "tokenizer": tokenizer, "lpd": lpd, "rates": {}}
    for name in stages(recipe):
        measure(recipe, name, device)
    return recipe


def stages(recipe):
    """The trainings of a recipe: those of PROGRAMS that have flags."""
    return [name for name in PROGRAMS if recipe[name]]


def say_what_to_expect(plan):
    """Minutes, steps and rates of the plan, and whether its pictures will be poor."""
    recipe, few, enough = plan.recipe, [], 0.0
    n = recipe["made_for"]["images"]
    for name in stages(recipe):
        rate, batch = recipe["rates"][name], recipe[name]["batch_size"]
        epochs, minutes = plan.epochs(name), plan.budget(name) / 60
        planned = epochs * n / batch
        least = planned if "pretrained_ckpt" in recipe[name] else POOR[name]
        few += [f"{least:,} steps of the {name}"] * (planned < least)
        enough += OVERHEAD * least * batch / rate / 60
        how = f"{rate:.1f} a second in {'bfloat16' if recipe[name]['bf16'] else 'float32'}"
        steps = f"{planned:,.0f} steps, {epochs:g} epochs of {n:,} images"
        print(f"{name}: about {minutes:.0f} minutes, {steps}, {how}")
    if few:
        minutes = math.ceil(enough / 5) * 5
        print(f"warning: pictures are poor below {' and '.join(few)}: give --minutes {minutes}")


def say_decibels(tokenizer, images, device):
    """How well the tokenizer that is tuned knows an ImageSet before that."""
    model, every = VQModel.load(tokenizer["pretrained_ckpt"])[0].to(device), -(-len(images) // LOOK_AT)
    some = images.subset(np.arange(len(images)) % every == 0)
    report, _ = evaluate_tokenizer(model, some, tokenizer["img_size"], device)
    print(f"tokenizer: {report['psnr']:.1f} dB on {len(some)} of your images before it is tuned")


# The four programs.


def command(args, recipe, program):
    """The command line of a program, a list of words, without Python."""
    out, tokenizer, lpd = args.output, recipe["tokenizer"], recipe["lpd"]
    vq = f"{out}/tokenizer/tokenizer.safetensors" if tokenizer else lpd["vqgan_path"]
    background = "#{:02x}{:02x}{:02x}".format(*args.background)
    read = {
        "data_path": args.data, "background": background != "#ffffff" and background,
        "published_reading": args.published_reading, "skip_unreadable": args.skip_unreadable,
    }
    size = {"img_size": (tokenizer or lpd)["img_size"], "vqgan_path": vq}
    cached = {"cached_path": f"{out}/cache"}
    flags = {
        "main_tokenizer.py": {**read, **tokenizer, "output_dir": f"{out}/tokenizer"},
        "main_cache.py": {**size, **read, **cached},
        "main_lpd.py": {"use_cached": True, **cached, **lpd, **size, **SAMPLING, "output_dir": f"{out}/lpd"},
        "main_sample.py": {
            "pretrained_ckpt": f"{out}/lpd", "vqgan_path": vq, **SAMPLING, "output_dir": f"{out}/samples",
            "overwrite": True,
        },
    }
    return [program, *words({**flags[program], "device": args.device})]


def words(flags):
    """A dict of flags as the words of a command line."""
    line = []
    for name, value in flags.items():
        if value is not False and value != "auto":
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            line += [f"--{name}", *map(str, values)]
    return line


def run(args, recipe, program, until=lambda: False):
    """Print a program's command and run it, unless --dry_run; it is stopped when `until()` is true. A failure
    ends this program too, with the same status."""
    line = command(args, recipe, program)
    print("\npython", shlex.join(line).replace(" --", " \\\n    --"), end="\n\n", flush=True)
    if args.dry_run:
        return
    write_json(Path(args.output, "recipe.json"), recipe)
    status, stopped = run_until(until, [sys.executable, str(REPO / line[0]), *line[1:]])
    if status and not stopped:
        sys.exit(status)


def run_training(args, plan, name, device):
    """Train; whenever the rate in its log has room for clearly more epochs, go on with these."""
    if name == "lpd" and "epochs" not in plan.recipe[name] and not args.dry_run:
        measure(plan.recipe, name, device)  # the machine may be less busy than it was
    more = True
    while more:
        plan.update(name)
        run(args, plan.recipe, PROGRAMS[name], lambda: plan.room(name))
        more = not args.dry_run and plan.room(name)


def print_results(args, recipe):
    """What the tokenizer reached, the first and last losses, and where the pictures are."""
    output, places = args.output, ("lpd/loss.png", "samples/grid.png", "samples/film.gif")
    if recipe["tokenizer"]:
        report = read_json(f"{output}/tokenizer/report.json")
        quality = f"{report['psnr']:.1f} dB, {report['codebook_use']:.0%} of the codes used"
        print(f"tokenizer: {quality}, {report['images']}")
        places = ("tokenizer/reconstructions.png", "tokenizer/loss.png", *places)
    log = [line for line in read_metrics(f"{output}/lpd") if "loss" in line]
    held_out = [line["val_loss"] for line in log if "val_loss" in line]
    print(f"loss: {log[0]['loss']:.2f} -> {log[-1]['loss']:.2f} nats per token, training images")
    if held_out:
        print(f"      {held_out[0]:.2f} -> {held_out[-1]:.2f} (least {min(held_out):.2f}), held-out images")
    for place in places:
        print(f"{output}/{place}")


def main(argv=None):
    args = parse_args(argv)
    cli.existing_images("DATA", args.data)
    kept = Path(cli.writable_folder("OUTPUT", args.output)) / "recipe.json"
    with cli.checking():
        device = choose_device(args.device)
        beside = None if args.dry_run else kept.parent / "cache"  # where main_cache.py looks for it
        folder, held_out = folders.split_folder(args.data, reading=cli.reading(args), beside=beside)
        say(folders.summary(args.data, folder.class_names, folder, held_out, folder.left_out))
        recipe = read_json(kept) if kept.exists() else new_recipe(args, folder, device)
        refuse_changes(kept, recipe.get("made_for"), made_for(args, folder), "give another OUTPUT")
    plan = Plan(recipe, kept.parent, 60 * args.minutes)
    if "pretrained_ckpt" in recipe["tokenizer"]:
        say_decibels(recipe["tokenizer"], held_out or folder, device)
    say_what_to_expect(plan)
    if recipe["tokenizer"] and not Path(args.output, "cache").exists():
        run_training(args, plan, "tokenizer", device)
    run(args, recipe, "main_cache.py")
    run_training(args, plan, "lpd", device)
    run(args, recipe, "main_sample.py")
    if not args.dry_run:
        print_results(args, recipe)


if __name__ == "__main__":
    cli.run(main)
