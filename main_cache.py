"""Encode a folder of images, and its mirror images, into a token cache.

    torchrun --nproc_per_node 8 main_cache.py --img_size 256 --vqgan_path tokenizers/vq_ds16_c2i.pt \\
        --data_path imagenet --published_reading --cached_path cache/imagenet256

A killed run, started again, continues with the missing shards.
"""

import sys
from pathlib import Path

from engine.cache import convert_mar, differing_share, encode_shards, prepare_encoder
from models.vqgan import VQModel
from models.weights import state_digest
from util import cli, device, distributed, folders
from util.token_cache import CacheMeta, CacheWriter, MarCache, names_digest


def parse_args(argv=None):
    parser = cli.Parser(description="Encode a folder of images into a token cache")
    add = parser.add_argument
    add("--img_size", type=cli.number(int, 1), default=256)
    cli.add_tokenizer_flags(parser)
    add("--batch_size", type=cli.number(int, 1), default=64, help="images encoded at a time")
    add("--bf16", action="store_true", help="encode in bf16, and report how many tokens differ")
    cli.add_folder_flags(parser, split=False)
    add("--cached_path", metavar="DIR", help="where the token cache goes")
    add("--shard_size", type=cli.number(int, 1), default=4096, help="images of a shard")
    add("--from_mar", metavar="DIR", help="convert this MAR-style folder; nothing is encoded")
    cli.add_device_flags(parser)
    cli.add_timeout_flag(parser)
    return parser.parse_args(argv)


def check(args):
    cli.required(args, "vqgan_path", "cached_path")
    cli.writable_folder("--cached_path", args.cached_path)
    if args.from_mar and args.bf16:
        raise cli.UsageError("--bf16 has no use with --from_mar: nothing is encoded")
    if args.from_mar:
        cli.existing_folder("--from_mar", args.from_mar)
    else:
        cli.required(args, "data_path")
        cli.existing_images("--data_path", args.data_path)


def describe(args, tokenizer, names, class_names, **how):
    """The `CacheMeta` of the images `names`, checked against the flags. `how`: its precision and reading."""
    config = tokenizer.config
    cli.check_stated(args, vqgan_vocab_size=config.vocab_size, vqgan_stride=config.stride)
    if args.img_size % config.stride:
        raise ValueError(f"--img_size {args.img_size} is not a multiple of the stride {config.stride}")
    return CacheMeta(
        img_size=args.img_size, grid_size=args.img_size // config.stride, vocab_size=config.vocab_size,
        class_names=tuple(class_names), tokenizer_digest=state_digest(tokenizer), num_images=len(names),
        shard_size=args.shard_size, names_digest=names_digest(names), **how,
    )


def convert(args):
    """Repack the --from_mar folder."""
    with cli.checking():
        tokenizer, _ = VQModel.load(args.vqgan_path)
        mar = MarCache(args.from_mar, tokenizer.config.vocab_size, args.img_size)
        meta = describe(args, tokenizer, mar.names, mar.meta.class_names, precision="unknown")
        cli.check_stated(args, img_size=mar.meta.grid_size * tokenizer.config.stride)
        writer = CacheWriter(args.cached_path, meta)
    writer.begin()
    convert_mar(writer, mar)
    print(f"{args.cached_path}: {meta.num_images} images")


def open_parts(args, tokenizer, world):
    """(ImageSet, CacheWriter) of the training images and of those in DATA/val. Images held out by their
    name stay among the others: `split_cache` tells them apart."""
    train, val = folders.split_folder(args.data_path, 0, cli.reading(args), beside=args.cached_path)
    places = {Path(args.cached_path): train} | ({Path(args.cached_path) / "val": val} if val else {})
    head = f"{train.root}: {len(train)} images{f', {len(val)} in {val.root}' if val else ''}"
    distributed.say(folders.listing(head, train.class_names, train.labels, train.left_out))
    how = {"precision": "bf16" if args.bf16 else "fp32", "reading": str(train.reading)}
    return [
        (folder, CacheWriter(place, describe(args, tokenizer, folder.names, folder.class_names, **how)))
        for place, folder in places.items()
    ]


def encode(args):
    """Encode --data_path. Returns name and reason of the unreadable images."""
    with cli.checking():
        world = distributed.init(args.device, args.timeout)
        tokenizer = VQModel.load(args.vqgan_path)[0].to(world.device)
        distributed.say(device.describe(tokenizer, world.device, bf16=args.bf16))
        parts = open_parts(args, tokenizer, world)
    missing, errors = [part for part in parts if not part[1].complete], []
    if not missing:
        if world.is_main:
            print(f"{args.cached_path} is complete already: {parts[0][1].meta.num_images} images")
        return []
    with cli.sole_writer("--cached_path", args.cached_path, world):
        encoder = prepare_encoder(tokenizer, bf16=args.bf16)
        if args.bf16 and world.is_main:  # before the hours of encoding
            share, n = differing_share(encoder, tokenizer, parts[0][0], args.img_size, world.device)
            print(f"bf16: {share:.2%} of the tokens of {n} images differ from those of fp32")
        how = {name: getattr(args, name) for name in ("batch_size", "num_workers", "skip_unreadable")}
        for folder, writer in missing:
            if world.is_main:
                writer.begin()
            distributed.barrier()
            found = encode_shards(writer, encoder, folder, world, **how)
            if world.is_main:
                finish(writer, folder, found, args.skip_unreadable)
            errors += found
    return errors


def finish(writer, folder, errors, skip_unreadable):
    """Report the unreadable images, and mark the cache complete if no shard is missing."""
    for _, reason in errors:
        print(f"unreadable: {reason}", file=sys.stderr)
    if errors and skip_unreadable:
        print(f"{len(errors)} unreadable images left out", file=sys.stderr)
    if skip_unreadable or not errors:
        writer.finish(folder.names)
        images = writer.meta.num_images - len(errors)
        print(f"{writer.folder}: {images} images, {writer.meta.num_shards} shards")


def main(argv=None):
    args = parse_args(argv)
    check(args)
    errors = convert(args) if args.from_mar else encode(args)
    if errors and not args.skip_unreadable:
        raise cli.Failure(f"{len(errors)} unreadable images, shards not written: repair or --skip_unreadable")


if __name__ == "__main__":
    cli.run(main)
