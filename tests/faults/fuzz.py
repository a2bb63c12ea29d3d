"""Mutated files for every reader: always a declared error or a right result, in little time and memory.

    python tests/faults/fuzz.py --seconds 600 --seed 1

Knows the formats, how to damage a sound file of each, and how to judge what its reader then does.
tests/test_fuzz.py runs a bounded part of it; this program goes on for as long as it is told, in processes of
their own, so that a crash or a hang is one fault among the counts and not the end. A fault is printed with
what repeats it: `--repeat FORMAT:SEED`.
"""

import argparse
import collections
import io
import itertools
import json
import multiprocessing
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from engine.checkpoint import load_checkpoint, load_lpd, load_tokenizer, save_weights  # noqa: E402
from engine.metrics import load_statistics, save_statistics  # noqa: E402
from models.lpd import LPD, LPDConfig  # noqa: E402
from models.vqgan import VQConfig, VQModel  # noqa: E402
from orders.order_file import load_orders  # noqa: E402
from util.images import UnreadableImage, load_image  # noqa: E402
from util.npz import open_array  # noqa: E402
from util.token_cache import CacheMeta, CacheWriter, MarCache, TokenCache, names_digest  # noqa: E402

DECLARED = (ValueError, UnreadableImage)  # DamagedCache is a ValueError
MOST_MEMORY = 2**28  # bytes by which the process may grow over all tries
MOST_FOR_IMAGES = 2**30  # WebP: 4 bytes for each of 16383 x 16383 pixels before it tells their number
MOST_SECONDS = 20  # of one try, on a busy machine
BATCH = 200  # tries of one process

LPD_SIZE = LPDConfig(grid_size=2, vocab_size=4, num_classes=2, embed_dim=8, depth=1, num_heads=1)
VQ_SIZE = VQConfig(
    vocab_size=4, code_dim=2, base_width=32, multipliers=(1, 1), num_res_blocks=1, z_channels=2
)


class Fault(AssertionError):
    """A reader that did not do what it promises."""


@dataclass(frozen=True)
class Format:
    """`make(folder)` writes sound files and returns the one to damage; `read(folder)` reads; `check(value)`
    raises unless the value is well-formed. `inside(content, place, payload)` damages what lies behind
    checksums and syntax, as bytes changed at random seldom do: the values of JSON, the parts of a zip."""

    make: object
    read: object
    check: object
    inside: object = None


def require(condition, what):
    """Raise a Fault unless the condition holds."""
    if not condition:
        raise Fault(what)


# Sound files, their readers, and what any value that these return must be.


def file_format(name, write, read, check):
    """A format of one file, whose suffix tells what is inside."""

    def make(folder):
        write(folder / name)
        return folder / name

    return Format(make, lambda folder: read(folder / name), check, INSIDE.get(Path(name).suffix))


def orders():
    return np.stack([np.random.default_rng(i).permutation(16) for i in range(6)]).astype(np.uint16)


def check_orders(value):
    require(value.dtype == np.uint16 and value.shape[1:] == (16,), f"{value.dtype} {value.shape}")
    require((np.sort(value, axis=1) == np.arange(16)).all(), "no permutations")


def check_statistics(value):
    require(value["mu"].dtype == np.float64 and np.isfinite(value["mu"]).all(), "mu")
    require(value["sigma"].shape == (len(value["mu"]),) * 2, "sigma's shape")
    require(np.isfinite(value["sigma"]).all(), "sigma")


def check_pixels(value):
    require(value.shape == (8, 8, 3) and value.dtype == np.uint8, f"{value.dtype} {value.shape}")


def check_model(model):
    require(all(tensor.isfinite().all() for tensor in model.state_dict().values()), "weights not finite")
    require(sum(tensor.numel() for tensor in model.state_dict().values()) < 2**20, "a model out of nothing")


def write_cache(folder):
    names = [f"{i}.png" for i in range(5)]
    meta = CacheMeta(
        img_size=8, grid_size=2, vocab_size=64, class_names=("cat", "dog"), tokenizer_digest="0123",
        num_images=5, shard_size=3, names_digest=names_digest(names),
    )  # fmt: skip
    writer, tokens = CacheWriter(folder, meta), np.arange(40).reshape(5, 2, 4)
    writer.begin()
    for shard in range(2):
        mine = list(writer.shard_range(shard))
        writer.write_shard(shard, tokens[mine], np.array([0, 0, 1, 1, 1])[mine], [names[i] for i in mine])
    writer.finish(names)


