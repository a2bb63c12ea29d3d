"""Parallel decoding (arXiv 2507.01957, section 3): labels, orders and group sizes in, tokens out.

B images, L tokens of an image, k known tokens, D width, V codes, R rows of the batch: 2B with guidance (the
images with their labels, then the same images without), else B.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.sampling import Sampling, cell_noise, guidance_scales, guide, gumbel_noise, image_words, sample
from models.lpd import LPD, NO_LABEL
from models.masks import Mask, cached_decoding_masks


@torch.inference_mode()
def generate_tokens(
    model, labels, order, group_sizes, sampling=Sampling(), *,
    seed=0, image_ids=None, known=None, return_order=False, **options,
):
    """Generate the tokens of images, one group per forward.

    Args:
        model: LPD in eval mode.
        labels: int64 [B], class of each image or NO_LABEL.
        order: int [B, L]; order[b, t] is the raster position generated at slot t. Or a policy
            (orders/policies.py), which picks each group when its turn comes.
        group_sizes: positive ints that sum to L - k.
        seed, image_ids: int, int64 [B] (default 0..B-1); an image's noise depends on these two alone.
        known: int64 [B, k], given tokens of the first k slots: context that is not generated (`edit_tokens`).
        return_order: return (tokens, order) instead, the order int64 [B, L].
        options: `teacher` and `on_group` of `decode`.
    Returns:
        int64 [B, L], raster order.
    """
    policy = order if callable(order) else None
    inputs = decoding_inputs(model, labels, order, group_sizes, seed=seed, image_ids=image_ids, known=known)
    tokens, order = decode(model, inputs, group_sizes, sampling, policy=policy, known=known, **options)
    return (tokens, order) if return_order else tokens


def decoding_inputs(model, labels, order, group_sizes, *, seed=0, image_ids=None, known=None):
    """Check the arguments of `generate_tokens` (ValueError); return labels [B], order [B, L] (raster for a
    policy) and the hash of seed and image ids [B, 2], all int64 on the model's device."""
    B, L = len(labels), model.config.num_tokens
    if callable(order):
        if known is not None:
            raise ValueError("a policy does not say where known tokens lie: use edit_tokens")
        order = torch.arange(L).repeat(B, 1)
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


# The loop. Nothing in it waits for the device, and shapes depend on the arguments alone: a CUDA graph can
# record all of it. Its parts between the products of the model are functions that `--compile` compiles.


def guided_logits(x, head, scales):
    """x [n, R, D] -> float32 logits [B, n, V]; scales are n or one for all, or None without guidance."""
    logits = head(x).transpose(0, 1).float()  # [R, n, V]
    if scales is None:
        return logits
    return guide(*logits.chunk(2), scales)  # [B, n, V]


def draw(x, head, scales, inputs, slot, sampling):
    """x [n, R, D] -> ids int64 [B, n] of the slots from `slot` on: guidance, noise and the draw.

    Order and scales are sliced here, since a compiled function copies inputs that begin at odd addresses.
    """
    _labels, order, words = inputs  # [B], [B, L], [B, 2]
    end = slot + len(x)
    logits = guided_logits(x, head, scales if scales is None else scales[slot:end])  # [B, n, V]
    noise = None
    if sampling.temperature > 0:
        noise = gumbel_noise(words, order[:, slot:end], logits.shape[-1])  # [B, n, V]
    return sample(logits, noise, sampling)


class Parts(NamedTuple):
    """The functions of the loop, as they are or compiled."""

    next_rows: Callable = LPD.next_rows
    guided_logits: Callable = guided_logits
    draw: Callable = draw


class Progress(NamedTuple):
    """What a policy is handed when a group's turn comes: the m cells that are left, in no particular order.

    Attributes:
        cells: int64 [B, m], their raster positions.
        noise: float32 [B, m] in (0, 1), a random number of each that belongs to the image.
        logits: float32 [B, m, V] of each alone, given all groups but the last, if the policy `looks`; None
            before the first group.
        tokens: int64 [B, L] so far, raster order. filled: bool [B, L].
    """

    cells: torch.Tensor
    noise: torch.Tensor
    logits: torch.Tensor | None
    tokens: torch.Tensor
    filled: torch.Tensor


EAGER = Parts()


def decode(
    model, inputs, group_sizes, sampling, *,
    policy=None, known=None, teacher=None, on_group=None, parts=EAGER,
):
    """All decoding steps, from the `decoding_inputs`; returns the tokens in raster order and the order they
    were generated in, both int64 [B, L].

    Args:
        policy: decides the order from the slots of `known` on.
        teacher: int64 [B, L], tokens in raster order that are taken in place of drawn ones.
        on_group: called after each group with (tokens so far [B, L], slots filled, order [B, L]).
    """
    labels, order, words = inputs  # [B], [B, L], [B, 2]
    order = order.clone() if policy else order
    inputs, L = (labels, order, words), order.shape[1]
    labels, branches, scales = with_guidance(labels, sampling, L)  # [R], R / B, [L]
    kv_cache, table = model.new_kv_cache(len(labels)), model.query_table()  # [.., 1 + L, R, 3D], [L, D]
    ids = []  # of the slots so far, [B, c] each
    if known is not None and known.shape[1]:
        # Context rows of one forward see one another, but the class token was trained to see only itself, so
        # it enters alone; the known tokens then enter as the group before the first.
        model.features(model.first_rows(labels, table, order, 0), Mask(1), kv_cache[:, :1])
        ids = [known.to(order)]
    slot, left_logits = L - sum(group_sizes), None  # [B, L - slot, V], of the cells that are left
    steps = step_shapes(group_sizes, L, policy is not None and policy.looks)
    masks = cached_decoding_masks(steps, kv_cache.dtype, kv_cache.device)
    for (_, n, looking, total), mask in zip(steps, masks, strict=True):
        if policy:
            pick_group(policy, n, order, slot, words, left_logits, in_raster_order(ids, order))
        q = n + looking  # rows that predict, then rows that only look
        if ids:
            before = slot - ids[-1].shape[1]
            x = parts.next_rows(model, table, ids[-1], order, before, (q, branches))  # [N, R, D]
        else:
            x = model.first_rows(labels, table, order, q)  # [1 + q, R, D]
        h = model.features(x, mask, kv_cache[:, :total])  # [q, R, D]; the next context overwrites q rows
        if teacher is None:
            ids.append(parts.draw(h[:n], model.head, scales, inputs, slot, sampling))  # [B, n]
        else:
            ids.append(teacher.to(order).gather(1, order[:, slot : slot + n]))  # [B, n]
        slot += n
        if looking:  # under one guidance scale: these cells have no slots yet
            scale = scales if scales is None else scales[slot : slot + 1]
            left_logits = parts.guided_logits(h[n:], model.head, scale)  # [B, L - slot, V]
        if on_group is not None:
            on_group(in_raster_order(ids, order), slot, order)
    return in_raster_order(ids, order), order


