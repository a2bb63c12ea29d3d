"""Time whole training steps: draws, forward, loss, backward, clipping, AdamW; on any device, at any size.

    python benchmarks/bench_train.py --model lpd_l --img_size 256 --batch_size 64 --bf16 --against plain

Tokens and labels are random and lie on the device. A schedule is drawn each step, as in training. Model
operations are those that cannot be left out, two for each multiply-add, the backward pass counted as twice
the forward and nothing for recomputing: of the rows, not the padding nor the context of the last group; of
the last block, only keys and values of context rows; of attention, only pairs a mask lets see one another.
The floor of a step is these operations at the rate of a large matrix product, measured in the same run.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import mean, median

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(REPOSITORY)]

import torch  # noqa: E402

from benchmarks.measure import matmul_rate, record, seconds_in_turns  # noqa: E402
from engine.speed import compile_training  # noqa: E402
from engine.train import TrainConfig, new_state, train_step  # noqa: E402
from models.lpd import LPD_CONFIGS, run_block  # noqa: E402
from models.masks import cached_block_mask, cached_training_mask, training_mask  # noqa: E402
from orders.schedule import cosine_group_sizes, training_steps  # noqa: E402
from util import cli, dist  # noqa: E402
from util.files import write_json  # noqa: E402

PIECES = ("compile", "loss", "fused")


def flags(argv=None):
    parser = cli.Parser(description="Time training steps.")
    parser.add_argument("--model", choices=sorted(LPD_CONFIGS), default="lpd_l")
    parser.add_argument("--img_size", type=cli.number(int, 16), default=256, help="16 pixels a token")
    parser.add_argument("--vocab_size", type=cli.number(int, 1), default=16384)
    parser.add_argument("--num_classes", type=cli.number(int, 1), default=1000)
    parser.add_argument("--dropout", type=cli.number(float, 0, 0.99), default=0.1)
    parser.add_argument("--batch_size", type=cli.number(int, 1), default=64)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--grad_checkpointing", action="store_true")
    parser.add_argument("--pieces", nargs="*", choices=PIECES, default=PIECES, help="what is made fast")
    parser.add_argument(
        "--attention", choices=["auto", "bool", "additive", "flex"], default="auto", help="of the fast steps"
    )
    parser.add_argument("--against", choices=["plain"], help="time the plain steps too, in turns")
    parser.add_argument("--n", type=cli.number(int, 1), default=7, help="timed calls, of which the median")
    parser.add_argument("--warm_up", type=cli.number(int, 0), default=2, help="calls before")
    parser.add_argument("--steps_per_call", type=cli.number(int, 1), help="default: 1 on a CPU, else 10")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--profile", metavar="FILE", type=Path, help="write a trace of the fast steps")
    parser.add_argument("--output_file", metavar="FILE", type=Path, help="JSON")
    return parser.parse_args(argv)


def model_operations(config, group_sizes):
    """Operations of the forward pass of one image, by kind; see the top of this file."""
    D, L, depth = config.embed_dim, config.num_tokens, config.depth
    context = L + 1 - group_sizes[-1]
    mask = training_mask(group_sizes)
    context_pairs = mask[:context, :context].sum().item()
    query_pairs = mask[L:, :context].sum().item() + mask[L:, L:].sum().item()
    query_rows = L * depth
    row_operations = 2 * D * D * (4 + 2 * config.mlp_ratio)
    return {
        "linears": row_operations * (context * (depth - 1) + query_rows) + 2 * D * D * 2 * context,
        "attention": 4 * D * (context_pairs * (depth - 1) + query_pairs * depth),
        "head": 2 * D * config.vocab_size * L,
    }


def train_config(args):
    grid_size = args.img_size // 16
    model = LPD_CONFIGS[args.model].__class__(**{
        **LPD_CONFIGS[args.model].__dict__, "grid_size": grid_size, "vocab_size": args.vocab_size,
        "num_classes": args.num_classes, "dropout": args.dropout,
    })  # fmt: skip
    schedules = tuple(cosine_group_sizes(grid_size**2, steps) for steps in training_steps(grid_size**2))
    return TrainConfig(
        model=model, num_images=args.batch_size, schedules=schedules, global_batch=args.batch_size,
        lr=1e-4, bf16=args.bf16,
    )  # fmt: skip


def processor_seconds():
    """Of this process and of those it started and waited for: compilers."""
    return sum(os.times()[:4])


def variant(args, config, world, *, fast):
    """A function that takes the next steps of a training of its own, how many, and a list into which each
    call puts the seconds that the processor worked: these hardly depend on what else runs beside."""
    pieces = args.pieces if fast else ()
    state = new_state(config, world.device, fused="fused" in pieces)
    model = state.model.train()
    model.grad_checkpointing = args.grad_checkpointing
    if fast:
        compile_training(model, world.device, bf16=config.bf16)
        model.run_block = model.run_block if "compile" in pieces else run_block
        model.loss_rows = model.loss_rows if "loss" in pieces else None
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        model.mask_of = {
            "auto": model.mask_of, "bool": cached_training_mask, "flex": cached_block_mask,
            "additive": lambda sizes, device: cached_training_mask(sizes, device, dtype),
        }[args.attention]  # fmt: skip
    batch = args.batch_size
    tokens = torch.randint(config.model.vocab_size, (batch, config.model.num_tokens)).to(world.device)
    labels = torch.randint(config.model.num_classes, (batch,)).to(world.device)
    forever = iter(lambda: (tokens, labels), None)
    steps = args.steps_per_call or (1 if world.device.type == "cpu" else 10)

    processor = []

    def call():
        start = processor_seconds()
        for _ in range(steps):
            train_step(state, model, config, world, 1, forever)
        processor.append(processor_seconds() - start)

    return call, steps, processor


def started(args, config, world, *, fast):
    """A variant after its first call; the seconds of that, compiling included, and its peak memory alone."""
    gpu = world.device.type == "cuda"
    before = torch.cuda.memory_allocated(world.device) if gpu else 0
    call, steps, processor = variant(args, config, world, fast=fast)
    if gpu:
        torch.cuda.reset_peak_memory_stats(world.device)
    start = time.perf_counter()
    call()
    dist.synchronize(world.device)
    facts = {
        "seconds_of_first_call": round(time.perf_counter() - start, 2),
        "processor_seconds_of_first_call": round(processor[0], 2),
    }
    if gpu:
        facts["peak_gb_alone"] = round((dist.peak_memory(world.device) - before) / 2**30, 2)
    return call, steps, processor, facts


def measured(args, config, world):
    """The results of all variants, by name."""
    names = ["fast", *([args.against] if args.against else [])]
    calls, processor, results = {}, {}, {}
    for name in names:
        calls[name], steps, processor[name], results[name] = started(args, config, world, fast=name == "fast")
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    rates = [matmul_rate(world.device, dtype)]
    seconds = seconds_in_turns(calls, world.device, n=args.n, warm_up=args.warm_up)
    rates.append(matmul_rate(world.device, dtype))
    kinds = [model_operations(config.model, sizes) for sizes in config.schedules]
    operations = {kind: 3 * mean(k[kind] for k in kinds) for kind in kinds[0]}
    floor = args.batch_size * sum(operations.values()) / max(rates)
    for name, times in seconds.items():
        step = median(times) / steps
        results[name] |= {
            "ms_per_step": round(1000 * step, 1),
            "ms_least_and_most": [round(1000 * f(times) / steps, 1) for f in (min, max)],
            "processor_ms_per_step": round(1000 * median(processor[name][-args.n :]) / steps, 1),
            "images_per_s": round(args.batch_size / step, 1),
            "share_of_floor": round(floor / step, 3),
        }
    if args.against:
        results["fast"]["times_as_fast"] = round(
            results[args.against]["ms_per_step"] / results["fast"]["ms_per_step"], 2
        )
    if args.profile:
        profile(calls["fast"], args.profile)
    return {
        "matrix_tflops": [round(rate / 1e12, 3) for rate in rates],
        "gflop_per_image_forward_and_backward": {k: round(v / 1e9, 2) for k, v in operations.items()},
        "floor_ms_per_step": round(1000 * floor, 1),
        "variants": results,
    }


def profile(call, path):
    """Write a trace of one call, for chrome://tracing."""
    with torch.profiler.profile() as profiler:
        call()
    profiler.export_chrome_trace(str(path))


def main(argv=None):
    args = flags(argv)
    with cli.checking():
        world = dist.World(0, 1, dist.choose_device(args.device))
        config = train_config(args)
    settings = {k: v for k, v in vars(args).items() if k not in ("profile", "output_file")}
    try:
        result = record(world.device, settings=settings, **measured(args, config, world))
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise cli.Failure(f"--batch_size {args.batch_size}, --against {args.against}: {reason}") from None
    variants = result["variants"]
    print(json.dumps({k: v for k, v in result.items() if k != "variants"}, indent=1))
    keys = list(variants["fast"])
    print(f"{'':>34}" + "".join(f"{name:>18}" for name in variants))
    for key in keys:
        print(f"{key:>34}" + "".join(f"{str(values.get(key, '')):>18}" for values in variants.values()))
    if args.output_file:
        write_json(args.output_file, result)


if __name__ == "__main__":
    cli.run(main)
