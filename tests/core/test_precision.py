"""--bf16 in generation (bfloat16 linears, the rest float32) must be as near to float32 as the published way,
float32 weights under bfloat16 autocast."""

import copy
from pathlib import Path

import pytest
import torch
from core.teacher import decoded_logits

from engine.decoding import generate_tokens
from engine.fast import packed
from engine.generate import resolve_settings
from engine.sampling import Sampling
from models.lpd import LPD, LPDConfig

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

    def logits_of(model):
        return decoded_logits(model, tokens, labels, orders, settings.group_sizes, settings.sampling)

    reference = logits_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        published = logits_of(model)
    published_kl, published_same = compare(published, reference)
    half = copy.deepcopy(model).bf16_linears()
    kl, same = compare(logits_of(half), reference)
    assert 0 < kl <= 1.05 * published_kl
    assert same >= published_same - 0.005
    kl, same = compare(logits_of(packed(half)), reference)
    assert 0 < kl <= 1.05 * published_kl
    assert same >= published_same - 0.005


def test_only_the_linears_are_bfloat16():
    model = deep_model().bf16_linears()
    kinds = {name.split(".")[-2]: w.dtype for name, w in model.named_parameters() if "." in name}
    half = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    assert half == {"qkv", "proj", "fc1", "fc2", "head"}
    assert model.pos_embed.dtype == torch.float32
