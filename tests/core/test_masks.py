"""Which rows attend to which: the masks drawn by hand, and what they hide from the model."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from models.layers import Attention, attend
from models.lpd import LPDConfig
from models.masks import Mask, cached_decoding_masks, cached_training_mask, decoding_mask, training_mask
from orders.schedule import cosine_group_sizes

CPU = torch.device("cpu")
TINY = LPDConfig(embed_dim=8, num_heads=2, dropout=0.0)

# Columns: the class token and the tokens at slots 0..4, then the queries of slots 0..5. Rows are the same.
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

# Two cached rows; then two new context rows and three queries.
DECODING_2_2_3 = """
    1 1   1 1   0 0 0
    1 1   1 1   0 0 0

    1 1   1 1   1 1 1
    1 1   1 1   1 1 1
    1 1   1 1   1 1 1
"""

# Two cached rows, one new context row, a query, and three rows that only look.
LOOKING_2_1_1_3 = """
    1 1   1   0   0 0 0

    1 1   1   1   0 0 0

    1 1   1   0   1 0 0
    1 1   1   0   0 1 0
    1 1   1   0   0 0 1
"""


def picture(text):
    """A bool tensor from rows of 0 and 1."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    return torch.tensor([[value == "1" for value in row] for row in rows])


def test_training_mask_matches_the_picture():
    assert torch.equal(training_mask((1, 2, 3)), picture(GROUPS_1_2_3))


@torch.no_grad()
def decoding_step(rows, mask):
    """What a decoding step gives for the rows after the first two, which are cached."""
    torch.manual_seed(0)
    attention, kv = Attention(TINY), torch.empty(7, 1, 24)
    attention(rows[:2, None], Mask(2), kv[:2])
    return attention(rows[2:, None], mask, kv)[:, 0]


@pytest.mark.parametrize("text, mask", [
    (DECODING_2_2_3, Mask(2)),
    (DECODING_2_2_3, Mask(2, decoding_mask(2, 3, 0, 7))),
    (LOOKING_2_1_1_3, cached_decoding_masks(((1, 1, 3, 7),), torch.float32, CPU)[0]),
], ids=["two calls", "one mask", "looking"])
def test_decoding_attention_matches_the_picture(text, mask):
    """Changing a visible row changes the result; changing a hidden one changes no bit of it."""
    rows = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    before = decoding_step(rows, mask)
    columns = []
    for column in range(7):
        perturbed = rows + torch.eye(7)[:, [column]]
        columns.append((decoding_step(perturbed, mask) != before).any(dim=1))
    assert torch.equal(torch.stack(columns, dim=1), picture(text))


@torch.no_grad()
def test_attention_without_rows_that_need_a_result_gives_none():
    result = Attention(TINY)(torch.zeros(3, 1, 8), Mask(0), torch.empty(5, 1, 24), first=3)
    assert result.shape == (0, 1, 8)


def test_rows_of_a_decoding_mask_begin_at_multiples_of_eight_values():
    assert cached_decoding_masks(((1, 1, 3, 7),), torch.float32, CPU)[0].seen.stride() == (8, 1)


# what the masks hide from the model


@pytest.mark.parametrize("grad", [True, False], ids=["plain", "fused"])
@pytest.mark.parametrize("group", [0, 1, 2, 3])
def test_a_token_leaves_the_logits_of_its_own_and_earlier_groups_unchanged(tiny_lpd, group, grad):
    """Bit-identical, not close: a hidden row has weight 0 in the softmax, whatever it holds."""
    group_sizes = (1, 3, 5, 7)
    start, end = sum(group_sizes[:group]), sum(group_sizes[: group + 1])
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    tokens = torch.arange(32).view(2, 16)
    own = order[:, start:end]
    perturbed = tokens.scatter(1, own, (tokens.gather(1, own) + 7) % 32)
    labels = torch.tensor([0, 3])
    with torch.set_grad_enabled(grad):
        before = tiny_lpd(tokens, labels, order, group_sizes)
        after = tiny_lpd(perturbed, labels, order, group_sizes)
    changed = (before != after).any(dim=-1)  # [B, L]
    assert not changed[:, :end].any()
    assert changed[:, end:].all()


def test_the_label_changes_the_logits_of_every_group(tiny_lpd):
    order = torch.arange(16)[None]
    with torch.no_grad():
        a, b = (tiny_lpd(order, torch.tensor([label]), order, (1, 3, 5, 7)) for label in (0, 1))
    assert (a != b).any(dim=-1).all()


# the other forms of the mask


def test_the_additive_mask_is_zero_where_a_row_is_visible_and_minus_infinity_elsewhere():
    mask = cached_training_mask((1, 2, 3), CPU, torch.float32)
    assert mask.context == 6 and torch.equal(mask.seen.exp(), picture(GROUPS_1_2_3).float())


@pytest.mark.parametrize("group_sizes", [(1, 2, 3), (1, 15), (1,) * 16, cosine_group_sizes(64, 8)], ids=len)
def test_the_block_mask_equals_the_training_mask(group_sizes):
    rows = 2 * sum(group_sizes)
    mask_mod = cached_training_mask(group_sizes, CPU, "flex").seen.mask_mod
    assert torch.equal(create_mask(mask_mod, 1, 1, rows, rows, "cpu")[0, 0], training_mask(group_sizes))


def test_flex_attention_with_skipped_blocks_equals_masked_attention():
    """512 rows. 1e-5: the same fp32 sums in another order. Forward only: FlexAttention has no backward on a
    CPU."""
    group_sizes = (1, 40, 100, 115)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 512, 16, generator=generator) for _ in range(3))
    mask = cached_training_mask(group_sizes, CPU, "flex")
    assert mask.seen.sparsity() > 10
    with torch.no_grad():
        flex = torch.compile(attend, backend="eager")(q, k, v, mask)
        plain = attend(q, k, v, cached_training_mask(group_sizes, CPU, torch.float32))
        torch.testing.assert_close(flex, plain, rtol=0, atol=1e-5)