def read_cache(folder):
    """Everything of a token cache: its description, labels, names, tokens of both views."""
    cache = TokenCache(folder)
    writer = CacheWriter(folder, cache.meta)
    writer.finish([])
    everything = np.repeat(np.arange(len(cache)), 2), np.tile([0, 1], len(cache))
    return cache, cache.tokens(*everything)


def check_cache(value):
    cache, tokens = value
    require(tokens.shape == (2 * len(cache), cache.meta.num_tokens), "shape of the tokens")
    require(tokens.min() >= 0 and tokens.max() < cache.meta.vocab_size, "tokens beyond the vocabulary")
    require(0 <= cache.labels.min() <= cache.labels.max() < len(cache.meta.class_names), "labels")


def in_cache(name):
    """The format of one file of a token cache."""

    def make(folder):
        write_cache(folder)
        return folder / name

    return Format(make, read_cache, check_cache, INSIDE.get(Path(name).suffix))


def write_mar(folder):
    (folder / "cat").mkdir()
    for i in range(2):
        np.savez(folder / f"cat/{i}.npz", indices=np.arange(4), indices_flip=np.arange(4)[::-1])
    return folder / "cat/0.npz"


def read_mar(folder):
    cache = MarCache(folder, 64, 8)
    return cache, cache.tokens([0, 1, 0, 1], [0, 0, 1, 1])


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8))


def picture_format(suffix, **how):
    return file_format(
        f"x.{suffix}",
        lambda path: picture().save(path, **how),
        lambda path: load_image(path, 8),
        check_pixels,
    )


def seeded(kind, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config)


