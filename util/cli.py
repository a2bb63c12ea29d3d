"""What the command-line programs share: flags, checks before anything slow starts, errors in one line.

Exit status 2 is wrong usage (flags or the files they name), 1 a failure while running, 75 the loss of other
processes (sysexits.h: try again), 128 + n a stop by signal n.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
import unicodedata
from contextlib import ExitStack, contextmanager
from pathlib import Path

from PIL import ImageColor

from util import files, folders, hub, sources
from util.distributed import Stopped, describe_loss, ending_workers, is_peer_failure, leave, say
from util.images import Reading, UnreadableImage
from util.token_cache import DamagedCache


class UsageError(Exception):
    """The user's mistake: reported in one line, exit status 2."""


class Failure(Exception):
    """The run cannot go on: reported in one line, exit status 1."""


class _Help(argparse.HelpFormatter):
    """Help with the default of every flag, unless its help says it in words."""

    def add_argument(self, action):
        default, words = action.default, action.help or ""
        if action.option_strings and default is not argparse.SUPPRESS and "default" not in words:
            shown = "no default" if default is None else "default: %(default)s"
            action.help = f"{words} ({'default: off' if default is False else shown})".strip()
        super().add_argument(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports mistakes in one line and shows defaults in its help."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UsageError(message)


def number(kind, least=None, most=None):
    """An argparse type: an int or float within [least, most]; a bound may be None."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a valid {kind.__name__}") from None
        low = least is not None and not value >= least  # `not >=` refuses nan too
        high = most is not None and not value <= most
        if low or high:
            bounds = f"at least {least}" if most is None else f"in {least}..{most}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    return parse


class GroupSizes(argparse.Action):
    """Group sizes as numbers, or as published scripts write them: "[1, 2, 5]" or "[1]*256"; parsed, never
    evaluated."""

    def __call__(self, parser, args, values, flag=None):
        text = " ".join(values)
        if not re.fullmatch(r"[\d\s]+|\[[\d,\s]+\](\s*\*\s*[1-9]\d{0,5})?", text):
            parser.error(f"{flag}: {text[:80]!r} is not a list of numbers")
        sizes, _, times = text.partition("*")
        setattr(args, self.dest, [int(size) for size in re.findall(r"\d+", sizes)] * int(times or 1))


class Schedules(argparse.Action):
    """Numbers of steps, or the path of a JSON list of lists of group sizes."""

    def __call__(self, parser, args, values, flag=None):
        if len(values) == 1 and not values[0].isdigit():
            with checking(f"{flag}: "):
                values = files.read_json(existing_file(flag, values[0]))
        if not all(isinstance(v, list) or str(v).isdigit() and int(v) > 0 for v in values):
            parser.error(f"{flag}: numbers of steps or a JSON list of lists of group sizes is needed")
        setattr(args, self.dest, [v if isinstance(v, list) else int(v) for v in values])


# Settings: frozen dataclasses whose fields are also the flags of a program.


def setting(default, help=None, *, kind=None, least=None, most=None, **flag):
    """A dataclass field that `add_settings` turns into a flag. `kind` is the type (default: the default's; a
    tuple takes one word or more); `flag` is argparse's `choices` or `metavar`."""
    kind = kind or type(default)
    if kind is bool:
        flag["action"] = "store_true"
    elif kind is tuple:
        flag["nargs"] = "+"
    else:
        flag["type"] = number(kind, least, most) if kind in (int, float) else kind
    return dataclasses.field(default=default, metadata={"flag": {**flag, "default": default, "help": help}})


def _flag_fields(Settings):
    return [field for field in dataclasses.fields(Settings) if "flag" in field.metadata]


def add_settings(parser, Settings, *without):
    """One flag for each field of a dataclass that was made with `setting`, but those named in `without`."""
    for field in _flag_fields(Settings):
        if field.name not in without:
            parser.add_argument(f"--{field.name}", **field.metadata["flag"])


def chosen(Settings, args):
    """The fields of a dataclass that are flags of `add_settings`, as a dict."""
    return {field.name: getattr(args, field.name) for field in _flag_fields(Settings) if field.name in args}


def settings_from(Settings, args, **given):
    """The dataclass from the flags of `add_settings`; `given` are the other fields, or override flags."""
    return Settings(**{**chosen(Settings, args), **given})


# Flags that several programs have.


def add_seed_flag(parser):
    """--seed, bounded so that every seed derived from it fits 64 bits."""
    parser.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0)


