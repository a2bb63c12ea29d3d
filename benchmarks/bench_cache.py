"""The token cache: random reads of one of ImageNet's size, and caching compared with the encoder alone.

    python benchmarks/bench_cache.py --vqgan_path assets/fashion_mnist/tokenizer.safetensors --img_size 32 \\
        --data_path data/fashion_mnist --encode_images 2000
    python benchmarks/bench_cache.py --device cuda --bf16 --encode_images 20000 --num_workers 16

Without --data_path it encodes JPEGs made here, without --vqgan_path with a random VQ-16. The floors are this
machine's rates: of memory, each token read (2 bytes) and written (8 bytes) once, and of matrix products.
"""

from util import cli  # isort: skip
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import bandwidth, publish, record, seconds_in_turns
from engine.cache import differing_share, encode_shards, encode_views, prepare_encoder
from models.vqgan import VQConfig, VQModel
from util import distributed
from util.device import matmul_rate
from util.folders import split_folder
from util.images import load_image
from util.token_cache import CacheMeta, CacheWriter, TokenCache

CODES = 16384


def parse_args(argv=None):
    parser = cli.Parser(description="Time the token cache: reading and making it")
    cli.add_tokenizer_flags(parser)
    add = parser.add_argument
    add("--cache_images", type=cli.number(int, 0), default=1281167, help="0: no reading")
    add("--grid_size", type=cli.number(int, 1), default=16, help="of the tokens that are read")
    add("--read_batch", type=cli.number(int, 1), default=256)
    add("--reads", type=cli.number(int, 1), default=200, help="batches in a timed call")
    add("--img_size", type=cli.number(int, 16), default=256)
    add("--data_path", metavar="DIR", help="as for main_cache.py")
    add("--encode_images", type=cli.number(int, 0), default=256, help="0: no caching")
    add("--batch_size", type=cli.number(int, 1), default=64)
    add("--shard_size", type=cli.number(int, 1), default=4096)
    add("--bf16", action="store_true")
    add("--n", type=cli.number(int, 1), default=5, help="timed calls; the median counts")
    add("--note", default="", help="what else ran on the machine")
    add("--output_file", metavar="FILE", help=".json to write")
    cli.add_device_flags(parser)
    return parser.parse_args(argv)


def describe(img_size, grid_size, num_images, shard_size):
    return CacheMeta(
        img_size=img_size, grid_size=grid_size, vocab_size=CODES, class_names=("any",), tokenizer_digest="",
        num_images=num_images, shard_size=shard_size, names_digest="",
    )


def write_cache(folder, meta):
    """A token cache of random tokens."""
    writer, rng = CacheWriter(folder, meta), np.random.default_rng(0)
    writer.begin()
    for shard in range(meta.num_shards):
        images = writer.shard_range(shard)
        tokens = rng.integers(0, CODES, (len(images), 2, meta.num_tokens), dtype=np.uint16)
        writer.write_shard(shard, tokens, np.zeros(len(images)), [f"{i}.JPEG" for i in images])
    writer.finish([])
    return TokenCache(folder)


def time_reading(args, folder):
    """Random images a second, mirrored at random."""
    meta = describe(1, args.grid_size, args.cache_images, args.shard_size)
    cache, rng, cpu = write_cache(folder / "packed", meta), np.random.default_rng(1), torch.device("cpu")
    shape = args.reads, args.read_batch
    indices, views = rng.integers(0, len(cache), shape), rng.integers(0, 2, shape)

    def read():
        for batch in zip(indices, views, strict=True):
            cache.tokens(*batch)

    rate = indices.size / median(seconds_in_turns({"": read}, cpu, n=args.n)[""])
    floor = bandwidth(cpu) / (10 * meta.num_tokens)
    return {
        "images": args.cache_images, "shards": meta.num_shards, "tokens_per_image": meta.num_tokens,
        "batch": args.read_batch, "samples_per_s": round(rate), "floor_samples_per_s": round(floor),
        "share_of_floor": round(rate / floor, 3),
    }


def write_photos(folder, count, img_size):
    """JPEGs of smooth noise, larger than `img_size` as photos usually are."""
    (folder / "any").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        sides = (img_size * 2, img_size * 3 // 2)
        coarse.resize(sides, Image.Resampling.BICUBIC).save(folder / f"any/{i}.jpg", quality=90)
    return folder


def time_caching(args, folder, world):
    """Images a second, both views each, of the whole caching and of the encoder alone."""
    torch.manual_seed(0)
    tokenizer = VQModel.load(args.vqgan_path)[0] if args.vqgan_path else VQModel(VQConfig()).eval()
    tokenizer = tokenizer.requires_grad_(False).to(world.device)
    encoder = prepare_encoder(tokenizer, bf16=args.bf16)
    photos = args.data_path or write_photos(folder / "photos", args.encode_images, args.img_size)
    images = split_folder(photos)[0]
    count = min(args.encode_images, len(images))
    chosen = np.linspace(0, len(images) - 1, count).astype(int)
    images = replace(images, names=tuple(images.names[i] for i in chosen), labels=images.labels[chosen])
    meta = describe(args.img_size, args.img_size // tokenizer.config.stride, count, args.shard_size)
    batch = [load_image(images.file(i), args.img_size) for i in range(min(count, args.batch_size))]
    batches = max(1, count // len(batch))

    def encode():
        for _ in range(batches):
            encode_views(encoder, batch, world.device)

    def cache():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            errors = encode_shards(
                CacheWriter(place, meta), encoder, images, world, batch_size=args.batch_size,
                num_workers=args.num_workers,
            )
        if errors:
            raise cli.Failure(errors[0][1])

    times = seconds_in_turns({"encoder": encode, "caching": cache}, world.device, n=args.n)
    alone, whole = batches * len(batch) / median(times["encoder"]), count / median(times["caching"])
    with FlopCounterMode(display=False) as counter:
        encode_views(encoder, batch[:1], world.device)
    rate = matmul_rate(world.device, torch.bfloat16 if args.bf16 else torch.float32)
    floor = rate / counter.get_total_flops()
    result = {
        "img_size": args.img_size, "images": count, "batch_size": args.batch_size,
        "num_workers": args.num_workers, "precision": "bf16" if args.bf16 else "fp32",
        "weights": args.vqgan_path or "random VQ-16", "data": args.data_path or "JPEGs made here",
        "encoder_images_per_s": round(alone, 2), "caching_images_per_s": round(whole, 2),
        "caching_share_of_encoder": round(whole / alone, 3),
        "floor_images_per_s": round(floor, 2), "encoder_share_of_floor": round(alone / floor, 3),
    }
    if args.bf16:
        share, sample = differing_share(encoder, tokenizer, images, args.img_size, world.device)
        result |= {"share_of_tokens_that_differ_from_fp32": round(share, 4), "of_images": sample}
    return result


def main(argv=None):
    args = parse_args(argv)
    if args.output_file:
        cli.writable_folder("--output_file", Path(args.output_file).parent)
    with cli.checking():
        world = distributed.init(args.device)
    sections = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.cache_images:
            sections["reading"] = time_reading(args, Path(folder))
        if args.encode_images:
            sections["caching"] = time_caching(args, Path(folder), world)
    report = record(world.device, n=args.n, note=args.note, **sections)
    figures = [(name, *figure) for name, part in sections.items() for figure in part.items()]
    rates = [f"{name}: {key} {value}" for name, key, value in figures if key.endswith("_per_s")]
    publish(report, args.output_file, "; ".join(rates))


if __name__ == "__main__":
    cli.run(main)
