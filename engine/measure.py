"""One pass over images: images -> extractors -> features. What is made of them are three compositions: an
evaluation's chunks (engine/evaluate.py), the score of stored images (scripts/score.py), reference statistics.

A set of images has a length and `batches(ids, timer)`, which yields uint8 [b, H, W, 3] for each of a list of
int64 arrays of indices. Batches do not depend on the number of processes, so neither do the numbers.
"""

import hashlib
from collections import Counter, defaultdict, deque
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.features import flat, nested
from engine.metrics import METRICS, RunningStatistics, compute_metrics, load_statistics, statistics_of
from util.cli import Failure
from util.device import AsyncCopy, device_name, is_cuda, timing_event, to_device
from util.distributed import gather_to_main, say
from util.files import array_names, file_digest, map_array
from util.images import image_loader, load_image, readable_pixels

LOSSY = {".jfif", ".jpe", ".jpeg", ".jpg", ".webp"}


class EvaluationFailed(Failure):
    """An evaluation that cannot continue."""


# Stored images.


class StoredImages:
    """Images that lie somewhere: `shape` [H, W, 3] of each, `preparation`, and how many files have which of
    the `endings`."""

    endings = {}

    @property
    def img_size(self):
        """Pixels of a side, or a text if the sides differ."""
        height, width, _ = self.shape
        return height if height == width else f"{width}x{height}"

    def warnings(self):
        """Why metrics of these files may not be comparable: a list of lines."""
        lossy = [f"{count} {ending}" for ending, count in self.endings.items() if ending in LOSSY]
        return [f"{', '.join(lossy)}: lossy compression changes FID"] if lossy else []


class FolderImages(StoredImages):
    """The images of a `folders.ImageSet`: ADM's centre crop to `size` pixels or, if it is None, as they
    are, all of one size. ValueError if the first cannot be read."""

    def __init__(self, folder, size=None, num_workers=0):
        self.folder, self.crop, self.num_workers = folder, size, num_workers
        self.shape = load_image(folder.file(0), size, folder.reading).shape
        how = f"centre crop to {size} px" if size else f"{self.img_size} px as they are"
        self.preparation = f"{how}, read as {folder.reading}"
        self.endings = Counter(Path(name).suffix.lower() for name in folder.names)

    def __len__(self):
        return len(self.folder)

    def batches(self, ids, timer=None):
        """As the module says. Raises UnreadableImage; EvaluationFailed for an image of another size."""
        pairs = ((batch.tolist(), [0] * len(batch)) for batch in ids)
        for items in image_loader(self.folder, self.crop, pairs, self.num_workers):
            for index, image in items:
                if not isinstance(image, str) and image.shape != self.shape:
                    name, (height, width, _) = self.folder.file(index), image.shape
                    sizes = f"{width}x{height} px, the first image {self.img_size} px"
                    raise EvaluationFailed(f"{name} has {sizes}: --img_size N would crop all alike")
            yield torch.from_numpy(readable_pixels(items)[1])


class ArrayImages(StoredImages):
    """Images in an `.npz` as ADM stores them, arr_0 uint8 [n, H, W, 3]. ValueError if it is anything else."""

    def __init__(self, path):
        self.array = map_array(path, "arr_0")
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
            found = f"{self.array.dtype} {list(self.array.shape)}"
            raise ValueError(f"{path}: arr_0 is {found}, not uint8 [n, H, W, 3]")
        self.shape = self.array.shape[1:]
        self.preparation = f"{self.img_size} px as they are"

    def __len__(self):
        return len(self.array)

    def batches(self, ids, timer=None):
        """As the module says."""
        return (torch.from_numpy(self.array[batch]) for batch in ids)


# The pass.


def in_batches(n, batch_size):
    """The indices of n images as a list of int64 arrays."""
    return np.split(np.arange(n), range(batch_size, n, batch_size))


