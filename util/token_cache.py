"""The token cache: the tokens of a folder of images, on disk.

Knows its format and the MAR-style folder of one `.npz` per image. Does not know pixels or models.

    meta.json                   only when the cache is complete
    plan.json                   what the cache is to hold, from the first moment on
    shard-00003.tokens.npy      uint16 [N, 2, L]: the image, the mirrored image
    shard-00003.labels.npy      int32 [N]
    shard-00003.names.json      relative image names [N]

Image i of the sorted folder belongs to shard i // shard_size. `labels` is written last and marks its shard
complete; every file has its final name only when it is whole. Names are never used as paths, and one that
would leave the image folder is refused all the same. What a file claims is checked before memory is taken.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from util.files import atomic, read_json, write_json
from util.npz import claimed_bytes, npy_header, read_arrays

FORMAT = 1
# The most that a description may say; far beyond use, so that nothing runs for hours on a damaged number.
MOST = {"img_size": 2**16, "grid_size": 2**10, "vocab_size": 2**16, "num_images": 2**32, "shard_size": 2**32}
MOST_SHARDS = 10**5


class DamagedCache(ValueError):
    """A token cache that is not what its description says; the message names the file or folder."""


@dataclass(frozen=True)
class CacheMeta:
    """What a token cache holds. `precision` is what the images were encoded in: fp32, bf16, or unknown.
    `unreadable` names images left out because the user allowed it."""

    img_size: int
    grid_size: int
    vocab_size: int
    class_names: tuple[str, ...]
    tokenizer_digest: str
    num_images: int
    shard_size: int
    names_digest: str
    precision: str = "fp32"
    unreadable: tuple[str, ...] = ()
    format: int = FORMAT

    @property
    def num_tokens(self):
        """L, tokens of an image."""
        return self.grid_size**2

    @property
    def num_shards(self):
        return -(-self.num_images // self.shard_size)

    def __post_init__(self):
        for name, most in MOST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} must be an int in 1..{most}, not {value!r:.40}")
        if self.num_shards > MOST_SHARDS:
            raise ValueError(
                f"{self.num_images} images in shards of shard_size {self.shard_size} are {self.num_shards} "
                f"shards, at most {MOST_SHARDS} are read"
            )
        for name in ("tokenizer_digest", "names_digest", "precision"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a text, not {getattr(self, name)!r:.40}")
        check_names(self.class_names)
        check_names(self.unreadable)

    def as_json(self):
        """A dict of plain values, as written to disk."""
        lists = {"class_names": list(self.class_names), "unreadable": list(self.unreadable)}
        return {"format": self.format, **self.__dict__, **lists}

    @staticmethod
    def read(path):
        """Read `meta.json` or `plan.json`.

        Raises:
            ValueError: not JSON, another format, or fields missing or unknown.
        """
        try:
            values = read_json(path)
            meta = CacheMeta(**{**values, "class_names": tuple(values["class_names"]),
                                "unreadable": tuple(values["unreadable"])})  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no token cache description ({error})") from None
        if meta.format != FORMAT:
            raise ValueError(
                f"{path}: token cache of format {meta.format!r:.40}, this program reads {FORMAT}"
            )
        return meta


def check_names(names):
    """Refuse a list that is none of relative paths inside a folder.

    Raises:
        ValueError: with the first wrong one.
    """
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"a name that is no text: {name!r:.40}")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
            raise ValueError(f"the name {name!r:.60} leaves its folder")


def names_digest(names):
    """16 hex digits that name a list of image names."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