def save_pth(path, zipped):
    content = {"model": seeded(LPD, LPD_SIZE).state_dict(), "step": 3, "info": {"config": LPD_SIZE.__dict__}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


def write_folder(folder):
    seeded(LPD, LPD_SIZE).save_pretrained(folder, class_names=["cat", "dog"])
    return folder / "config.json"


# Damage. An edit is (kind, place in 0..1, bytes or a value); a file is damaged by a few of them in turn.

VALUES = [
    None, True, 0, -1, 1, 2, 65535, 65536, 2**31, 2**63, 10**18, 10**400, 0.5, 1e308, float("nan"), "", "x",
    "..", "../../x", "/etc/passwd", "\0", [], [[]], {}, {"x": 1}, [0] * 100, "9" * 5000,
]  # fmt: skip
KINDS = ("flip", "cut", "insert", "remove", "repeat", "number", "inside")
CHOICES = (*KINDS, "inside", "inside", "inside")  # how often each is drawn


def damaged(content, edits, inside=None):
    """Bytes of a sound file -> bytes of a damaged one.

    Args:
        edits: (kind, place, payload) triples: kind of KINDS, place in [0, 1), payload of two bytes or more.
        inside: of the Format; without it an edit inside is one of bytes.
    """
    for kind, place, payload in edits:
        if kind != "inside":
            content = damaged_bytes(content, kind, place, payload)
        else:
            content = (inside or flipped)(content, place, payload)
    return content


def damaged_bytes(content, kind, place, payload):
    """One edit of bytes."""
    at, number = int(place * len(content)), int.from_bytes(payload[:2], "little")
    if kind == "flip":
        return flipped(content, place, payload)
    if kind == "cut":
        return content[:at]
    if kind == "insert":
        return content[:at] + payload + content[at:]
    if kind == "remove":
        return content[:at] + content[at + 1 + number % 64 :]
    if kind == "repeat":
        return content[:at] + content[at : at + 64] * (1 + number % 8) + content[at:]
    size, fill = (1, 2, 4, 8)[number % 4], (b"\xff", b"\x7f", b"\0")[number // 4 % 3]
    return content[:at] + fill * size + content[at + size :]  # what sizes are made of: the largest, zero


def flipped(content, place, payload):
    """One bit."""
    at = int(place * len(content))
    return content[:at] + bytes(b ^ 1 << payload[0] % 8 for b in content[at : at + 1]) + content[at + 1 :]


def swapped(content, place, payload):
    """JSON with one of its values in the place of another; unreadable JSON as it is."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return content
    return json.dumps(with_swap(whole, place, payload)).encode()


def with_swap(whole, place, payload):
    """A value of lists and dicts, with one of VALUES somewhere in it."""
    value, spots = VALUES[payload[0] % len(VALUES)], list(places_of(whole))
    if not spots:
        return value
    holder, key = spots[int(place * len(spots))]
    holder[key] = value
    return whole


ZIP_ERRORS = (zipfile.BadZipFile, ValueError, OSError, EOFError, LookupError, NotImplementedError,
              RuntimeError, struct.error, zlib.error)  # fmt: skip


def resealed(content, place, payload):
    """A zip, a part of it damaged, all sums right again: of a checkpoint every other time its pickle."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
    except ZIP_ERRORS:
        return content  # damaged already
    names = [name for name in parts if name.endswith("data.pkl")] if payload[1] % 2 else []
    names = names or list(parts)
    if not names:
        return content
    name, within = names[int(place * len(names))], place * len(names) % 1
    kind = KINDS[payload[0] % (len(KINDS) - 1)]
    parts[name] = damaged_bytes(parts[name], kind, within, payload[1:] + b"\0")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, part in parts.items():
            archive.writestr(name, part)
    return file.getvalue()


def reheaded(content, place, payload):
    """Safetensors with one value of the header swapped, or of the text that our own weights have in it."""
    try:
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        header["__metadata__"]["lpd"] = json.loads(header["__metadata__"]["lpd"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return content
    header = with_swap(header, place, payload)
    if isinstance(header.get("__metadata__"), dict) and "lpd" in header["__metadata__"]:
        header["__metadata__"]["lpd"] = json.dumps(header["__metadata__"]["lpd"])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[end:]


INSIDE = {".json": swapped, ".npz": resealed, ".pth": resealed, ".safetensors": reheaded}


def places_of(value):
    """(holder, key) of every value inside lists and dicts."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places_of(value[key])


def random_edits(rng):
    """One to four edits."""
    return [
        (rng.choice(CHOICES), rng.random(), rng.randbytes(rng.choice((2, 3, 8, 40))))
        for _ in range(rng.choice((1, 1, 1, 2, 4)))
    ]


FORMATS = {
    "orders .npy": file_format(
        "o.npy", lambda p: np.save(p, orders()), lambda p: load_orders(p, 16), check_orders),
    "orders .json": file_format(
        "o.json", lambda p: p.write_text(json.dumps(orders().tolist())), lambda p: load_orders(p, 16),
        check_orders),
    "cache meta.json": in_cache("meta.json"),
    "cache plan.json": in_cache("plan.json"),
    "cache names.json": in_cache("shard-00001.names.json"),
    "cache tokens.npy": in_cache("shard-00000.tokens.npy"),
    "cache labels.npy": in_cache("shard-00001.labels.npy"),
    "MAR .npz": Format(write_mar, read_mar, check_cache, resealed),
    "statistics .npz": file_format(
        "s.npz", lambda p: save_statistics(p, {"mu": np.ones(3), "sigma": np.eye(3), "n": 9}, img_size=8),
        load_statistics, check_statistics),
    "batch .npz": file_format(
        "b.npz", lambda p: np.savez(p, arr_0=np.arange(48, dtype=np.uint8)),
        lambda p: np.array(open_array(p, "arr_0")), lambda v: require(v.nbytes < 2**20, "large")),
    "batch .npz, deflated": file_format(
        "b.npz", lambda p: np.savez_compressed(p, arr_0=np.arange(48, dtype=np.uint8)),
        lambda p: open_array(p, "arr_0"), lambda v: require(v.nbytes < 2**26, "large")),
    "weights .safetensors": file_format(
        "w.safetensors", lambda p: save_weights(p, seeded(LPD, LPD_SIZE)), lambda p: load_lpd(p)[0],
        check_model),
    "tokenizer .safetensors": file_format(
        "v.safetensors", lambda p: save_weights(p, seeded(VQModel, VQ_SIZE)), load_tokenizer, check_model),
    "weights .pth": file_format(
        "w.pth", lambda p: save_pth(p, True), lambda p: load_lpd(p)[0], check_model),
    "weights .pth, older": file_format(
        "w.pth", lambda p: save_pth(p, False), lambda p: load_lpd(p)[0], check_model),
    "weights config.json": Format(write_folder, LPD.from_pretrained, check_model, swapped),
    "checkpoint .pth": file_format(
        "c.pth", lambda p: save_pth(p, True), load_checkpoint,
        lambda value: require(isinstance(value, dict), "no dict")),
    "image .png": picture_format("png"),
    "image .jpg": picture_format("jpg"),
    "image .gif": picture_format("gif"),
    "image .webp": picture_format("webp"),
    "image .tif": picture_format("tif", compression="tiff_lzw"),
    "image .bmp": picture_format("bmp"),
}  # fmt: skip


# Judgement.


def same(a, b):
    """Whether two values that a reader returned are equal."""
    if isinstance(a, torch.nn.Module):
        a, b = a.state_dict(), b.state_dict()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return a == b if isinstance(a, (str, int, float, list)) else True


def outcome(form, folder, sound):
    """What the reader does: "refused", "same" as of the sound file, or "well-formed".

    Raises:
        Fault: another error, no message of one line, or a value that is out of its ranges.
    """
    try:
        value = form.read(folder)
    except DECLARED as error:
        require(str(error) and "\n" not in str(error), f"a message of {str(error)!r:.80}")
        require(len(str(error)) < 2000, f"a message of {len(str(error))} characters")
        return "refused"
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        raise Fault(f"{type(error).__name__}: {str(error):.200}\n{where}") from error
    form.check(value)
    return "same" if same(value, sound) else "well-formed"


class Bench:
    """A format's sound files in a folder, to be damaged again and again."""

    def __init__(self, name, folder):
        self.form, self.folder = FORMATS[name], Path(folder)
        self.path = self.form.make(self.folder)
        self.files = {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        self.sound = self.form.read(self.folder)

    def try_edits(self, edits):
        """The outcome of reading the files, one of them damaged."""
        for path, content in self.files.items():
            path.write_bytes(content)
        self.path.write_bytes(damaged(self.files[self.path], edits, self.form.inside))
        return outcome(self.form, self.folder, self.sound)


def memory():
    """The most memory that this process has taken, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# The program.


def run_batch(name, seeds, results):
    """In a process of its own: one try for each seed; tells seed, outcome and text of a fault as it goes."""
    warnings.simplefilter("ignore")  # numpy and PIL warn of what is then refused
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(name, folder)
        for seed in seeds:
            results.put((seed, "begun", ""))
            before, start = memory(), time.monotonic()
            try:
                told, text = bench.try_edits(random_edits(random.Random(f"{name}:{seed}"))), ""
            except Fault as fault:
                told, text = "fault", str(fault)
            if memory() - before > (MOST_FOR_IMAGES if name.startswith("image") else MOST_MEMORY):
                told, text = "fault", f"{(memory() - before) / 2**20:.0f} MB taken"
            if time.monotonic() - start > MOST_SECONDS:
                told, text = "fault", f"{time.monotonic() - start:.0f} s"
            results.put((seed, told, text))


def watch(name, seeds, counts, faults):
    """Run a batch; a crash or a hang is a fault of the seed it happened at."""
    results = multiprocessing.SimpleQueue()
    process = multiprocessing.Process(target=run_batch, args=(name, seeds, results))
    process.start()
    done, current, last = 0, None, time.monotonic()
    while done < len(seeds):
        if not results.empty():
            current, told, text = results.get()
            last = time.monotonic()
            if told == "begun":
                continue
            done += 1
            counts[name][told] += 1
            if told == "fault":
                faults.append((name, current, text))
        elif not process.is_alive() or time.monotonic() - last > 3 * MOST_SECONDS:
            if results.empty():
                counts[name]["fault"] += 1
                faults.append((name, current, f"crash or hang, exit status {process.exitcode}"))
                break
        else:
            time.sleep(0.01)
    process.kill() if done < len(seeds) else None
    process.join()


def report(counts, faults):
    """A table of the counts, and the faults."""
    columns = ("refused", "same", "well-formed", "fault")
    print(f"{'format':24}{'tried':>10}" + "".join(f"{column:>13}" for column in columns))
    total = collections.Counter()
    for name, count in sorted(counts.items()):
        total += count
        print(f"{name:24}{sum(count.values()):10}" + "".join(f"{count[column]:13}" for column in columns))
    print(f"{'all':24}{sum(total.values()):10}" + "".join(f"{total[column]:13}" for column in columns))
    for name, seed, text in faults[:40]:
        print(f"\nFAULT  --repeat '{name}:{seed}'\n{text}")


def repeat(which):
    """One try again, with its traceback."""
    name, seed = which.rsplit(":", 1)
    with tempfile.TemporaryDirectory() as folder:
        edits = random_edits(random.Random(f"{name}:{seed}"))
        print(name, edits)
        print(Bench(name, folder).try_edits(edits))


def main():
    parser = argparse.ArgumentParser(description="Mutated files for every reader")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--repeat", metavar="FORMAT:SEED", help="one try that was reported as a fault")
    args = parser.parse_args()
    if args.repeat:
        return repeat(args.repeat)
    counts, faults = collections.defaultdict(collections.Counter), []
    start, first = time.monotonic(), args.seed * 10**9
    for number in itertools.count():
        if time.monotonic() - start > args.seconds:
            break
        batch, name = first + number // len(args.formats) * BATCH, args.formats[number % len(args.formats)]
        watch(name, range(batch, batch + BATCH), counts, faults)
    print(f"seed {args.seed}, {time.monotonic() - start:.0f} s")
    report(counts, faults)
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
