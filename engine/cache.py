"""Images -> token cache.

Knows how to encode both mirror views of images, and how reading, encoding and writing go on at the same time.
Does not know flags or what tokens are for.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from util import dist
from util.images import image_loader, in_order, to_unit


class _InBf16(nn.Module):
    """An encoder whose weights and activations are bf16, between float32 pixels and float32 latents."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder.bfloat16()

    def forward(self, pixels):
        return self.encoder(pixels.bfloat16()).float()


def prepare_encoder(tokenizer, *, bf16=False):
    """The tokenizer, changed in place to be quick at encoding: channels last, as the pixels come; in bf16 if
    asked for, but for the choice of the code, in which thousands of codes would be equally near."""
    tokenizer.encoder.to(memory_format=torch.channels_last)
    if bf16:
        tokenizer.encoder = _InBf16(tokenizer.encoder)
    return tokenizer


@torch.inference_mode()
def encode_views(tokenizer, images, device):
    """uint8 images, n of [H, W, 3] -> tokens int32 [n, 2, L] on the device, of the image and the mirrored
    image. A GPU is not waited for."""
    shape = (len(images), *images[0].shape)
    pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=dist.is_nvidia(device))
    np.stack(images, out=pixels.numpy())
    pixels = to_unit(pixels.to(device, non_blocking=True))
    tokens = tokenizer.encode(torch.cat([pixels, pixels.flip(-1)]))  # [2n, L]
    return tokens.view(2, len(images), -1).transpose(0, 1).int()


def encode_shards(writer, tokenizer, folder, world, *, batch_size, num_workers, skip_unreadable=False):
    """Encode the missing shards, shared out among the processes.

    The workers read ahead, also beyond the end of a shard; a shard is written while the next is encoded. A
    shard with an unreadable image is not written, unless `skip_unreadable`.

    Returns:
        names and reasons of the unreadable images of this process: list of str.
    """
    ranges = [writer.shard_range(shard) for shard in writer.missing_shards()[world.rank :: world.size]]
    batches = chain.from_iterable(in_order(images, batch_size) for images in ranges)
    loader = image_loader(folder, writer.meta.img_size, batches, num_workers)
    all_errors, writing = [], None
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(total=sum(map(len, ranges)), unit="img", disable=not world.is_main, mininterval=1) as progress,
    ):
        for shard, parts in groupby(loader, lambda items: items[0][0] // writer.meta.shard_size):
            tokens, kept, errors = _encode_parts(parts, tokenizer, world.device, progress)
            all_errors += [(folder.names[i], reason) for i, reason in errors]
            if writing:
                writing.result()  # a full disk ends the run here
            if skip_unreadable or not errors:
                names = [folder.names[i] for i in kept]
                writing = pool.submit(_write, writer, shard, tokens, folder.labels[kept], names)
        if writing:
            writing.result()
    return [error for part in dist.gather_objects(all_errors) for error in part]


def _encode_parts(parts, tokenizer, device, progress):
    """A loader's items -> a list of `encode_views`' tokens, the indices of the images that they are of, and
    (index, reason) pairs of the unreadable ones. Waits for the device no more than its queue makes it."""
    tokens, kept, errors = [], [], []
    for items in parts:
        good = [(i, image) for i, image in items if not isinstance(image, str)]
        errors += [(i, reason) for i, reason in items if isinstance(reason, str)]
        if good:
            tokens.append(encode_views(tokenizer, [image for _, image in good], device))
            kept += [i for i, _ in good]
        progress.update(len(items))
    return tokens, kept, errors


def _write(writer, shard, tokens, labels, names):
    empty = np.empty((0, 2, writer.meta.num_tokens))
    writer.write_shard(
        shard, np.concatenate([empty, *(part.cpu().numpy() for part in tokens)]), labels, names
    )


def differing_share(tokenizer, reference, folder, img_size, device, *, sample=64, batch_size=16):
    """The share of tokens in which two tokenizers of the same weights differ, and on how many images.

    Args:
        sample: images, evenly taken from the folder, both views of each; unreadable ones are left out.
    """
    indices = np.unique(np.linspace(0, len(folder) - 1, sample).astype(int))
    differing = images = 0
    for items in image_loader(folder, img_size, in_order(indices, batch_size), num_workers=0):
        good = [image for _, image in items if not isinstance(image, str)]
        if good:
            a, b = (encode_views(model, good, device) for model in (tokenizer, reference))
            differing += (a != b).float().mean().item() * len(good)
            images += len(good)
    return differing / max(1, images), images


def convert_mar(writer, mar, *, batch_size=1024):
    """Write a MAR-style folder's tokens as a packed token cache."""
    for shard in tqdm(writer.missing_shards(), unit="shard"):
        indices = np.array(writer.shard_range(shard))
        tokens = np.stack([mar.tokens(indices, np.full(len(indices), view)) for view in (0, 1)], axis=1)
        writer.write_shard(shard, tokens, mar.labels[indices], [mar.names[i] for i in indices])
    writer.finish(mar.names)