class CacheWriter:
    """Writes a token cache shard by shard; goes on where an earlier run was killed.

    Raises:
        ValueError: the folder holds a cache of something else.
    """

    def __init__(self, folder, meta):
        self.folder, self.meta = Path(folder), meta
        for name in ("meta.json", "plan.json"):
            if (self.folder / name).exists():
                self._check_same(self.folder / name)

    def _check_same(self, path):
        old, new = CacheMeta.read(path).as_json(), self.meta.as_json()
        changed = [k for k in new if k != "unreadable" and old[k] != new[k]]
        if changed:
            key = changed[0]
            raise ValueError(
                f"{self.folder} holds a token cache whose {key} is {str(old[key])[:60]}, now it would be "
                f"{str(new[key])[:60]}: give another --cached_path"
            )

    @property
    def complete(self):
        return (self.folder / "meta.json").exists()

    def begin(self):
        """Make the folder and write down the plan."""
        write_json(self.folder / "plan.json", self.meta.as_json())

    def missing_shards(self):
        """Numbers of the shards that are not complete."""
        return [
            s for s in range(self.meta.num_shards) if not _shard_file(self.folder, s, "labels.npy").exists()
        ]

    def shard_range(self, shard):
        """Indices of the images of a shard."""
        start = shard * self.meta.shard_size
        return range(start, min(start + self.meta.shard_size, self.meta.num_images))

    def write_shard(self, shard, tokens, labels, names):
        """Write tokens [N, 2, L], labels [N] and names [N] of a shard.

        Raises:
            ValueError: a name that leaves the image folder.
        """
        check_names(names)
        write_json(_shard_file(self.folder, shard, "names.json"), list(names))
        for kind, array in (
            ("tokens.npy", tokens.astype(np.uint16)),
            ("labels.npy", labels.astype(np.int32)),
        ):
            with atomic(_shard_file(self.folder, shard, kind)) as partial, partial.open("wb") as file:
                np.save(file, array)

    def finish(self, names):
        """Mark the cache complete. Of `names`, all that were to be cached, those not in it are listed."""
        stored = set()
        for shard in range(self.meta.num_shards):
            stored.update(_read_names(_shard_file(self.folder, shard, "names.json")))
        unreadable = sorted(set(names) - stored)
        write_json(self.folder / "meta.json", {**self.meta.as_json(), "unreadable": unreadable})


def _shard_file(folder, shard, kind):
    return Path(folder) / f"shard-{shard:05d}.{kind}"


def _read_names(path):
    names = read_json(path)
    try:
        if not isinstance(names, list):
            raise ValueError(f"a {type(names).__name__} in place of a list of names")
        check_names(names)
    except ValueError as error:
        raise DamagedCache(f"{path}: {error}") from None
    return names


def _load_array(path, dtype, shape_tail):
    try:
        with Path(path).open("rb") as file:
            shape, fortran, found = npy_header(file)
            claimed, there = claimed_bytes(shape, found), os.fstat(file.fileno()).st_size - file.tell()
            start = file.tell()
    except Exception as error:  # numpy reads the header as Python, which fails in many ways
        raise ValueError(f"{path}: cut short or no array ({str(error).splitlines()[0]})") from None
    if found != dtype or fortran or shape[1:] != shape_tail or len(shape) != 1 + len(shape_tail):
        raise ValueError(f"{path}: {found} {list(shape)} in place of {np.dtype(dtype)} [N, *{shape_tail}]")
    if claimed != there:
        raise ValueError(f"{path}: cut short or no array (it claims {claimed} bytes, it has {there})")
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)


class TokenCache:
    """A complete token cache, memory-mapped. `len` is the number of images.

    Attributes:
        meta: CacheMeta. labels: int64 [N], all in memory.
    Raises:
        ValueError: not complete, damaged, or of another format.
    """

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        if not (folder / "meta.json").exists():
            raise ValueError(_why_no_cache(folder))
        self.meta = CacheMeta.read(folder / "meta.json")
        shards = range(self.meta.num_shards)
        tail = (2, self.meta.num_tokens)
        self._tokens = [_load_array(_shard_file(folder, s, "tokens.npy"), np.uint16, tail) for s in shards]
        self.labels = np.concatenate(
            [_load_array(_shard_file(folder, s, "labels.npy"), np.int32, ()) for s in shards]
        ).astype(np.int64)
        sizes = [len(t) for t in self._tokens]
        expected = self.meta.num_images - len(self.meta.unreadable)
        if sum(sizes) != expected or len(self.labels) != expected:
            raise ValueError(
                f"{folder}: {sum(sizes)} images, {len(self.labels)} labels; meta.json says {expected}"
            )
        if not 0 <= self.labels.min() <= self.labels.max() < len(self.meta.class_names):
            raise ValueError(f"{folder}: a label outside 0..{len(self.meta.class_names) - 1}")
        self._starts = np.cumsum([0, *sizes])
        # Without numpy's memmap class, whose every slice costs more than the tokens of an image.
        self._rows = [np.asarray(t).reshape(-1, self.meta.num_tokens) for t in self._tokens]

    def __len__(self):
        return len(self.labels)

    def tokens(self, indices, views):
        """Tokens of images, int64 [n, L]; view 1 is the mirrored image."""
        indices, views = np.asarray(indices), np.asarray(views)
        _check_range("index", indices, len(self))
        _check_range("view", views, 2)
        by_place = np.argsort(indices)  # the images of a shard come one after the other
        shards = np.searchsorted(self._starts, indices[by_place], side="right") - 1
        rows = 2 * (indices[by_place] - self._starts[shards]) + views[by_place]
        stored = np.empty((len(indices), self.meta.num_tokens), dtype=np.uint16)
        cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(indices)]
        for start, end in zip(cuts, cuts[1:], strict=False):
            if start < end:  # "clip" takes straight into `out`; the ranges were checked above
                self._rows[shards[start]].take(rows[start:end], axis=0, out=stored[start:end], mode="clip")
        if stored.max(initial=0) >= self.meta.vocab_size:  # a device would stop with no word of the reason
            raise DamagedCache(
                f"{self.folder}: token {stored.max()}, meta.json says {self.meta.vocab_size} codes"
            )
        out = np.empty(stored.shape, dtype=np.int64)
        out[by_place] = stored
        return out


