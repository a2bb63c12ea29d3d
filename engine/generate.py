"""Parallel decoding: labels, orders and group sizes in, tokens and images out.

Pure functions of (model, labels, orders, group sizes, seed). Does not know files, pictures or printing.
B images, L tokens of an image, V codes.
"""

import torch

from engine.sampling import guidance_scales, guide, gumbel_noise, sample
from models.lpd import NO_LABEL
from util.images import to_uint8


def _check(model, labels, order, group_sizes, cfg_schedule, image_ids, known):
    config = model.config
    if order.shape != (len(labels), config.num_tokens):
        raise ValueError(f"order is {list(order.shape)}, needed is [{len(labels)}, {config.num_tokens}]")
    if image_ids is not None and len(image_ids) != len(labels):
        raise ValueError(f"{len(image_ids)} image_ids for {len(labels)} labels")
    if not group_sizes or min(group_sizes) < 1:
        raise ValueError(f"group sizes must be 1 or more, not {list(group_sizes)}")
    needed = config.num_tokens - known
    if sum(group_sizes) != needed:
        raise ValueError(
            f"group sizes sum to {sum(group_sizes)}, the model has {config.num_tokens} tokens an image"
            + (f", {needed} of them unknown" if known else "")
        )
    if cfg_schedule not in ("linear", "constant"):
        raise ValueError(f"cfg_schedule is {cfg_schedule!r}, not linear or constant")


@torch.inference_mode()
def generate_tokens(
    model, labels, order, group_sizes, *, cfg=1.0, cfg_schedule="linear", temperature=1.0, top_k=0, top_p=1.0,
    seed=0, image_ids=None, on_group=None, known=None,
):  # fmt: skip
    """Generate the tokens of images, one group per forward (arXiv 2507.01957, section 3).

    Each step feeds the context tokens of the group before (at first the class token) and the position query
    tokens of this group. Known tokens are a group that need not be generated: the one before the first.

    Args:
        model: LPD in eval mode.
        labels: int64 [B], class of each image or NO_LABEL.
        order: int [B, L]; order[b, t] is the raster position generated at slot t.
        group_sizes: tuple of positive ints that sum to L, less the known tokens.
        cfg: guidance scale; at 1 the unconditional branch is not computed.
        temperature: 0 takes the likeliest token. top_k: 0 keeps all. top_p: 1 keeps all.
        seed, image_ids: int, int64 [B] (default 0..B-1): the noise of an image depends on the two alone.
        on_group: called after each group with (tokens so far [B, L], to be cloned if kept; slots filled).
        known: int64 [B, k], tokens of the first k slots (see engine/edit.py).
    Returns:
        int64 [B, L], raster order.
    """
    start = 0 if known is None else known.shape[1]
    _check(model, labels, order, group_sizes, cfg_schedule, image_ids, start)
    device = model.pos_embed.device
    labels, order = labels.to(device), order.to(device, torch.int64)
    B, L = order.shape
    image_ids = torch.arange(B, device=device) if image_ids is None else image_ids.to(device)
    guided = cfg != 1
    branches = 2 if guided else 1
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, NO_LABEL)])  # [2B]
    kv_cache = model.new_kv_cache(branches * B)
    context = model.embed_labels(labels)  # [2B, 1, D]
    tokens = torch.zeros(B, L, dtype=torch.int64, device=device)
    if start:
        none = order[:, :0].repeat(branches, 1)
        model.predict(context, none, kv_cache)  # the class token by itself: it does not see the known
        known, positions = known.to(device), order[:, :start]
        tokens.scatter_(1, positions, known)
        context = model.embed_tokens(known, positions).repeat(branches, 1, 1)  # [2B, k, D]
    for size in group_sizes:
        positions = order[:, start : start + size]  # [B, size]
        logits = model.predict(context, positions.repeat(branches, 1), kv_cache).float()  # [2B, size, V]
        if guided:
            scales = guidance_scales(cfg, cfg_schedule, start, size, L)
            logits = guide(*logits.chunk(2), torch.tensor(scales, device=device))  # [B, size, V]
        noise = None if temperature == 0 else gumbel_noise(seed, image_ids, positions, logits.shape[-1])
        ids = sample(logits, noise, temperature=temperature, top_k=top_k, top_p=top_p)  # [B, size]
        tokens.scatter_(1, positions, ids)
        context = model.embed_tokens(ids, positions).repeat(branches, 1, 1)  # [2B, size, D]
        start += size
        if on_group is not None:
            on_group(tokens, start)
    return tokens


@torch.inference_mode()
def generate_images(model, tokenizer, labels, order, group_sizes, **settings):
    """`generate_tokens`, then the tokenizer's decoder.

    Returns:
        uint8 [B, H, W, 3].
    """
    return to_uint8(tokenizer.decode(generate_tokens(model, labels, order, group_sizes, **settings)))
