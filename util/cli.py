"""Flags and error rules shared by the command-line programs.

Knows argparse, exit statuses and what can be checked before anything slow starts. Does not know what the
programs do. Exit status 2: wrong usage (flags or the files they name); 1: failure while running.
"""

import argparse
import os
import re
import shutil
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

from util import dist, files
from util.images import UnreadableImage
from util.signals import Stopped
from util.token_cache import DamagedCache


class UsageError(Exception):
    """The user's mistake: told in one line, exit status 2."""


class Failure(Exception):
    """The run cannot go on: told in one line, exit status 1."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that tells mistakes in one line and shows defaults in its help."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UsageError(message)


def number(kind, least=None, most=None):
    """An argparse type: an int or float within [least, most]; a bound may be None."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        low = least is not None and not value >= least  # `not >=` refuses nan too
        high = most is not None and not value <= most
        if low or high:
            bounds = f"at least {least}" if most is None else f"in {least}..{most}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    return parse


def add_seed_flag(parser):
    """--seed; so bounded that all seeds made of it, for steps and processes, fit 64 bits."""
    parser.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0)


def add_device_flags(parser):
    """--device and --num_workers."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, or mps")
    parser.add_argument("--num_workers", type=number(int, 0), default=4, help="processes that read images")


def add_tokenizer_flags(parser):
    """--vqgan_path and what may be said of a tokenizer whose file has no config."""
    parser.add_argument("--vqgan_path", metavar="FILE", help="tokenizer weights (.pt, .safetensors)")
    parser.add_argument(
        "--vqgan_vocab_size", type=number(int, 1, 65536), help="checked against the tokenizer's own"
    )
    parser.add_argument("--vqgan_stride", type=number(int, 1), help="checked against the tokenizer's own")


def add_output_flags(parser):
    """--output_dir and --overwrite, for `prepare_output`."""
    parser.add_argument("--output_dir", metavar="DIR")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run put into --output_dir"
    )


def add_class_names_flag(parser):
    """--class_names, for `class_names`."""
    parser.add_argument("--class_names", metavar="FILE", help="a name per line, for weights that hold none")


GENERATION_FLAGS = (
    "generation_steps", "group_sizes", "order", "lpd_order_file", "proximity_threshold",
    "repulsion_threshold", "cfg", "cfg_schedule", "temperature", "top_k", "top_p", "seed",
)  # fmt: skip


def add_generation_flags(parser):
    """How images are decoded: schedule, order, guidance, draws."""
    g = parser.add_argument_group("generation")
    g.add_argument(
        "--generation_steps", type=number(int, 1), help="steps of the cosine schedule; default: 20 of 256"
    )
    g.add_argument(
        "--group_sizes", type=int, nargs="+", help="tokens of each step, in place of --generation_steps"
    )
    g.add_argument(
        "--order", default="lpd", choices=["lpd", "random", "raster", "halton"], help="made when no file"
    )
    g.add_argument("--lpd_order_file", metavar="FILE", help="precomputed orders, .npy or .json")
    g.add_argument("--proximity_threshold", type=number(float, 0), default=1.0)
    g.add_argument(
        "--repulsion_threshold", type=number(float, 0), help="default: 2 on 16x16, scaled with the grid"
    )
    g.add_argument("--cfg", type=number(float, 0), default=1.0, help="guidance scale; 1 is no guidance")
    g.add_argument("--cfg_schedule", default="linear", choices=["linear", "constant"])
    g.add_argument("--temperature", type=number(float, 0), default=1.0, help="0 takes the likeliest token")
    g.add_argument("--top_k", type=number(int, 0), default=0, help="0 keeps all")
    g.add_argument("--top_p", type=number(float, 0, 1), default=1.0)


def existing_file(flag, path):
    """The path, if it is a readable file."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{flag}: no such file: {path}")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{flag}: file cannot be read: {path}")
    return path


def existing_folder(flag, path):
    """The path, if it is a folder."""
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{flag}: no such folder: {path}")
    return path


def weights_file(flag, path):
    """The path of weights; of a run folder, its checkpoint-last.pth."""
    path = Path(path)
    return existing_file(flag, path / "checkpoint-last.pth" if path.is_dir() else path)


def required(args, *names):
    """Refuse when one of these flags was not given."""
    for name in names:
        if getattr(args, name) in (None, ""):
            raise UsageError(f"--{name} is needed")


