"""Encode a folder of images, and its mirror images, into a token cache.

    torchrun --nproc_per_node 8 main_cache.py --img_size 256 --vqgan_path tokenizers/vq_ds16_c2i.pt \\
        --data_path imagenet --cached_path cache/imagenet256

Killed and started again it goes on with the shards that are missing.
"""

import sys
from copy import deepcopy

from engine.cache import convert_mar, differing_share, encode_shards, prepare_encoder
from engine.checkpoint import load_tokenizer, state_digest
from util import cli, dist
from util.images import list_images, split_folder
from util.token_cache import CacheMeta, CacheWriter, MarCache, names_digest


def parse_args(argv=None):
    parser = cli.Parser(description="Encode a folder of images into a token cache")
    parser.add_argument("--img_size", type=cli.number(int, 1), default=256)
    cli.add_tokenizer_flags(parser)
    parser.add_argument("--batch_size", type=cli.number(int, 1), default=64, help="images encoded at a time")
    parser.add_argument("--bf16", action="store_true", help="encode in bf16; says how many tokens differ")
    parser.add_argument("--data_path", metavar="DIR", help="CLASS/IMAGE folders, or a folder with train/")
    parser.add_argument("--cached_path", metavar="DIR", help="where the token cache goes")
    parser.add_argument("--shard_size", type=cli.number(int, 1), default=4096, help="images of a shard")
    parser.add_argument("--skip_unreadable", action="store_true", help="leave unreadable images out")
    parser.add_argument("--from_mar", metavar="DIR", help="convert this MAR-style folder; nothing is encoded")
    cli.add_device_flags(parser)
    return parser.parse_args(argv)


def plan(args, tokenizer, names, class_names, precision):
    """The cache's description, checked against the flags."""
    config = tokenizer.config
    cli.check_tokenizer_flags(args, config)
    if args.img_size % config.stride:
        raise ValueError(
            f"--img_size {args.img_size} is no multiple of the tokenizer's stride {config.stride}"
        )
    return CacheMeta(
        img_size=args.img_size, grid_size=args.img_size // config.stride, vocab_size=config.vocab_size,
        class_names=tuple(class_names), tokenizer_digest=state_digest(tokenizer), num_images=len(names),
        shard_size=args.shard_size, names_digest=names_digest(names), precision=precision,
    )  # fmt: skip


def convert(args, tokenizer):
    """The `--from_mar` mode."""
    with cli.checking():
        mar = MarCache(args.from_mar, tokenizer.config.vocab_size, args.img_size)
        meta = plan(args, tokenizer, mar.names, mar.meta.class_names, "unknown")
        if mar.meta.grid_size != meta.grid_size:
            raise ValueError(
                f"--from_mar: {args.from_mar} has {mar.meta.num_tokens} tokens an image, "
                f"--img_size {args.img_size} makes {meta.num_tokens}"
            )
        writer = CacheWriter(args.cached_path, meta)
    writer.begin()
    convert_mar(writer, mar)
    print(f"{args.cached_path}: {meta.num_images} images")


def prepared(tokenizer, folder, img_size, world, *, bf16):
    """The tokenizer ready to encode; for bf16, said before the hours of encoding, what that changes."""
    reference = prepare_encoder(deepcopy(tokenizer)) if bf16 and world.is_main else None
    tokenizer = prepare_encoder(tokenizer, bf16=bf16)
    if reference:
        share, images = differing_share(tokenizer, reference, folder, img_size, world.device)
        print(f"bf16: {share:.2%} of the tokens of {images} images differ from those of fp32")
    return tokenizer


def main(argv=None):
    args = parse_args(argv)
    cli.required(args, "vqgan_path", "cached_path")
    cli.writable_folder("--cached_path", args.cached_path)
    if args.from_mar:
        if args.bf16:
            raise cli.UsageError("--bf16 has no use with --from_mar: nothing is encoded")
        cli.existing_folder("--from_mar", args.from_mar)
        cli.find_files(args)
        with cli.checking():
            tokenizer = load_tokenizer(args.vqgan_path)
        return convert(args, tokenizer)
    cli.required(args, "data_path")
    cli.existing_folder("--data_path", args.data_path)
    cli.find_files(args)
    with cli.checking():
        world = dist.init(args.device)
        tokenizer = load_tokenizer(args.vqgan_path).to(world.device)
        folder = list_images(split_folder(args.data_path, "train"))
        meta = plan(args, tokenizer, folder.names, folder.class_names, "bf16" if args.bf16 else "fp32")
        writer = CacheWriter(args.cached_path, meta)
    if writer.complete:
        if world.is_main:
            print(f"{args.cached_path} is complete already: {meta.num_images} images")
        return dist.finish()
    with cli.sole_writer("--cached_path", args.cached_path, world):
        if world.is_main:
            writer.begin()
        dist.barrier()
        tokenizer = prepared(tokenizer, folder, args.img_size, world, bf16=args.bf16)
        errors = encode_shards(
            writer, tokenizer, folder, world, batch_size=args.batch_size, num_workers=args.num_workers,
            skip_unreadable=args.skip_unreadable,
        )  # fmt: skip
        if world.is_main:
            report(writer, folder, errors, args.skip_unreadable)
    dist.finish()
    if errors:
        sys.exit(1)


def report(writer, folder, errors, skip_unreadable):
    """Say what was left out, and mark the cache complete if nothing is missing."""
    for _, reason in errors:
        print(f"unreadable: {reason}", file=sys.stderr)
    if errors:
        action = "left out" if skip_unreadable else "shards not written: mend them or give --skip_unreadable"
        print(f"error: {len(errors)} unreadable images, {action}", file=sys.stderr)
    if skip_unreadable or not errors:
        writer.finish(folder.names)
        print(
            f"{writer.folder}: {writer.meta.num_images - len(errors)} images, {writer.meta.num_shards} shards"
        )


if __name__ == "__main__":
    cli.run(main)
