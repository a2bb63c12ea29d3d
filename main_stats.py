"""Reference statistics for FID: mean and covariance of the features of real images.

    torchrun --nproc_per_node 8 main_stats.py --data_path imagenet/train --output_file imagenet256.npz
    python main_stats.py --reference_batch VIRTUAL_imagenet256_labeled.npz --output_file adm256.npz

Takes an image folder (ADM's centre crop) or one of ADM's reference batches, at any size. The sums take 34 MB
whatever the number of images; --save_features takes 8 KB an image on every process, which is meant for
50,000 of them.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.features import EXTRACTORS, make_extractor
from engine.metrics import RunningStatistics, save_statistics
from util import cli, dist
from util.images import image_loader, in_order, list_images, readable_pixels
from util.npz import open_array


def parse_args(argv=None):
    parser = cli.Parser(description="Reference statistics for FID")
    parser.add_argument("--data_path", metavar="DIR", help="CLASS/IMAGE folders")
    parser.add_argument(
        "--reference_batch", metavar="FILE", help=".npz with arr_0 uint8 [n, H, W, 3], as of ADM"
    )
    parser.add_argument("--output_file", metavar="FILE", help=".npz to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --output_file")
    parser.add_argument(
        "--img_size", type=cli.number(int, 1), help="pixels; default: 256, or the batch's own"
    )
    parser.add_argument("--batch_size", type=cli.number(int, 1), default=64)
    parser.add_argument(
        "--save_features", action="store_true", help="keep the features, for KID and precision"
    )
    parser.add_argument("--features", choices=EXTRACTORS, default="inception")
    parser.add_argument(
        "--inception", metavar="FILE", help="Inception weights; default: $LPD_INCEPTION, torch's cache"
    )
    cli.add_device_flags(parser)
    return parser.parse_args(argv)


def folder_images(folder, img_size, indices, batch_size, num_workers):
    """uint8 [b, H, W, 3] batches of the images of a folder with these indices."""
    for items in image_loader(folder, img_size, in_order(indices, batch_size), num_workers):
        yield torch.from_numpy(readable_pixels(items)[1])


def array_images(array, indices, batch_size):
    """uint8 [b, H, W, 3] batches of a memory-mapped or loaded array."""
    for batch, _ in in_order(indices, batch_size):
        yield torch.from_numpy(array[batch])


def open_images(args):
    """The images: their number, facts about them, and a function that gives batches of some indices."""
    if args.data_path:
        cli.existing_folder("--data_path", args.data_path)
        folder, img_size = list_images(args.data_path), args.img_size or 256
        facts = {"img_size": img_size, "preparation": f"centre crop to {img_size} px"}

        def images(indices):
            return folder_images(folder, img_size, indices, args.batch_size, args.num_workers)

        return len(folder), facts, images
    cli.existing_file("--reference_batch", args.reference_batch)
    array = open_array(args.reference_batch, "arr_0")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(
            f"--reference_batch: arr_0 is {array.dtype} {list(array.shape)}, not uint8 [n, H, W, 3]"
        )
    if args.img_size not in (None, array.shape[1]):
        raise ValueError(f"--img_size is {args.img_size}, {args.reference_batch} holds {array.shape[1]} px")
    facts = {"img_size": array.shape[1], "preparation": f"reference batch of {array.shape[1]} px, as it is"}
    return len(array), facts, lambda indices: array_images(array, indices, args.batch_size)


def gather_statistics(world, n, images, extractor, *, keep):
    """Statistics over all processes and, if `keep`, the features in order; None on all but the first."""
    mine = np.array_split(np.arange(n), world.size)[world.rank]
    running, kept = RunningStatistics(extractor.num_features), [torch.empty(0, extractor.num_features)]
    with tqdm(total=len(mine), unit="img", disable=not world.is_main, mininterval=1) as progress:
        for batch in images(mine):
            features = extractor(batch.to(world.device))["features"].cpu()
            running.add(features)
            if keep:
                kept.append(features)
            progress.update(len(batch))
    parts = dist.gather_objects((running, torch.cat(kept)))
    if not world.is_main:
        return None, None
    for part, _ in parts[1:]:
        running.merge(part)
    return running.finish(), torch.cat([features for _, features in parts]).numpy() if keep else None


def main(argv=None):
    args = parse_args(argv)
    cli.required(args, "output_file")
    if bool(args.data_path) == bool(args.reference_batch):
        raise cli.UsageError("give either --data_path or --reference_batch")
    output = Path(args.output_file)
    if output.suffix != ".npz":
        raise cli.UsageError(f"--output_file {output} must end in .npz")
    if output.exists() and not args.overwrite:
        raise cli.UsageError(f"--output_file {output} exists: give another name or --overwrite")
    cli.writable_folder("--output_file", output.parent)
    with cli.checking():
        world = dist.init(args.device)
        n, facts, images = open_images(args)
        if n < 2:
            raise ValueError(f"{n} images: statistics need at least 2")
        extractor = make_extractor(args.features, world.device, args.inception)
    statistics, features = gather_statistics(world, n, images, extractor, keep=args.save_features)
    if world.is_main:
        save_statistics(
            output, statistics, features=features, extractor=extractor.name,
            extractor_digest=extractor.digest, **facts,
        )  # fmt: skip
        print(f"{output}: {n} images, {extractor.num_features} features of {extractor.name}, "
              f"{facts['preparation']}")  # fmt: skip
    dist.finish()


if __name__ == "__main__":
    cli.run(main)
