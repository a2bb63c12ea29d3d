"""Speed of generation: latency and throughput, with and without the tokenizer's decoder, against the floor.

    python benchmarks/bench_generate.py --model lpd_l --bf16 --batch_sizes 1 64 --against plain
    OMP_NUM_THREADS=1 python benchmarks/bench_generate.py --model lpd_l --device cpu --n 3

The floor is the least time of the products that a trajectory cannot do without: those of the linears, of the
rows of each step. `products` times the very products, in turns with the generation. `floor` computes it: each
is bound by the device's rate of arithmetic or by reading its weights once, both rates measured in this run.
`packed products`, on a CPU, are those products on weights in the layout that the fast path uses.
Attention, which is left out of both, and all that is no product is what the rest of the time goes to.

Weights are random unless given: times do not depend on them, the decoder's PSNR (of the fast one against the
plain one in float32, over the same tokens) does.
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure  # noqa: E402
from engine.checkpoint import load_lpd, load_tokenizer  # noqa: E402
from engine.fast_generate import FastGenerator  # noqa: E402
from engine.generate import generate_images, generate_tokens  # noqa: E402
from engine.settings import resolve_settings  # noqa: E402
from models.lpd import LPD, LPD_CONFIGS  # noqa: E402
from models.packed import PackedLinear  # noqa: E402
from models.vqgan import FastDecoder, VQConfig, VQModel  # noqa: E402
from util import cli, dist  # noqa: E402
from util.files import write_json  # noqa: E402
from util.images import to_uint8  # noqa: E402


def parse_args(argv=None):
    parser = cli.Parser(description="Speed of generation")
    parser.add_argument("--model", choices=sorted(LPD_CONFIGS), default="lpd_l", help="with random weights")
    parser.add_argument("--grid_size", type=cli.number(int, 1), default=16, help="32 for 512 px")
    parser.add_argument("--pretrained_ckpt", metavar="FILE", help="in place of --model and --grid_size")
    parser.add_argument("--vqgan_path", metavar="FILE", help="default: VQ-16 with random weights")
    parser.add_argument("--generation_steps", type=cli.number(int, 1))
    parser.add_argument("--cfg", type=cli.number(float, 0), default=4.8)
    parser.add_argument("--top_k", type=cli.number(int, 0), default=0)
    parser.add_argument("--top_p", type=cli.number(float, 0, 1), default=1.0)
    parser.add_argument("--batch_sizes", type=cli.number(int, 1), nargs="+", default=[1])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--against", choices=["plain"], help="time this path too, in turns")
    parser.add_argument("--no_decoder", action="store_true", help="tokens only")
    parser.add_argument("--fused_decoder", action="store_true", help="torch.compile it")
    parser.add_argument("--n", type=cli.number(int, 1), default=5, help="timed calls; the median is told")
    parser.add_argument("--profile", metavar="FILE", help="write a trace of one call, for chrome://tracing")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the results")
    parser.add_argument("--output_file", metavar="FILE", help=".json to write")
    return parser.parse_args(argv)


def linears(block):
    return block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2


def needed_products(model, group_sizes, branches):
    """The products that the trajectory of one image needs, as (rows, weight).

    The last block needs keys and values of its context rows, and everything of its query rows.
    """
    *others, last = model.blocks
    keys_and_values = last.attn.qkv.weight[model.config.embed_dim :]
    for context, queries in zip((1, *group_sizes[:-1]), group_sizes, strict=True):
        c, n = branches * context, branches * queries
        yield from ((c + n, linear.weight) for block in others for linear in linears(block))
        yield c, keys_and_values
        yield from ((n, linear.weight) for linear in linears(last))
        yield n, model.head.weight


def run_products(products, batch, *, pack=False):
    """A function that computes these products alone; `pack`: on weights laid out as a CPU reads them."""
    most = batch * max(rows for rows, _ in products)
    inputs = {w.shape[1]: torch.randn(most, w.shape[1], dtype=w.dtype, device=w.device) for _, w in products}
    by_weight = {
        w: PackedLinear(SimpleNamespace(weight=w, bias=None)) if pack else partial(F.linear, weight=w)
        for _, w in products
    }

    @torch.inference_mode()
    def run():
        for rows, weight in products:
            by_weight[weight](inputs[weight.shape[1]][: batch * rows])

    return run


def floor_seconds(products, batch, rates):
    """The least seconds of products: each is bound by arithmetic, or by reading its weight."""
    return sum(
        max(2 * batch * rows * weight.numel() / rates["flops"], weight.nbytes / rates["bytes"])
        for rows, weight in products
    )


def load(args, device):
    """Model in the dtype asked for, tokenizer in float32, both on the device."""
    torch.manual_seed(0)
    config = dataclasses.replace(LPD_CONFIGS[args.model], grid_size=args.grid_size)
    model = load_lpd(args.pretrained_ckpt)[0] if args.pretrained_ckpt else LPD(config)
    tokenizer = load_tokenizer(args.vqgan_path) if args.vqgan_path else VQModel(VQConfig())
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return model.eval().to(device, dtype), tokenizer.eval().to(device)


def paths(args, model, tokenizer, decoder):
    """The functions to time, by name: each takes what `generate_tokens` takes behind the model."""
    fast = FastGenerator(model, decoder)
    made = {"fast tokens": fast.generate_tokens, "fast images": fast.generate_images}
    if args.against:
        made["plain tokens"] = partial(generate_tokens, model)
        made["plain images"] = partial(generate_images, model, tokenizer)
    return {name: made[name] for name in made if not (args.no_decoder and name.endswith("images"))}


def time_batch(args, made, settings, products, batch, device, rates):
    """A row of the table for each path, and one for the bare products."""
    labels, orders = torch.zeros(batch, dtype=torch.int64), settings.orders(range(batch))
    calls = {
        name: partial(function, labels, orders, settings.group_sizes, **settings.decoding())
        for name, function in made.items()
    }
    calls["products"] = run_products(products, batch)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        calls["packed products"] = run_products(products, batch, pack=True)
    seconds = measure.seconds_in_turns(calls, device, n=args.n, warm_up=2)
    floor = floor_seconds(products, batch, rates)
    return [
        {
            "batch": batch, "path": name, "seconds": median(times),
            "images_per_second": batch / median(times),
            "floor_seconds": floor, "share_of_floor": floor / median(times),
            "times_the_products": median(a / b for a, b in zip(times, seconds["products"], strict=True)),
        }
        for name, times in seconds.items()
    ]  # fmt: skip


@torch.inference_mode()
def psnr(tokenizer, decoder, tokens):
    """Decibels of the decoder's images against those of the plain decoder in float32; the peak is white."""
    a, b = (to_uint8(part.decode(tokens)).double() for part in (tokenizer, decoder))
    return (20 * torch.log10(255 / (a - b).square().mean().sqrt())).item()


