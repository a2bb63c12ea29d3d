"""Who sees whom in a training pass. Rows are *context* (tokens already known) and *queries* (positions to
predict); see arXiv 2507.01957, section 3."""

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import create_block_mask


def row_groups(group_sizes):
    """The groups of the context rows and of the query rows, each int64 [L]; the class token's is -1."""
    groups = torch.repeat_interleave(torch.arange(len(group_sizes)), torch.tensor(group_sizes))
    return torch.cat([torch.tensor([-1]), groups[:-1]]), groups


def training_mask(group_sizes):
    """The attention mask of one training pass over all groups: bool [2L, 2L], True where a row may look.

    Rows and columns are L context rows (the class token, then the tokens at slots 0..L-2), then L query rows
    (slots 0..L-1). A context row sees the context of its own and earlier groups; a query row sees the context
    of earlier groups and the queries of its own group. The class token comes before all groups: every row
    sees it, and it sees only itself. The context of the last group is present, so that every schedule has 2L
    rows, but no query sees it.
    """
    context, groups = row_groups(group_sizes)
    L = len(groups)
    mask = torch.zeros(2 * L, 2 * L, dtype=torch.bool)
    mask[:L, :L] = context[:, None] >= context[None, :]
    mask[L:, :L] = groups[:, None] > context[None, :]
    mask[L:, L:] = groups[:, None] == groups[None, :]
    return mask


@lru_cache(maxsize=32)
def cached_training_mask(group_sizes, device, dtype=torch.bool):
    """`training_mask` on a device, built once per schedule. With a floating-point dtype it is what is added
    to the scores: 0 where a row may look, else -inf."""
    with torch.inference_mode(False):  # so that a mask built while sampling can serve a training step
        mask = training_mask(group_sizes).to(device)
        if dtype == torch.bool:
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, float("-inf"))


@lru_cache(maxsize=32)
def cached_block_mask(group_sizes, device):
    """`training_mask` as the BlockMask of FlexAttention, built once per schedule."""
    context, groups = row_groups(group_sizes)
    with torch.inference_mode(False):
        levels = torch.cat([2 * context + 1, 2 * groups]).to(device)  # context is odd, queries are even
        return create_block_mask(_mask_mod(levels), None, None, len(levels), len(levels), device=device)


def _mask_mod(levels):
    """The rule of `training_mask` on levels [2L]: a row sees lower levels of context and its own level.

    It reads a tensor, so that all schedules share one compiled kernel.
    """
    L = len(levels) // 2

    def mask_mod(_batch, _head, row, column):
        own, other = levels[row], levels[column]
        return (other <= own) & ((column < L) | (other == own))

    return mask_mod