def writable_folder(flag, path):
    """The path, if files can be written there. Nothing is made: the nearest existing parent is looked at."""
    path = Path(path)
    nearest = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
    if not nearest.is_dir():
        raise UsageError(f"{flag}: {nearest} is not a folder")
    probe = nearest / f".lpd-probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{flag}: cannot write into {nearest}: {error.strerror}") from None
    return path


def class_names(args, num_classes, info):
    """A name for every class: from --class_names, the weights, or its index."""
    names = info.get("class_names") or [str(i) for i in range(num_classes)]
    if args.class_names:
        names = existing_file("--class_names", args.class_names).read_text().splitlines()
    if len(names) != num_classes:
        raise ValueError(f"--class_names has {len(names)} names, the weights have {num_classes} classes")
    return names


def find_class(flag, text, names):
    """The label of a class given by its index, its name, or its name without a leading number."""
    if text.isdigit():
        if int(text) >= len(names):
            raise ValueError(f"{flag}: {text} is not in 0..{len(names) - 1}")
        return int(text)
    plain = [re.sub(r"^\d+_", "", name) for name in names]
    for known in (names, plain):
        if text in known:
            return known.index(text)
    raise ValueError(f"{flag}: no class {text!r} among {len(names)} ({', '.join(plain[:10])}, ...)")


def prepare_output(args, record):
    """Refuse to mix with what is there; with --overwrite, clear the images of an earlier run of the program,
    which is known by the file `record`."""
    folder = writable_folder("--output_dir", args.output_dir)
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not args.overwrite:
        raise UsageError(f"--output_dir {folder} is not empty: give another or --overwrite")
    if not (folder / record).exists():
        raise UsageError(
            f"--output_dir {folder} holds no {record}: not made by this program, not overwritten"
        )
    for images in folder.glob("images*"):
        shutil.rmtree(images)


@contextmanager
def checking():
    """Inside it a ValueError or OSError is about what the user gave: told in one line, exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(error) from error


@contextmanager
def sole_writer(flag, folder, world):
    """Inside it this run alone writes into the folder that a flag names; a second run is refused."""
    with ExitStack() as stack:
        if world.is_main:
            try:
                stack.enter_context(files.sole_writer(folder))
            except files.FolderInUse as error:
                raise UsageError(f"{flag}: {error}") from None
        yield


def run(main):
    """Run a program's `main()`; end the process with the exit status of its errors, without a traceback
    for a user's mistake or a failing disk. Of several processes the first to fail tells why. A run that a
    signal stopped in good order ends with 128 and the signal's number."""
    try:
        main()
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        told = isinstance(error, (UsageError, Failure, UnreadableImage, DamagedCache, OSError))
        first, echo = dist.first_to_fail(error), dist.is_echo(error)
        if first and not (told or echo):
            raise
        if first:
            reason = f"another process is gone ({str(error).splitlines()[0]})" if echo else error
            print(f"error: {reason}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def check_tokenizer_flags(args, config):
    """Refuse --vqgan_vocab_size or --vqgan_stride that differ from the tokenizer's own."""
    for flag, own in (("vqgan_vocab_size", config.vocab_size), ("vqgan_stride", config.stride)):
        given = getattr(args, flag)
        if given is not None and given != own:
            raise UsageError(f"--{flag} is {given}, the tokenizer {args.vqgan_path} has {own}")


def check_fit(args, model, tokenizer, info, digest):
    """Refuse a model and a tokenizer (of that digest), or an --img_size, that do not belong together."""
    if info.get("tokenizer_digest") not in (None, "", digest):
        raise UsageError(
            f"--pretrained_ckpt was trained with tokenizer {info['tokenizer_digest']}, "
            f"{args.vqgan_path} is {digest}"
        )
    ours, theirs = model.config.vocab_size, tokenizer.config.vocab_size
    if ours != theirs:
        raise UsageError(f"--pretrained_ckpt has {ours} codes, the tokenizer {args.vqgan_path} has {theirs}")
    img_size = model.config.grid_size * tokenizer.config.stride
    if args.img_size not in (None, img_size):
        raise UsageError(f"--img_size is {args.img_size}, the weights make {img_size} px")
    class_num = getattr(args, "class_num", None)
    if class_num not in (None, model.config.num_classes):
        raise UsageError(f"--class_num is {class_num}, the weights have {model.config.num_classes} classes")