def table(rows):
    """Lines of text, a row for each path and batch."""
    lines = [f"{'batch':>5}  {'path':14}{'s':>9}{'img/s':>9}{'of floor':>10}{'x products':>12}"]
    for row in rows:
        lines.append(
            f"{row['batch']:5d}  {row['path']:14}{row['seconds']:9.4f}{row['images_per_second']:9.2f}"
            f"{row['share_of_floor']:10.1%}{row['times_the_products']:12.3f}"
        )
    return "\n".join(lines)


def main(argv=None):
    args = parse_args(argv)
    for flag in ("profile", "output_file"):
        if getattr(args, flag):
            cli.writable_folder(f"--{flag}", Path(getattr(args, flag)).parent)
    with cli.checking():
        device = dist.init(args.device).device
        model, tokenizer = load(args, device)
        settings = resolve_settings(
            model.config.grid_size, generation_steps=args.generation_steps, cfg=args.cfg, top_k=args.top_k,
            top_p=args.top_p,
        )  # fmt: skip
    dtype = model.pos_embed.dtype
    decoder = FastDecoder(tokenizer, dtype, fused=args.fused_decoder)
    made = paths(args, model, tokenizer, decoder)
    products = list(needed_products(model, settings.group_sizes, 1 if args.cfg == 1 else 2))
    rates = {"flops": measure.matmul_rate(device, dtype), "bytes": measure.bandwidth(device)}
    rows = [
        row
        for batch in args.batch_sizes
        for row in time_batch(args, made, settings, products, batch, device, rates)
    ]
    example = (torch.zeros(1, dtype=torch.int64), settings.orders([0]), settings.group_sizes)
    report = measure.record(device, note=args.note, dtype=str(dtype), rates=rates, rows=rows)
    if not args.no_decoder:
        tokens = made["fast tokens"](*example, **settings.decoding())
        report["decoder_psnr_db"] = psnr(tokenizer, decoder, tokens)
    if args.profile:
        with torch.profiler.profile() as trace:
            next(reversed(made.values()))(*example, **settings.decoding())
            dist.synchronize(device)
        trace.export_chrome_trace(args.profile)
    print(table(rows))
    print(json.dumps({key: value for key, value in report.items() if key != "rows"}, indent=2))
    if args.output_file:
        write_json(args.output_file, report)


if __name__ == "__main__":
    cli.run(main)
