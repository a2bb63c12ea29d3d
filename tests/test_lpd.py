"""The transformer: cached decoding = masked pass, equal alternative paths, and the published figures."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.generate import generate_tokens
from models.layers import MLP, attend
from models.lpd import LPD, LPD_CONFIGS, NO_LABEL, LPDConfig, lpd_loss, resize_pos_embed
from models.masks import training_mask
from orders.lpd_order import make_orders
from orders.schedule import cosine_group_sizes

SCHEDULES = [(1,) * 16, (1, 3, 5, 7), (1, 15), cosine_group_sizes(16, 6)]


def orders_of(kind, n, group_sizes=(1, 3, 5, 7)):
    return torch.from_numpy(make_orders(kind, n, group_sizes, 4, seed=1).astype(np.int64))


def examples(config, n):
    """Random tokens [n, L] and labels [n], the last label a dropped one."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (n, config.num_tokens), generator=generator)
    labels = torch.randint(config.num_classes, (n,), generator=generator)
    labels[-1] = NO_LABEL
    return tokens, labels


# the alternative paths


@pytest.mark.parametrize("kind", ["raster", "random", "lpd"])
@pytest.mark.parametrize("group_sizes", SCHEDULES, ids=lambda sizes: f"{len(sizes)}steps")
def test_cached_decoding_equals_the_masked_pass(tiny_lpd, group_sizes, kind):
    """Teacher-forced. 1e-5: the same fp32 sums in another order; logits are of size 1."""
    order = orders_of(kind, 3, group_sizes)
    tokens, labels = examples(tiny_lpd.config, 3)
    with torch.no_grad():
        expected = tiny_lpd(tokens, labels, order, group_sizes)
        kv_cache, context, logits = tiny_lpd.new_kv_cache(3), tiny_lpd.embed_labels(labels), []
        for positions in order.split(group_sizes, dim=1):
            logits.append(tiny_lpd.predict(context, tiny_lpd.query_table()[positions], kv_cache))
            context = tiny_lpd.embed_tokens(tokens.gather(1, positions), positions)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-5)


def test_a_full_kv_cache_refuses_more_rows_with_both_numbers(tiny_lpd):
    kv_cache = tiny_lpd.new_kv_cache(1)
    kv_cache.keep(10)
    with pytest.raises(ValueError, match="17 rows, 18 are needed"):
        kv_cache.extend(0, torch.zeros(1, 8, 2, 4, 8))


@pytest.mark.parametrize("mask", [None, training_mask((1, 3, 5, 7))], ids=["unmasked", "masked"])
def test_plain_attention_equals_the_fused_one_with_gradients(mask):
    """1e-5: fp32, values and gradients of size 1. Where gradients are on, a CPU takes the plain one."""
    generator = torch.Generator().manual_seed(0)
    fused_in = [torch.randn(2, 4, 32, 8, generator=generator, requires_grad=True) for _ in range(3)]
    plain_in = [x.detach().clone().requires_grad_() for x in fused_in]
    fused, plain = F.scaled_dot_product_attention(*fused_in, attn_mask=mask), attend(*plain_in, mask)
    weights = torch.randn(fused.shape, generator=generator)
    for out in (fused, plain):
        (out * weights).sum().backward()
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-5)
    for a, b in zip(plain_in, fused_in, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(tiny_lpd):
    """Bit-identical, dropout on: recomputing runs the same operations with the same random numbers. That it
    recomputes at all is seen by each block running twice."""
    tokens, labels = examples(tiny_lpd.config, 3)
    order = orders_of("random", 3)
    tiny_lpd.train()
    gradients, runs = [], []
    tiny_lpd.blocks[0].register_forward_pre_hook(lambda *_: runs.append(tiny_lpd.grad_checkpointing))
    for checkpointing in (False, True):
        tiny_lpd.grad_checkpointing = checkpointing
        tiny_lpd.zero_grad()
        torch.manual_seed(7)
        lpd_loss(tiny_lpd(tokens, labels, order, (1, 3, 5, 7)), tokens, order).backward()
        gradients.append([parameter.grad.clone() for parameter in tiny_lpd.parameters()])
    assert runs == [False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_activation_is_the_exact_gelu():
    """x Phi(x). 1e-6: fp32; the tanh form is up to 5e-4 away, which the golden logits would let pass."""
    mlp = MLP(64, 64, dropout=0.0)
    for linear in (mlp.fc1, mlp.fc2):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    x = torch.linspace(-4, 4, 64)
    torch.testing.assert_close(mlp(x), x * torch.special.ndtr(x), rtol=0, atol=1e-6)


# labels


def test_labels_are_dropped_in_training_only_and_as_often_as_told(tiny_config):
    """10,000 labels, probability 0.3: mean 3000, standard deviation 46; 6 of these are missed 1 in 5e8 times,
    were the seed not fixed."""
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
    assert torch.equal(token[:, 0], tiny_lpd.z_proj_ln(expected))


# position embeddings of another grid


def test_resizing_position_embeddings_to_the_same_grid_changes_nothing(tiny_lpd):
    assert torch.equal(resize_pos_embed(tiny_lpd.pos_embed, 4), tiny_lpd.pos_embed)


def test_resizing_position_embeddings_keeps_the_class_token(tiny_lpd):
    resized = resize_pos_embed(tiny_lpd.pos_embed, 8)
    assert resized.shape == (1, 65, 32)
    assert torch.equal(resized[:, 0], tiny_lpd.pos_embed[:, 0])


def test_resizing_position_embeddings_keeps_rows_and_columns_apart():
    """Row and column numbers as embeddings: cell x of 16 lies at (x + 0.5) / 2 - 0.5 of 8. 0.05: cubic
    interpolation leaves a straight line by at most 3/64. Inner cells only, as edges are replicated."""
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), dim=-1)
    pos_embed = torch.cat([torch.zeros(1, 2), grid.flatten(0, 1)])[None]
    resized = resize_pos_embed(pos_embed, 16)[0, 1:].view(16, 16, 2)
    places = (torch.arange(4.0, 12.0) + 0.5) / 2 - 0.5
    expected = torch.stack(torch.meshgrid(places, places, indexing="ij"), dim=-1)
    torch.testing.assert_close(resized[4:12, 4:12], expected, rtol=0, atol=0.05)


