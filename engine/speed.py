"""Ways to compute training steps faster: each gives what the plain one gives, but for rounding.

Knows compilers, attention kernels, memory and where tokens lie. Does not know what is learned. What is here
was measured on a CPU only, so all of it is off unless asked for.
"""

from functools import partial

import numpy as np
import torch

from models.lpd import run_block
from models.masks import cached_block_mask, cached_training_mask
from util import dist

FLEX_ROWS = 2048  # from so many rows on (512 px) FlexAttention skips 60-70 % of the blocks
LOSS_LOGITS = 2**26  # logits alive at once: 256 MB in float32


def compile_training(model, device, *, bf16=False, backend="inductor"):
    """Let a model train with compiled blocks, the mask in the form that suits its length, and chunked logits.

    All blocks share one compiled function, and a mask is its argument: it is compiled once for all layers and
    schedules. The model's parameters and state dict stay as they are.
    """
    model.run_block = torch.compile(run_block, dynamic=False, backend=backend)
    model.loss_rows = max(1, LOSS_LOGITS // model.config.vocab_size)
    if dist.is_nvidia(device):
        if 2 * model.config.num_tokens >= FLEX_ROWS:
            model.mask_of = cached_block_mask
        else:
            dtype = torch.bfloat16 if bf16 else torch.float32
            model.mask_of = partial(cached_training_mask, dtype=dtype)


def fits(cache, device):
    """Whether all tokens of a token cache take at most a quarter of the device's free memory."""
    return len(cache) * 2 * cache.meta.num_tokens * 2 <= dist.free_memory(device) / 4


class ResidentTokens:
    """Micro-batches from a token cache that lies whole on the device: 2 bytes a token.

    Raises:
        DamagedCache: naming the folder.
    """

    def __init__(self, cache, device, *, images_at_a_time=8192):
        self.device, self.num_images = device, len(cache)
        shape = len(cache), 2, cache.meta.num_tokens
        self.tokens = torch.empty(shape, dtype=torch.int16, device=device)  # the bits of uint16
        self.labels = torch.from_numpy(cache.labels).to(device)
        for indices in np.array_split(np.arange(len(cache)), -(-len(cache) // images_at_a_time)):
            for view in (0, 1):
                tokens = cache.tokens(indices, np.full(len(indices), view)).astype(np.uint16)
                rows = slice(indices[0], indices[-1] + 1)
                self.tokens[rows, view].copy_(torch.from_numpy(tokens.view(np.int16)))

    def batches(self, plan):
        """As `CachedTokens.batches`, on the device."""
        for places in plan:
            indices, views = (dist.to_device(torch.from_numpy(x), self.device) for x in places)
            yield self.tokens[indices, views].long() & 0xFFFF, self.labels[indices]
