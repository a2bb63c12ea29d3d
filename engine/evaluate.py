"""Evaluation: settings -> images as a stream -> features -> chunks on disk -> metrics -> one JSON.

A chunk is a file, complete or absent, of the features of consecutive images: a killed evaluation resumes with
the missing ones. Batches do not depend on the number of processes, so neither do the numbers.
"""

import shutil
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.decoding import generate_tokens
from engine.features import nested
from engine.generate import GenerationSettings
from engine.measure import EvaluationFailed, MetricSpec, environment, extract, in_batches
from models.weights import state_digest
from util.distributed import barrier, gather_objects, main_alone
from util.files import array_names, atomic, map_array, read_arrays, read_json, refuse_changes, write_json
from util.images import to_uint8
from util.pictures import save_png

PHASES = ("generate", "decode", "features")
PUBLISHED_IMAGES = 50000
MIN_CHUNKS = 256  # if there are as many batches: any number of processes then shares them evenly
MARKER = "evaluation-images.json"  # identifies a folder of PNGs as an evaluation's


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: what decides its numbers, and its files in `output_dir`: the result and, until that is
    written, protocol and chunks. `facts` is a dict of what decides the images besides the settings."""

    settings: GenerationSettings
    facts: dict = field(repr=False)
    metrics: MetricSpec
    num_images: int
    batch_size: int
    output_dir: Path
    save_images: Path | None = None  # a folder of PNGs
    save_npz: Path | None = None  # as ADM's

    def __post_init__(self):
        if "prc" in self.metrics.asked and self.num_images < 4:
            raise ValueError(f"--prc needs 4 images or more, --num_images is {self.num_images}")

    @cached_property
    def protocol(self):
        """Every setting that decides the numbers, as a dict of plain values."""
        folder, npz = self.save_images, self.save_npz
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

    @property
    def result(self):
        return Path(self.output_dir, f"{self.name}.json")

    @property
    def chunks(self):
        return Path(self.output_dir, f"{self.name}.chunks")

    @property
    def protocol_file(self):
        return self.chunks / "protocol.json"

    @cached_property
    def batches(self):
        """The image numbers, int64 [b], of the batches of each chunk: a list of lists."""
        batches = in_batches(self.num_images, self.batch_size)
        each = max(1, self.num_images // (MIN_CHUNKS * self.batch_size))
        return [batches[i : i + each] for i in range(0, len(batches), each)]

    def chunk(self, index):
        return self.chunks / f"chunk-{index:05d}.npz"

    def missing(self):
        """The indices of the chunks that do not exist; without the protocol no chunk's settings are known."""
        known = self.protocol_file.exists()
        return [index for index in range(len(self.batches)) if not (known and self.chunk(index).exists())]

    def _from_chunk(self, index, read, *what):
        try:
            return read(self.chunk(index), *what)
        except (ValueError, OSError) as error:
            raise EvaluationFailed(f"{error}: remove this file and run the same command again") from None

    def read(self, key):
        """The list of this array of each chunk, in image order. EvaluationFailed names a damaged file."""
        return [self._from_chunk(i, read_arrays, [key])[key] for i in range(len(self.batches))]

    def outputs(self):
        """What the extractors returned for all images, as `MetricSpec.compute` takes it."""
        keys = self._from_chunk(0, array_names) - {"images", "seconds"}
        arrays = {key: torch.from_numpy(np.concatenate(self.read(key))) for key in keys}
        return nested(arrays, [extractor.name for extractor in self.metrics.extractors])


# Images of a model.


@dataclass(frozen=True)
class GeneratedImages:
    """The images of a model under GenerationSettings; `generate` replaces `generate_tokens` of the model."""

    settings: GenerationSettings
    num_images: int
    model: torch.nn.Module
    tokenizer: object
    generate: Callable | None = None

    def labels(self, ids):
        """The classes of images, int64 as `ids`: in label order, equally many images of each."""
        return ids * self.model.config.num_classes // self.num_images

    def batches(self, ids, timer):
        """Yield uint8 [b, H, W, 3] on the device for each int64 [b] of `ids`; `timer` learns the phases."""
        settings, generate = self.settings, self.generate or partial(generate_tokens, self.model)
        for batch in ids:
            image_ids = torch.from_numpy(batch)
            with timer.phase("generate"):
                tokens = generate(
                    self.labels(image_ids), settings.orders(batch), settings.group_sizes, settings.sampling,
                    seed=settings.seed, image_ids=image_ids,
                )
            with timer.phase("decode"), torch.inference_mode():
                images = to_uint8(self.tokenizer.decode(tokens))
            yield images


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


def evaluation_facts(model, tokenizer, device):
    """What decides the numbers besides settings, metrics and the model's weights: a dict of plain values."""
    precision = str(model.head.weight.dtype).removeprefix("torch.")
    return {
        "tokenizer_digest": state_digest(tokenizer), "num_classes": model.config.num_classes,
        "img_size": model.config.grid_size * tokenizer.config.stride,
        "precision": precision, "decoder": precision, **environment(device),
    }


# The evaluation.


