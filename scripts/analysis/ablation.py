"""What the queries of a group should see of one another: three small models, trained equally long.

    python scripts/analysis/ablation.py --cached_path DIR --output_dir OUT --train_steps 400

The paper's figure 9a inside one model: queries that see each other, that see the context only, and of which
each sees those before it. Initial weights, data and random draws are the same, only the mask differs.
Compared are bits of held-out images, paired.
"""

from util import cli  # isort: skip
import dataclasses
from functools import lru_cache, partial

import numpy as np
import torch
from tqdm import trange

from engine.data import CachedTokens, ImageStream
from engine.train import TrainConfig, new_state, train_step
from models.lpd import LPD, LPD_CONFIGS
from models.masks import Mask, training_mask
from orders.lpd_order import ORDER_KINDS, make_orders
from orders.schedule import cosine_group_sizes, training_steps
from scripts.analysis import images
from util.device import choose_device
from util.distributed import World
from util.files import write_json
from util.pictures import save_curves
from util.token_cache import open_token_cache, split_cache

VARIANTS = ("each other", "context only", "those before")


def parse_args(argv=None):
    parser = cli.Parser(description="What queries see of one another")
    add = parser.add_argument
    add("--cached_path", metavar="DIR", help="token cache, with or without val/")
    add("--output_dir", metavar="DIR")
    add("--model", choices=sorted(LPD_CONFIGS), default="lpd_micro")
    add("--train_steps", type=cli.number(int, 1), default=400)
    add("--batch_size", type=cli.number(int, 1), default=64)
    add("--lr", type=cli.number(float, 0), default=2e-3)
    add("--bf16", action="store_true")
    add("--num_images", type=cli.number(int, 2), default=500, help="held-out images, evenly spaced")
    add("--steps", type=cli.number(int, 1), nargs="+", default=[4, 8, 16])
    add("--order", choices=ORDER_KINDS, default="lpd", help="of the held-out images")
    cli.add_device_flags(parser)
    cli.add_seed_flag(parser)
    return parser.parse_args(argv)


@lru_cache(maxsize=64)
def mask_of(variant, group_sizes, device):
    """The training `Mask` in which the queries of a group see of one another what `variant` says."""
    seen = training_mask(group_sizes)
    L = len(seen) // 2
    among = seen[L:, L:]  # a view
    if variant == "context only":
        among.copy_(torch.eye(L, dtype=torch.bool))
    elif variant == "those before":
        among.tril_()
    return Mask(L, torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).to(device))


class Ablated(LPD):
    """An LPD with the mask of a variant."""

    def __init__(self, config, variant):
        super().__init__(config)
        self.variant = variant

    def training_mask(self, group_sizes, device):
        return mask_of(self.variant, group_sizes, device)


def train(args, config, variant, cache, device):
    """A model of that variant, trained; in eval mode."""
    state = new_state(config, device, build=partial(Ablated, variant=variant))
    world, stream = World(0, 1, device), ImageStream(len(cache), config.seed, config.global_batch)
    batches = CachedTokens(cache).batches(stream.micro_batches(range(args.train_steps), world))
    state.model.train()
    progress = trange(args.train_steps, desc=variant, mininterval=2)
    for state.step in progress:
        loss, _ = train_step(state, state.model.loss, world, 1, batches)
        if state.step % 20 == 19:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return state.model.eval()


def train_config(args, cache):
    meta = cache.meta
    model = dataclasses.replace(
        LPD_CONFIGS[args.model], grid_size=meta.grid_size, vocab_size=meta.vocab_size, dropout=0.0,
        num_classes=len(meta.class_names),
    )
    epochs = args.train_steps * args.batch_size / len(cache)
    return TrainConfig(
        model, len(cache), training_steps(model.num_tokens), epochs=epochs, global_batch=args.batch_size,
        lr=args.lr, lr_schedule="cosine", warmup_epochs=epochs / 20, bf16=args.bf16, seed=args.seed,
    )


def main(argv=None):
    args = parse_args(argv)
    with cli.checking():
        cli.required(args, "cached_path", "output_dir")
        folder, device = cli.writable_folder("--output_dir", args.output_dir), choose_device(args.device)
        cache, held_out = split_cache(open_token_cache(args.cached_path))
        indices = images.evenly_spaced(held_out, args.num_images, f"the held-out part of {args.cached_path}")
        config = train_config(args, cache)
        for steps in args.steps:
            cosine_group_sizes(config.model.num_tokens, steps)
    tokens = torch.from_numpy(held_out.tokens(indices, np.zeros_like(indices)))
    labels, rows, curves, reference = torch.from_numpy(held_out.labels[indices]), [], {}, {}
    for variant in VARIANTS:
        model = train(args, config, variant, cache, device)
        for steps in args.steps:
            group_sizes = cosine_group_sizes(tokens.shape[1], steps)
            orders = make_orders(args.order, len(tokens), group_sizes, model.config.grid_size, seed=args.seed)
            bits = images.token_bits(model, tokens, labels, orders, group_sizes)
            bits = bits.sum(axis=1, dtype=np.float64)  # [n]
            mean, error = images.mean_and_error(bits - reference.setdefault(steps, bits))
            rows.append({"queries see": variant, "steps": steps, "bits": bits.mean().item(),
                         "difference": mean, "difference_error": error})
            curves.setdefault(variant, []).append((steps, mean, error))
            print(f"{variant:>14} {steps:4d} steps: {bits.mean():7.1f} bits, {mean:+6.2f} ± {error:.2f}")
    write_json(folder / "ablation.json", {**vars(args), "rows": rows})
    label = f"bits an image more than queries\nthat see each other, {len(tokens)} images"
    save_curves(folder / "ablation.png", curves, xlabel="steps", ylabel=label)


if __name__ == "__main__":
    cli.run(main)
