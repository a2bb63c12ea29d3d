"""Evaluation: images of a model as a stream, their features, the metrics.

Knows which image has which number, label and order, and how an evaluation survives a kill. Does not know
model internals or flags. The images of an evaluation are cut into chunks of consecutive numbers; a chunk's
features are a file, complete or not there, so a killed evaluation goes on with the chunks that are missing.
Processes share out the chunks; the batches of a chunk are the same for any number of processes.
"""

import json
import shutil
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.generate import generate_tokens
from engine.metrics import compute_metrics
from util import dist, npz
from util.files import atomic, write_json
from util.images import to_uint8
from util.pictures import save_png

CHUNK = 1000  # images of a chunk: 12 MB of Inception features and logits
PHASES = ("generate", "decode", "features")
PUBLISHED_IMAGES = 50000
MARK = "evaluation-images.json"  # marks a folder of PNGs as ours


def balanced_label(image_id, num_images, num_classes):
    """The class of an image of an evaluation: classes in label order, equally many of each."""
    return image_id * num_classes // num_images


class Stopwatch:
    """Seconds spent in named phases. On a GPU the device is not waited for until `totals` is asked for."""

    def __init__(self, device):
        self.device, self.seconds, self.events = device, defaultdict(float), []

    @contextmanager
    def __call__(self, phase):
        if self.device.type == "cpu":
            start = time.perf_counter()
            yield
            self.seconds[phase] += time.perf_counter() - start
            return
        start, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.events.append((phase, start, end))

    def totals(self):
        """dict of phase -> seconds so far; waits for the device."""
        dist.synchronize(self.device)
        for phase, start, end in self.events:
            self.seconds[phase] += start.elapsed_time(end) / 1000
        self.events = []
        return dict(self.seconds)


def check_same(place, saved, protocol):
    """Refuse to go on with what was made with other settings.

    Raises:
        ValueError: naming the first setting that changed.
    """
    for key, value in json.loads(json.dumps(protocol)).items():
        if saved.get(key) != value:
            raise ValueError(
                f"{place} was made with {key} {str(saved.get(key))[:60]}, now it is {str(value)[:60]}: "
                "give another --output_dir"
            )


class ChunkStore:
    """The chunks of one evaluation in a folder, and the settings they were made with.

    Raises:
        ValueError: the folder holds chunks made with other settings; the message names the first.
    """

    def __init__(self, folder, protocol):
        self.folder, self.protocol = Path(folder), protocol
        self.num_images = protocol["num_images"]
        if (self.folder / "protocol.json").exists():
            saved = json.loads((self.folder / "protocol.json").read_text())
            check_same(self.folder, saved, protocol)

    def begin(self):
        """Write the settings down."""
        write_json(self.folder / "protocol.json", self.protocol)

    @property
    def num_chunks(self):
        return -(-self.num_images // CHUNK)

    def path(self, chunk):
        return self.folder / f"chunk-{chunk:05d}.npz"

    def missing(self):
        """Numbers of the chunks that are not there."""
        return [chunk for chunk in range(self.num_chunks) if not self.path(chunk).exists()]

    def ids(self, chunk):
        """Image numbers of a chunk, int64 [n]."""
        return torch.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, self.num_images))

    def write(self, chunk, arrays):
        """Write a chunk's arrays, atomically."""
        with atomic(self.path(chunk)) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)

    def read(self, key):
        """An array of all chunks in image order, a float32 tensor."""
        parts = []
        for chunk in range(self.num_chunks):
            with np.load(self.path(chunk), allow_pickle=False) as arrays:
                parts.append(torch.from_numpy(arrays[key]))
        return torch.cat(parts)


