"""The token cache: the tokens of an image folder on disk.

    meta.json                   present only when the cache is complete
    plan.json                   what the cache will hold, from the first moment on
    shard-00003.tokens.npy      uint16 [N, 2, L]: the image, the mirrored image
    shard-00003.labels.npy      int32 [N], written last: it marks the shard complete
    shard-00003.names.json      relative image names [N]

    val/                        the same of the held-out images, if the image folder has train/ and val/

Image i of the sorted folder belongs to shard i // shard_size. The MAR-style folder of one `.npz` per image is
read too.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from util import hub
from util.files import atomic, read_arrays, read_json, refuse_changes, write_json
from util.folders import held_out, list_images, val_fraction_of

FORMAT = 1
META = "meta.json"  # present only in a complete cache
CACHE_FILES = "shard-*", "val/shard-*", f"val/{META}", META  # the files of a complete cache


class DamagedCache(ValueError):
    """A token cache that is not what its description says; the message names the file or folder."""


@dataclass(frozen=True)
class CacheMeta:
    """What a token cache holds. `precision` is that of the encoder: fp32, bf16, or unknown; `reading` that of
    the images, as `str(Reading)`. `unreadable` names the images that were left out."""

    img_size: int
    grid_size: int
    vocab_size: int
    class_names: tuple[str, ...]
    tokenizer_digest: str
    num_images: int
    shard_size: int
    names_digest: str
    precision: str = "fp32"
    reading: str = "published"  # also of caches from before it was recorded
    unreadable: tuple[str, ...] = ()
    format: int = FORMAT

    def __post_init__(self):
        for name in ("img_size", "grid_size", "vocab_size", "num_images", "shard_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive int, not {value!r:.40}")

    @property
    def num_tokens(self):
        """L, tokens of an image."""
        return self.grid_size**2

    @property
    def num_shards(self):
        return -(-self.num_images // self.shard_size)

    def as_json(self):
        """A dict of plain values, as written to disk."""
        lists = {"class_names": list(self.class_names), "unreadable": list(self.unreadable)}
        return {"format": self.format, **self.__dict__, **lists}

    @staticmethod
    def read(path):
        """Read `meta.json` or `plan.json`. Raises ValueError: not JSON, another format, or fields missing or
        unknown."""
        try:
            values = read_json(path)
            lists = {name: tuple(values[name]) for name in ("class_names", "unreadable") if name in values}
            meta = CacheMeta(**{**values, **lists})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not describe a token cache ({error})") from None
        if meta.format != FORMAT:
            raise ValueError(f"{path}: token cache of format {meta.format}, this program reads {FORMAT}")
        return meta


def names_digest(names):
    """16 hex digits that identify a list of image names."""
    return hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()[:16]


def _shard_file(folder, shard, kind):
    return Path(folder) / f"shard-{shard:05d}.{kind}"


class CacheWriter:
    """Writes a token cache shard by shard; continues where an earlier run was killed. Raises ValueError: the
    folder holds a cache of something else."""

    def __init__(self, folder, meta):
        self.folder, self.meta = Path(folder), meta
        now = {name: value for name, value in meta.as_json().items() if name != "unreadable"}
        for path in (self.folder / META, self.folder / "plan.json"):
            if path.exists():
                refuse_changes(path, CacheMeta.read(path).as_json(), now, "give another --cached_path")

    @property
    def complete(self):
        return (self.folder / META).exists()

    def begin(self):
        """Create the folder and write the plan."""
        write_json(self.folder / "plan.json", self.meta.as_json())

    def missing_shards(self):
        """Numbers of the shards that are not complete."""
        shards = range(self.meta.num_shards)
        return [shard for shard in shards if not _shard_file(self.folder, shard, "labels.npy").exists()]

    def shard_range(self, shard):
        """Indices of the images of a shard."""
        start = shard * self.meta.shard_size
        return range(start, min(start + self.meta.shard_size, self.meta.num_images))

    def write_shard(self, shard, tokens, labels, names):
        """Write tokens [N, 2, L], labels [N] and names [N] of a shard."""
        write_json(_shard_file(self.folder, shard, "names.json"), list(names))
        arrays = {"tokens.npy": tokens.astype(np.uint16), "labels.npy": labels.astype(np.int32)}
        for kind, array in arrays.items():
            with atomic(_shard_file(self.folder, shard, kind)) as partial, partial.open("wb") as file:
                np.save(file, array)

    def finish(self, names):
        """Mark the cache complete, listing those of all `names` that are not in it."""
        unreadable = sorted(set(names) - set(_read_names(self.folder, self.meta)))
        write_json(self.folder / META, {**self.meta.as_json(), "unreadable": unreadable})


def _read_names(folder, meta):
    """The names of all shards."""
    names = []
    for shard in range(meta.num_shards):
        path = _shard_file(folder, shard, "names.json")
        found = read_json(path)
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise DamagedCache(f"{path} is not a list of image names")
        names += found
    return names


def _map_shard(path, dtype, shape_tail):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python, which fails in many ways
        raise ValueError(f"{path}: truncated or not an array ({str(error).splitlines()[0]})") from None
    if array.dtype != dtype or array.shape[1:] != shape_tail or array.ndim != 1 + len(shape_tail):
        found = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{path}: {found} instead of {np.dtype(dtype)} [N, *{shape_tail}]")
    return np.asarray(array)  # every slice of numpy's memmap class runs Python, slower than the read itself


class TokenCache:
    """A complete token cache, memory-mapped. `len` is the number of images.

    Attributes:
        meta: CacheMeta. labels: int64 [N], all in memory. left_out: as of an ImageSet.
    Raises:
        ValueError: incomplete, damaged, or of another format.
    """

    left_out = ()

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        if not (folder / META).exists():
            raise ValueError(_why_incomplete(folder))
        self.meta = meta = CacheMeta.read(folder / META)
        shards, tail = range(meta.num_shards), (2, meta.num_tokens)
        paths = [_shard_file(folder, s, "tokens.npy") for s in shards]
        tokens = [_map_shard(path, np.uint16, tail) for path in paths]
        labels = [_map_shard(_shard_file(folder, s, "labels.npy"), np.int32, ()) for s in shards]
        self.labels = np.concatenate(labels).astype(np.int64)
        images, labels = sum(len(part) for part in tokens), len(self.labels)
        expected = meta.num_images - len(meta.unreadable)
        if not images == labels == expected:
            raise ValueError(f"{folder}: {images} images, {labels} labels; meta.json says {expected}")
        if not 0 <= self.labels.min() <= self.labels.max() < len(meta.class_names):
            raise ValueError(f"{folder}: a label outside 0..{len(meta.class_names) - 1}")
        rows = [part.reshape(-1, meta.num_tokens) for part in tokens]  # per shard [2N, L]
        self._starts = np.cumsum([0, *map(len, rows)])
        self._shards = [(path, path.stat().st_size, part) for path, part in zip(paths, rows, strict=True)]

    def __len__(self):
        return len(self.labels)

    @cached_property
    def names(self):
        """Relative image names."""
        names = _read_names(self.folder, self.meta)
        if len(names) != len(self):
            raise DamagedCache(f"{self.folder}: {len(names)} names of {len(self)} images")
        return names

    def tokens(self, indices, views):
        """Tokens of images, int64 [n, L]; view 1 is the mirrored image. Raises DamagedCache: a token outside
        the vocabulary; a GPU would only report an assertion. ValueError: an index or view out of range."""
        both = np.asarray(indices, np.int64), np.asarray(views, np.int64)
        rows = np.ravel_multi_index(both, (len(self), 2))
        by_shard = rows.argsort()
        rows = rows[by_shard]
        cuts = rows.searchsorted(self._starts)
        stored = np.empty((len(rows), self.meta.num_tokens), dtype=np.uint16)
        for shard in np.flatnonzero(np.diff(cuts)):
            path, size, part = self._shards[shard]
            if path.stat().st_size != size:  # a read beyond the end is a signal that ends the process
                raise DamagedCache(f"{path} has changed its size while it is read")
            here = slice(cuts[shard], cuts[shard + 1])  # mode "clip" reads straight into `out`
            part.take(rows[here] - self._starts[shard], axis=0, out=stored[here], mode="clip")
        if stored.max(initial=0) >= self.meta.vocab_size:
            most = f"token {stored.max()}, meta.json says {self.meta.vocab_size} codes"
            raise DamagedCache(f"{self.folder}: {most}")
        tokens = np.empty(stored.shape, dtype=np.int64)
        tokens[by_shard] = stored
        return tokens


class MarCache:
    """A MAR-style folder, CLASS/NAME.npz with keys `indices` and `indices_flip`, read as a token cache.

    It does not record its tokenizer: `meta.tokenizer_digest` is empty.
    """

    def __init__(self, folder, vocab_size, img_size):
        try:
            listed = list_images(folder, endings={".npz"})
        except ValueError as error:
            raise ValueError(f"{folder} is not a token cache: no meta.json or CLASS/*.npz: {error}") from None
        self.names, self.labels, self.left_out = list(listed.names), listed.labels, listed.left_out
        self.paths = [Path(folder, name) for name in self.names]
        num_tokens = self._load(self.paths[0]).shape[1]
        if (grid_size := math.isqrt(num_tokens)) ** 2 != num_tokens:
            raise ValueError(f"{self.paths[0]}: {num_tokens} tokens do not make a square image")
        self.meta = CacheMeta(
            img_size=img_size, grid_size=grid_size, vocab_size=vocab_size,
            class_names=listed.class_names, tokenizer_digest="", num_images=len(self.paths),
            shard_size=len(self.paths), names_digest=names_digest(self.names),
        )

    @staticmethod
    def _load(path):
        try:
            arrays = read_arrays(path, ("indices", "indices_flip"))
            both = np.stack([array.reshape(-1) for array in arrays.values()])
            return both.astype(np.int64, casting="same_kind")
        except (ValueError, TypeError) as error:  # TypeError: not integers
            raise DamagedCache(f"{path}: no tokens of an image ({error})") from None

    def _read(self, path):
        both, count, codes = self._load(path), self.meta.num_tokens, self.meta.vocab_size
        if both.shape[1] != count or both.min() < 0 or both.max() >= codes:
            found = f"{both.shape[1]} tokens in {both.min()}..{both.max()}"
            raise DamagedCache(f"{path}: {found}, not {count} of a tokenizer with {codes} codes")
        return both

    def __len__(self):
        return len(self.paths)

    def tokens(self, indices, views):
        """As `TokenCache.tokens`, one file per image."""
        return np.stack([self._read(self.paths[i])[v] for i, v in zip(indices, views, strict=True)])


def _why_incomplete(folder):
    if not (folder / "plan.json").exists():
        return f"{folder} is not a token cache: it has no meta.json"
    meta = CacheMeta.read(folder / "plan.json")
    done = meta.num_shards - len(CacheWriter(folder, meta).missing_shards())
    return f"{folder}: {done} of {meta.num_shards} shards are written; run main_cache.py again to finish it"


def open_token_cache(name, *, vocab_size=16384, img_size=256):
    """A `TokenCache`, or a `MarCache` if the folder has no packed cache; the MAR style does not record
    `vocab_size` and `img_size`. The packed cache at hf://datasets/OWNER/REPO[@REVISION][/FOLDER] is fetched
    unless it is cached."""
    if hub.is_on_hub(name):
        uri = hub.parse(name, "dataset")
        part = PurePosixPath(uri.path_in_repo)
        folder = hub.fetch(name, uri, [f"{part / pattern}" for pattern in CACHE_FILES]) / part
        return TokenCache(folder)
    folder = Path(name)
    if (folder / META).exists() or (folder / "plan.json").exists():
        return TokenCache(folder)
    return MarCache(folder, vocab_size, img_size)


class Subset:
    """Some images of a token cache, read like a token cache."""

    def __init__(self, cache, chosen):
        self.cache, self.meta, self.indices = cache, cache.meta, np.flatnonzero(chosen)
        self.labels, self.names = cache.labels[self.indices], [cache.names[i] for i in self.indices]

    def __len__(self):
        return len(self.indices)

    def tokens(self, indices, views):
        """As `TokenCache.tokens`."""
        return self.cache.tokens(self.indices[indices], views)


def split_cache(cache, val_fraction=None):
    """The training images of a token cache and those held out, as `split_folder` splits the image folder: the
    cache and its val/ if it has one, else by `held_out`. The second is None if nothing is held out. Raises
    ValueError: val/ is incomplete, damaged, or not of the same tokenizer, classes and reading."""
    if isinstance(cache, TokenCache) and (cache.folder / "val").is_dir():
        val = TokenCache(cache.folder / "val")
        own = ("num_images", "shard_size", "names_digest", "unreadable")
        now = {name: value for name, value in cache.meta.as_json().items() if name not in own}
        refuse_changes(val.folder, val.meta.as_json(), now, f"make {cache.folder} again")
        return cache, val
    fraction = val_fraction_of(val_fraction, cache.meta.reading == "published")
    mask = held_out(cache.names, cache.labels, fraction) if fraction else np.zeros(len(cache), bool)
    return (Subset(cache, ~mask), Subset(cache, mask)) if mask.any() else (cache, None)
