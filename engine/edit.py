"""Editing: the tokens that are kept are context, the others are generated.

Knows tokens, which of them are kept, and orders of the others. Does not know pixels, masks or files.
Source: Locality-aware Parallel Decoding, arXiv 2507.01957, where editing is shown without further training.
B images, L tokens of an image, k kept ones.
"""

import torch

from engine.generate import generate_tokens


def whole_order(keep, order):
    """The kept places, in raster order, then those of `order`: an order of all places.

    Args:
        keep: bool [B, L], equally many kept in each image. order: int [B, L - k], the others.
    Returns:
        int64 [B, L].
    Raises:
        ValueError: the numbers differ, or `order` does not list each place that is not kept once.
    """
    counts = keep.sum(dim=1)
    if (counts != counts[0]).any():
        raise ValueError(f"images keep from {counts.min()} to {counts.max()} tokens: give equal numbers")
    B, L = keep.shape
    if order.shape != (B, L - counts[0]):
        raise ValueError(f"order is {list(order.shape)}, needed is [{B}, {L - counts[0]}]")
    kept = keep.nonzero()[:, 1].view(B, -1)  # [B, k]
    whole = torch.cat([kept, order.to(kept)], dim=1)
    if (whole.sort(dim=1).values != torch.arange(L, device=whole.device)).any():
        raise ValueError("order does not list each place that is not kept once")
    return whole


def edit_tokens(model, tokens, keep, labels, order, group_sizes, **settings):
    """Generate the tokens of images that are not kept.

    The kept tokens enter the KV cache in one pass, as the group before the first, and count as slots passed:
    with nothing kept this is `generate_tokens`, token for token; with everything kept it is a copy.

    Args:
        model: LPD in eval mode.
        tokens: int64 [B, L], raster order; those not kept do not matter.
        keep: bool [B, L], the tokens that come back as they are; equally many in each image.
        labels: int64 [B], class of each edited image or NO_LABEL.
        order: int [B, L - k], the places to generate (`make_orders(..., known=keep)`).
        group_sizes: tuple of positive ints that sum to L - k; with everything kept ().
        settings: as of `generate_tokens`; its `on_group` counts the kept tokens as filled.
    Returns:
        int64 [B, L], raster order.
    """
    if tokens.shape != keep.shape or tokens.shape != (len(labels), model.config.num_tokens):
        raise ValueError(
            f"tokens are {list(tokens.shape)} and keep is {list(keep.shape)}, "
            f"needed is [{len(labels)}, {model.config.num_tokens}]"
        )
    whole = whole_order(keep, order)
    if keep.all():
        return tokens.clone()
    known = tokens.gather(1, whole.to(tokens.device)[:, : whole.shape[1] - order.shape[1]])  # [B, k]
    return generate_tokens(model, labels, whole, group_sizes, known=known, **settings)
