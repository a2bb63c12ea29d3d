"""Parallel decoding (arXiv 2507.01957, section 3): labels, orders and group sizes in, tokens and images out.

B images, L tokens of an image, k known tokens, D width, V codes. With guidance a forward takes 2B rows: the
images with their labels, then the same images without. Without guidance, read 2B as B.
"""

from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from engine.sampling import Sampling, guidance_scales, guide, gumbel_noise, image_words, sample
from models.lpd import LPD, NO_LABEL
from models.vqgan import VQModel
from models.weights import state_digest
from orders.lpd_order import make_orders
from orders.order_file import load_orders
from orders.schedule import check_group_sizes, cosine_group_sizes
from util.images import to_uint8

# Decoding.


@torch.inference_mode()
def generate_tokens(
    model, labels, order, group_sizes, sampling=Sampling(), *,
    seed=0, image_ids=None, known=None, on_group=None,
):
    """Generate the tokens of images, one group per forward.

    Args:
        model: LPD in eval mode.
        labels: int64 [B], class of each image or NO_LABEL.
        order: int [B, L]; order[b, t] is the raster position generated at slot t.
        group_sizes: positive ints that sum to L - k.
        seed, image_ids: int, int64 [B] (default 0..B-1); an image's noise depends on these two alone.
        known: int64 [B, k], given tokens of the first k slots: context that is not generated (`edit_tokens`).
        on_group: called after each group with (tokens so far [B, L], slots filled); the tensor is reused.
    Returns:
        int64 [B, L], raster order.
    """
    inputs = decoding_inputs(model, labels, order, group_sizes, seed=seed, image_ids=image_ids, known=known)
    return decode_steps(model, inputs, group_sizes, sampling, known=known, on_group=on_group)


@torch.inference_mode()
def generate_images(model, tokenizer, labels, order, group_sizes, sampling=Sampling(), **options):
    """`generate_tokens` with the same arguments, then the tokenizer's decoder: uint8 [B, H, W, 3]."""
    tokens = generate_tokens(model, labels, order, group_sizes, sampling, **options)
    return to_uint8(tokenizer.decode(tokens))


def decoding_inputs(model, labels, order, group_sizes, *, seed=0, image_ids=None, known=None):
    """Check the arguments of `generate_tokens` (ValueError); return labels [B], order [B, L] and the hash of
    seed and image ids [B, 2], all int64 on the model's device."""
    B, L = len(labels), model.config.num_tokens
    if order.shape != (B, L):
        raise ValueError(f"order is {list(order.shape)}, needed is [{B}, {L}]")
    if image_ids is None:
        image_ids = torch.arange(B)
    if len(image_ids) != B:
        raise ValueError(f"{len(image_ids)} image_ids for {B} labels")
    if not group_sizes or min(group_sizes) < 1:
        raise ValueError(f"group sizes must be 1 or more, not {list(group_sizes)}")
    unknown = L if known is None else L - known.shape[1]
    if sum(group_sizes) != unknown:
        raise ValueError(f"group sizes sum to {sum(group_sizes)}, but {unknown} of {L} tokens are unknown")
    inputs = labels, order, image_words(seed, image_ids)
    return [x.to(model.pos_embed.device, torch.int64, non_blocking=True) for x in inputs]


def decode_steps(model, inputs, group_sizes, sampling, *, known=None, on_group=None):
    """All decoding steps, from the `decoding_inputs`; returns tokens int64 [B, L] in raster order.

    Shapes depend on the arguments alone and nothing waits for the device: a CUDA graph can record all of it.
    """
    labels, order, words = inputs  # [B], [B, L], [B, 2]
    guided = sampling.cfg != 1
    branches = 2 if guided else 1
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, NO_LABEL)])  # [2B]
        scales = guidance_scales(sampling, order.shape[1], order.device)  # [L]
    kv_cache = model.new_kv_cache(len(labels))
    query_table = model.query_table()  # [L, D]
    tokens = torch.zeros_like(order)  # [B, L]
    context = model.embed_labels(labels)  # [2B, 1, D]
    slot = 0
    if known is not None and known.shape[1]:
        # Context rows of one forward see one another, but the class token was trained to see only itself, so
        # it enters alone; the known tokens then enter as the group before the first.
        model.predict(context, context[:, :0], kv_cache)
        slot = known.shape[1]
        known, positions = known.to(order.device), order[:, :slot]  # [B, k]
        tokens.scatter_(1, positions, known)
        context = model.embed_tokens(known, positions).repeat(branches, 1, 1)  # [2B, k, D]
    for size in group_sizes:
        positions = order[:, slot : slot + size]  # [B, size]
        queries = query_table[positions].repeat(branches, 1, 1)  # [2B, size, D]
        logits = model.predict(context, queries, kv_cache).float()  # [2B, size, V]
        if guided:
            logits = guide(*logits.chunk(2), scales[slot : slot + size])  # [B, size, V]
        noise = None if sampling.temperature == 0 else gumbel_noise(words, positions, logits.shape[-1])
        ids = sample(logits, noise, sampling)  # [B, size]
        tokens.scatter_(1, positions, ids)
        context = model.embed_tokens(ids, positions).repeat(branches, 1, 1)  # [2B, size, D]
        slot += size
        if on_group is not None:
            on_group(tokens, slot)
    return tokens


