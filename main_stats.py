"""Reference statistics for FID: mean and covariance of the features of real images.

    torchrun --nproc_per_node 8 main_stats.py --data_path imagenet --published_reading \\
        --output_file imagenet256.npz
    python main_stats.py --reference_batch images.npz --output_file images_stats.npz

Takes an image folder (ADM's centre crop) or images in an .npz, as ADM stores them, at any size. ADM's own
VIRTUAL_*.npz have mu and sigma, of the whole training set: these are kept, and --fid_stats reads them itself.
"""

from util import cli  # isort: skip
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.features import EXTRACTORS, make_extractor
from engine.metrics import RunningStatistics, load_statistics, save_statistics
from util import distributed
from util.files import map_array, read_arrays
from util.images import image_loader, in_order, readable_pixels


def parse_args(argv=None):
    parser = cli.Parser(description="Reference statistics for FID")
    add = parser.add_argument
    cli.add_folder_flags(parser)
    add("--split", choices=["train", "val"], default="train", help="which images of --data_path")
    add("--reference_batch", metavar="FILE", help="ADM's .npz: arr_0 uint8 [n, H, W, 3]")
    add("--output_file", metavar="FILE", help=".npz to write")
    add("--overwrite", action="store_true", help="replace --output_file")
    add("--img_size", type=cli.number(int, 1), help="pixels; default: 256, or the batch's own")
    add("--batch_size", type=cli.number(int, 1), default=64)
    add("--save_features", action="store_true", help="for KID and precision: 8 KB an image, on each process")
    add("--features", choices=EXTRACTORS, default="inception")
    add("--inception", metavar="FILE", help="Inception weights; default: $LPD_INCEPTION, torch's cache")
    cli.add_device_flags(parser)
    cli.add_timeout_flag(parser)
    return parser.parse_args(argv)


def check(args):
    cli.required(args, "output_file")
    if bool(args.data_path) == bool(args.reference_batch):
        raise cli.UsageError("give either --data_path or --reference_batch")
    output = Path(args.output_file)
    if output.suffix != ".npz":
        raise cli.UsageError(f"--output_file {output} must end in .npz")
    if output.exists() and not args.overwrite:
        raise cli.UsageError(f"--output_file {output} exists: give another name or --overwrite")
    cli.writable_folder("--output_file", output.parent)
    if args.data_path:
        cli.existing_folder("--data_path", args.data_path)
    else:
        cli.existing_file("--reference_batch", args.reference_batch)


def open_folder(args, world):
    """The images of --data_path: their number, their size in pixels, how they are prepared, and a function
    from indices to batches uint8 [b, H, W, 3]."""
    size = args.img_size or 256
    train, val = cli.open_folders(args, size, world)
    folder = {"train": train, "val": val}[args.split]
    if folder is None:
        raise ValueError(f"--split val: no images of {args.data_path} are held out")

    def batches(indices):
        for items in image_loader(folder, size, in_order(indices, args.batch_size), args.num_workers):
            yield torch.from_numpy(readable_pixels(items)[1])

    which = {"train": "training images" if val else "all images", "val": "held-out images"}[args.split]
    return len(folder), size, f"{which}, centre crop to {size} px, read as {folder.reading}", batches


def open_batch(args, world):
    """The images of --reference_batch, as `open_folder`."""
    array = map_array(args.reference_batch, "arr_0")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        found = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"--reference_batch: arr_0 is {found}, not uint8 [n, H, W, 3]")
    size = array.shape[1]
    cli.check_stated(args, img_size=size)

    def batches(indices):
        for batch, _ in in_order(indices, args.batch_size):
            yield torch.from_numpy(array[batch])

    return len(array), size, f"reference batch of {size} px, as it is", batches


def gather_statistics(world, n, batches, extractor, save_features):
    """Statistics over all processes and, if asked for, the features in image order; rank 0 has them all."""
    own = np.array_split(np.arange(n), world.size)[world.rank]
    running = RunningStatistics(extractor.num_features)
    features = [torch.empty(0, extractor.num_features)]
    with tqdm(total=len(own), unit="img", disable=not world.is_main, mininterval=1) as progress:
        for images in batches(own):
            found = extractor(images.to(world.device))["features"].cpu()
            running.add(found)
            if save_features:
                features.append(found)
            progress.update(len(images))
    parts = distributed.gather_objects((running, torch.cat(features)))
    for other, _ in parts[1:]:
        parts[0][0].merge(other)
    return parts[0][0], torch.cat([features for _, features in parts]).numpy() if save_features else None


def main(argv=None):
    args = parse_args(argv)
    check(args)
    with cli.checking():
        world = distributed.init(args.device, args.timeout)
        n, size, preparation, batches = (open_folder if args.data_path else open_batch)(args, world)
        if n < 2:
            raise ValueError(f"{n} images: statistics need at least 2")
        known = None  # mu and sigma of Inception features that the file itself has
        if args.reference_batch and args.features == "inception":
            has_mu = read_arrays(args.reference_batch, (), ["mu"])
            known = load_statistics(args.reference_batch, features=False) if has_mu else None
        facts, features = {"extractor": args.features, "img_size": size, "preparation": preparation}, None
        if measured := args.save_features or not known:
            extractor = make_extractor(args.features, world.device, args.inception)
            facts |= {"extractor": extractor.name, "extractor_digest": extractor.digest}
    if measured:
        running, features = gather_statistics(world, n, batches, extractor, args.save_features)
    if world.is_main:
        statistics = known or running.finish()
        save_statistics(args.output_file, statistics, features=features, **facts)
        kept = f"mu and sigma of {args.reference_batch}" if known else f"{n} images"
        of_what = f"{len(statistics['mu'])} features of {facts['extractor']}, {preparation}"
        print(f"{args.output_file}: {kept}, {of_what}")


if __name__ == "__main__":
    cli.run(main)
