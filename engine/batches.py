"""Which images make up which training step.

Knows indices and mirror views. Does not know pixels or tokens. The images seen in training are one endless
stream of shuffled epochs; step s takes `global_batch` of them from place s * global_batch on. So the order
depends on the seed alone: not on the number of processes, nor on where a run was resumed.
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def _epoch(num_images, seed, epoch):
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(num_images), rng.integers(0, 2, num_images)


def step_images(num_images, seed, global_batch, step):
    """Image indices and views (0 as it is, 1 mirrored) of a step, each int64 [global_batch]."""
    places = np.arange(step * global_batch, (step + 1) * global_batch)
    parts = [
        [part[places[places // num_images == epoch] % num_images] for part in _epoch(num_images, seed, epoch)]
        for epoch in range(places[0] // num_images, places[-1] // num_images + 1)
    ]
    indices, views = (np.concatenate(part) for part in zip(*parts, strict=True))
    return indices, views


def own_part(values, rank, world_size, accum_iter):
    """This process's micro-batches of a global batch [G, ...]: [accum_iter, G / (world * accum), ...]."""
    return values.reshape(accum_iter, world_size, -1, *values.shape[1:])[:, rank]


def num_steps(num_images, epochs, global_batch):
    """Optimizer steps that see every image `epochs` times (rounded up to a whole step)."""
    return -(-int(epochs * num_images) // global_batch)
