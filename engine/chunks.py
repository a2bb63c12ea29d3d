"""The chunks of an evaluation on disk: how it survives a kill.

The images are cut into chunks of consecutive numbers. A chunk's arrays are a file that is complete or not
there, so a killed evaluation goes on with the chunks that are missing. Chunks are whole batches and do not
depend on the number of processes, so neither do the batches. Does not know images or metrics.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from util.files import atomic, read_json, write_json
from util.npz import read_arrays

CHUNKS = 256  # so many at least, where there are as many batches: any number of processes shares them evenly


class DamagedChunk(Exception):
    """A chunk that cannot be read, or is not where it should be."""


def check_same(place, saved, protocol, flag="--output_dir"):
    """Refuse to go on with what was made with other settings.

    Raises:
        ValueError: naming the first setting that changed.
    """
    saved = saved if isinstance(saved, dict) else {}
    for key, value in json.loads(json.dumps(protocol)).items():
        if saved.get(key) != value:
            raise ValueError(
                f"{place} was made with {key} {str(saved.get(key))[:60]}, now it is {str(value)[:60]}: "
                f"give another {flag}"
            )


class ChunkStore:
    """The chunks of one evaluation in a folder, and the settings they are made with.

    Raises:
        ValueError: the folder holds chunks made with other settings; the message names the first.
    """

    def __init__(self, folder, protocol):
        self.folder, self.protocol = Path(folder), protocol
        self.num_images, batch_size = protocol["num_images"], protocol["batch_size"]
        self.size = batch_size * max(1, self.num_images // (CHUNKS * batch_size))
        if self.begun:
            check_same(self.folder, read_json(self.folder / "protocol.json"), protocol)

    @property
    def begun(self):
        """Whether the settings were written down."""
        return (self.folder / "protocol.json").exists()

    def begin(self):
        """Write the settings down."""
        write_json(self.folder / "protocol.json", self.protocol)

    def __len__(self):
        return -(-self.num_images // self.size)

    def path(self, chunk):
        """The file of a chunk."""
        return self.folder / f"chunk-{chunk:05d}.npz"

    def missing(self):
        """Numbers of the chunks that are not there."""
        return [chunk for chunk in range(len(self)) if not self.path(chunk).exists()]

    def ids(self, chunk):
        """Image numbers of a chunk, int64 [n]."""
        return torch.arange(chunk * self.size, min((chunk + 1) * self.size, self.num_images))

    def write(self, chunk, arrays):
        """Write a chunk's arrays, atomically."""
        with atomic(self.path(chunk)) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)

    def read(self, key):
        """An array of each chunk, one after the other, in image order.

        Raises:
            DamagedChunk: naming the file.
        """
        for chunk in range(len(self)):
            try:
                yield read_arrays(self.path(chunk), [key])[key]
            except (ValueError, OSError) as error:
                raise DamagedChunk(f"{self.path(chunk)} cannot be read: remove it ({error})") from None

    def read_rows(self, key):
        """A per-image array of all chunks as one float32 tensor [num_images, ...]."""
        whole, start = None, 0
        for part in self.read(key):
            if whole is None:
                whole = torch.empty(self.num_images, *part.shape[1:])
            whole[start : start + len(part)] = torch.from_numpy(part)
            start += len(part)
        return whole

    def remove(self):
        """Remove the folder, if it is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