def add_device_flag(parser):
    """--device, for `choose_device`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, or mps")


def add_device_flags(parser):
    """--device and --num_workers."""
    add_device_flag(parser)
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)  # macOS cannot tell
    workers = max(1, min(4, len(usable) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    parser.add_argument("--num_workers", type=number(int, 0), default=workers, help="processes that read")


def colour(text):
    """An argparse type: a colour by name or as #rrggbb, as a tuple of three numbers."""
    try:
        red, green, blue = ImageColor.getrgb(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a colour like white or #e0e0e0") from None
    return red, green, blue


def add_reading_flags(parser):
    """--background and --published_reading, for `reading`."""
    add = parser.add_argument
    add("--background", type=colour, default="white", help="colour behind transparent images")
    add(
        "--published_reading", action="store_true",
        help="read images as the published code: drop transparency, ignore the rotation in EXIF",
    )


def reading(args):
    """The Reading of the flags of `add_reading_flags`."""
    return Reading(args.background, args.published_reading)


def add_folder_flags(parser, *, split=True):
    """--data_path and how its images are read; with `split` also --val_fraction, for `split_folder` and
    `split_cache`."""
    add = parser.add_argument
    what = "images: DIR/CLASS/IMAGE, or DIR/train/CLASS/IMAGE and DIR/val; or archives, see docs/data.md"
    add("--data_path", metavar="DIR", help=what)
    add_reading_flags(parser)
    add("--skip_unreadable", action="store_true", help="leave unreadable images out")
    if split:
        share = f"held out if there is no DIR/val; default: {folders.VAL_FRACTION}, or 0 if read as published"
        add("--val_fraction", type=number(float, 0, 0.9), help=share)


def open_folders(args, img_size, world, output):
    """The training images of --data_path and those held out or None, as `folders.split_folder`; without
    unreadable ones if --skip_unreadable says so. Prints what there is; an index is kept beside `output`."""
    train, val = folders.split_folder(args.data_path, args.val_fraction, reading(args), beside=output)
    if args.skip_unreadable:
        how = img_size, world, args.num_workers
        train, val = (part and folders.without_unreadable(part, *how) for part in (train, val))
    say(folders.summary(train.root, train.class_names, train, val, train.left_out))
    return train, val


def add_timeout_flag(parser):
    """--timeout, for programs that run as several processes."""
    minutes = number(float, 0.01)
    parser.add_argument("--timeout", type=minutes, default=10, help="minutes of waiting for other processes")


def add_tokenizer_flags(parser):
    """--vqgan_path, and what may be stated of the tokenizer."""
    add = parser.add_argument
    add("--vqgan_path", metavar="FILE", help="tokenizer weights (.pt, .safetensors, folder, hf://owner/repo)")
    add("--vqgan_vocab_size", type=number(int, 1, 65536), help="checked against the tokenizer's")
    add("--vqgan_stride", type=number(int, 1), help="checked against the tokenizer's")


def add_weights_flags(parser, models):
    """The weights of a generator: --pretrained_ckpt, --model (one of `models`), --img_size, the tokenizer."""
    add = parser.add_argument
    add("--pretrained_ckpt", metavar="FILE", help="LPD weights (.safetensors, .pth, folder, hf://owner/repo)")
    add("--model", choices=sorted(models), help="published, with weights and settings, or a size")
    add("--img_size", type=number(int, 1), help="checked against the weights'")
    add_tokenizer_flags(parser)


def add_output_flags(parser):
    """--output_dir and --overwrite, for `prepare_output`."""
    parser.add_argument("--output_dir", metavar="DIR", help="default: a new folder in output/")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in --output_dir")


def add_class_names_flag(parser):
    """--class_names, for `class_names`."""
    parser.add_argument("--class_names", metavar="FILE", help="one name per line, if the weights have none")


# Checks before anything slow starts.


def required(args, *names):
    """Refuse when one of these flags was not given."""
    for name in names:
        if getattr(args, name) in (None, ""):
            raise UsageError(f"--{name} is needed")


def existing_file(flag, path):
    """The path, if it is a file."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{flag}: no such file: {path}")
    return path


def existing_folder(flag, path):
    """The path, if it is a folder."""
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{flag}: no such folder: {path}")
    return path


def existing_images(flag, path):
    """The path, if it is a folder or archives."""
    with checking(f"{flag}: "):
        sources.locate(path)
    return path


def writable_folder(flag, path):
    """The path, if files can be written there. Nothing is created: the nearest existing parent is tried."""
    if hub.is_on_hub(path):
        raise UsageError(f"{flag}: {path} is on the hub, a folder is needed")
    path = Path(path)
    nearest = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
    if not nearest.is_dir():
        raise UsageError(f"{flag}: {nearest} is not a folder")
    probe = nearest / f".lpd-probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        if files.is_machine_trouble(error):
            raise
        raise UsageError(f"{flag}: cannot write into {nearest}: {error.strerror}") from None
    return path


def new_file(flag, path, suffix, overwrite):
    """The path, if a file that ends in `suffix` can be written there, over an old one with --overwrite."""
    path = Path(path)
    if path.suffix != suffix:
        raise UsageError(f"{flag} {path} must end in {suffix}")
    if path.exists() and not overwrite:
        raise UsageError(f"{flag} {path} exists: give another name or --overwrite")
    writable_folder(flag, path.parent)
    return path


def prepare_output(args, record):
    """The --output_dir as a Path: empty or new; with --overwrite, an earlier run's of the program, which the
    file `record` identifies, without its images. If none is given, a new one in output/ that has the record's
    name."""
    if not args.output_dir:
        numbered = (Path("output", f"{Path(record).stem}-{i}") for i in itertools.count(1))
        return writable_folder("--output_dir", next(path for path in numbered if not path.exists()))
    folder = writable_folder("--output_dir", args.output_dir)
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not args.overwrite:
        raise UsageError(f"--output_dir {folder} is not empty: give another or --overwrite")
    if not (folder / record).exists():
        raise UsageError(f"--output_dir {folder} has no {record}: another program's, not overwritten")
    for images in folder.glob("images*"):
        shutil.rmtree(images)
    return folder


def check_stated(args, **actual):
    """Refuse a flag that contradicts the weights or the data."""
    for name, value in actual.items():
        stated = getattr(args, name, None)
        if stated not in (None, value):
            raise UsageError(f"--{name} is {stated}, the weights or data have {value}")


def check_weights(args, model, tokenizer):
    """Refuse a flag that contradicts these configs of a generator and its tokenizer."""
    size = model.grid_size * tokenizer.stride
    check_stated(args, vqgan_vocab_size=tokenizer.vocab_size, vqgan_stride=tokenizer.stride, img_size=size)


def class_names(args, num_classes, info):
    """A name for every class: from --class_names, the weights, or its index."""
    names = info.get("class_names") or [str(i) for i in range(num_classes)]
    if args.class_names:
        path = existing_file("--class_names", args.class_names)
        with checking(f"--class_names: {path} is to be saved as UTF-8: "):
            text = path.read_text(encoding="utf-8-sig")  # Windows begins a file with a mark
        names = [line.strip() for line in text.rstrip().split("\n")]
    if len(names) != num_classes:
        raise ValueError(f"--class_names has {len(names)} names, the weights have {num_classes} classes")
    return names


def plain_name(name):
    """A class name without the leading number that sorts its folder."""
    return re.sub(r"^\d+_", "", name)


def find_class(flag, text, names):
    """The label of a class given by its name, its name without a leading number, or its index; a name wins.
    Raises ValueError: no such class, or several."""
    text, *names = (unicodedata.normalize("NFC", name) for name in (text, *names))  # macOS splits accents off
    plain = [plain_name(name) for name in names]
    index = int(text) if text.isdecimal() and int(text) < len(names) else None
    for known in (names, plain, [name.lstrip("0") for name in plain]):
        found = [label for label, name in enumerate(known) if name == text]
        if len(found) > 1:
            raise ValueError(f"{flag}: {text!r} names {' and '.join(map(str, found))}: give an index")
        if found and index not in (None, *found):
            say(f"{flag} {text}: the class of that name, {found[0]}; class {index} is {names[index]!r}")
        if found:
            return found[0]
    if index is not None:
        return index
    shown = ", ".join(plain[:10] + ["..."] * (len(plain) > 10))
    raise ValueError(f"{flag}: no class {text!r} in 0..{len(names) - 1} ({shown})")


@contextmanager
def checking(prefix=""):
    """Inside it a ValueError or OSError is the user's mistake, and its message gets the prefix, unless it is
    `files.is_machine_trouble`."""
    try:
        yield
    except (ValueError, OSError) as error:
        if files.is_machine_trouble(error):
            raise
        raise UsageError(f"{prefix}{error}") from error


@contextmanager
def sole_writer(flag, folder, world):
    """Inside it only this run writes into the folder that a flag names; a second run is refused."""
    with ExitStack() as stack:
        if world.is_main:
            try:
                stack.enter_context(files.sole_writer(folder))
            except files.FolderInUse as error:
                raise UsageError(f"{flag}: {error}") from None
        yield


# How a program ends.

ONE_LINE = (UsageError, Failure, UnreadableImage, DamagedCache, OSError, files.FolderInUse)
PEER_LOST = 75


def run(main):
    """Run a program's `main()` and end the process with its exit status; errors that users cause, and failing
    disks, are one line without a traceback."""
    status = 0
    try:
        with ending_workers():
            main()
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {stop}", file=sys.stderr)
        status = stop.status
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        report(f"error: {error}" if isinstance(error, ONE_LINE) else traceback.format_exc().strip(), error)
        status = 2 if isinstance(error, UsageError) else PEER_LOST if is_peer_failure(error) else 1
    leave(status)


def report(message, error):
    """Report the failure of this process once: by itself, or through the launcher if there is one.

    torchrun and scripts/cli/agent.py print what the first worker to fail wrote into its error file. A worker
    that only lost its peer first leaves the launcher time to find one that failed on this machine.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if is_peer_failure(error):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        message = f"error: {describe_loss(error)}"
    if not error_file:
        print(message, file=sys.stderr)
    else:
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(error_file).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))
