"""Who sees whom, as boolean tensors (True = may look at).

Knows group sizes and row counts. Does not know tokens, orders or embeddings. Rows come in two kinds:
*context* rows (what is known) and *query* rows (what is to be predicted); see arXiv 2507.01957, section 3.
"""

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import create_block_mask


def row_groups(group_sizes):
    """The groups of the context rows and of the query rows, each int64 [L]; the class token's is -1."""
    groups = torch.repeat_interleave(torch.arange(len(group_sizes)), torch.tensor(group_sizes))
    return torch.cat([torch.tensor([-1]), groups[:-1]]), groups


def training_mask(group_sizes):
    """The attention mask of one training pass over all groups at once.

    Rows (and columns) are L context rows, the class token followed by the tokens at slots 0..L-2, then L
    query rows, slots 0..L-1. Context of group g sees the class token and context of groups <= g; a query of
    group g sees the class token, context of groups < g, and the queries of its own group. That is 2L rows for
    every schedule: context of the last group is present but no query looks at it.

    Args:
        group_sizes: tuple of positive ints that sum to L.
    Returns:
        bool tensor [2L, 2L].
    """
    context, groups = row_groups(group_sizes)
    length = len(groups)
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    mask[:length, :length] = context[:, None] >= context[None, :]
    mask[length:, :length] = groups[:, None] > context[None, :]
    mask[length:, length:] = groups[:, None] == groups[None, :]
    return mask


@lru_cache(maxsize=32)
def cached_training_mask(group_sizes, device, dtype=torch.bool):
    """`training_mask` on a device, prepared once per schedule (32 schedules are kept).

    Of a floating-point dtype it is what is added to the scores: 0 where a row may look, else -inf.
    """
    with torch.inference_mode(False):  # so that one built while sampling serves a training step too
        mask = training_mask(group_sizes).to(device)
        if dtype == torch.bool:
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, float("-inf"))


@lru_cache(maxsize=32)
def cached_block_mask(group_sizes, device):
    """`training_mask` as the BlockMask of FlexAttention, prepared once per schedule (32 are kept)."""
    context, groups = row_groups(group_sizes)
    with torch.inference_mode(False):
        levels = torch.cat([2 * context + 1, 2 * groups]).to(device)  # context is odd, queries are even
        return create_block_mask(_sees(levels), None, None, len(levels), len(levels), device=device)


def _sees(levels):
    """A mask_mod that reads the levels [2L] of the rows: context is seen by what is later or its like, a
    query by its own group. All of these share their code, so a compiled caller takes one as it takes another
    tensor, and is not compiled again."""
    length = len(levels) // 2

    def mask_mod(_batch, _head, row, column):
        own, other = levels[row], levels[column]
        return (other <= own) & ((column < length) | (other == own))

    return mask_mod
