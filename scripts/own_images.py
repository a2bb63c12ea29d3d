"""From a folder of images to samples: a tokenizer, a token cache and an LPD model that fit the images, the
device and the time, made by the four programs, whose commands are printed. On a CPU the small weights of
assets/colour are the start, on a GPU published ones if they can be had.

    bash scripts/own_images.sh DATA [OUTPUT] [--minutes 30]

DATA has CLASS/IMAGE, or train/ and val/ with such folders. What was chosen is kept in OUTPUT/recipe.json; the
same command again resumes, and one with more minutes goes on.
"""

from util import cli  # isort: skip
import math
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

from engine import published
from engine.train_tokenizer import evaluate_tokenizer
from models.vqgan import VQModel
from models.weights import find
from scripts.cli.job import run_until
from scripts.plan import OVERHEAD, SHARE, Plan, free_share, measure, num_processes, tuning_epochs
from util import folders
from util.device import choose_device, is_cuda
from util.distributed import World, say
from util.files import read_json, refuse_changes, write_json
from util.logging import read_metrics
from util.token_cache import names_digest

REPO = Path(__file__).resolve().parents[1]
COLOUR = REPO / "assets/colour"  # a tokenizer, 8 pixels a token, of images of any size; an LPD of its tokens
SHIPPED = "lpd_micro"  # the size of that LPD
RECIPE = 4  # changes with what is chosen: folders of others are refused
TUNING = 3000  # steps of the tokenizer on a CPU
GAINED = {0: 0.0, 600: 0.6, 1987: 0.8}  # dB by such steps with its tokens kept, of held-out emoji
BLURRED = 19  # dB
PROBED = 64  # images that the tokenizer is tried on before
POOR = 1000  # steps of LPD; fewer give colours and textures instead of things
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
    few = num_images < 5000  # smaller steps, and a model that memorises less
    gpu, size = is_cuda(device), args.img_size
    if size and size % 8:
        raise ValueError(f"--img_size {size} is not a multiple of the 8 pixels of a token")
    model = name or (("lpd_tiny" if few else "lpd_small") if gpu else SHIPPED)
    shape = {"img_size": size or 128, "batch_size": 64} if gpu else {"img_size": size or 64, "batch_size": 8}
    start = {"pretrained_ckpt": str(COLOUR / "tokenizer.safetensors"), "keep_tokens": model == SHIPPED}
    if model == SHIPPED:
        lpd = {"pretrained_ckpt": str(COLOUR / "lpd.safetensors"), "batch_size": 16, "lr": 2.5e-3}
        lpd["proj_dropout"] = 0  # on a CPU it takes a quarter of a step of this size
    else:
        lpd = {"batch_size": 32 if few else 64, "lr": 1.5e-3 if few or not gpu else 7.5e-4}
    return {**start, **shape, "lr": 5e-4}, {"model": model, **lpd}


def start_from_published(name="lpd_l_256"):
    """The name, if its weights and its tokenizer's are here or can be fetched; else None, and says why."""
    flags = published_flags(name)
    try:
        for weights in (flags["pretrained_ckpt"], flags["vqgan_path"]):
            find(weights)
    except (OSError, ValueError) as error:
        say(f"{name}: {error}; a model is trained from nothing")
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
    return {"recipe": RECIPE, **{name: getattr(args, name) for name in given}, **names}


def new_recipe(args, folder, held_out, device):
    """What is trained, with precisions and rates as measured now, and what the tokenizer gives before."""
    tokenizer, lpd = choose(args, len(folder), device)
    lpd["lr_schedule"] = "cosine"
    recipe = {"made_for": made_for(args, folder), "tokenizer": tokenizer, "lpd": lpd, "rates": {}}
    recipe["processes"] = num_processes(device)
    for name in stages(recipe):
        recipe[name]["no_mirror"] = args.no_mirror
        measure(recipe, name, device)
    if (share := free_share(device)) < 0.8:
        print(f"busy processors, {share:.0%} for this: up to {1 / share:.1f} times the steps without")
    if tokenizer:
        steps = 3 * TUNING if is_cuda(device) else TUNING
        tokenizer["epochs"] = tuning_epochs(recipe, steps, 60 * args.minutes)
        if tokenizer["keep_tokens"]:
            recipe["decibels"] = decibels(args, tokenizer, held_out or folder, device)
    return recipe


