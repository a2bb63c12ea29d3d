"""Evaluation: images of a model as a stream, their features, the metrics, written down with their protocol.

Knows which image has which number, label and order, and what decides an evaluation's numbers. Does not know
model internals or flags.

For 50,000 images and Inception (2,048 features and 1,008 logits of 4 bytes) the chunks take 0.61 GB of disk,
and 9.8 GB more at 256 px (39 GB at 512) for `Keep.npz_path`, as much again as the file itself. A process
holds the features of one chunk; the first one, at the end, all of them: docs/evaluation.md has the figures.
"""

import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.chunks import ChunkStore, DamagedChunk, check_same
from engine.generate import generate_tokens
from engine.metrics import compute_metrics
from util import dist, npz
from util.files import read_json, write_json
from util.images import to_uint8
from util.pictures import save_png

PHASES = ("generate", "decode", "features")
PUBLISHED_IMAGES = 50000
MARK = "evaluation-images.json"  # marks a folder of PNGs as ours


class EvaluationFailed(Exception):
    """An evaluation that cannot go on."""


def balanced_label(image_id, num_images, num_classes):
    """The class of an image of an evaluation: classes in label order, equally many of each."""
    return image_id * num_classes // num_images


class Stopwatch:
    """Seconds of the device spent in named phases. A GPU is not waited for until `lap`."""

    def __init__(self, device):
        self.device, self.events = device, []

    @contextmanager
    def __call__(self, phase):
        start, end = dist.timing_event(self.device), dist.timing_event(self.device)
        start.record()
        yield
        end.record()
        self.events.append((phase, start, end))

    def lap(self):
        """Seconds of each of PHASES since the last lap, float64 [3]; waits for the device."""
        dist.synchronize(self.device)
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase, start, end in self.events:
            seconds[phase] += start.elapsed_time(end) / 1000
        self.events = []
        return np.array(list(seconds.values()))


@dataclass(frozen=True)
class Judge:
    """What images are measured with.

    Attributes:
        extractor: of engine.features. reference: from `load_statistics`, or None.
        reference_digest: names the reference's file. kid, prc: compute these too.
    Raises:
        ValueError: the reference is of other features, or has none where kid and prc need them.
    """

    extractor: object
    reference: dict | None = None
    reference_digest: str = ""
    kid: bool = False
    prc: bool = False

    def __post_init__(self):
        reference, own = self.reference or {}, self.extractor
        if (self.kid or self.prc) and "features" not in reference:
            raise ValueError("--kid and --prc need --fid_stats made by main_stats.py --save_features")
        if reference.get("extractor", own.name) != own.name:
            raise ValueError(f"--fid_stats is of {reference['extractor']} features, --features is {own.name}")
        if reference.get("extractor_digest", own.digest) != own.digest:
            raise ValueError(
                f"--fid_stats was made with {own.name} weights {reference['extractor_digest']}, "
                f"now they are {own.digest}"
            )
        if reference and len(reference["mu"]) != own.num_features:
            raise ValueError(
                f"--fid_stats: mu is [{len(reference['mu'])}], {own.name} has {own.num_features} features"
            )

    def check_size(self, img_size):
        """Refuse a reference whose file says that it is of images of another size.

        Raises:
            ValueError: naming both.
        """
        size = (self.reference or {}).get("img_size", img_size)
        if size != img_size:
            raise ValueError(f"--fid_stats is of {size} px images, the weights make {img_size} px")

    def as_json(self):
        """A dict of plain values."""
        return {
            "features": self.extractor.name, "features_digest": self.extractor.digest,
            "reference_digest": self.reference_digest,
            **{f"reference_{k}": (self.reference or {}).get(k) for k in ("n", "preparation")},
            "kid": self.kid, "prc": self.prc,
        }  # fmt: skip


