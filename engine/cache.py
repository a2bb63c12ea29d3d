"""Images -> token cache.

Knows how to encode both mirror views of the images of a shard. Does not know flags or what tokens are for.
"""

import numpy as np
import torch
from tqdm import tqdm

from util import dist
from util.images import image_loader, in_order, to_unit


@torch.inference_mode()
def encode_views(tokenizer, images, device):
    """uint8 images [n, H, W, 3] -> tokens uint16 [n, 2, L], of the image and the mirrored image."""
    pixels = to_unit(torch.from_numpy(np.stack(images))).to(device)
    tokens = tokenizer.encode(torch.cat([pixels, pixels.flip(-1)]))  # [2n, L]
    return tokens.view(2, len(images), -1).transpose(0, 1).cpu().numpy().astype(np.uint16)


def encode_shards(writer, tokenizer, folder, world, *, batch_size, num_workers, skip_unreadable=False):
    """Encode the missing shards, shared out among the processes.

    A shard with an unreadable image is not written, unless `skip_unreadable`.

    Returns:
        names and reasons of the unreadable images of this process: list of str.
    """
    shards = writer.missing_shards()[world.rank :: world.size]
    mine = sum(len(writer.shard_range(s)) for s in shards)
    all_errors = []
    with tqdm(total=mine, unit="img", disable=not world.is_main, mininterval=1) as progress:
        for shard in shards:
            batches = in_order(writer.shard_range(shard), batch_size)
            tokens, kept, errors = [np.empty((0, 2, writer.meta.num_tokens))], [], []
            for items in image_loader(folder, writer.meta.img_size, batches, num_workers):
                good = [(i, image) for i, image in items if not isinstance(image, str)]
                errors += [(i, reason) for i, reason in items if isinstance(reason, str)]
                if good:
                    tokens.append(encode_views(tokenizer, [image for _, image in good], world.device))
                    kept += [i for i, _ in good]
                progress.update(len(items))
            all_errors += [(folder.names[i], reason) for i, reason in errors]
            if skip_unreadable or not errors:
                writer.write_shard(
                    shard, np.concatenate(tokens), folder.labels[kept], [folder.names[i] for i in kept]
                )
    return [error for part in dist.gather_objects(all_errors) for error in part]


def convert_mar(writer, mar, *, batch_size=1024):
    """Write a MAR-style folder's tokens as a packed token cache."""
    for shard in tqdm(writer.missing_shards(), unit="shard"):
        indices = np.array(writer.shard_range(shard))
        tokens = np.stack([mar.tokens(indices, np.full(len(indices), view)) for view in (0, 1)], axis=1)
        writer.write_shard(shard, tokens, mar.labels[indices], [mar.names[i] for i in indices])
    writer.finish(mar.names)
