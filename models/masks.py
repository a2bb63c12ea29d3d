"""Who sees whom. Rows are *context* (tokens already known), then *queries* (positions to predict); context
rows never see a query. See arXiv 2507.01957, section 3."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


class Mask(NamedTuple):
    """What the N rows of an attention call see of its M columns, the last of which are their own keys.

    The first `context` rows are context, the others queries. `seen` is bool [N, M] (True: may see), or what
    is added to the scores (0 or -inf), or a BlockMask; None if context rows see all but the queries, and
    queries see all.
    """

    context: int
    seen: torch.Tensor | BlockMask | None = None

    def of_queries(self):
        """The mask of the query rows alone."""
        return Mask(0, self.seen if self.seen is None else self.seen[self.context :])


def row_groups(group_sizes):
    """The groups of the context rows and of the query rows, each int64 [L]; the class token's is -1."""
    groups = torch.repeat_interleave(torch.arange(len(group_sizes)), torch.tensor(group_sizes))
    return torch.cat([torch.tensor([-1]), groups[:-1]]), groups


def training_mask(group_sizes):
    """What the rows of one training pass over all groups see: bool [2L, 2L].

    Rows and columns are L context rows (the class token, then the tokens at slots 0..L-2), then L query rows
    (slots 0..L-1). A context row sees the context of its own and earlier groups; a query row sees the context
    of earlier groups and the queries of its own group. The class token comes before all groups: every row
    sees it, and it sees only itself. The context of the last group is present, so that every schedule has 2L
    rows, but no query sees it.
    """
    context, groups = row_groups(group_sizes)
    L = len(groups)
    seen = torch.zeros(2 * L, 2 * L, dtype=torch.bool)
    seen[:L, :L] = context[:, None] >= context[None, :]
    seen[L:, :L] = groups[:, None] > context[None, :]
    seen[L:, L:] = groups[:, None] == groups[None, :]
    return seen


@lru_cache(maxsize=32)
def cached_training_mask(group_sizes, device, form=torch.bool):
    """The `Mask` of a training pass, made once per schedule: `training_mask` as bool, as what is added to
    scores of a floating-point dtype, or as the BlockMask of FlexAttention ("flex")."""
    # Not in inference mode, so that a mask made while sampling can serve a training step.
    with torch.inference_mode(False), torch.device("cpu"):
        if form == "flex":
            return Mask(sum(group_sizes), _block_mask(group_sizes, device))
        seen = training_mask(group_sizes).to(device)
        return Mask(sum(group_sizes), seen if form == torch.bool else _additive(seen, form))


def decoding_mask(context, queries, looking, total):
    """What the rows of a decoding step see: bool [N, total]; the columns before theirs are cached context.

    Rows are `context`, then `queries`, then rows that only look: each of these sees the context and itself,
    and no other row sees it.
    """
    seen = torch.ones(context + queries + looking, total, dtype=torch.bool)
    seen[:context, total - queries - looking :] = False
    seen[context:, total - looking :] = False
    seen[context + queries :, total - queries - looking :] = False
    seen[context + queries :, total - looking :].fill_diagonal_(True)
    return seen


@lru_cache(maxsize=8)  # of rows that look at 1,024 cells: 100 MB a schedule in float32
def cached_decoding_masks(steps, dtype, device):
    """The `Mask`s of all decoding steps, each given as the arguments of `decoding_mask`. A CUDA graph reads
    them by address: hold the tuple as long as the graph."""
    return tuple(_step_mask(*step, dtype, device) for step in steps)


def _step_mask(context, queries, looking, total, dtype, device):
    """As what is added to the scores; on a CPU none is needed if no row only looks. Its rows begin at
    multiples of 8 values, as attention kernels want them."""
    if not looking and device.type == "cpu":
        return Mask(context)
    seen = decoding_mask(context, queries, looking, total).to(device)
    padded = torch.zeros(len(seen), -(-total // 8) * 8, dtype=dtype, device=device)[:, :total]
    return Mask(context, padded.copy_(_additive(seen, dtype)))


def _additive(seen, dtype):
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _block_mask(group_sizes, device):
    context, groups = row_groups(group_sizes)
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
