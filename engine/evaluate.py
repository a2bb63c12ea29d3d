"""Evaluation: settings -> images as a stream -> features -> chunks on disk -> metrics -> one JSON.

A chunk is a file, complete or absent, of the features of consecutive images: a killed evaluation resumes with
the missing ones. Batches do not depend on the number of processes, so neither do the numbers.
"""

import shutil
import time
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.decoding import generate_tokens
from engine.features import make_extractor
from engine.metrics import compute_metrics, load_statistics
from models.weights import state_digest
from util.device import device_name, synchronize, timing_event
from util.distributed import barrier, gather_objects
from util.files import atomic, file_digest, map_array, read_arrays, read_json, refuse_changes, write_json
from util.images import to_uint8
from util.pictures import save_png

PHASES = ("generate", "decode", "features")
PUBLISHED_IMAGES = 50000
MIN_CHUNKS = 256  # if there are as many batches: any number of processes then shares them evenly
MARKER = "evaluation-images.json"  # identifies a folder of PNGs as an evaluation's


class EvaluationFailed(Exception):
    """An evaluation that cannot continue."""


@dataclass(frozen=True)
class MetricSpec:
    """What images are measured with: an extractor from engine.features, reference statistics from
    `load_statistics`, the digest of their file, and whether to compute KID and precision/recall. ValueError
    if these do not fit."""

    extractor: object
    reference: dict | None = None
    reference_digest: str = ""
    kid: bool = False
    prc: bool = False

    @classmethod
    def load(cls, features, device, img_size, *, inception=None, fid_stats=None, kid=False, prc=False):
        """From an extractor's name and files. ValueError also for a reference of another image size."""
        reference, digest = None, ""
        if fid_stats:
            reference, digest = load_statistics(fid_stats, features=kid or prc), file_digest(fid_stats)
            if (size := reference.get("img_size", img_size)) != img_size:
                raise ValueError(f"--fid_stats is of {size} px images, the weights make {img_size} px")
        return cls(make_extractor(features, device, inception), reference, digest, kid, prc)

    def __post_init__(self):
        """Compare what the reference records of its extractor, if anything, with the extractor."""
        reference, extractor = self.reference or {}, self.extractor
        if (self.kid or self.prc) and "features" not in reference:
            raise ValueError("--kid and --prc need --fid_stats made by main_stats.py --save_features")
        name = reference.get("extractor", extractor.name)
        if name != extractor.name:
            raise ValueError(f"--fid_stats is of {name} features, --features is {extractor.name}")
        digest = reference.get("extractor_digest", extractor.digest)
        if digest != extractor.digest:
            raise ValueError(f"--fid_stats is of {name} weights {digest}, now they are {extractor.digest}")
        expected = extractor.num_features
        if reference and (size := len(reference["mu"])) != expected:
            raise ValueError(f"--fid_stats: mu is [{size}], {name} has {expected} features")

    def as_json(self):
        """A dict of plain values."""
        reference = self.reference or {}
        return {
            "features": self.extractor.name, "features_digest": self.extractor.digest,
            "reference_digest": self.reference_digest, "reference_n": reference.get("n"),
            "reference_preparation": reference.get("preparation"), "kid": self.kid, "prc": self.prc,
        }


@dataclass(frozen=True)
class ImageSink:
    """Where the images of an evaluation are saved, if anywhere: a folder of PNGs, an `.npz` like ADM's."""

    folder: Path | None = None
    npz: Path | None = None


@dataclass(frozen=True)
class EvaluationSpec:
    """One evaluation: GenerationSettings, metrics, and `facts`, a dict of what else decides the numbers."""

    settings: object
    metrics: MetricSpec
    num_images: int
    batch_size: int
    facts: dict
    sink: ImageSink = ImageSink()

    def __post_init__(self):
        if self.metrics.prc and self.num_images < 4:
            raise ValueError(f"--prc needs 4 images or more, --num_images is {self.num_images}")

    @cached_property
    def protocol(self):
        """Every setting that decides the numbers, as a dict of plain values."""
        folder, npz = self.sink.folder, self.sink.npz
        return {
            **self.settings.as_json(), "num_images": self.num_images, "batch_size": self.batch_size,
            **self.metrics.as_json(), **self.facts, "save_images": str(folder) if folder else None,
            "save_npz": str(npz) if npz else None,
        }

    @property
    def name(self):
        """The name of the result's file, without `.json`."""
        s = self.settings
        order = s.order if s.file_orders is None else "file"
        return f"{order}_steps{len(s.group_sizes)}_cfg{s.sampling.cfg:g}_seed{s.seed}_n{self.num_images}"


class PublishedDecoder:
    """The decoder of the published evaluation: bfloat16 autocast, (x + 1) / 2 in bfloat16, then bytes.

    Ours (`engine.fast.for_inference`) is nearer to float32. The pixels are those of whole bytes, in [-1, 1].
    """

    def __init__(self, tokenizer):
        self.config, self.tokenizer = tokenizer.config, tokenizer

    def decode(self, tokens):
        with torch.autocast(tokens.device.type, torch.bfloat16):
            pixels = self.tokenizer.decode(tokens)
        scaled = (pixels.bfloat16() + 1) / 2
        return (255 * scaled.float()).round().clamp(0, 255) / 127.5 - 1


