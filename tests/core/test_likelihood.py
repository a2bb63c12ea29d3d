"""Likelihood of tokens decoded in groups."""

import itertools
import math

import pytest
import torch

from engine.likelihood import token_nll
from models.lpd import LPD, LPDConfig

SCHEDULES = [(1,) * 16, (1, 3, 5, 7), (16,)]


def examples(config, n):
    """Random tokens and orders, [n, L] both, and labels [n]."""
    generator = torch.Generator().manual_seed(1)
    shape = (n, config.num_tokens)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    order = torch.rand(shape, generator=generator).argsort(dim=1)
    return tokens, torch.arange(n) % config.num_classes, order


@pytest.mark.parametrize("group_sizes", [(1, 1, 1, 1), (1, 3), (4,)])
def test_the_probabilities_of_all_images_sum_to_1(group_sizes):
    """3^4 images, one order. 1e-5: fp32. A token that saw itself or its group's answer would break this."""
    generator = torch.Generator().manual_seed(0)
    model = LPD(LPDConfig(grid_size=2, vocab_size=3, num_classes=2, embed_dim=32, depth=2, num_heads=4))
    for parameter in model.parameters():  # the initial model hardly looks at its context
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    tokens = torch.tensor(list(itertools.product(range(3), repeat=4)))  # [81, 4]
    labels, order = torch.ones(81, dtype=torch.int64), torch.tensor([[2, 0, 3, 1]]).expand(81, 4)
    nats = token_nll(model.eval(), tokens, labels, order, group_sizes)
    assert nats.std() > 0.1
    assert nats.sum(dim=1).neg().exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("group_sizes", SCHEDULES, ids=lambda sizes: f"{len(sizes)}groups")
def test_the_closed_form_of_a_model_without_context(tiny_lpd, group_sizes):
    """Blocks that add nothing, and a head that gives code 0 the odds exp(b): every token costs log(31 + e^b),
    less b if it is code 0. 1e-5: fp32."""
    for block in tiny_lpd.blocks:
        for linear in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(tiny_lpd.norm.weight)
    torch.nn.init.ones_(tiny_lpd.norm.bias)
    torch.nn.init.zeros_(tiny_lpd.head.weight)
    tiny_lpd.head.weight.data[0] = 1 / 16  # 32 of them: b = 2
    tokens, labels, order = examples(tiny_lpd.config, 5)
    tokens[0] = 0
    nats = token_nll(tiny_lpd, tokens, labels, order, group_sizes)
    expected = math.log(31 + math.exp(2)) - 2.0 * (tokens.gather(1, order) == 0)
    torch.testing.assert_close(nats, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("group_sizes", SCHEDULES, ids=lambda sizes: f"{len(sizes)}groups")
def test_its_mean_is_the_training_loss(tiny_lpd, group_sizes):
    """Within the tolerance of fp32."""
    tokens, labels, order = examples(tiny_lpd.config, 5)
    with torch.no_grad():
        loss = tiny_lpd.loss(tokens, labels, order, group_sizes)
    torch.testing.assert_close(token_nll(tiny_lpd, tokens, labels, order, group_sizes).mean(), loss)
