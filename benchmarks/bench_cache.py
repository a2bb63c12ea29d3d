"""The token cache: random reads, and caching beside the encoder alone.

    python benchmarks/bench_cache.py --vqgan_path assets/fashion_mnist/tokenizer.safetensors --img_size 32 \\
        --data_path data/fashion_mnist --encode_images 2000
    python benchmarks/bench_cache.py --device cuda --bf16 --encode_images 20000 --num_workers 16

Reads batches of random images, mirrored at random, out of a packed cache of random tokens of ImageNet's size
and, in turns with it, out of a MAR-style folder of a file per image. Then times `encode_shards`, which is all
of main_cache.py but its start, in turns with the encoder on pixels in memory: without --data_path on JPEGs
made here, without --vqgan_path with random weights of VQ-16 (the time does not depend on them, the share of
tokens that differ in bf16 does). The floors are measured here: reading each token once (2 bytes) and writing
it once (8 bytes) at the memory's rate; the encoder's multiply-adds at the rate of matrix products.
"""

import json
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import bandwidth, matmul_rate, record, seconds_in_turns  # noqa: E402
from engine.cache import differing_share, encode_shards, encode_views, prepare_encoder  # noqa: E402
from engine.checkpoint import load_tokenizer  # noqa: E402
from models.vqgan import VQConfig, VQModel  # noqa: E402
from util import cli, dist  # noqa: E402
from util.files import write_json  # noqa: E402
from util.images import list_images, load_image, split_folder  # noqa: E402
from util.token_cache import CacheMeta, CacheWriter, MarCache, TokenCache  # noqa: E402

CODES = 16384


def parse_args(argv=None):
    parser = cli.Parser(description="Time the token cache: reading and making it")
    cli.add_tokenizer_flags(parser)
    parser.add_argument("--cache_images", type=cli.number(int, 0), default=1281167, help="0: no reading")
    parser.add_argument(
        "--grid_size", type=cli.number(int, 1), default=16, help="of the tokens that are read"
    )
    parser.add_argument("--mar_files", type=cli.number(int, 1), default=4096)
    parser.add_argument("--read_batch", type=cli.number(int, 1), default=256)
    parser.add_argument("--reads", type=cli.number(int, 1), default=200, help="batches of a timed call")
    parser.add_argument("--img_size", type=cli.number(int, 16), default=256)
    parser.add_argument("--data_path", metavar="DIR", help="as of main_cache.py")
    parser.add_argument("--encode_images", type=cli.number(int, 0), default=256, help="0: no caching")
    parser.add_argument("--batch_size", type=cli.number(int, 1), default=64)
    parser.add_argument("--shard_size", type=cli.number(int, 1), default=4096)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--n", type=cli.number(int, 1), default=5, help="timed calls, of which the median")
    parser.add_argument("--profile", metavar="FILE", help="trace of one more caching, .json")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--output_file", metavar="FILE", help=".json to write")
    cli.add_device_flags(parser)
    return parser.parse_args(argv)


def description(img_size, grid_size, num_images, shard_size):
    """Of a cache that is only timed."""
    return CacheMeta(
        img_size=img_size, grid_size=grid_size, vocab_size=CODES, class_names=("any",), tokenizer_digest="",
        num_images=num_images, shard_size=shard_size, names_digest="",
    )  # fmt: skip


def write_packed(folder, meta):
    """A packed cache of random tokens."""
    writer, rng = CacheWriter(folder, meta), np.random.default_rng(0)
    writer.begin()
    for shard in range(meta.num_shards):
        images = writer.shard_range(shard)
        tokens = rng.integers(0, CODES, (len(images), 2, meta.num_tokens), dtype=np.uint16)
        writer.write_shard(shard, tokens, np.zeros(len(images)), [f"{i}.JPEG" for i in images])
    writer.finish([])
    return TokenCache(folder)


def write_mar(folder, num_files, num_tokens):
    """A MAR-style folder of random tokens."""
    (folder / "any").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(num_files):
        both = rng.integers(0, CODES, (2, num_tokens))
        np.savez(folder / f"any/{i}.npz", indices=both[0], indices_flip=both[1])
    return MarCache(folder, CODES, img_size=1)


