"""Who sees whom: the masks as pictures, and what they keep the model from knowing."""

import pytest
import torch

from models.kv_cache import KVCache
from models.layers import Attention
from models.masks import training_mask

# Columns: the class token and the tokens at slots 0..4, then the queries of slots 0..5; rows alike.
GROUPS_1_2_3 = """
    1 0 0 0 0 0   0 0 0 0 0 0
    1 1 0 0 0 0   0 0 0 0 0 0
    1 1 1 1 0 0   0 0 0 0 0 0
    1 1 1 1 0 0   0 0 0 0 0 0
    1 1 1 1 1 1   0 0 0 0 0 0
    1 1 1 1 1 1   0 0 0 0 0 0

    1 0 0 0 0 0   1 0 0 0 0 0
    1 1 0 0 0 0   0 1 1 0 0 0
    1 1 0 0 0 0   0 1 1 0 0 0
    1 1 1 1 0 0   0 0 0 1 1 1
    1 1 1 1 0 0   0 0 0 1 1 1
    1 1 1 1 0 0   0 0 0 1 1 1
"""

# Two rows are kept in the cache; two new context rows, then three queries.
DECODING_2_2_3 = """
    1 1   1 1   0 0 0
    1 1   1 1   0 0 0

    1 1   1 1   1 1 1
    1 1   1 1   1 1 1
    1 1   1 1   1 1 1
"""


def picture(text):
    """A bool tensor from rows of 0 and 1."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    return torch.tensor([[value == "1" for value in row] for row in rows])


def test_training_mask_is_the_one_drawn_by_hand():
    assert torch.equal(training_mask((1, 2, 3)), picture(GROUPS_1_2_3))


@torch.no_grad()
def decoded(rows):
    """What a decoding step makes of two rows of context and three queries, after two rows kept."""
    torch.manual_seed(0)
    attention = Attention(8, 2, 0.0, layer=0)
    kv_cache = KVCache(1, 1, 2, 7, 4, dtype=torch.float32, device="cpu")
    attention.decode(rows[None, :2], kv_cache, 2, 0)
    kv_cache.keep(2)
    return attention.decode(rows[None, 2:], kv_cache, 2, 0)[0]


def test_decoding_looks_where_it_is_drawn_by_hand():
    """A row that is looked at changes the result, one that is not changes no bit of it."""
    rows = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    before = decoded(rows)
    looked = torch.stack([
        (decoded(rows + torch.eye(7)[:, [column]]) != before).any(dim=1) for column in range(7)
    ], dim=1)  # fmt: skip
    assert torch.equal(looked, picture(DECODING_2_2_3))


@pytest.mark.parametrize("group_sizes", [(1,) * 16, (1, 3, 5, 7), (1, 15)])
def test_training_masks_have_one_static_shape(group_sizes):
    assert training_mask(group_sizes).shape == (32, 32)


@pytest.mark.parametrize("grad", [True, False], ids=["plain", "fused"])
@pytest.mark.parametrize("group", [0, 1, 2, 3])
def test_a_token_changes_no_logits_of_its_own_group_or_earlier_ones(tiny_lpd, group, grad):
    """Bit-identical, not close: a hidden row has weight 0 in the softmax, whatever stands in it."""
    group_sizes = (1, 3, 5, 7)
    start, end = sum(group_sizes[:group]), sum(group_sizes[: group + 1])
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    tokens = torch.arange(32).view(2, 16)
    perturbed = tokens.scatter(1, order[:, start:end], (tokens.gather(1, order[:, start:end]) + 7) % 32)
    labels = torch.tensor([0, 3])
    with torch.set_grad_enabled(grad):
        before, after = (tiny_lpd(t, labels, order, group_sizes) for t in (tokens, perturbed))
    changed = (before != after).any(dim=-1)  # [B, L]
    assert not changed[:, :end].any()
    assert changed[:, end:].all()


def test_the_label_changes_the_logits_of_every_group(tiny_lpd):
    order = torch.arange(16)[None]
    with torch.no_grad():
        a, b = (tiny_lpd(order, torch.tensor([label]), order, (1, 3, 5, 7)) for label in (0, 1))
    assert (a != b).any(dim=-1).all()
