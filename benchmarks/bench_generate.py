"""Speed of generation: latency and throughput, with and without the decoder, against a lower bound.

    python benchmarks/bench_generate.py --model lpd_l --bf16 --batch_sizes 1 64 --against plain
    OMP_NUM_THREADS=1 python benchmarks/bench_generate.py --model lpd_l --device cpu --n 3

The floor counts the products that no trajectory can avoid (the linears): each takes at least its arithmetic,
or reading its weights once, at rates measured in this run. `products` times them alone. Weights are random
unless given, which matters only to the PSNR of the fast decoder against the tokenizer in float32.
"""

from util import cli  # isort: skip
import dataclasses
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks import measure
from engine.decoding import generate_tokens
from engine.fast import FastDecoder, FastGenerator, packed
from engine.generate import generate_images, resolve_settings
from engine.sampling import Sampling
from models.lpd import LPD, LPD_CONFIGS
from models.vqgan import VQConfig, VQModel
from util.device import choose_device, matmul_rate
from util.images import to_uint8


def parse_args(argv=None):
    parser = cli.Parser(description="Speed of generation")
    add = parser.add_argument
    add("--model", choices=sorted(LPD_CONFIGS), default="lpd_l", help="with random weights")
    add("--grid_size", type=cli.number(int, 1), default=16, help="32 for 512 px")
    add("--pretrained_ckpt", metavar="FILE", help="replaces --model and --grid_size")
    add("--vqgan_path", metavar="FILE", help="default: VQ-16 with random weights")
    add("--generation_steps", type=cli.number(int, 1))
    cli.add_settings(parser, Sampling)
    parser.set_defaults(cfg=4.8)
    add("--batch_sizes", type=cli.number(int, 1), nargs="+", default=[1])
    add("--bf16", action="store_true")
    add("--against", choices=["plain"], help="time this path too, in turns")
    add("--no_decoder", action="store_true", help="tokens only")
    add("--fused_decoder", action="store_true", help="torch.compile it")
    add("--n", type=cli.number(int, 1), default=5, help="timed calls, of which the median is reported")
    add("--device", default="auto")
    add("--note", default="", help="what else ran on the machine, for the results")
    add("--output_file", metavar="FILE", help=".json to write")
    return parser.parse_args(argv)


def needed_products(model, group_sizes, branches):
    """The products (rows, weight) of one image. The last block needs only keys and values of context."""
    *others, last = [(b.attn.qkv, b.attn.proj, b.mlp.fc1, b.mlp.fc2) for b in model.blocks]
    keys_and_values = last[0].weight[model.config.embed_dim :]
    for context, queries in zip((1, *group_sizes[:-1]), group_sizes, strict=True):
        c, n = branches * context, branches * queries
        yield from ((c + n, linear.weight) for block in others for linear in block)
        yield c, keys_and_values
        yield from ((n, linear.weight) for linear in last)
        yield n, model.head.weight


def run_products(products, batch):
    """A function that computes these products alone."""
    most = batch * max(rows for rows, _ in products)
    inputs = {w.shape[1]: torch.randn(most, w.shape[1], dtype=w.dtype, device=w.device) for _, w in products}

    @torch.inference_mode()
    def run():
        for rows, weight in products:
            F.linear(inputs[weight.shape[1]][: batch * rows], weight)

    return run


def load(args, device):
    """The model in the requested precision and the tokenizer in float32, both on the device."""
    config = dataclasses.replace(LPD_CONFIGS[args.model], grid_size=args.grid_size)
    model = LPD.load(args.pretrained_ckpt)[0] if args.pretrained_ckpt else LPD(config)
    tokenizer = VQModel.load(args.vqgan_path)[0] if args.vqgan_path else VQModel(VQConfig())
    model = model.eval().to(device)
    return model.bf16_linears() if args.bf16 else model, tokenizer.eval().to(device)


def make_paths(args, model, tokenizer, decoder):
    """The functions to time, by name; each takes the arguments of `generate_tokens` after the model."""
    fast = FastGenerator(packed(model), decoder)
    paths = {"fast tokens": fast.generate_tokens, "fast images": fast.generate_images}
    if args.against:
        paths["plain tokens"] = partial(generate_tokens, model)
        paths["plain images"] = partial(generate_images, model, tokenizer)
    return {name: paths[name] for name in paths if not (args.no_decoder and name.endswith("images"))}


def time_batch(paths, settings, products, batch, rates, n):
    """Rows of the table for one batch size: one for each path and one for the products alone."""
    arguments = torch.zeros(batch, dtype=torch.int64), settings.orders(range(batch)), settings.group_sizes
    calls = {name: partial(path, *arguments, settings.sampling) for name, path in paths.items()}
    calls["products"] = run_products(products, batch)
    seconds = measure.seconds_in_turns(calls, products[0][1].device, n=n, warm_up=2)
    floor = sum(
        max(2 * batch * rows * weight.numel() / rates["flops"], weight.nbytes / rates["bytes"])
        for rows, weight in products
    )
    for name, times in seconds.items():
        typical = median(times)
        yield {
            "batch": batch, "path": name, "seconds": typical, "images_per_second": batch / typical,
            "floor_seconds": floor, "share_of_floor": floor / typical,
            "times_the_products": median(a / b for a, b in zip(times, seconds["products"], strict=True)),
        }


@torch.inference_mode()
def psnr(tokenizer, decoder, tokens):
    """Decibels of the decoder's images against those of the tokenizer; the peak is white."""
    a, b = (to_uint8(part.decode(tokens)).cpu().double() for part in (tokenizer, decoder))
    return (20 * torch.log10(255 / (a - b).square().mean().sqrt())).item()


def in_words(rows):
    return "; ".join(
        f"{row['path']}, batch {row['batch']}: {1000 * row['seconds']:.1f} ms, "
        f"{row['images_per_second']:.1f} images/s (floor {1000 * row['floor_seconds']:.1f} ms)"
        for row in rows if row["path"] != "products"
    )


def main(argv=None):
    args = parse_args(argv)
    with cli.checking():
        if args.output_file:
            cli.writable_folder("--output_file", Path(args.output_file).parent)
        model, tokenizer = load(args, choose_device(args.device))
        sampling, grid_size = cli.settings_from(Sampling, args), model.config.grid_size
        settings = resolve_settings(grid_size, sampling=sampling, generation_steps=args.generation_steps)
    device, dtype = model.pos_embed.device, model.head.weight.dtype
    decoder = FastDecoder(tokenizer, dtype, fused=args.fused_decoder)
    paths = make_paths(args, model, tokenizer, decoder)
    products = list(needed_products(model, settings.group_sizes, 1 if sampling.cfg == 1 else 2))
    rates = {"flops": matmul_rate(device, dtype), "bytes": measure.bandwidth(device)}
    batches = (time_batch(paths, settings, products, batch, rates, args.n) for batch in args.batch_sizes)
    rows = list(chain.from_iterable(batches))
    report = measure.record(device, note=args.note, dtype=str(dtype), rates=rates, rows=rows)
    if not args.no_decoder:
        example = torch.zeros(1, dtype=torch.int64), settings.orders([0]), settings.group_sizes, sampling
        report["decoder_psnr_db"] = psnr(tokenizer, decoder, paths["fast tokens"](*example))
    measure.publish(report, args.output_file, in_words(rows))


if __name__ == "__main__":
    cli.run(main)