@dataclass(frozen=True)
class Keep:
    """Where the images of an evaluation are kept, if they are: a folder of PNGs, an `.npz` as of ADM."""

    image_folder: Path | None = None
    npz_path: Path | None = None

    def as_json(self):
        """A dict of plain values."""
        return {f"save_{k}": str(p) if p else None for k, p in
                (("images", self.image_folder), ("npz", self.npz_path))}  # fmt: skip

    def check(self, protocol, *, begun, finished):
        """Refuse places that hold something else than this evaluation's images.

        Raises:
            ValueError: naming the place.
        """
        folder = self.image_folder
        if folder and folder.exists() and any(folder.iterdir()):
            if not (folder / MARK).exists():
                raise ValueError(f"--save_images: {folder} is not empty and was not made by an evaluation")
            check_same(folder, read_json(folder / MARK), protocol, "--save_images")
        if self.npz_path and self.npz_path.exists() and not (begun or finished):
            raise ValueError(f"--save_npz: {self.npz_path} exists: give another name")
        for place in (folder, self.npz_path) if finished else ():
            if place and not place.exists():
                raise ValueError(f"{place} is gone and the evaluation is finished: give another --output_dir")

    def begin(self, protocol):
        """Mark the folder."""
        if self.image_folder:
            write_json(self.image_folder / MARK, protocol)

    def write_pngs(self, ids, images, writers):
        """Write images, uint8 [b, H, W, 3], in other threads; gives what is to be waited for."""
        if not self.image_folder:
            return []
        paths = [self.image_folder / f"{i:06d}.png" for i in ids.tolist()]
        return [writers.submit(save_png, *pair) for pair in zip(paths, images, strict=True)]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: what decides its numbers, and the folder its result goes to.

    Attributes:
        settings: GenerationSettings. judge, keep: as above.
        facts: dict of plain values: what else decides the numbers (digests of weights, precision, device).
    Raises:
        ValueError: the folder, or a place of `keep`, holds the like made with other settings.
    """

    settings: object
    judge: Judge
    num_images: int
    batch_size: int
    output_dir: Path
    facts: dict
    keep: Keep = Keep()

    def __post_init__(self):
        if self.judge.prc and self.num_images < 4:
            raise ValueError(f"--prc needs 4 images or more, --num_images is {self.num_images}")
        finished = self.path.exists()
        if finished:
            check_same(self.path, read_json(self.path), self.protocol)
        self.keep.check(self.protocol, begun=self.store.begun, finished=finished)

    @cached_property
    def protocol(self):
        """Every setting that decides the numbers, as plain values."""
        return {
            **self.settings.as_json(), "num_images": self.num_images, "batch_size": self.batch_size,
            **self.judge.as_json(), **self.facts, **self.keep.as_json(),
        }  # fmt: skip

    @cached_property
    def path(self):
        """The JSON of the result."""
        s = self.settings
        order = s.order if s.file_orders is None else "file"
        name = f"{order}_steps{len(s.group_sizes)}_cfg{s.cfg:g}_seed{s.seed}_n{self.num_images}.json"
        return Path(self.output_dir) / name

    @cached_property
    def store(self):
        """The chunks, in a folder beside the result."""
        return ChunkStore(self.path.with_suffix(".chunks"), self.protocol)

    def run(self, model, tokenizer, world, *, generate=None):
        """Make what is missing, and the metrics. Every process of `world` takes part.

        `generate` is used in place of `generate_tokens` of the model; `tokenizer` needs only `decode`.

        Run again after a kill it goes on with the missing chunks and ends with the same numbers; run again
        when finished it gives the written result.

        Returns:
            dict of the protocol, `metrics`, and `seconds` by phase (of all processes together), on the first
            process; None on the others.
        Raises:
            EvaluationFailed, OSError.
        """
        plan = None if self.path.exists() else self.store.missing()
        # The first process decides, and writes nothing before all have made their checks.
        plan = dist.gather_objects(plan if world.is_main else None)[0]
        if plan is not None:
            if world.is_main:
                self.store.begin()
                self.keep.begin(self.protocol)
            dist.barrier()
            generate = generate or partial(generate_tokens, model)
            made = partial(generated_images, generate, tokenizer, model.config.num_classes)
            fill_chunks(self, plan[world.rank :: world.size], made, world)
            dist.barrier()
        if not world.is_main:
            return None
        if plan is not None:
            finish(self, model.config.num_classes, world.size)
        self.store.remove()
        return read_json(self.path)


def generated_images(
    generate, tokenizer, num_classes, settings, ids, num_images, batch_size, stopwatch
):  # fmt: skip
    """Images with these numbers, in batches; `generate` is `generate_tokens` of a model.

    Yields:
        (image ids int64 [b], uint8 [b, H, W, 3] on the device)
    """
    for batch in ids.split(batch_size):
        labels = balanced_label(batch, num_images, num_classes)
        with stopwatch("generate"):
            tokens = generate(
                labels, settings.orders(batch.numpy()), settings.group_sizes, image_ids=batch,
                **settings.decoding(),
            )  # fmt: skip
        with stopwatch("decode"), torch.inference_mode():
            images = to_uint8(tokenizer.decode(tokens))
        yield batch, images


def fill_chunks(evaluation, chunks, made, world):
    """Make these chunks, of the images that `made` gives. PNGs are written by other threads meanwhile."""
    store, stopwatch = evaluation.store, Stopwatch(world.device)
    total = sum(len(store.ids(chunk)) for chunk in chunks)
    with (
        tqdm(total=total, unit="img", disable=not world.is_main, mininterval=1) as progress,
        ThreadPoolExecutor(4) as writers,
    ):
        for chunk in chunks:
            images = made(
                evaluation.settings, store.ids(chunk), store.num_images, evaluation.batch_size, stopwatch
            )
            arrays = measure(images, evaluation.judge.extractor, evaluation.keep, stopwatch, writers)
            store.write(chunk, {**arrays, "seconds": stopwatch.lap()})
            progress.update(len(store.ids(chunk)))


def measure(images, extractor, keep, stopwatch, writers):
    """The arrays of a chunk: features [n, F] and logits [n, C] float32 and, for an `.npz`, the images.

    Args:
        images: iterable of (ids, uint8 [b, H, W, 3]).
    Raises:
        EvaluationFailed: features that are not finite. OSError: a PNG cannot be written.
    """
    arrays, writing = defaultdict(list), []
    for ids, batch in images:
        with stopwatch("features"):
            for key, value in extractor(batch).items():
                arrays[key].append(value.float())
        if keep.image_folder or keep.npz_path:
            pixels = batch.cpu()
            writing += keep.write_pngs(ids, pixels.numpy(), writers)
            arrays["images"] += [pixels] if keep.npz_path else []
    for future in writing:
        future.result()  # a chunk is complete when its PNGs are
    whole = {key: torch.cat(parts).cpu().numpy() for key, parts in arrays.items() if parts}
    if not np.isfinite(whole["features"]).all():
        raise EvaluationFailed(f"{extractor.name} features that are not finite, in images up to {ids[-1]}")
    return whole


def finish(evaluation, num_classes, processes):
    """The metrics of all chunks, and the result's file."""
    store, judge, keep = evaluation.store, evaluation.judge, evaluation.keep
    if missing := store.missing():
        raise EvaluationFailed(
            f"{store.path(missing[0])} is not there: all processes must see the same --output_dir"
        )
    start = time.perf_counter()
    try:
        metrics = compute_metrics(
            store.read_rows("features"), store.read_rows("logits"), judge.extractor.name, judge.reference,
            kid=judge.kid, prc=judge.prc,
        )  # fmt: skip
        phases = sum(store.read("seconds"))
    except DamagedChunk as error:
        raise EvaluationFailed(f"{error} and run the same command again") from None
    seconds = {**dict(zip(PHASES, phases, strict=True)), "metrics": time.perf_counter() - start}
    if keep.npz_path:
        save_npz(keep.npz_path, store, num_classes)
    result = {
        **evaluation.protocol, "warnings": warnings(evaluation.num_images, num_classes), "metrics": metrics,
        "seconds": {phase: round(float(value), 3) for phase, value in seconds.items()},
        "processes": processes,
    }  # fmt: skip
    write_json(evaluation.path, result)


def save_npz(path, store, num_classes):
    """The images of all chunks and their labels in ADM's form."""
    n = store.num_images
    parts = (npz.open_array(store.path(chunk), "images") for chunk in range(len(store)))
    labels = balanced_label(np.arange(n), n, num_classes)
    npz.save_images(path, parts, n, npz.open_array(store.path(0), "images").shape[1:], labels)


def warnings(num_images, num_classes):
    """What keeps a result from being compared with published ones, a line each."""
    lines = []
    if num_images < PUBLISHED_IMAGES:
        lines.append(f"{num_images} images: published figures are of {PUBLISHED_IMAGES}; fewer raise FID")
    if num_images % num_classes:
        lines.append(f"{num_images} images are not equally many of each of {num_classes} classes")
    return lines
