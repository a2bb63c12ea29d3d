"""Training batches: which images make up which step, and the sources that turn them into tokens."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from util.device import free_memory, to_device
from util.images import image_loader, readable_pixels, to_unit


@lru_cache(maxsize=2)
def _epoch(num_images, seed, epoch):
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(num_images), rng.integers(0, 2, num_images)


@dataclass(frozen=True)
class ImageStream:
    """The images of a training run: an endless stream of shuffled epochs, cut into steps of `global_batch`.

    The order depends on the seed alone, not on the number of processes or on where a run was resumed.
    `accum_iter` is the number of micro-batches that each process makes of its part of a step; `no_mirror`
    makes all views the original.
    """

    num_images: int
    seed: int
    global_batch: int
    accum_iter: int = 1
    no_mirror: bool = False

    def images(self, step):
        """Image indices and views (0: original, 1: mirrored) of a step, each int64 [global_batch]."""
        places = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        epochs, offsets = np.divmod(places, self.num_images)
        indices, views = np.empty_like(places), np.empty_like(places)
        for epoch in range(epochs[0], epochs[-1] + 1):
            now = epochs == epoch
            permutation, mirrored = _epoch(self.num_images, self.seed, epoch)
            indices[now], views[now] = permutation[offsets[now]], mirrored[offsets[now]]
        return indices, views * (not self.no_mirror)

    def micro_batches(self, steps, world):
        """The (indices, views) of this process in each of `steps`, one micro-batch after another."""
        for step in steps:
            indices, views = (own_part(x, world.rank, world.size, self.accum_iter) for x in self.images(step))
            yield from zip(indices, views, strict=True)


def own_part(values, rank, world_size, accum_iter):
    """A process's part of a global batch [G, ...]: [accum_iter, G / (world_size * accum_iter), ...]."""
    return values.reshape(accum_iter, world_size, -1, *values.shape[1:])[:, rank]


def num_steps(num_images, epochs, global_batch):
    """Optimizer steps that see every image `epochs` times, rounded up to a whole step."""
    return -(-int(epochs * num_images) // global_batch)


# Sources: `batches` turns (indices, views) pairs into (tokens int64 [b, L], labels int64 [b]) pairs.


class CachedTokens:
    """Tokens from a token cache on disk."""

    def __init__(self, cache):
        self.cache, self.num_images = cache, len(cache)

    def batches(self, micro_batches):
        for indices, views in micro_batches:
            tokens = torch.from_numpy(self.cache.tokens(indices, views))
            yield tokens, torch.from_numpy(self.cache.labels[indices])


class ResidentTokens:
    """A token cache in the memory of a device, 2 bytes per token. Raises DamagedCache."""

    def __init__(self, cache, device, *, images_at_a_time=8192):
        self.device, self.num_images = device, len(cache)
        shape = len(cache), 2, cache.meta.num_tokens
        self.tokens = torch.empty(shape, dtype=torch.int16, device=device)  # the bits of uint16
        self.labels = torch.from_numpy(cache.labels).to(device)
        for start in range(0, len(cache), images_at_a_time):
            indices = np.arange(len(cache))[start : start + images_at_a_time]
            both = cache.tokens(indices.repeat(2), np.tile([0, 1], len(indices))).astype(np.uint16)
            rows = torch.from_numpy(both.view(np.int16)).view(len(indices), *shape[1:])
            self.tokens[start : start + images_at_a_time] = rows

    def batches(self, micro_batches):
        for pair in micro_batches:
            indices, views = (to_device(torch.from_numpy(part), self.device) for part in pair)
            yield self.tokens[indices, views].long() & 0xFFFF, self.labels[indices]


def token_source(cache, device, *, resident=False):
    """The source of a token cache; if `resident`, in the device's memory when a quarter of what is free is
    enough."""
    fits = len(cache) * 2 * cache.meta.num_tokens * 2 <= free_memory(device) / 4
    return ResidentTokens(cache, device) if resident and fits else CachedTokens(cache)


class EncodedImages:
    """Tokens of an image folder, encoded as they are needed. `batches` raises UnreadableImage."""

    def __init__(self, folder, tokenizer, img_size, num_workers, device):
        self.folder, self.tokenizer, self.num_images = folder, tokenizer, len(folder)
        self.img_size, self.num_workers, self.device = img_size, num_workers, device

    def batches(self, micro_batches):
        for items in image_loader(self.folder, self.img_size, micro_batches, self.num_workers):
            indices, pixels = readable_pixels(items)
            pixels = to_unit(to_device(torch.from_numpy(pixels), self.device))
            with torch.no_grad():
                tokens = self.tokenizer.encode(pixels)
            yield tokens, torch.from_numpy(self.folder.labels[indices])
