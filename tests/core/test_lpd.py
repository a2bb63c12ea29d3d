"""The transformer: cached decoding equals the masked pass, and all other paths give the same numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from core.teacher import decoded_logits

from engine.sampling import Sampling
from models.layers import MLP, attend, attend_in_products
from models.lpd import LPD, NO_LABEL, Execution, LPDConfig, resize_pos_embed
from models.masks import cached_training_mask
from orders.lpd_order import make_orders
from orders.schedule import cosine_group_sizes

GROUPS = (1, 3, 5, 7)
SCHEDULES = [(1,) * 16, GROUPS, (1, 15), cosine_group_sizes(16, 6)]


def orders_of(kind, n, group_sizes=GROUPS):
    return torch.from_numpy(make_orders(kind, n, group_sizes, 4, seed=1).astype(np.int64))


def examples(config, n):
    """Random tokens [n, L] and labels [n], the last label dropped."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (n, config.num_tokens), generator=generator)
    labels = torch.randint(config.num_classes, (n,), generator=generator)
    labels[-1] = NO_LABEL
    return tokens, labels


# decoding


@pytest.mark.parametrize("kind", ["raster", "random", "lpd"])
@pytest.mark.parametrize("group_sizes", SCHEDULES, ids=lambda sizes: f"{len(sizes)}steps")
def test_cached_decoding_equals_the_masked_pass(tiny_lpd, group_sizes, kind):
    """Teacher-forced. 1e-5: the same fp32 sums in another order; logits are of size 1."""
    order = orders_of(kind, 3, group_sizes)
    tokens, labels = examples(tiny_lpd.config, 3)
    with torch.no_grad():
        expected = tiny_lpd(tokens, labels, order, group_sizes)
    logits = decoded_logits(tiny_lpd, tokens, labels, order, group_sizes)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_guided_decoding_equals_two_masked_passes(tiny_lpd):
    """3e-5: as above, times the guidance scale."""
    order, (tokens, labels) = orders_of("lpd", 3), examples(tiny_lpd.config, 3)
    with torch.no_grad():
        cond = tiny_lpd(tokens, labels, order, GROUPS)
        uncond = tiny_lpd(tokens, torch.full((3,), NO_LABEL), order, GROUPS)
    expected = uncond + (1 + 2 * torch.arange(16) / 16)[:, None] * (cond - uncond)
    logits = decoded_logits(tiny_lpd, tokens, labels, order, GROUPS, Sampling(cfg=3.0))
    torch.testing.assert_close(logits, expected, rtol=0, atol=3e-5)


# layers


@pytest.mark.parametrize("attention, dtype, tolerance", [
    (attend, torch.float32, 1e-5), (attend_in_products, torch.float32, 1e-5), (attend, torch.bfloat16, 0.06),
])
def test_attention_on_a_cpu_equals_one_fused_call_with_gradients(attention, dtype, tolerance):
    """Values and gradients of size 1 to 4, summed in another order; in bfloat16 a few roundings of 2^-8."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 4, 32, 8, generator=generator, requires_grad=True) for _ in range(3)]
    fused_in = [x.detach().clone().requires_grad_() for x in inputs]
    mask = cached_training_mask(GROUPS, torch.device("cpu"), torch.float32)
    given = mask if attention is attend else mask.seen.to(dtype)
    out = attention(*(x.to(dtype) for x in inputs), given)
    fused = F.scaled_dot_product_attention(*fused_in, attn_mask=mask.seen)
    weights = torch.randn(fused.shape, generator=generator)
    for result in (out, fused):
        (result.float() * weights).sum().backward()
    torch.testing.assert_close(out.float(), fused, rtol=0, atol=tolerance)
    for a, b in zip(inputs, fused_in, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", [torch.bool, torch.float32])
def test_every_form_of_the_mask_hides_the_same_in_bfloat16_on_a_cpu(form):
    q, k, v = torch.randn(3, 2, 4, 32, 8, generator=torch.Generator().manual_seed(0))
    expected = attend(q, k, v, cached_training_mask(GROUPS, torch.device("cpu"), torch.float32))
    half = (x.bfloat16() for x in (q, k, v))
    found = attend(*half, cached_training_mask(GROUPS, torch.device("cpu"), form)).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.06)


def test_the_activation_is_the_exact_gelu():
    """x Phi(x). 1e-6: fp32; the tanh form is up to 5e-4 away, which the golden logits would not notice."""
    mlp = MLP(LPDConfig(embed_dim=64, mlp_ratio=1.0, dropout=0.0))
    for linear in (mlp.fc1, mlp.fc2):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    x = torch.linspace(-4, 4, 64)
    torch.testing.assert_close(mlp(x), x * torch.special.ndtr(x), rtol=0, atol=1e-6)


# the training pass


def loss_and_gradients(config, execution=None, bf16=False, hook=None):
    """The training loss of three images, dropout on, and its gradient for every parameter; `hook` is called
    whenever a block begins."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LPD(config, execution or Execution()).train()
        for block in model.blocks if hook else ():
            block.register_forward_pre_hook(hook)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.loss(*examples(config, 3), orders_of("random", 3), GROUPS)
        loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def test_the_loss_is_the_mean_cross_entropy_in_generation_order(tiny_lpd):
    """1e-6: fp32, the same mean."""
    tokens, labels = examples(tiny_lpd.config, 3)
    order = orders_of("random", 3)
    with torch.no_grad():
        nats = -tiny_lpd(tokens, labels, order, GROUPS).log_softmax(dim=-1)
        expected = nats.gather(2, tokens.gather(1, order)[..., None]).mean()
        loss = tiny_lpd.loss(tokens, labels, order, GROUPS)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows, bf16", [(1, False), (7, False), (48, False), (1000, False), (7, True)])
