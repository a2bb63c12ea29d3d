"""Agreement with the published code: state-dict schema, logits, loss, greedy tokens and the VQ-16 tokenizer.

tests/golden/README.md says how the values were made.
"""

import json
import zlib

import numpy as np
import pytest
import torch

from engine.decoding import generate_tokens
from engine.sampling import Sampling
from models.lpd import LPD, LPD_CONFIGS, LPDConfig
from models.vqgan import VQConfig, VQModel

PARAMETERS = {"lpd_l": 337_157_120, "lpd_xl": 751_947_520, "lpd_xxl": 1_412_184_576}


def on_meta(kind, config):
    """A model of full size that takes no memory."""
    with torch.device("meta"):
        return kind(config)


def arrays_of(path):
    """The arrays of an .npz as tensors, integers as int64."""
    with np.load(path) as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays if key != "meta"}
    return {key: value if value.is_floating_point() else value.long() for key, value in tensors.items()}


# released weights


def assert_schema(model, golden, name):
    schema = json.loads((golden / "checkpoint_schema.json").read_text())[name]
    state = model.state_dict().items()
    assert {key: [list(x.shape), str(x.dtype).removeprefix("torch.")] for key, x in state} == schema


@pytest.mark.parametrize("name", PARAMETERS)
def test_state_dict_has_the_keys_and_shapes_of_the_released_weights(golden, name):
    model = on_meta(LPD, LPD_CONFIGS[name])
    assert_schema(model, golden, f"{name}_256")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_vq_state_dict_has_the_keys_and_shapes_of_the_released_weights(golden):
    assert_schema(on_meta(VQModel, VQConfig()), golden, "vq_ds16_c2i")


# the transformer


@pytest.fixture(scope="module")
def lpd(golden):
    """A small LPD with weights from the published code."""
    with np.load(golden / "lpd_public.npz") as arrays:
        meta = json.loads(str(arrays["meta"]))
    model = LPD(LPDConfig(
        grid_size=meta["img_size"] // meta["stride"], vocab_size=meta["vocab"],
        num_classes=meta["num_classes"], embed_dim=meta["embed_dim"], depth=meta["depth"],
        num_heads=meta["heads"],
    ))
    model.load_state_dict(arrays_of(golden / "lpd_public_weights.npz"))
    return model.eval()


@pytest.fixture(scope="module")
def published(golden):
    """What the published code was given and what it returned."""
    values = arrays_of(golden / "lpd_public.npz")
    return {**values, "group_sizes": tuple(values["group_sizes"].tolist())}


def inputs(published):
    return [published[key] for key in ("tokens", "labels", "orders", "group_sizes")]


def test_logits_are_those_of_the_published_code(lpd, published):
    """2e-4: how closely the published code agrees with itself across machines in fp32."""
    with torch.no_grad():
        logits = lpd(*inputs(published))
    torch.testing.assert_close(logits, published["logits"], rtol=0, atol=2e-4)


def test_the_loss_is_that_of_the_published_code(lpd, published):
    """1e-5 of 4.66: a mean over 48 tokens of logits that agree to 2e-4 at worst, mostly far better."""
    with torch.no_grad():
        loss = lpd.loss(*inputs(published))
    assert loss.item() == pytest.approx(published["loss"].item(), abs=1e-5)


@pytest.mark.parametrize("cfg, schedule", [(1.0, "linear"), (6.0, "linear"), (6.0, "constant")])
def test_every_greedy_token_is_that_of_the_published_code(lpd, published, cfg, schedule):
    sampling = Sampling(cfg=cfg, cfg_schedule=schedule, temperature=0.0)
    _, labels, orders, group_sizes = inputs(published)
    tokens = generate_tokens(lpd, labels, orders, group_sizes, sampling)
    assert torch.equal(tokens, published[f"greedy_cfg{cfg:.0f}_{schedule}"])


# the tokenizer


@pytest.fixture(scope="module")
def vq16():
    """VQ-16 filled by the rule in the README of the golden values."""
    model, state = on_meta(VQModel, VQConfig()), {}
    for name, tensor in model.state_dict().items():
        random = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
        values = random.standard_normal(tuple(tensor.shape)).astype(np.float32)
        if values.ndim > 1:
            values = 0.03 * values
        elif name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values = 0.02 * values
        state[name] = torch.from_numpy(values.astype(np.float32))
    model.load_state_dict(state, assign=True)
    return model.eval()


def test_vq_tokens_are_those_of_the_published_code(golden, vq16):
    published = arrays_of(golden / "vq_public.npz")
    assert torch.equal(vq16.encode(published["image"]), published["indices"])


def test_vq_reconstruction_is_that_of_the_published_code(golden, vq16):
    """Relative 1e-4: some forty fp32 layers whose sums run in another order on another machine."""
    published = arrays_of(golden / "vq_public.npz")
    pixels = vq16.decode(published["indices"])
    scale = published["recon"].abs().max().item()
    torch.testing.assert_close(pixels, published["recon"], rtol=0, atol=1e-4 * scale)