def prepare_image_folder(folder):
    """A folder for PNGs: new, empty, or marked as ours by an earlier evaluation.

    Raises:
        ValueError: it holds something else.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise ValueError(f"--save_images: {folder} is not empty and was not made by an evaluation")
    return folder


def generated_images(model, tokenizer, settings, ids, num_images, batch_size, stopwatch):
    """Images with these numbers, in batches.

    Yields:
        (image ids int64 [b], uint8 [b, H, W, 3] on the device)
    """
    for batch in ids.split(batch_size):
        labels = balanced_label(batch, num_images, model.config.num_classes)
        with stopwatch("generate"):
            tokens = generate_tokens(
                model, labels, settings.orders(batch.numpy()), settings.group_sizes, image_ids=batch,
                **settings.decoding(),
            )  # fmt: skip
        with stopwatch("decode"), torch.inference_mode():
            images = to_uint8(tokenizer.decode(tokens))
        yield batch, images


def fill_chunks(model, tokenizer, settings, store, batch_size, judge, world, keep):
    """Generate the images of the missing chunks and keep their features; returns seconds by phase.

    PNGs are written by other threads while the device goes on.
    """
    stopwatch = Stopwatch(world.device)
    mine = store.missing()[world.rank :: world.size]
    total = sum(len(store.ids(chunk)) for chunk in mine)
    with (
        tqdm(total=total, unit="img", disable=not world.is_main, mininterval=1) as progress,
        ThreadPoolExecutor(4) as writers,
    ):
        for chunk in mine:
            features, pixels, writing = defaultdict(list), [], []
            for ids, images in generated_images(
                model, tokenizer, settings, store.ids(chunk), store.num_images, batch_size, stopwatch
            ):
                with stopwatch("features"):
                    for key, value in judge.extractor(images).items():
                        features[key].append(value)
                if keep.image_folder or keep.npz_path:
                    pixels.append(images.cpu().numpy())
                if keep.image_folder:
                    paths = [keep.image_folder / f"{i:06d}.png" for i in ids.tolist()]
                    writing += [
                        writers.submit(save_png, *pair) for pair in zip(paths, pixels[-1], strict=True)
                    ]
                progress.update(len(ids))
            for future in writing:
                future.result()  # a failing disk ends the evaluation
            arrays = {key: torch.cat(parts).float().cpu().numpy() for key, parts in features.items()}
            if keep.npz_path:
                arrays["images"] = np.concatenate(pixels)
            store.write(chunk, arrays)
    return stopwatch.totals()


@dataclass(frozen=True)
class Judge:
    """What images are measured with.

    Attributes:
        extractor: of engine.features. reference: from `load_statistics`, or None.
        reference_digest: names the reference's file. kid, prc: compute these too.
    """

    extractor: object
    reference: dict | None = None
    reference_digest: str = ""
    kid: bool = False
    prc: bool = False

    def __post_init__(self):
        made_of = (self.reference or {}).get("extractor", self.extractor.name)
        if made_of != self.extractor.name:
            raise ValueError(f"--fid_stats are of {made_of} features, --features is {self.extractor.name}")
        if (self.kid or self.prc) and "features" not in (self.reference or {}):
            raise ValueError("--kid and --prc need --fid_stats made by main_stats.py --save_features")

    def as_json(self):
        """A dict of plain values."""
        return {
            "features": self.extractor.name, "features_digest": self.extractor.digest,
            "reference_digest": self.reference_digest, "reference_n": (self.reference or {}).get("n"),
            "kid": self.kid, "prc": self.prc,
        }  # fmt: skip


@dataclass(frozen=True)
class Keep:
    """Where the images of an evaluation are kept, if they are: a folder of PNGs, an `.npz` as of ADM."""

    image_folder: Path | None = None
    npz_path: Path | None = None


def result_name(settings, num_images):
    """The file name of an evaluation's result, without its suffix."""
    steps = len(settings.group_sizes)
    return f"{settings.order}_steps{steps}_cfg{settings.cfg:g}_seed{settings.seed}_n{num_images}"


def evaluate(
    model, tokenizer, settings, judge, num_images, output_dir, facts, world, *, batch_size, keep=Keep()
):  # fmt: skip
    """Metrics of generated images, written to OUTPUT_DIR/NAME.json with every setting that decides them.

    Run again after a kill it goes on with the missing chunks, in OUTPUT_DIR/NAME; run again when finished it
    gives the written result.

    Args:
        facts: dict of plain values: what else decides the number (digests of the weights, precision, device).
    Returns:
        dict of the settings, `metrics`, and `seconds` by phase on the first process; None on the others.
    Raises:
        ValueError: OUTPUT_DIR holds that name with other settings.
    """
    protocol = {
        **settings.as_json(),
        "num_images": num_images,
        **judge.as_json(),
        "batch_size": batch_size,
        **facts,
    }
    name = result_name(settings, num_images)
    store = ChunkStore(Path(output_dir) / name, protocol)
    path = Path(output_dir) / f"{name}.json"
    if path.exists():
        result = json.loads(path.read_text())
        check_same(path, result, protocol)
        return result if world.is_main else None
    if world.is_main:
        store.begin()
        if keep.image_folder:
            write_json(keep.image_folder / MARK, protocol)
    dist.barrier()
    parts = dist.gather_objects(
        fill_chunks(model, tokenizer, settings, store, batch_size, judge, world, keep)
    )
    if not world.is_main:
        return None
    start = time.perf_counter()
    metrics = compute_metrics(
        store.read("features"), store.read("logits"), judge.extractor.name, judge.reference, kid=judge.kid,
        prc=judge.prc,
    )  # fmt: skip
    seconds = {phase: max(part.get(phase, 0.0) for part in parts) for phase in PHASES}
    seconds["metrics"] = time.perf_counter() - start
    if keep.npz_path:
        save_npz(keep.npz_path, store, model.config.num_classes)
    seconds = {phase: round(value, 3) for phase, value in seconds.items()}
    result = {**protocol, "metrics": metrics, "seconds": seconds}
    write_json(path, result)
    shutil.rmtree(store.folder)
    return result


def save_npz(path, store, num_classes):
    """The images of all chunks and their labels in ADM's form."""
    n = store.num_images
    first = npz.open_array(store.path(0), "images")
    parts = (npz.open_array(store.path(chunk), "images") for chunk in range(store.num_chunks))
    labels = balanced_label(np.arange(n), n, num_classes)
    npz.save_images(path, parts, n, first.shape[1:], labels)


def warnings(num_images, num_classes):
    """What keeps a result from being compared with published ones, a line each."""
    lines = []
    if num_images < PUBLISHED_IMAGES:
        lines.append(f"{num_images} images: published figures are of {PUBLISHED_IMAGES}; fewer raise FID")
    if num_images % num_classes:
        lines.append(f"{num_images} images are not equally many of each of {num_classes} classes")
    return lines