def evaluation_facts(
    model, tokenizer, device, *, weights_digest, order_file=None, compiled=False, published=False,
):
    """What decides the numbers besides settings and metrics, as a dict of plain values."""
    precision = str(model.head.weight.dtype).removeprefix("torch.")
    return {
        "weights_digest": weights_digest, "tokenizer_digest": state_digest(tokenizer),
        "num_classes": model.config.num_classes,
        "img_size": model.config.grid_size * tokenizer.config.stride,
        "order_file_digest": file_digest(order_file) if order_file else "",
        "precision": precision, "decoder": "published" if published else precision, "compile": compiled,
        "device": device_name(device), "torch": torch.__version__,
        "torch_fidelity": version("torch_fidelity"), "numpy": np.__version__,
    }


def check_output(spec, output_dir):
    """Refuse places that hold anything other than this evaluation's result, chunks and images: a ValueError
    that names the place and, of another evaluation, the first setting that differs."""
    files = OutputFiles(spec, output_dir)
    for path in (files.result, files.protocol):
        if path.exists():
            refuse_changes(path, read_json(path), spec.protocol, "give another --output_dir")
    folder, npz = spec.sink.folder, spec.sink.npz
    if folder and folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ValueError(f"--save_images: {folder} is not empty and was not made by an evaluation")
        refuse_changes(folder, read_json(folder / MARKER), spec.protocol, "give another --save_images")
    if npz and npz.exists() and not (files.protocol.exists() or files.result.exists()):
        raise ValueError(f"--save_npz: {npz} exists: give another name")
    for place in (folder, npz) if files.result.exists() else ():
        if place and not place.exists():
            raise ValueError(f"{place} is gone and the evaluation is finished: give another --output_dir")


def evaluate(spec, output_dir, model, tokenizer, world, generate=None):
    """Make the missing chunks, then the result: a dict of the protocol, `metrics`, and `seconds` by phase,
    summed over processes. All processes of `world` take part; rank 0 returns the result, the others None.

    A killed evaluation resumes, with the same numbers; a finished one returns its written result. `generate`
    replaces `generate_tokens` of the model. Raises ValueError as `check_output`, EvaluationFailed, OSError.
    """
    check_output(spec, output_dir)
    files = OutputFiles(spec, output_dir)
    # Rank 0 decides for all what is missing, and writes nothing before all have checked.
    missing = gather_objects(None if files.result.exists() else files.missing())[0]
    if missing is not None:
        if world.is_main:
            if files.chunks.exists() and not files.protocol.exists():
                shutil.rmtree(files.chunks)
            write_json(files.protocol, spec.protocol)
            if spec.sink.folder:
                write_json(spec.sink.folder / MARKER, spec.protocol)
        barrier()
        generate = generate or partial(generate_tokens, model)
        images = partial(generate_batches, spec, generate, tokenizer, model.config.num_classes)
        fill_chunks(spec, files, missing[world.rank :: world.size], images, world)
        barrier()
        if world.is_main:
            write_result(spec, files, model.config.num_classes, world.size)
    if not world.is_main:
        return None
    shutil.rmtree(files.chunks, ignore_errors=True)
    return read_json(files.result)


def balanced_label(image_id, num_images, num_classes):
    """The class of an image of an evaluation: classes in label order, equally many images of each."""
    return image_id * num_classes // num_images


def generate_batches(spec, generate, tokenizer, num_classes, ids, timer):
    """Yield the images with these ids in batches: (ids int64 [b], uint8 [b, H, W, 3] on the device)."""
    settings = spec.settings
    for batch in ids.split(spec.batch_size):
        labels = balanced_label(batch, spec.num_images, num_classes)
        with timer.phase("generate"):
            tokens = generate(
                labels, settings.orders(batch.numpy()), settings.group_sizes, settings.sampling,
                seed=settings.seed, image_ids=batch,
            )
        with timer.phase("decode"), torch.inference_mode():
            images = to_uint8(tokenizer.decode(tokens))
        yield batch, images


def fill_chunks(spec, files, missing, images, world):
    """Measure the images of these chunks, `images(ids, timer)`, and write the chunks."""
    timer = PhaseTimer(world.device)
    total = sum(len(files.ids(chunk)) for chunk in missing)
    with (
        tqdm(total=total, unit="img", disable=not world.is_main, mininterval=1) as progress,
        ThreadPoolExecutor(4) as png_writers,
    ):
        for chunk in missing:
            ids = files.ids(chunk)
            arrays = measure(spec, images(ids, timer), timer, png_writers)
            files.write_chunk(chunk, {**arrays, "seconds": timer.lap()})
            progress.update(len(ids))