def check_output(evaluation):
    """Refuse places that hold anything other than this evaluation's result, chunks and images: a ValueError
    that names the place and, of another evaluation, the first setting that differs."""
    result, protocol = evaluation.result, evaluation.protocol
    for path in (result, evaluation.protocol_file):
        if path.exists():
            refuse_changes(path, read_json(path), protocol, "give another --output_dir")
    folder, npz = evaluation.save_images, evaluation.save_npz
    if folder and folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ValueError(f"--save_images: {folder} is not empty and was not made by an evaluation")
        refuse_changes(folder, read_json(folder / MARKER), protocol, "give another --save_images")
    if npz and npz.exists() and not (evaluation.protocol_file.exists() or result.exists()):
        raise ValueError(f"--save_npz: {npz} exists: give another name")
    for place in (folder, npz) if result.exists() else ():
        if place and not place.exists():
            raise ValueError(f"{place} is gone and the evaluation is finished: give another --output_dir")


def evaluate(evaluation, images, world):
    """Make the missing chunks of GeneratedImages, then the result: a dict of the protocol, `metrics`, and
    `seconds` by phase, summed over processes. All processes take part; the first returns it, others None.

    A killed evaluation resumes, with the same numbers; a finished one returns its written result. Raises
    ValueError as `check_output`, EvaluationFailed, OSError.
    """
    check_output(evaluation)
    # Rank 0 decides for all what is missing, and writes nothing before all have checked.
    missing = gather_objects(None if evaluation.result.exists() else evaluation.missing())[0]
    if missing is not None:
        if world.is_main:
            begin(evaluation)
        barrier()
        fill_chunks(evaluation, missing[world.rank :: world.size], images, world)
        barrier()
        metrics = evaluation.metrics.measured(evaluation.batch_size, world)
        with main_alone():
            if world.is_main:
                write_result(evaluation, metrics, images, world.size)
    if not world.is_main:
        return None
    shutil.rmtree(evaluation.chunks, ignore_errors=True)
    return read_json(evaluation.result)


def begin(evaluation):
    """Write the protocol to where chunks and images will lie."""
    if evaluation.chunks.exists() and not evaluation.protocol_file.exists():
        shutil.rmtree(evaluation.chunks)
    write_json(evaluation.protocol_file, evaluation.protocol)
    if evaluation.save_images:
        write_json(evaluation.save_images / MARKER, evaluation.protocol)


def fill_chunks(evaluation, missing, images, world):
    """Measure the images of these chunks and write them."""
    ids = [batch for chunk in missing for batch in evaluation.batches[chunk]]
    keep = bool(evaluation.save_images or evaluation.save_npz)
    stream = extract(images, ids, evaluation.metrics.extractors, world.device, keep_images=keep)
    with (
        tqdm(total=sum(map(len, ids)), unit="img", disable=not world.is_main, mininterval=1) as progress,
        ThreadPoolExecutor(4) as png_writers,
    ):
        for chunk in missing:
            write_chunk(evaluation, chunk, stream, png_writers)
            progress.update(sum(map(len, evaluation.batches[chunk])))


def write_chunk(evaluation, chunk, stream, png_writers):
    """Write a chunk: what the extractors returned, float32 [n, ...], seconds by phase and, for an `.npz`, the
    images. Its batches are the next of the stream."""
    arrays, seconds, pngs = defaultdict(list), np.zeros(len(PHASES)), []
    for ids, (found, times) in zip(evaluation.batches[chunk], stream, strict=False):
        seconds += [times[phase] for phase in PHASES]
        if folder := evaluation.save_images:
            for i, pixels in zip(ids, found["images"].numpy(), strict=True):
                pngs.append(png_writers.submit(save_png, folder / f"{i:06d}.png", pixels))
        for key, values in found.items():
            if key != "images" or evaluation.save_npz:
                arrays[key].append(values.numpy())
    for png in pngs:
        png.result()  # a chunk is complete when its PNGs are; a full disk is raised here
    arrays = {key: np.concatenate(parts) for key, parts in arrays.items()}
    with atomic(evaluation.chunk(chunk)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, seconds=seconds)


def write_result(evaluation, metrics, images, processes):
    """Compute the metrics of all chunks, and write the result and, if asked for, the images' `.npz`."""
    if missing := evaluation.missing():
        raise EvaluationFailed(
            f"{evaluation.chunk(missing[0])} is not there: all processes must see the same --output_dir"
        )
    start, n = time.perf_counter(), evaluation.num_images
    values = metrics.compute(evaluation.outputs())
    seconds = dict(zip(PHASES, sum(evaluation.read("seconds")), strict=True))
    seconds["metrics"] = time.perf_counter() - start
    if evaluation.save_npz:
        parts = (map_array(evaluation.chunk(chunk), "images") for chunk in range(len(evaluation.batches)))
        save_image_npz(evaluation.save_npz, parts, images.labels(np.arange(n)))
    write_json(evaluation.result, {
        **evaluation.protocol, "warnings": warnings(n, images.model.config.num_classes), "metrics": values,
        "seconds": {phase: round(float(value), 3) for phase, value in seconds.items()},
        "processes": processes,
    })


def warnings(num_images, num_classes=1):
    """Why a result is not comparable with published ones: a list of lines."""
    lines = []
    if num_images < PUBLISHED_IMAGES:
        lines.append(f"{num_images} images: published figures are of {PUBLISHED_IMAGES}")
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