def time_reading(args, folder):
    """Random samples a second of both formats; the packed one's also by this process's own time."""
    tokens = args.grid_size**2
    packed = write_packed(
        folder / "packed", description(1, args.grid_size, args.cache_images, args.shard_size)
    )
    mar = write_mar(folder / "mar", args.mar_files, tokens)
    rng, own, count = np.random.default_rng(1), [], args.reads * args.read_batch

    def read(cache, batches):
        drawn = [(rng.integers(0, len(cache), args.read_batch), rng.integers(0, 2, args.read_batch))
                 for _ in range(batches)]  # fmt: skip
        start = time.process_time()
        for indices, views in drawn:
            cache.tokens(indices, views)
        own.append(time.process_time() - start)

    few = max(1, args.reads // 50)  # the MAR style is so much slower
    calls = {"packed": lambda: read(packed, args.reads), "mar": lambda: read(mar, few)}
    cpu = torch.device("cpu")
    seconds = {k: median(v) for k, v in seconds_in_turns(calls, cpu, n=args.n).items()}
    per_processor = count / median(own[2::2])  # own: packed, mar, packed, ...; the first pair warms up
    floor = bandwidth(cpu) / (10 * tokens)
    rate = count / seconds["packed"]
    return {
        "images": args.cache_images, "shards": packed.meta.num_shards, "tokens_per_image": tokens,
        "batch": args.read_batch, "samples_per_s": round(rate),
        "samples_per_processor_s": round(per_processor),
        "floor_samples_per_s": round(floor), "share_of_floor": round(per_processor / floor, 3),
        "mar_files": args.mar_files, "mar_samples_per_s": round(few * args.read_batch / seconds["mar"]),
    }  # fmt: skip


def write_photos(folder, count, img_size):
    """JPEGs of smooth noise, of the sides of a usual photo for a crop of `img_size`."""
    (folder / "any").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        sides = (img_size * 2, img_size * 3 // 2)
        coarse.resize(sides, Image.Resampling.BICUBIC).save(folder / f"any/{i}.jpg", quality=90)
    return folder


def time_caching(args, folder, world):
    """Images a second, both views each: all of the caching, and the encoder alone."""
    tokenizer = load_tokenizer(args.vqgan_path) if args.vqgan_path else random_vq16()
    tokenizer = tokenizer.to(world.device)
    reference = prepare_encoder(deepcopy(tokenizer)) if args.bf16 else None
    prepare_encoder(tokenizer, bf16=args.bf16)
    photos = split_folder(args.data_path, "train") if args.data_path else write_photos(
        folder / "photos", args.encode_images, args.img_size)  # fmt: skip
    images = list_images(photos)
    count = min(args.encode_images, len(images))
    chosen = np.linspace(0, len(images) - 1, count).astype(int)
    images = replace(images, names=tuple(images.names[i] for i in chosen), labels=images.labels[chosen])
    meta = description(args.img_size, args.img_size // tokenizer.config.stride, count, args.shard_size)
    batch = [load_image(images.root / n, args.img_size) for n in images.names[: args.batch_size]]
    batches = max(1, count // len(batch))

    def encode():
        for _ in range(batches):
            encode_views(tokenizer, batch, world.device)

    def cache():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            writer = CacheWriter(place, meta)
            errors = encode_shards(
                writer, tokenizer, images, world, batch_size=args.batch_size, num_workers=args.num_workers
            )
            if errors:
                raise cli.Failure(errors[0][1])

    times = seconds_in_turns({"encoder": encode, "caching": cache}, world.device, n=args.n)
    alone, whole = batches * len(batch) / median(times["encoder"]), count / median(times["caching"])
    with FlopCounterMode(display=False) as counter:
        encode_views(tokenizer, batch[:1], world.device)
    floor = matmul_rate(world.device, torch.bfloat16 if args.bf16 else torch.float32)
    floor /= counter.get_total_flops()
    if args.profile:
        profile(cache, args.profile)
    result = {
        "img_size": args.img_size, "images": count, "batch_size": args.batch_size,
        "num_workers": args.num_workers, "precision": "bf16" if args.bf16 else "fp32",
        "weights": args.vqgan_path or "random VQ-16", "data": args.data_path or "JPEGs made here",
        "encoder_images_per_s": round(alone, 2), "caching_images_per_s": round(whole, 2),
        "caching_share_of_encoder": round(whole / alone, 3),
        "floor_images_per_s": round(floor, 2), "encoder_share_of_floor": round(alone / floor, 3),
    }  # fmt: skip
    if reference:
        share, sample = differing_share(tokenizer, reference, images, args.img_size, world.device)
        result |= {"share_of_tokens_that_differ_from_fp32": round(share, 4), "of_images": sample}
    return result


def random_vq16():
    """VQ-16 with random weights, always the same."""
    torch.manual_seed(0)
    return VQModel(VQConfig()).eval().requires_grad_(False)


def profile(function, path):
    """Write a trace of one call, to be looked at in a browser."""
    with torch.profiler.profile() as profiler:
        function()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def table(sections):
    """The figures as lines of text, a line each."""
    return "\n".join(
        f"{section:8} {name.replace('_', ' '):44} {value}"
        for section, values in sections.items()
        for name, value in values.items()
    )


def main(argv=None):
    args = parse_args(argv)
    for flag in ("output_file", "profile"):
        if getattr(args, flag):
            cli.writable_folder(f"--{flag}", Path(getattr(args, flag)).parent)
    with cli.checking():
        world = dist.init(args.device)
    sections = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.cache_images:
            sections["reading"] = time_reading(args, Path(folder))
        if args.encode_images:
            sections["caching"] = time_caching(args, Path(folder), world)
    print(table(sections))
    report = record(world.device, n=args.n, note=args.note, **sections)
    print(json.dumps({k: v for k, v in report.items() if k not in sections}, indent=2))
    if args.output_file:
        write_json(args.output_file, report)


if __name__ == "__main__":
    cli.run(main)