def measure(spec, batches, timer, png_writers):
    """A chunk's arrays: float32 features [n, F] and logits [n, C] and, for an `.npz`, the images."""
    arrays, pngs = defaultdict(list), []
    for ids, images in batches:
        with timer.phase("features"):
            for key, value in spec.metrics.extractor(images).items():
                arrays[key].append(value.float())
        if spec.sink.folder:
            for i, pixels in zip(ids.tolist(), images.cpu().numpy(), strict=True):
                pngs.append(png_writers.submit(save_png, spec.sink.folder / f"{i:06d}.png", pixels))
        if spec.sink.npz:
            arrays["images"].append(images.cpu())
    for png in pngs:
        png.result()  # a chunk is complete when its PNGs are; a full disk is raised here
    arrays = {key: torch.cat(parts).cpu().numpy() for key, parts in arrays.items()}
    if not np.isfinite(arrays["features"]).all():
        raise EvaluationFailed(f"non-finite {spec.metrics.extractor.name} features in images up to {ids[-1]}")
    return arrays


def write_result(spec, files, num_classes, processes):
    """Compute the metrics of all chunks, and write the result and, if asked for, the images' `.npz`."""
    if missing := files.missing():
        raise EvaluationFailed(
            f"{files.chunk(missing[0])} is not there: all processes must see the same --output_dir"
        )
    start, metrics = time.perf_counter(), spec.metrics
    features, logits = (torch.from_numpy(np.concatenate(files.read(key))) for key in ("features", "logits"))
    values = compute_metrics(
        features, logits, metrics.extractor.name, metrics.reference, kid=metrics.kid, prc=metrics.prc
    )
    seconds = dict(zip(PHASES, sum(files.read("seconds")), strict=True))
    seconds["metrics"] = time.perf_counter() - start
    if spec.sink.npz:
        images = (map_array(files.chunk(chunk), "images") for chunk in range(files.num_chunks))
        labels = balanced_label(np.arange(spec.num_images), spec.num_images, num_classes)
        save_image_npz(spec.sink.npz, images, labels)
    result = {
        **spec.protocol, "warnings": warnings(spec.num_images, num_classes), "metrics": values,
        "seconds": {phase: round(float(value), 3) for phase, value in seconds.items()},
        "processes": processes,
    }
    write_json(files.result, result)


def warnings(num_images, num_classes):
    """Why a result is not comparable with published ones: a list of lines."""
    lines = []
    if num_images < PUBLISHED_IMAGES:
        lines.append(f"{num_images} images: published figures are of {PUBLISHED_IMAGES}; fewer raise FID")
    if num_images % num_classes:
        lines.append(f"{num_images} images are not equally many of each of {num_classes} classes")
    return lines


def save_image_npz(path, parts, labels):
    """Write images as ADM does: `.npz` of arr_0 uint8 [n, H, W, 3] and arr_1 int64 [n], the labels.

    `parts` yields uint8 [m, H, W, 3], n images in all; one part is in memory at a time.
    """
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for i, part in enumerate(parts):
                if i == 0:
                    shape = (len(labels), *part.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(part.tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64), allow_pickle=False)


class OutputFiles:
    """The files of an evaluation: its result and, until that is written, its protocol and chunks."""

    def __init__(self, spec, output_dir):
        self.result = Path(output_dir, f"{spec.name}.json")
        self.chunks = Path(output_dir, f"{spec.name}.chunks")
        self.protocol = self.chunks / "protocol.json"
        self.num_images = spec.num_images
        self.chunk_size = spec.batch_size * max(1, spec.num_images // (MIN_CHUNKS * spec.batch_size))
        self.num_chunks = -(-self.num_images // self.chunk_size)

    def chunk(self, index):
        return self.chunks / f"chunk-{index:05d}.npz"

    def missing(self):
        """The indices of the chunks that do not exist; without the protocol no chunk's settings are known."""
        known = self.protocol.exists()
        return [index for index in range(self.num_chunks) if not (known and self.chunk(index).exists())]

    def ids(self, index):
        """The image numbers of a chunk, int64 [n]: whole batches, except in the last one."""
        return torch.arange(index * self.chunk_size, min((index + 1) * self.chunk_size, self.num_images))

    def write_chunk(self, index, arrays):
        with atomic(self.chunk(index)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def read(self, key):
        """The list of this array of each chunk, in image order. EvaluationFailed names a damaged file."""
        try:
            return [read_arrays(self.chunk(index), [key])[key] for index in range(self.num_chunks)]
        except (ValueError, OSError) as error:
            raise EvaluationFailed(f"{error}: remove this file and run the same command again") from None


class PhaseTimer:
    """Seconds that the device spends in each of PHASES. A GPU is not waited for until `lap`."""

    def __init__(self, device):
        self.device, self.events = device, []

    @contextmanager
    def phase(self, name):
        start, end = timing_event(self.device), timing_event(self.device)
        start.record()
        yield
        end.record()
        self.events.append((name, start, end))

    def lap(self):
        """Seconds of each phase since the last lap, float64 [3]; waits for the device."""
        synchronize(self.device)
        seconds = dict.fromkeys(PHASES, 0.0)
        for name, start, end in self.events:
            seconds[name] += start.elapsed_time(end) / 1000
        self.events = []
        return np.array(list(seconds.values()))
