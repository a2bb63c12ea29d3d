"""What decides an image besides labels and weights, and images made with it. B images, L tokens of each."""

from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from engine.decoding import generate_tokens
from engine.sampling import Sampling
from models.lpd import LPD
from models.vqgan import VQModel
from models.weights import find, find_tokenizer, state_digest
from orders.lpd_order import ORDER_KINDS, make_orders
from orders.order_file import load_orders
from orders.policies import POLICIES
from orders.schedule import check_group_sizes, cosine_group_sizes
from util import cli
from util.cli import setting
from util.images import to_uint8

ORDERS = *ORDER_KINDS, *POLICIES


@torch.inference_mode()
def generate_images(model, tokenizer, labels, order, group_sizes, sampling=Sampling(), **options):
    """`generate_tokens` with the same arguments, then the tokenizer's decoder: uint8 [B, H, W, 3]."""
    tokens = generate_tokens(model, labels, order, group_sizes, sampling, **options)
    return to_uint8(tokenizer.decode(tokens))


# Settings, resolved before anything slow starts.


@dataclass(frozen=True)
class GenerationSettings:
    """All that decides an image besides the weights, its label and its id.

    `file_orders`, uint16 [n, L], replaces computed orders. `known`, bool [n, L], marks cells of images 0..n-1
    that are given, not generated, and not counted in the group sizes.
    """

    grid_size: int
    group_sizes: tuple[int, ...]
    order: str = "lpd"  # or another of ORDERS
    file_orders: np.ndarray | None = field(default=None, repr=False, compare=False)
    known: np.ndarray | None = field(default=None, repr=False, compare=False)
    proximity_threshold: float = 1.0
    repulsion_threshold: float = 1.0
    sampling: Sampling = Sampling()
    seed: int = 0

    def orders(self, image_ids):
        """Generation orders int64 [n, L - k], which (seed, image id) and the known cells alone decide, or the
        policy that decides while decoding."""
        ids = np.asarray(image_ids)
        if self.file_orders is not None:
            return torch.from_numpy(self.file_orders[ids].astype(np.int64))
        if self.order in POLICIES:
            return POLICIES[self.order](self.grid_size, self.repulsion_threshold)
        orders = make_orders(
            self.order, len(ids), self.group_sizes, self.grid_size, seed=self.seed, image_ids=ids,
            proximity_threshold=self.proximity_threshold, repulsion_threshold=self.repulsion_threshold,
            known=None if self.known is None else self.known[ids],
        )
        return torch.from_numpy(orders.astype(np.int64))

    def as_json(self):
        """A flat dict of plain values, without the orders and known cells."""
        names = ("grid_size", "order", "proximity_threshold", "repulsion_threshold", "seed")
        own = {name: getattr(self, name) for name in names}
        sizes = {"group_sizes": list(self.group_sizes), "steps": len(self.group_sizes)}
        return {**own, **asdict(self.sampling), **sizes}


def default_steps(num_tokens):
    """20 steps for 256 tokens and 48 for 1024, as published; elsewhere the power law through the two."""
    return min(num_tokens, max(2, round(20 * (num_tokens / 256) ** 0.6315)))


def default_repulsion(grid_size):
    """2 on 16x16 and 4 on 32x32, as published; elsewhere in proportion."""
    return max(1.0, grid_size / 8)


@dataclass(frozen=True)
class OrderChoice:
    """The schedule of group sizes and the order that a user asks for; None is the default for the grid."""

    generation_steps: int | None = setting(None, "default: 20 for 256 tokens", kind=int, least=1)
    group_sizes: tuple | None = setting(None, "tokens of each step", kind=tuple, action=cli.GroupSizes)
    order: str = setting("lpd", "if no file is given", choices=ORDERS)
    lpd_order_file: str | None = setting(
        None, "precomputed, .npy or .json, or hf://", kind=str, metavar="FILE"
    )
    proximity_threshold: float = setting(1.0, "least score of a near cell", least=0)
    repulsion_threshold: float | None = setting(
        None, "least spacing; default: 2 on 16x16", kind=float, least=0
    )


def resolve_settings(grid_size, *, sampling=Sampling(), seed=0, num_images=1, known=None, **chosen):
    """`GenerationSettings` of a grid; `chosen` are fields of `OrderChoice`.

    Raises ValueError for group sizes that do not fit the cells to generate, and for an order file that does
    not fit, has fewer than `num_images` orders, or comes together with `known` cells.
    """
    choice = OrderChoice(**chosen)
    path, sizes, steps = choice.lpd_order_file, choice.group_sizes, choice.generation_steps
    repulsion, num_tokens = choice.repulsion_threshold, grid_size**2
    if known is not None:
        if path:
            raise ValueError("--lpd_order_file: orders of whole images are not for editing")
        num_tokens -= int(known[0].sum())
    if sizes is None:
        sizes = cosine_group_sizes(num_tokens, steps or default_steps(num_tokens))
    elif steps not in (None, len(sizes)):
        raise ValueError(f"--group_sizes has {len(sizes)} steps, --generation_steps is {steps}")
    return GenerationSettings(
        grid_size=grid_size, group_sizes=check_group_sizes(sizes, num_tokens), order=choice.order,
        file_orders=load_orders(path, num_tokens, num_images) if path else None, known=known,
        proximity_threshold=choice.proximity_threshold,
        repulsion_threshold=default_repulsion(grid_size) if repulsion is None else repulsion,
        sampling=sampling, seed=seed,
    )


def load_pair(weights, tokenizer_weights=None, size=None):
    """A generator, its tokenizer (both in eval mode) and the info dict of its weights, from files, folders or
    hf:// names; the tokenizer by default from beside the weights (`find_tokenizer`).

    `size` is a key of LPD_CONFIGS, for weights that do not record their config. Raises ValueError for weights
    that cannot be read or do not belong together.
    """
    weights = find(weights)
    tokenizer, _ = VQModel.load(tokenizer_weights or find_tokenizer(weights))
    model, info = LPD.load(weights, size)
    expected, digest = info.get("tokenizer_digest"), state_digest(tokenizer)
    if expected and expected != digest:
        raise ValueError(f"--pretrained_ckpt was trained with tokenizer {expected}, --vqgan_path is {digest}")
    ours, theirs = model.config.vocab_size, tokenizer.config.vocab_size
    if ours != theirs:
        raise ValueError(f"--pretrained_ckpt has {ours} codes, --vqgan_path has {theirs}")
    return model, tokenizer, info
