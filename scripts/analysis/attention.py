"""Where queries look: attention of a decoding model by distance on the grid, per layer and head.

    python scripts/analysis/attention.py --pretrained_ckpt FILE --cached_path DIR --output_dir OUT

The paper's figures 2 and 7, on held-out images in random orders: all distances are seen equally early.
"""

from util import cli  # isort: skip
import math

import numpy as np
import torch

from engine.generate import default_steps
from models.masks import training_mask
from orders.lpd_order import random_orders
from orders.schedule import cosine_group_sizes
from scripts.analysis import images
from util.device import choose_device
from util.files import atomic, write_json

BATCH = 10
CLASS, GROUP = -2, -1  # the bins of the class token and of the queries of the own group, after the distances


def parse_args(argv=None):
    parser = cli.Parser(description="Attention by distance on the grid")
    images.add_flags(parser)
    parser.add_argument("--output_dir", metavar="DIR")
    parser.add_argument("--generation_steps", type=cli.number(int, 1), help="default: 20 for 256 tokens")
    cli.add_seed_flag(parser)
    return parser.parse_args(argv)


def attention_weights(attention, x, mask):
    """The weights of an `Attention` of x [N, B, D], mask bool [N, N] -> [B, H, N, N]."""
    q, k, _ = attention.heads(attention.qkv(x))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)


