"""Metrics of anybody's images: FID, IS, FD-DINOv2, KID, precision and recall.

    python scripts/score.py --images DIR --fid_stats imagenet256.npz
    torchrun --nproc_per_node 8 scripts/score.py --images samples.npz --reference imagenet/val --prc \\
        --features inception dinov2 --dinov2 FILE --output_file score.json

The images of a folder or archive (docs/data.md), at any depth, or of an .npz as ADM and --save_npz of
main_lpd.py write it. They are measured as they are, or centre-cropped to --img_size. For the digits of an
evaluation take its --eval_bsz.
"""

import time
from pathlib import Path

from engine.evaluate import warnings
from engine.measure import ArrayImages, FolderImages, MetricSpec, environment, measure
from engine.metrics import MetricSettings
from engine.report import print_result
from util import cli, distributed, folders
from util.files import write_json


def parse_args(argv=None):
    parser = cli.Parser(description="Metrics of stored images")
    add = parser.add_argument
    add("--images", metavar="SOURCE", help="folder or archive, flat or by class, or .npz with arr_0")
    add("--reference", metavar="SOURCE", help="real images, measured too, in place of --fid_stats")
    add("--output_file", metavar="FILE", help=".json to write")
    add("--overwrite", action="store_true", help="replace --output_file")
    add("--img_size", type=cli.number(int, 1), help="of ADM's centre crop; default: images as they are")
    add("--batch_size", type=cli.number(int, 1), default=64)
    cli.add_reading_flags(parser)
    cli.add_settings(parser, MetricSettings)
    cli.add_device_flags(parser)
    cli.add_timeout_flag(parser)
    return parser.parse_args(argv)


def check(args):
    cli.required(args, "images")
    if args.reference and args.fid_stats:
        raise cli.UsageError("give either --reference or --fid_stats")
    if args.output_file:
        cli.new_file("--output_file", args.output_file, ".json", args.overwrite)


def open_images(source, args, size):
    """The images of a source, centre-cropped to `size` pixels, or as they are if that is None."""
    if Path(source).suffix == ".npz":
        images = ArrayImages(source)
    else:
        folder = folders.all_images(source, cli.reading(args))
        images = FolderImages(folder, size, args.num_workers)
        distributed.say(f"{source}: {', left out: '.join([f'{len(folder)} images', *folder.left_out])}")
    if size and images.img_size != size:
        raise ValueError(f"{source} has images of {images.img_size} px, not {size} px")
    if len(images) < (least := 4 if args.prc else 2):
        raise ValueError(f"{source}: {len(images)} images, {least} are needed")
    return images


def open_both(args):
    """The images, and those of --reference, if given, cropped to the same size."""
    images = open_images(args.images, args, args.img_size)
    if not args.reference:
        return images, None
    height, width, _ = images.shape
    reference = open_images(args.reference, args, height if height == width else None)
    return images, reference


def main(argv=None):
    args = parse_args(argv)
    check(args)
    with cli.checking():
        world = distributed.init(args.device, args.timeout)
        images, reference = open_both(args)
        settings = cli.settings_from(MetricSettings, args)
        metrics = MetricSpec.load(settings, world.device, images.img_size, reference)
    start = time.perf_counter()
    metrics = metrics.measured(args.batch_size, world)
    outputs, digest = measure(images, metrics.extractors, args.batch_size, world, keep=True)
    if not world.is_main:
        return
    measured = time.perf_counter()
    values = metrics.compute(outputs)
    seconds = {"features": measured - start, "metrics": time.perf_counter() - measured}
    result = {
        "images": str(args.images), "images_digest": digest, "num_images": len(images),
        "img_size": images.img_size, "preparation": images.preparation, "files": images.endings,
        "batch_size": args.batch_size, **metrics.as_json(), **environment(world.device),
        "warnings": warnings(len(images)) + images.warnings(), "metrics": values,
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()}, "processes": world.size,
    }
    if args.output_file:
        write_json(args.output_file, result)
    print_result(result)


if __name__ == "__main__":
    cli.run(main)