def extract(images, ids, extractors, device, *, keep_images=False):
    """Yield what is found of each array of indices in `ids`. A GPU works on the next one meanwhile.

    Yields:
        a dict of host tensors, what the extractors return as float32 under the names of `flat`, and `images`
        if they are kept; and seconds by phase. EvaluationFailed if a value is not finite.
    """
    timer = PhaseTimer(device)

    def launched():
        for pixels in images.batches(ids, timer):
            kept = {"images": AsyncCopy(pixels)} if keep_images else {}
            pixels = to_device(pixels, device)
            with timer.phase("features"):
                found = flat({extractor.name: extractor(pixels) for extractor in extractors})
            yield {key: AsyncCopy(value.float()) for key, value in found.items()} | kept, timer.cut()

    for batch, (copies, events) in zip(ids, delayed(launched(), 1 if is_cuda(device) else 0), strict=True):
        found = {key: copy.get() for key, copy in copies.items()}
        if wrong := [key for key, value in found.items() if not value.isfinite().all()]:
            raise EvaluationFailed(f"non-finite {wrong[0]} in images up to {batch[-1]}")
        yield found, timer.seconds(events)


def delayed(items, lag):
    """The same items, each yielded only when `lag` more have been made."""
    waiting = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > lag:
            yield waiting.popleft()
    yield from waiting


class PhaseTimer:
    """Seconds that the device spends in phases. A GPU is waited for only by `seconds`, until the last of the
    given events."""

    def __init__(self, device):
        self.device, self.events = device, []

    @contextmanager
    def phase(self, name):
        start, end = timing_event(self.device), timing_event(self.device)
        start.record()
        yield
        end.record()
        self.events.append((name, start, end))

    def cut(self):
        """The events since the last cut."""
        events, self.events = self.events, []
        return events

    @staticmethod
    def seconds(events):
        """Phase -> seconds."""
        seconds = defaultdict(float)
        for name, start, end in events:
            end.synchronize()
            seconds[name] += start.elapsed_time(end) / 1000
        return seconds


def measure(images, extractors, batch_size, world, *, keep):
    """Measure stored images; the processes share them, whole batches each.

    Returns:
        on the first process: extractor name -> dict of what it returned for all images, in their order, or,
        if that is not to be kept, of mu, sigma and n; and a digest of the images. Elsewhere ({}, "").
    """
    ids, names = in_batches(len(images), batch_size), [extractor.name for extractor in extractors]
    own = ids[world.rank :: world.size]
    sums = {extractor.name: RunningStatistics(extractor.num_features) for extractor in extractors}
    kept, digests = [], []
    with tqdm(total=sum(map(len, own)), unit="img", disable=not world.is_main, mininterval=1) as progress:
        for found, _ in extract(images, own, extractors, world.device, keep_images=True):
            pixels = found.pop("images").numpy()
            digests.append(b"".join(hashlib.sha256(image).digest() for image in pixels))
            if keep:
                kept.append(found)
            else:
                for name, outputs in nested(found, names).items():
                    sums[name].add(outputs["features"])
            progress.update(len(pixels))
    parts = gather_to_main((kept, digests, sums))
    if not world.is_main:
        return {}, ""
    kept, digests, (sums, *others) = zip(*parts, strict=True)
    digest = hashlib.sha256(b"".join(_in_turn(digests))).hexdigest()[:16]
    if keep:
        kept = _in_turn(kept)
        return nested({key: torch.cat([found[key] for found in kept]) for key in kept[0]}, names), digest
    for name, other in ((name, other[name]) for other in others for name in names):
        sums[name].merge(other)
    return {name: sums[name].finish() for name in names}, digest


def _in_turn(lists):
    """The items of lists to which they were dealt in turn."""
    return [item for turn in zip_longest(*lists) for item in turn if item is not None]


def reference_of(outputs, known=None):
    """Reference statistics, as of `load_statistics`, from what `measure` found of real images. Mean and
    covariance that are known replace theirs: ADM's are of more images than its file holds."""
    if "features" not in outputs:
        return known or outputs
    return {**(known or statistics_of(outputs["features"])), "features": outputs["features"]}


