"""Images -> token cache: both mirror views encoded, while images are read and finished shards written."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import chain, groupby

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from util.device import is_cuda
from util.distributed import gather_objects
from util.images import image_loader, in_order, to_unit


class Bf16Encoder:
    """`encode` of a tokenizer with its encoder in bf16. The codes are chosen in float32: in bf16 thousands of
    them would be equally near."""

    def __init__(self, tokenizer):
        self.tokenizer, self.encoder = tokenizer, deepcopy(tokenizer.encoder).bfloat16()

    def encode(self, pixels):
        """pixels float32 [B, 3, H, W] in [-1, 1] -> tokens int64 [B, L] in raster order."""
        z = self.tokenizer.quant_conv(self.encoder(pixels.bfloat16()).float())  # [B, e, h, w]
        latents = F.normalize(z.permute(0, 2, 3, 1), dim=-1)  # [B, h, w, e]
        return self.tokenizer.quantize.nearest(latents).flatten(1)


def prepare_encoder(tokenizer, *, bf16=False):
    """What encodes fast: the tokenizer, its encoder now in channels-last layout, or its `Bf16Encoder`."""
    tokenizer.encoder.to(memory_format=torch.channels_last)
    return Bf16Encoder(tokenizer) if bf16 else tokenizer


@torch.inference_mode()
def encode_views(tokenizer, images, device):
    """uint8 images, n of [H, W, 3] -> tokens int32 [n, 2, L] on the device, of the image and the mirrored
    image. A GPU is not waited for."""
    shape = (len(images), *images[0].shape)
    pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=is_cuda(device))
    np.stack(images, out=pixels.numpy())
    pixels = to_unit(pixels.to(device, non_blocking=True))
    tokens = tokenizer.encode(torch.cat([pixels, pixels.flip(-1)]))  # [2n, L]
    return tokens.view(2, len(images), -1).transpose(0, 1).int()


def encode_shards(writer, tokenizer, folder, world, *, batch_size, num_workers, skip_unreadable=False):
    """Encode the missing shards, shared among the processes. A shard with an unreadable image is not written,
    unless `skip_unreadable`. Returns the name and reason of each unreadable image of all processes.

    Workers read ahead, also beyond the end of a shard; a shard is written while the next is encoded.
    """
    ranges = [writer.shard_range(shard) for shard in writer.missing_shards()[world.rank :: world.size]]
    batches = chain.from_iterable(in_order(images, batch_size) for images in ranges)
    loader = image_loader(folder, writer.meta.img_size, batches, num_workers)
    unreadable, writing = [], None
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(total=sum(map(len, ranges)), unit="img", disable=not world.is_main, mininterval=1) as progress,
    ):
        for shard, parts in groupby(loader, lambda items: items[0][0] // writer.meta.shard_size):
            tokens, kept, errors = _encode_parts(parts, tokenizer, world.device, progress)
            unreadable += [(folder.names[i], reason) for i, reason in errors]
            if writing:
                writing.result()  # a full disk ends the run here
            if skip_unreadable or not errors:
                names = [folder.names[i] for i in kept]
                writing = pool.submit(_write, writer, shard, tokens, folder.labels[kept], names)
        if writing:
            writing.result()
    return [error for part in gather_objects(unreadable) for error in part]


def _encode_parts(parts, tokenizer, device, progress):
    """A shard's loader items -> list of tokens [n, 2, L] still being computed, the indices of their images,
    and (index, reason) of each unreadable image."""
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
    parts = [np.empty((0, 2, writer.meta.num_tokens)), *(part.cpu().numpy() for part in tokens)]
    writer.write_shard(shard, np.concatenate(parts), labels, names)


def differing_share(tokenizer, reference, folder, img_size, device, *, sample=64):
    """The fraction of tokens on which two tokenizers differ, and the number of images compared: at most
    `sample`, evenly spaced in the folder, both views of each."""
    indices = np.unique(np.linspace(0, len(folder) - 1, sample).astype(int))
    differing = images = 0
    for items in image_loader(folder, img_size, in_order(indices, 16), num_workers=0):
        good = [image for _, image in items if not isinstance(image, str)]
        if good:
            a, b = (encode_views(model, good, device) for model in (tokenizer, reference))
            differing += (a != b).float().mean().item() * len(good)
            images += len(good)
    return differing / max(1, images), images


def convert_mar(writer, mar):
    """Write a MAR-style folder's tokens as a packed token cache."""
    for shard in tqdm(writer.missing_shards(), unit="shard"):
        indices = np.array(writer.shard_range(shard))
        tokens = np.stack([mar.tokens(indices, np.full(len(indices), view)) for view in (0, 1)], axis=1)
        writer.write_shard(shard, tokens, mar.labels[indices], [mar.names[i] for i in indices])
    writer.finish(mar.names)