def test_a_chunked_loss_equals_the_plain_one_with_gradients(tiny_config, rows, bf16):
    """48 rows: one at a time, chunks with a remainder, all at once, and a chunk larger than the batch. 1e-5:
    the same fp32 sums in another order; in bfloat16 each moves a gradient of size 1 by up to 2^-9."""
    chunked = loss_and_gradients(tiny_config, Execution(loss_rows=rows), bf16)
    for a, b in zip(chunked, loss_and_gradients(tiny_config, bf16=bf16), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.01 if bf16 else 1e-5)


def test_the_logits_of_a_chunked_loss_never_exist_all_at_once(tiny_config):
    model, rows = LPD(tiny_config, Execution(loss_rows=20)), []
    model.head.register_forward_hook(lambda module, inputs, out: rows.append(out.shape[0]))
    model.loss(*examples(tiny_config, 3), orders_of("random", 3), GROUPS).backward()
    assert max(rows) == 20 and sum(rows) == 2 * 48  # each row in the forward pass and again in the backward


def test_gradient_checkpointing_changes_no_bit_of_the_gradients(tiny_config):
    """Dropout is on: recomputing runs the same operations with the same random numbers. That it recomputes at
    all shows in each block running twice."""
    runs, execution = [], Execution(grad_checkpointing=True)
    checkpointed = loss_and_gradients(tiny_config, execution, hook=lambda block, *_: runs.append(block))
    assert len(runs) == 2 * tiny_config.depth
    plain = loss_and_gradients(tiny_config)
    assert all(torch.equal(a, b) for a, b in zip(checkpointed, plain, strict=True))


# labels


def test_labels_are_dropped_in_training_only_and_at_the_given_rate(tiny_config):
    """10,000 labels, probability 0.3: mean 3000, standard deviation 46. Six of these are exceeded 1 in 5e8
    times, were the seed not fixed."""
    dropout = LPD(replace(tiny_config, label_drop_prob=0.3)).label_dropout
    labels = torch.arange(10_000) % 5
    assert torch.equal(dropout.eval()(labels), labels)
    torch.manual_seed(0)
    dropped = dropout.train()(labels)
    assert abs((dropped == NO_LABEL).sum().item() - 3000) < 6 * 46
    assert torch.equal(dropped[dropped != NO_LABEL], labels[dropped != NO_LABEL])


def test_an_image_without_a_label_gets_the_fake_latent(tiny_lpd):
    token = tiny_lpd.embed_labels(torch.tensor([NO_LABEL, 2]))
    expected = torch.cat([tiny_lpd.fake_latent, tiny_lpd.class_emb.weight[2:3]]) + tiny_lpd.pos_embed[0, 0]
    assert torch.equal(token[0], tiny_lpd.z_proj_ln(expected))


# position embeddings of another grid


def test_resizing_position_embeddings_keeps_the_class_token_and_the_axes():
    """Row and column numbers as embeddings: cell x of 16 lies at (x + 0.5) / 2 - 0.5 of 8. 0.05: cubic
    interpolation leaves a straight line by at most 3/64. Inner cells only, as edges are replicated."""
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), dim=-1)
    pos_embed = torch.cat([torch.full((1, 2), 7.0), grid.flatten(0, 1)])[None]
    class_token, resized = resize_pos_embed(pos_embed, 16)[0].split([1, 256])
    assert torch.equal(class_token, pos_embed[0, :1])
    places = (torch.arange(4.0, 12.0) + 0.5) / 2 - 0.5
    expected = torch.stack(torch.meshgrid(places, places, indexing="ij"), dim=-1)
    torch.testing.assert_close(resized.view(16, 16, 2)[4:12, 4:12], expected, rtol=0, atol=0.05)


# what is refused


def test_group_sizes_must_sum_to_the_number_of_tokens(tiny_lpd):
    order = torch.arange(16)[None]
    with pytest.raises(ValueError, match="sum to 15.* 16 tokens"):
        tiny_lpd(order, torch.tensor([0]), order, (1, 14))


@pytest.mark.parametrize(
    "wrong",
    [{"grid_size": 0}, {"vocab_size": 0}, {"embed_dim": 30}, {"dropout": 1.0}, {"label_drop_prob": -0.1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_impossible_sizes_are_refused_by_name(tiny_config, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(tiny_config, **wrong)
