"""Reference statistics for FID: mean and covariance of the features of real images.

    torchrun --nproc_per_node 8 main_stats.py --data_path imagenet --published_reading \\
        --output_file imagenet256.npz
    python main_stats.py --reference_batch images.npz --output_file images_stats.npz

Takes a folder or archive of images (ADM's centre crop) or images in an .npz, as ADM stores them, at any size.
ADM's own VIRTUAL_*.npz have mu and sigma, of the whole training set: these are kept, and --fid_stats reads
them itself.
"""

from util import cli  # isort: skip
from dataclasses import replace

from engine.features import FeatureSettings
from engine.measure import ArrayImages, FolderImages, measure, reference_of
from engine.metrics import load_statistics, save_statistics
from util import distributed
from util.files import array_names


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
    add("--save_features", action="store_true", help="for KID and precision; 12 KB of memory an image")
    cli.add_settings(parser, FeatureSettings)
    cli.add_device_flags(parser)
    cli.add_timeout_flag(parser)
    return parser.parse_args(argv)


def check(args):
    cli.required(args, "output_file")
    if bool(args.data_path) == bool(args.reference_batch):
        raise cli.UsageError("give either --data_path or --reference_batch")
    cli.new_file("--output_file", args.output_file, ".npz", args.overwrite)
    if args.data_path:
        cli.existing_images("--data_path", args.data_path)
    else:
        cli.existing_file("--reference_batch", args.reference_batch)


def open_images(args, world):
    """The images to measure, and how they are prepared."""
    if args.reference_batch:
        images = ArrayImages(args.reference_batch)
        cli.check_stated(args, img_size=images.img_size)
        return images, f"reference batch, {images.preparation}"
    size = args.img_size or 256
    train, val = cli.open_folders(args, size, world, args.output_file)
    folder = {"train": train, "val": val}[args.split]
    if folder is None:
        raise ValueError(f"--split val: no images of {args.data_path} are held out")
    which = {"train": "training images" if val else "all images", "val": "held-out images"}[args.split]
    images = FolderImages(folder, size, args.num_workers)
    return images, f"{which}, {images.preparation}"


def known_statistics(args):
    """Extractor name -> the statistics of its features that the file of --reference_batch itself has."""
    path = args.reference_batch
    if path and "inception" in args.features and "mu" in array_names(path):
        return {"inception": load_statistics(path, features=False)}
    return {}


def main(argv=None):
    args = parse_args(argv)
    check(args)
    with cli.checking():
        world = distributed.init(args.device, args.timeout)
        images, preparation = open_images(args, world)
        if len(images) < 2:
            raise ValueError(f"{len(images)} images: statistics need at least 2")
        known = known_statistics(args)
        settings = cli.settings_from(FeatureSettings, args)
        names = [name for name in settings.features if args.save_features or name not in known]
        extractors = replace(settings, features=names).extractors(world.device)
    found = {}
    if extractors:
        found, _ = measure(images, extractors, args.batch_size, world, keep=args.save_features)
    if world.is_main:
        digests = {extractor.name: {"extractor_digest": extractor.digest} for extractor in extractors}
        facts, statistics = {"img_size": images.img_size, "preparation": preparation}, {}
        for name in dict.fromkeys(settings.features):
            own = reference_of(found.get(name, {}), known.get(name))
            statistics[name] = {**own, "extractor": name, **digests.get(name, {}), **facts}
        save_statistics(args.output_file, statistics)
        for name, values in statistics.items():
            kept = f"mu and sigma of {args.reference_batch}" if name in known else f"{len(images)} images"
            print(f"{args.output_file}: {kept}, {len(values['mu'])} features of {name}, {preparation}")


if __name__ == "__main__":
    cli.run(main)