def decibels(args, flags, images, device):
    """Mean PSNR of the tokenizer that is to be tuned, of PROBED images at most, evenly spaced."""
    probed = np.isin(np.arange(len(images)), np.linspace(0, len(images) - 1, PROBED).astype(int))
    images, size = images.subset(probed), flags["img_size"]
    if args.skip_unreadable:
        images = folders.without_unreadable(images, size, World(0, 1, device), 0)
    model = VQModel.load(flags["pretrained_ckpt"])[0].to(device)
    return evaluate_tokenizer(model, images, size, device)[0]["psnr"]


def stages(recipe):
    """The trainings of a recipe: those that have flags."""
    return [name for name in ("tokenizer", "lpd") if recipe[name]]


def say_what_to_expect(plan):
    """Minutes, steps and rates of the plan, and what its tokenizer gave elsewhere."""
    recipe, tuning = plan.recipe, plan.tuning()
    n, seconds = recipe["made_for"]["images"], {"tokenizer": tuning, "lpd": plan.seconds - tuning}
    for name in stages(recipe):
        flags, rate = recipe[name], recipe["rates"][name]
        epochs = plan.epochs() if name == "lpd" else flags["epochs"]
        steps, how = epochs * n / flags["batch_size"], f"in {'bfloat16' if flags['bf16'] else 'float32'}"
        planned = f"{steps:,.0f} steps, {epochs:g} epochs of {n:,} images, {rate:.1f} a second {how}"
        print(f"{name}: about {seconds[name] / 60:.0f} minutes, {planned}")
        if flags.get("keep_tokens"):
            before, gained = recipe["decibels"], np.interp(steps, [*GAINED], [*GAINED.values()])
            print(f"expected of it: {before + gained:.1f} dB, {before:.1f} now and {gained:.1f} as on emoji")
            if before + gained < BLURRED:
                print(f"warning: pictures are blurred below {BLURRED} dB: a larger --img_size may help")


def warn_of_poor_pictures(plan, labels):
    """Say so if a model has few steps, or few images, whose labels these are. Published ones need fewer."""
    flags, n, least = plan.recipe["lpd"], len(labels), np.bincount(labels).min()
    if not plan.recipe["tokenizer"]:
        return
    if plan.epochs() * n / flags["batch_size"] < POOR:
        seconds = OVERHEAD * POOR * flags["batch_size"] / plan.recipe["rates"]["lpd"]
        enough = 5 * math.ceil(seconds / (1 - SHARE) / 300)
        print(f"warning: pictures are poor below {POOR:,} steps of LPD: give --minutes {enough}")
    if n < 100 or least < 10:
        print(f"warning: {n:,} images, {least} of the smallest class, are few: expect blots or copies")


# The four programs.


def command(args, recipe, program, python="python", place=Path()):
    """The command line of a program, a list of words; a training is started by torchrun if several processes
    share it. place: the folder of this repository."""
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
    start, own = [python], {**flags[program], "device": args.device}
    if "batch_size" in own and (processes := recipe["processes"]) > 1:
        threads = f"OMP_NUM_THREADS={max(1, torch.get_num_threads() // processes)}"
        agent = str(place / "scripts/cli/agent.py")
        start = ["env", threads, python, agent, "--nproc_per_node", str(processes)]
        own["batch_size"] //= processes
    return [*start, str(place / program), *words(own)]


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
    line = shlex.join(command(args, recipe, program))
    print("", line.replace(" --", " \\\n    --"), sep="\n", end="\n\n", flush=True)
    if args.dry_run:
        return
    write_json(Path(args.output, "recipe.json"), recipe)
    status, stopped = run_until(until, command(args, recipe, program, sys.executable, REPO))
    if status and not stopped:
        sys.exit(status)


def train_lpd(args, plan, device):
    """Train; whenever the rate in its log has room for clearly more epochs, go on with these."""
    if "epochs" not in plan.recipe["lpd"] and not args.dry_run:
        measure(plan.recipe, "lpd", device)  # the machine may be less busy than it was
    more = True
    while more:
        plan.update()
        run(args, plan.recipe, "main_lpd.py", plan.room)
        more = not args.dry_run and plan.room()


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
        recipe = read_json(kept) if kept.exists() else new_recipe(args, folder, held_out, device)
        refuse_changes(kept, recipe.get("made_for"), made_for(args, folder), "give another OUTPUT")
    plan = Plan(recipe, kept.parent, 60 * args.minutes)
    say_what_to_expect(plan)
    warn_of_poor_pictures(plan, folder.labels)
    if recipe["tokenizer"] and not Path(args.output, "cache").exists():
        run(args, recipe, "main_tokenizer.py")
    run(args, recipe, "main_cache.py")
    train_lpd(args, plan, device)
    run(args, recipe, "main_sample.py")
    if not args.dry_run:
        print_results(args, recipe)


if __name__ == "__main__":
    cli.run(main)