class Recorder:
    """A forward hook of each `Attention` that notes what the queries of a batch look at.

    Bins are the rounded distances to tokens of the context, then CLASS and GROUP. After `start(order)` and a
    forward, `paid` has per layer the weight that a query gives to each bin in all, [B, H, bins]; `maps` per
    layer what the query of the centre gives to each position of the context, [B, L], mean over the heads.
    """

    def __init__(self, grid_size):
        self.centre = grid_size // 2 * (grid_size + 1)
        positions = torch.arange(grid_size**2)
        y, x = (a.float() for a in (positions // grid_size, positions % grid_size))
        distance = torch.hypot(y[:, None] - y, x[:, None] - x)
        self.distance = distance.round().long()  # [L, L] of positions

    def start(self, order, mask):
        """Begin a batch with these orders, int64 [B, L], under a mask, bool [2L, 2L]."""
        (B, L), self.mask = order.shape, mask
        self.order, self.paid, self.maps = order, [], []
        far = int(self.distance.max()) + 1
        bins = torch.full((B, L, 2 * L), far + 1, device=order.device)  # GROUP
        bins[..., 0] = far  # CLASS
        distance = self.distance.to(order.device)
        bins[..., 1:L] = distance[order[:, :, None], order[:, None, :-1]]
        self.bins, self.num_bins = bins, far + 2

    def by_bin(self, weights):
        """Weights [B, H, L, 2L] of the queries, summed by bin, per query: [B, H, bins]."""
        B, H, L, _ = weights.shape
        bins = self.bins[:, None].expand(weights.shape).flatten(2)
        return weights.new_zeros(B, H, self.num_bins).scatter_add_(2, bins, weights.flatten(2)) / L

    def __call__(self, attention, inputs, _output):
        L = self.order.shape[1]
        weights = attention_weights(attention, inputs[0], self.mask)[:, :, L:]  # [B, H, L, 2L]
        self.paid.append(self.by_bin(weights))
        slots = (self.order == self.centre).nonzero()[:, 1]
        own = weights.mean(dim=1)[torch.arange(len(slots)), slots, 1:L]  # [B, L - 1]
        self.maps.append(torch.zeros_like(own[:, :1]).repeat(1, L).scatter_(1, self.order[:, :-1], own))


@torch.inference_mode()
def measure(model, tokens, labels, group_sizes, seed):
    """Per image and bin: weight paid [n, layers, H, bins] and tokens seen [n, bins], both per query; and the
    mean map of the centre's query [layers, L]."""
    device, L = model.pos_embed.device, tokens.shape[1]
    recorder = Recorder(model.config.grid_size)
    hooks = [block.attn.register_forward_hook(recorder) for block in model.blocks]
    orders = torch.from_numpy(random_orders(len(tokens), model.config.grid_size, seed=seed).astype(np.int64))
    mask = training_mask(group_sizes).to(device)  # [2L, 2L]
    paid, seen, maps = [], [], []
    for batch in zip(*(x.split(BATCH) for x in (tokens, labels, orders)), strict=True):
        batch = [part.to(device) for part in batch]
        recorder.start(batch[2], mask)
        model(*batch, group_sizes)
        paid.append(torch.stack(recorder.paid, dim=1).cpu())
        seen.append(recorder.by_bin(mask[L:].float().expand(len(batch[2]), 1, -1, -1))[:, 0].cpu())
        maps.append(torch.stack(recorder.maps, dim=1).cpu())
    for hook in hooks:
        hook.remove()
    return torch.cat(paid).numpy(), torch.cat(seen).numpy(), torch.cat(maps).mean(dim=0).numpy()


def draw(path, paid, error, seen, maps):
    """One row per layer: weight per token by distance and in all by distance, a curve per head, and the map.

    paid, error [layers, H, bins], seen [bins], maps [layers, L]."""
    from matplotlib.figure import Figure

    layers, heads, bins = paid.shape
    figure = Figure(figsize=(11, 2.3 * layers), layout="constrained")
    panels = figure.subplots(layers, 3, squeeze=False, width_ratios=(3, 3, 1.6))
    distances = np.arange(1, bins - 2)
    for layer, (each, total, picture) in enumerate(panels):
        for head in range(heads):
            y, bar = paid[layer, head, 1:-2], error[layer, head, 1:-2]
            each.errorbar(distances, y / seen[1:-2], bar / seen[1:-2], linewidth=1)
            total.errorbar(distances, y, bar, linewidth=1)
        each.set(yscale="log", ylabel=f"layer {layer}\nweight per token")
        total.set(ylabel="weight in all", ylim=0)
        shares = paid[layer].mean(axis=0)
        total.set_title(f"class token {shares[CLASS]:.0%}, own group {shares[GROUP]:.0%}", fontsize=9)
        grid_size = math.isqrt(maps.shape[1])
        picture.imshow(maps[layer].reshape(grid_size, grid_size))
        picture.set(xticks=[], yticks=[])
    panels[-1, 0].set(xlabel="distance in cells")
    panels[-1, 1].set(xlabel="distance in cells")
    panels[0, 0].set_title("each context token, one curve a head", fontsize=9)
    panels[0, 2].set_title("from the centre", fontsize=9)
    with atomic(path) as partial:
        figure.savefig(partial, format="png", dpi=80)


def main(argv=None):
    args = parse_args(argv)
    with cli.checking():
        cli.required(args, "output_dir")
        folder = cli.writable_folder("--output_dir", args.output_dir)
        model, tokens, labels = images.load(args, choose_device(args.device))
        num_tokens = model.config.num_tokens
        group_sizes = cosine_group_sizes(num_tokens, args.generation_steps or default_steps(num_tokens))
    weights, seen, maps = measure(model, tokens, labels, group_sizes, args.seed)
    paid, error = weights.mean(axis=0), weights.std(axis=0, ddof=1) / math.sqrt(len(weights))
    seen = seen.mean(axis=0)
    write_json(folder / "attention.json", {
        "images": len(tokens), "steps": len(group_sizes),
        "bins": "distance 0, 1, ..., class token, own group",
        "tokens_seen": seen.tolist(), "weight": paid.tolist(), "weight_error": error.tolist(),
        "centre_map": maps.tolist(),
    })
    draw(folder / "attention.png", paid, error, seen, maps)
    mean = paid.mean(axis=(0, 1))
    print(f"class token {mean[CLASS]:.1%}, own group {mean[GROUP]:.1%} of the weight")
    for distance in range(1, len(mean) - 2):
        each = mean[distance] / seen[distance]
        print(f"distance {distance:2d}: {mean[distance]:6.1%} in all, {each:.4f} each token")


if __name__ == "__main__":
    cli.run(main)