# What images are measured with.


@dataclass(frozen=True)
class MetricSpec:
    """Extractors, and what they found of real images: `references`, extractor name -> dict as of
    `load_statistics`, and what `measured` adds from `reference_images`. `asked` are flags of METRICS."""

    extractors: list
    references: dict = field(default_factory=dict)
    reference_digest: str = ""
    reference_images: object = None
    asked: tuple[str, ...] = ()

    @classmethod
    def load(cls, settings, device, img_size, reference_images=None):
        """From MetricSettings; `img_size` is that of the images to be measured. ValueError if the reference
        is of another size, other features or weights, or lacks what --kid and --prc need."""
        extractors, references = settings.extractors(device), {}
        path, asked = settings.fid_stats, settings.asked
        for extractor in extractors if path else ():
            references[extractor.name] = load_statistics(path, extractor.name, features=bool(asked))
            _check_reference(references[extractor.name], extractor, img_size)
        names = array_names(path) if path else ()
        if "mu_s" in names:
            say(f"{path}: mu_s and sigma_s are not read, sFID is not offered")
        lacking = not references or any("features" not in known for known in references.values())
        if asked and lacking and not reference_images:
            if "arr_0" not in names:
                flags = " and ".join(f"--{flag}" for flag in asked)
                raise ValueError(f"{flags}: give --fid_stats of main_stats.py --save_features or ADM's batch")
            reference_images = ArrayImages(path)  # its mu and sigma are of more images
        digest = file_digest(path) if path else ""
        return cls(extractors, references, digest, reference_images, asked)

    def as_json(self):
        """A dict of plain values."""
        images, reference = self.reference_images, next(iter(self.references.values()), {})
        if images and not reference:
            reference = {"n": len(images), "preparation": images.preparation}
        return {
            "features": " ".join(extractor.name for extractor in self.extractors),
            "features_digest": " ".join(extractor.digest for extractor in self.extractors),
            "reference_digest": self.reference_digest, "reference_n": reference.get("n"),
            "reference_preparation": reference.get("preparation"),
            **{metric.flag: metric.flag in self.asked for metric in METRICS if metric.flag},
        }

    def measured(self, batch_size, world):
        """The same with what is measured of `reference_images`, on the first process; all take part."""
        if self.reference_images is None:
            return self
        found, digest = measure(
            self.reference_images, self.extractors, batch_size, world, keep=bool(self.asked)
        )
        references = {name: reference_of(found[name], self.references.get(name)) for name in found}
        return replace(self, references=references, reference_digest=self.reference_digest or digest)

    def compute(self, outputs):
        """All metrics of images, from extractor name -> outputs as of `compute_metrics`."""
        values = {}
        for extractor in self.extractors:
            reference = self.references.get(extractor.name)
            values |= compute_metrics(extractor, outputs[extractor.name], reference, self.asked)
        return values


def _check_reference(reference, extractor, img_size):
    """Compare what a reference records, if anything, with the images and their extractor."""
    name = reference.get("extractor", extractor.name)
    digest = reference.get("extractor_digest", extractor.digest)
    if (size := reference.get("img_size", img_size)) != img_size:
        raise ValueError(f"--fid_stats is of {size} px images, those to be measured have {img_size} px")
    if name != extractor.name:
        raise ValueError(f"--fid_stats is of {name} features, --features is {extractor.name}")
    if digest != extractor.digest:
        raise ValueError(f"--fid_stats is of {name} weights {digest}, now they are {extractor.digest}")
    if (size := len(reference["mu"])) != extractor.num_features:
        raise ValueError(f"--fid_stats: mu is [{size}], {name} has {extractor.num_features} features")


def environment(device):
    """The device and the versions that decide digits of the metrics, a dict of plain values."""
    return {
        "device": device_name(device), "torch": torch.__version__,
        "torch_fidelity": version("torch_fidelity"), "numpy": np.__version__,
    }