# Editing: the tokens to keep are known, the others are generated.


def edit_tokens(model, tokens, keep, labels, order, group_sizes, sampling=Sampling(), **options):
    """`generate_tokens` where some tokens are kept: int64 [B, L], raster order. If all are, it is a copy.

    Args:
        tokens: int64 [B, L], raster order; those not kept do not matter.
        keep: bool [B, L], equally many in each image.
        order: int [B, L - k], the positions to generate (`GenerationSettings.orders` with `known=keep`).
        group_sizes: positive ints that sum to L - k.
    """
    needed = (len(labels), model.config.num_tokens)
    if tokens.shape != needed or keep.shape != needed:
        raise ValueError(
            f"tokens are {list(tokens.shape)} and keep is {list(keep.shape)}, needed is {list(needed)}"
        )
    whole = whole_order(keep, order)
    if keep.all():
        return tokens.clone()
    known = tokens.gather(1, whole[:, : -order.shape[1]].to(tokens.device))  # [B, k]
    return generate_tokens(model, labels, whole, group_sizes, sampling, known=known, **options)


def whole_order(keep, order):
    """An order of all positions, int64 [B, L]: keep [B, L] in raster order, then order [B, L - k]."""
    counts = keep.sum(dim=1)
    if (counts != counts[0]).any():
        raise ValueError(f"images keep from {counts.min()} to {counts.max()} tokens: give equal numbers")
    B, L = keep.shape
    if order.shape != (B, L - counts[0]):
        raise ValueError(f"order is {list(order.shape)}, needed is [{B}, {L - counts[0]}]")
    kept = keep.nonzero()[:, 1].view(B, -1)  # [B, k]
    whole = torch.cat([kept, order.to(kept)], dim=1)  # [B, L]
    if (whole.sort(dim=1).values != torch.arange(L, device=whole.device)).any():
        raise ValueError("order does not list each position that is not kept once")
    return whole


# Settings, resolved before anything slow starts.


@dataclass(frozen=True)
class GenerationSettings:
    """All that decides an image besides the weights, its label and its id.

    `file_orders`, uint16 [n, L], replaces computed orders. `known`, bool [n, L], marks cells of images 0..n-1
    that are given, not generated, and not counted in the group sizes.
    """

    grid_size: int
    group_sizes: tuple[int, ...]
    order: str = "lpd"  # or another of ORDER_KINDS
    file_orders: np.ndarray | None = field(default=None, repr=False, compare=False)
    known: np.ndarray | None = field(default=None, repr=False, compare=False)
    proximity_threshold: float = 1.0
    repulsion_threshold: float = 1.0
    sampling: Sampling = Sampling()
    seed: int = 0

    def orders(self, image_ids):
        """Generation orders int64 [n, L - k]; (seed, image id) and the known cells alone decide them."""
        ids = np.asarray(image_ids)
        if self.file_orders is not None:
            return torch.from_numpy(self.file_orders[ids].astype(np.int64))
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


def resolve_settings(
    grid_size, *, sampling=Sampling(), seed=0, num_images=1, known=None,
    generation_steps=None, group_sizes=None, order="lpd", lpd_order_file=None, proximity_threshold=1.0,
    repulsion_threshold=None,
):
    """`GenerationSettings` from what a user gave; None takes the default for the grid.

    Raises ValueError for group sizes that do not fit the cells to generate, and for an order file that does
    not fit, has fewer than `num_images` orders, or comes together with `known` cells.
    """
    num_tokens = grid_size**2
    if known is not None:
        if lpd_order_file:
            raise ValueError("--lpd_order_file: orders of whole images are not for editing")
        num_tokens -= int(known[0].sum())
    if group_sizes is None:
        group_sizes = cosine_group_sizes(num_tokens, generation_steps or default_steps(num_tokens))
    elif generation_steps not in (None, len(group_sizes)):
        raise ValueError(
            f"--group_sizes has {len(group_sizes)} steps, --generation_steps is {generation_steps}"
        )
    if repulsion_threshold is None:
        repulsion_threshold = default_repulsion(grid_size)
    return GenerationSettings(
        grid_size=grid_size, group_sizes=check_group_sizes(group_sizes, num_tokens), order=order,
        file_orders=load_orders(lpd_order_file, num_tokens, num_images) if lpd_order_file else None,
        known=known, proximity_threshold=proximity_threshold, repulsion_threshold=repulsion_threshold,
        sampling=sampling, seed=seed,
    )


def load_pair(weights, tokenizer_weights, size=None):
    """A generator, its tokenizer (both in eval mode) and the info dict of its weights, from files, folders or
    hf:// names.

    `size` is a key of LPD_CONFIGS, for weights that do not record their config. Raises ValueError for weights
    that cannot be read or do not belong together.
    """
    tokenizer, _ = VQModel.load(tokenizer_weights)
    model, info = LPD.load(weights, size)
    expected, digest = info.get("tokenizer_digest"), state_digest(tokenizer)
    if expected and expected != digest:
        raise ValueError(f"--pretrained_ckpt was trained with tokenizer {expected}, --vqgan_path is {digest}")
    ours, theirs = model.config.vocab_size, tokenizer.config.vocab_size
    if ours != theirs:
        raise ValueError(f"--pretrained_ckpt has {ours} codes, --vqgan_path has {theirs}")
    return model, tokenizer, info
