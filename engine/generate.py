"""Parallel decoding: labels, orders and group sizes in, tokens and images out.

Pure functions of (model, labels, orders, group sizes, seed). Does not know files, pictures or printing.
B images, L tokens of an image, V codes.
"""

import torch

from engine.sampling import guidance_scales, guide, gumbel_noise, image_words, sample
from models.lpd import NO_LABEL
from util.images import to_uint8


def decoding_inputs(
    model, labels, order, group_sizes, *, cfg_schedule="linear", seed=0, image_ids=None, known=None
):
    """Labels, order and words for `decode_steps`, on the device, from arguments of `generate_tokens`.

    Raises:
        ValueError: arguments that do not fit the model or one another.
    """
    config = model.config
    if order.shape != (len(labels), config.num_tokens):
        raise ValueError(f"order is {list(order.shape)}, needed is [{len(labels)}, {config.num_tokens}]")
    if image_ids is not None and len(image_ids) != len(labels):
        raise ValueError(f"{len(image_ids)} image_ids for {len(labels)} labels")
    if not group_sizes or min(group_sizes) < 1:
        raise ValueError(f"group sizes must be 1 or more, not {list(group_sizes)}")
    needed = config.num_tokens - (0 if known is None else known.shape[1])
    if sum(group_sizes) != needed:
        raise ValueError(
            f"group sizes sum to {sum(group_sizes)}, the model has {config.num_tokens} tokens an image"
            + (f", {needed} of them unknown" if needed < config.num_tokens else "")
        )
    if cfg_schedule not in ("linear", "constant"):
        raise ValueError(f"cfg_schedule is {cfg_schedule!r}, not linear or constant")
    words = image_words(seed, torch.arange(len(labels)) if image_ids is None else image_ids)  # [B, 2]
    device = model.pos_embed.device
    return [x.to(device, torch.int64, non_blocking=True) for x in (labels, order, words)]


def decode_steps(
    model, labels, order, words, group_sizes, *, cfg=1.0, cfg_schedule="linear", temperature=1.0, top_k=0,
    top_p=1.0, on_group=None, known=None,
):  # fmt: skip
    """All steps of `generate_tokens`, of checked arguments; `words` [B, 2] are from `image_words`.

    Every shape follows from those of the arguments and nothing waits for the device, so that one GPU graph
    can hold it all.
    """
    B, L = order.shape
    guided = cfg != 1
    branches = 2 if guided else 1
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, NO_LABEL)])  # [2B]
        scales = guidance_scales(cfg, cfg_schedule, L, order.device)  # [L]
    kv_cache = model.new_kv_cache(branches * B)
    query_table = model.query_table()  # [L, D]
    context = model.embed_labels(labels)  # [2B, 1, D]
    tokens = torch.zeros_like(order)
    start = 0 if known is None else known.shape[1]
    if start:
        model.predict(context, context[:, :0], kv_cache)  # the class token by itself: it sees nothing known
        known, positions = known.to(order.device), order[:, :start]
        tokens.scatter_(1, positions, known)
        context = model.embed_tokens(known, positions).repeat(branches, 1, 1)  # [2B, k, D]
    for size in group_sizes:
        positions = order[:, start : start + size]  # [B, size]
        queries = query_table[positions].repeat(branches, 1, 1)  # [2B, size, D]
        logits = model.predict(context, queries, kv_cache).float()  # [2B, size, V]
        if guided:
            logits = guide(*logits.chunk(2), scales[start : start + size])  # [B, size, V]
        noise = None if temperature == 0 else gumbel_noise(words, positions, logits.shape[-1])
        ids = sample(logits, noise, temperature=temperature, top_k=top_k, top_p=top_p)  # [B, size]
        tokens.scatter_(1, positions, ids)
        context = model.embed_tokens(ids, positions).repeat(branches, 1, 1)  # [2B, size, D]
        start += size
        if on_group is not None:
            on_group(tokens, start)
    return tokens


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
    inputs = decoding_inputs(
        model, labels, order, group_sizes, cfg_schedule=cfg_schedule, seed=seed, image_ids=image_ids,
        known=known,
    )  # fmt: skip
    return decode_steps(
        model, *inputs, group_sizes, cfg=cfg, cfg_schedule=cfg_schedule, temperature=temperature, top_k=top_k,
        top_p=top_p, on_group=on_group, known=known,
    )  # fmt: skip


@torch.inference_mode()
def generate_images(model, tokenizer, labels, order, group_sizes, **settings):
    """`generate_tokens`, then the tokenizer's decoder.

    Returns:
        uint8 [B, H, W, 3].
    """
    return to_uint8(tokenizer.decode(generate_tokens(model, labels, order, group_sizes, **settings)))
