"""Who sees whom, as boolean tensors (True = may look at).

Knows group sizes and row counts. Does not know tokens, orders or embeddings. Rows come in two kinds:
*context* rows (what is known) and *query* rows (what is to be predicted); see arXiv 2507.01957, section 3.
"""

from functools import lru_cache

import torch


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
    groups = torch.repeat_interleave(torch.arange(len(group_sizes)), torch.tensor(group_sizes))  # [L]
    context = torch.cat([torch.tensor([-1]), groups[:-1]])  # [L]; the class token comes before group 0
    length = len(groups)
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    mask[:length, :length] = context[:, None] >= context[None, :]
    mask[length:, :length] = groups[:, None] > context[None, :]
    mask[length:, length:] = groups[:, None] == groups[None, :]
    return mask


@lru_cache(maxsize=32)
def cached_training_mask(group_sizes, device):
    """`training_mask` on a device, prepared once per schedule (32 schedules are kept)."""
    with torch.inference_mode(False):  # so that one built while sampling serves a training step too
        return training_mask(group_sizes).to(device)
