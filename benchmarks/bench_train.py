"""Time whole training steps: draws, forward, loss, backward, clipping, AdamW; on any device, at any size.

    python benchmarks/bench_train.py --model lpd_l --img_size 256 --batch_size 64 --bf16 --variants fast plain
    python benchmarks/bench_train.py --model lpd_l --batch_size 2 --device cpu --variants plain one_call

Tokens and labels are random and lie on the device; each step draws a schedule, as in training. The floor of
a step is its model operations at the rate of a large matrix product, which is measured here too. `one_call`
is `plain` with one fused attention call over all rows, the usual way.
"""

from util import cli  # isort: skip
import dataclasses
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import mean, median
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import publish, record, seconds_in_turns
from engine.fast import compiled_lpd
from engine.train import LossForDDP, TrainConfig, new_state, train_step
from models import layers
from models.lpd import LPD, LPD_CONFIGS, Execution
from models.masks import training_mask
from orders.schedule import cosine_group_sizes, training_steps
from util import distributed
from util.device import is_cuda, matmul_rate


def parse_args(argv=None):
    parser = cli.Parser(description="Time training steps.")
    add = parser.add_argument
    add("--model", choices=sorted(LPD_CONFIGS), default="lpd_l")
    add("--img_size", type=cli.number(int, 16), default=256, help="16 pixels a token")
    add("--vocab_size", type=cli.number(int, 1), default=16384)
    add("--num_classes", type=cli.number(int, 1), default=1000)
    add("--dropout", type=cli.number(float, 0, 0.99), default=0.1)
    add("--batch_size", type=cli.number(int, 1), default=64)
    add("--bf16", action="store_true")
    add("--grad_checkpointing", action="store_true")
    add("--attention", choices=["bool", "additive", "flex"], help="form of the mask")
    add("--variants", nargs="+", choices=["fast", "plain", "one_call"], default=["fast"], help="in turns")
    add("--n", type=cli.number(int, 1), default=7, help="timed calls, of which the median")
    add("--device", default="auto")
    add("--output_file", metavar="FILE", type=Path, help="JSON")
    return parser.parse_args(argv)


def model_operations(config, group_sizes):
    """Operations of the forward pass of one image that cannot be left out, by kind: two per multiply-add, of
    rows that count (no padding, no context of the last group; in the last block only keys and values of
    context rows), and of pairs that the mask allows. A backward pass has twice as many."""
    D, L, depth = config.embed_dim, config.num_tokens, config.depth
    context = L + 1 - group_sizes[-1]
    mask = training_mask(group_sizes)
    context_pairs = mask[:context, :context].sum().item()
    query_pairs = mask[L:, :context].sum().item() + mask[L:, L:].sum().item()
    row_operations = 2 * D * D * (4 + 2 * config.mlp_ratio)
    return {
        "linears": row_operations * (context * (depth - 1) + L * depth) + 2 * D * D * 2 * context,
        "attention": 4 * D * (context_pairs * (depth - 1) + query_pairs * depth),
        "head": 2 * D * config.vocab_size * L,
    }


def train_config(args, processes):
    model = dataclasses.replace(
        LPD_CONFIGS[args.model], grid_size=args.img_size // 16, vocab_size=args.vocab_size,
        num_classes=args.num_classes, dropout=args.dropout,
    )
    L, batch = model.num_tokens, args.batch_size * processes
    schedules = tuple(cosine_group_sizes(L, steps) for steps in training_steps(L))
    return TrainConfig(model, batch, schedules, global_batch=batch, lr=1e-4, bf16=args.bf16)


def in_one_call(q, k, v, mask):
    """In place of `attend_by_kind`."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.seen.to(q.dtype))


def variant(args, config, world, name):
    """A function that takes the next steps of a training of its own, and how many."""
    chosen = {"grad_checkpointing": args.grad_checkpointing}
    if args.attention:
        additive = torch.bfloat16 if args.bf16 else torch.float32
        chosen["mask"] = {"bool": torch.bool, "additive": additive, "flex": "flex"}[args.attention]
    build = partial(LPD, execution=Execution(**chosen))
    if name == "fast":
        build = partial(compiled_lpd, device=world.device, bf16=args.bf16, **chosen)
    state = new_state(config, world.device, build)
    state.model.train()
    loss_of = state.model.loss
    if world.size > 1:
        loss_of = DistributedDataParallel(LossForDDP(state.model))
    tokens = torch.randint(config.model.vocab_size, (args.batch_size, config.model.num_tokens))
    labels = torch.randint(config.model.num_classes, (args.batch_size,))
    batch = tokens.to(world.device), labels.to(world.device)
    steps = 10 if is_cuda(world.device) else 1

    def call():
        changed = mock.patch.object(layers, "attend_by_kind", in_one_call)
        with changed if name == "one_call" else nullcontext():
            for _ in range(steps):
                train_step(state, loss_of, world, 1, iter([batch]))

    return call, steps


def measured(args, config, world):
    """The results of all variants, by name, beside the machine's rate and the floor."""
    calls, results = {}, {}
    for name in args.variants:
        calls[name], steps = variant(args, config, world, name)
        (first,) = seconds_in_turns({name: calls[name]}, world.device, n=1, warm_up=0)[name]
        results[name] = {"seconds_of_first_call": round(first, 2)}
    seconds = seconds_in_turns(calls, world.device, n=args.n, warm_up=2)
    rate = matmul_rate(world.device, torch.bfloat16 if args.bf16 else torch.float32)
    kinds = [model_operations(config.model, sizes) for sizes in config.group_sizes]
    operations = {kind: 3 * mean(k[kind] for k in kinds) for kind in kinds[0]}
    floor = args.batch_size * sum(operations.values()) / rate
    for name, times in seconds.items():
        step = median(times) / steps
        results[name] |= {
            "ms_per_step": round(1000 * step, 1),
            "ms_least_and_most": [round(1000 * f(times) / steps, 1) for f in (min, max)],
            "images_per_s": round(config.global_batch / step, 1),
            "share_of_floor": round(floor / step, 3),
        }
    return {
        "matrix_tflops": round(rate / 1e12, 3),
        "gflop_per_image_forward_and_backward": {k: round(v / 1e9, 2) for k, v in operations.items()},
        "floor_ms_per_step": round(1000 * floor, 1),
        "variants": results,
    }


def in_words(result):
    rates = "; ".join(
        f"{name}: {steps['images_per_s']} images/s, {steps['share_of_floor']:.0%} of a matrix product's rate"
        for name, steps in result["variants"].items()
    )
    return f"{rates}; {result['processes']} processes, {result['peak_device_memory_gb']} GB of GPU memory"


def main(argv=None):
    args = parse_args(argv)
    with cli.checking():
        world = distributed.init(args.device)
        config = train_config(args, world.size)
    result = record(world.device, processes=world.size, **measured(args, config, world))
    if world.is_main:
        publish(result, args.output_file, in_words(result))


if __name__ == "__main__":
    cli.run(main)
