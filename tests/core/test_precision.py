"""--bf16 in generation (bfloat16 linears, the rest float32) must be as near to float32 as the published way,
float32 weights under bfloat16 autocast."""

import copy
from pathlib import Path

import pytest
import torch

from engine.fast import packed
from engine.generate import Sampling, generate_tokens, resolve_settings
from models.lpd import LPD, NO_LABEL, LPDConfig

SHIPPED = Path(__file__).resolve().parents[2] / "assets/fashion_mnist/lpd.safetensors"
CFG, IMAGES = 4.8, 2


def shipped_model():
    return LPD.load(SHIPPED)[0]


def deep_model():
    """24 layers of random weights, where errors of the residual stream add up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"embed_dim": 96, "depth": 24, "num_heads": 3}
        return LPD(LPDConfig(grid_size=8, vocab_size=512, num_classes=10, **sizes)).eval()


@torch.inference_mode()
def guided_logits(model, tokens, labels, settings, orders):
    """Teacher-forced logits of all decoding steps, float32 [B, L, V], in generation order."""
    labels = torch.cat([labels, torch.full_like(labels, NO_LABEL)])
    kv_cache, queries = model.new_kv_cache(len(labels)), model.query_table()
    context = model.embed_labels(labels)
    parts, slot = [], 0
    for size in settings.group_sizes:
        positions = orders[:, slot : slot + size]
        cond, uncond = model.predict(context, queries[positions].repeat(2, 1, 1), kv_cache).float().chunk(2)
        parts.append(uncond + CFG * (cond - uncond))
        context = model.embed_tokens(tokens.gather(1, positions), positions).repeat(2, 1, 1)
        slot += size
    return torch.cat(parts, dim=1)


def compare(logits, reference):
    """(mean KL divergence from the reference, share of equal likeliest tokens)."""
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    same = logits.argmax(-1) == reference.argmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item(), same.float().mean().item()


@pytest.mark.parametrize("make_model", [shipped_model, deep_model])
def test_bf16_generation_is_as_near_to_float32_as_the_published_autocast(make_model):
    model, labels = make_model(), torch.arange(IMAGES) % 10
    settings = resolve_settings(8, generation_steps=8, sampling=Sampling(cfg=CFG))
    orders = settings.orders(range(IMAGES))
    tokens = generate_tokens(model, labels, orders, settings.group_sizes, settings.sampling)
    reference = guided_logits(model, tokens, labels, settings, orders)
    with torch.autocast("cpu", torch.bfloat16):
        published = guided_logits(model, tokens, labels, settings, orders)
    published_kl, published_same = compare(published, reference)
    half = copy.deepcopy(model).bf16_linears()
    kl, same = compare(guided_logits(half, tokens, labels, settings, orders), reference)
    assert 0 < kl <= 1.05 * published_kl
    assert same >= published_same - 0.005
    kl, same = compare(guided_logits(packed(half), tokens, labels, settings, orders), reference)
    assert 0 < kl <= 1.05 * published_kl
    assert same >= published_same - 0.005


def test_only_the_linears_are_bfloat16():
    model = deep_model().bf16_linears()
    kinds = {name.split(".")[-2]: w.dtype for name, w in model.named_parameters() if "." in name}
    half = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    assert half == {"qkv", "proj", "fc1", "fc2", "head"}
    assert model.pos_embed.dtype == torch.float32