def step_shapes(group_sizes, num_tokens, looks=False):
    """Of each step: context rows, queries, rows that only look at the cells left behind these, and all rows
    attended to. Tokens beyond the group sizes are known; the class token enters alone before them."""
    slot, shapes = num_tokens - sum(group_sizes), []
    context, start = (slot, 1) if slot else (1, 0)
    for n in group_sizes:
        looking = num_tokens - slot - n if looks else 0
        shapes.append((context, n, looking, start + context + n + looking))
        context, start, slot = n, start + context, slot + n
    return tuple(shapes)


def with_guidance(labels, sampling, num_tokens):
    """Labels [R], branches R / B and guidance scales [L], or None without guidance."""
    if sampling.cfg == 1:
        return labels, 1, None
    labels = torch.cat([labels, torch.full_like(labels, NO_LABEL)])  # [2B]
    return labels, 2, guidance_scales(sampling, num_tokens, labels.device)


def in_raster_order(ids, order):
    """The ids of the first slots, [B, c] each, at their places in the image: int64 [B, L], elsewhere 0."""
    ids = torch.cat([order[:, :0], *ids], dim=1)  # [B, slot]
    return torch.zeros_like(order).scatter_(1, order[:, : ids.shape[1]], ids)


def pick_group(policy, n, order, slot, words, logits, tokens):
    """Have a policy pick the n cells of the slots from `slot` on; the cells that are left lie behind them, in
    their former order."""
    cells = order[:, slot:].clone()  # [B, m]
    filled = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :slot], True)
    picked = policy(n, Progress(cells, cell_noise(words, cells), logits, tokens, filled))  # [B, n]
    left = torch.ones_like(cells, dtype=torch.bool).scatter_(1, picked, False)
    others = left.int().argsort(dim=1, descending=True, stable=True)[:, : cells.shape[1] - n]  # [B, m - n]
    order[:, slot:] = cells.gather(1, torch.cat([picked, others], dim=1))


# Editing: the tokens to keep are known, the others are generated.


@torch.inference_mode()
def edit_tokens(
    model, tokens, keep, labels, order, group_sizes, sampling=Sampling(), *,
    seed=0, image_ids=None, on_group=None,
):
    """`generate_tokens` where some tokens are kept: int64 [B, L], raster order. If all are, it is a copy.

    Args:
        tokens: int64 [B, L], raster order; those not kept do not matter.
        keep: bool [B, L], equally many in each image.
        order: int [B, L - k], the positions to generate (`GenerationSettings.orders` with `known=keep`), or a
            policy.
        group_sizes: positive ints that sum to L - k.
    """
    needed = (len(labels), model.config.num_tokens)
    if tokens.shape != needed or keep.shape != needed:
        raise ValueError(
            f"tokens are {list(tokens.shape)} and keep is {list(keep.shape)}, needed is {list(needed)}"
        )
    whole, policy = whole_order(keep, order), order if callable(order) else None
    if keep.all():
        return tokens.clone()
    known = tokens.gather(1, whole[:, : int(keep[0].sum())].to(tokens.device))  # [B, k]
    given = {"seed": seed, "image_ids": image_ids, "known": known}
    inputs = decoding_inputs(model, labels, whole, group_sizes, **given)
    return decode(model, inputs, group_sizes, sampling, policy=policy, known=known, on_group=on_group)[0]


def whole_order(keep, order):
    """An order of all positions, int64 [B, L]: keep [B, L] in raster order, then order [B, L - k]; of a
    policy, the others in raster order."""
    counts = keep.sum(dim=1)
    if (counts != counts[0]).any():
        raise ValueError(f"images keep from {counts.min()} to {counts.max()} tokens: give equal numbers")
    B, L = keep.shape
    if callable(order):
        order = (~keep).nonzero()[:, 1].view(B, -1)
    if order.shape != (B, L - counts[0]):
        raise ValueError(f"order is {list(order.shape)}, needed is [{B}, {L - counts[0]}]")
    kept = keep.nonzero()[:, 1].view(B, -1)  # [B, k]
    whole = torch.cat([kept, order.to(kept)], dim=1)  # [B, L]
    if (whole.sort(dim=1).values != torch.arange(L, device=whole.device)).any():
        raise ValueError("order does not list each position that is not kept once")
    return whole