# what is refused


def test_group_sizes_that_do_not_sum_to_the_tokens_are_refused_with_both_numbers(tiny_lpd):
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


# the published model


@pytest.mark.parametrize(
    "name, parameters", [("lpd_l", 337_157_120), ("lpd_xl", 751_947_520), ("lpd_xxl", 1_412_184_576)]
)
def test_published_sizes_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = LPD(LPD_CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["lpd_l", "lpd_xl", "lpd_xxl"])
def test_state_dicts_have_the_keys_and_shapes_of_the_released_weights(golden, name):
    schema = json.loads((golden / "checkpoint_schema.json").read_text())[f"{name}_256"]
    with torch.device("meta"):
        state = LPD(LPD_CONFIGS[name]).state_dict()
    own = {
        key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for key, tensor in state.items()
    }
    assert own == schema


@pytest.fixture(scope="module")
def published(golden):
    """The small published model, and what it was given and gave: a dict of tensors."""
    with np.load(golden / "lpd_public.npz") as arrays, np.load(golden / "lpd_public_weights.npz") as weights:
        meta = json.loads(str(arrays["meta"]))
        model = LPD(LPDConfig(
            grid_size=meta["img_size"] // meta["stride"], vocab_size=meta["vocab"],
            num_classes=meta["num_classes"], embed_dim=meta["embed_dim"], depth=meta["depth"],
            num_heads=meta["heads"],
        ))  # fmt: skip
        model.load_state_dict({key: torch.from_numpy(weights[key]) for key in weights})
        values = {key: torch.from_numpy(arrays[key]) for key in arrays if key != "meta"}
    values = {key: value if value.is_floating_point() else value.long() for key, value in values.items()}
    return model.eval(), {**values, "group_sizes": tuple(values["group_sizes"].tolist())}


def test_logits_are_those_of_the_published_code(published):
    """2e-4: how far the published code in fp32 agrees with itself elsewhere (README of the golden values)."""
    model, golden = published
    with torch.no_grad():
        logits = model(golden["tokens"], golden["labels"], golden["orders"], golden["group_sizes"])
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=2e-4)


def test_loss_is_that_of_the_published_code(published):
    """1e-5 of 4.66: a mean over 48 tokens of logits that agree to 2e-4 at worst, mostly far better."""
    model, golden = published
    with torch.no_grad():
        logits = model(golden["tokens"], golden["labels"], golden["orders"], golden["group_sizes"])
        loss = lpd_loss(logits, golden["tokens"], golden["orders"])
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-5)


@pytest.mark.parametrize("cfg, schedule", [(1.0, "linear"), (6.0, "linear"), (6.0, "constant")])
def test_every_greedy_token_is_that_of_the_published_code(published, cfg, schedule):
    model, golden = published
    tokens = generate_tokens(
        model, golden["labels"], golden["orders"], golden["group_sizes"],
        cfg=cfg, cfg_schedule=schedule, temperature=0,
    )  # fmt: skip
    assert torch.equal(tokens, golden[f"greedy_cfg{cfg:.0f}_{schedule}"])