def _check_range(what, values, end):
    if len(values) and not 0 <= values.min() <= values.max() < end:
        raise IndexError(f"{what} {values.min()}..{values.max()} outside 0..{end - 1}")


class MarCache:
    """A MAR-style folder, CLASS/NAME.npz with keys `indices` and `indices_flip`, read as a token cache.

    It does not name its tokenizer: `meta.tokenizer_digest` is empty.
    """

    def __init__(self, folder, vocab_size, img_size):
        folder = Path(folder)
        class_names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))
        self.paths = [p for name in class_names for p in sorted((folder / name).rglob("*.npz"))]
        if not self.paths:
            raise ValueError(f"{folder} is no token cache: no meta.json, no CLASS/*.npz")
        position = {name: label for label, name in enumerate(class_names)}
        self.names = [p.relative_to(folder).as_posix() for p in self.paths]
        self.labels = np.array([position[name.split("/")[0]] for name in self.names])
        num_tokens = self._load(self.paths[0]).shape[1]
        if int(num_tokens**0.5) ** 2 != num_tokens:
            raise ValueError(f"{self.paths[0]}: {num_tokens} tokens make no square image")
        self.meta = CacheMeta(
            img_size=img_size, grid_size=int(num_tokens**0.5), vocab_size=vocab_size,
            class_names=class_names, tokenizer_digest="", num_images=len(self.paths),
            shard_size=len(self.paths), names_digest=names_digest(self.names),
        )  # fmt: skip

    @staticmethod
    def _load(path):
        try:
            arrays = read_arrays(path, ("indices", "indices_flip"))
            both = np.stack([array.reshape(-1) for array in arrays.values()])
            return both.astype(np.int64, casting="same_kind")
        except (ValueError, TypeError) as error:  # a TypeError: of another kind than integers
            raise DamagedCache(f"{path}: no tokens of an image ({error})") from None

    def _read(self, path):
        """Tokens [2, L] of a file, as many as the first file's and all codes of the vocabulary."""
        both, count, codes = self._load(path), self.meta.num_tokens, self.meta.vocab_size
        if both.shape[1] != count:
            raise DamagedCache(f"{path}: {both.shape[1]} tokens, {self.paths[0]} has {count}")
        if both.min() < 0 or both.max() >= codes:
            raise DamagedCache(f"{path}: tokens {both.min()}..{both.max()}, the tokenizer has {codes} codes")
        return both

    def __len__(self):
        return len(self.paths)

    def tokens(self, indices, views):
        """As `TokenCache.tokens`, one file per image."""
        return np.stack([self._read(self.paths[i])[v] for i, v in zip(indices, views, strict=True)])


def _why_no_cache(folder):
    if (folder / "plan.json").exists():
        meta = CacheMeta.read(folder / "plan.json")
        done = meta.num_shards - sum(
            not _shard_file(folder, s, "labels.npy").exists() for s in range(meta.num_shards)
        )
        return (
            f"{folder}: {done} of {meta.num_shards} shards are written; run main_cache.py again to finish it"
        )
    return f"{folder} is no token cache: no meta.json"


def open_token_cache(folder, *, vocab_size=16384, img_size=256):
    """A `TokenCache`, or a `MarCache` where the folder has no packed cache.

    `vocab_size` and `img_size` are for the MAR style, which does not say them.
    """
    folder = Path(folder)
    if (folder / "meta.json").exists() or (folder / "plan.json").exists():
        return TokenCache(folder)
    return MarCache(folder, vocab_size, img_size)
