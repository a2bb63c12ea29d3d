"""The image tokenizer: the published VQ-16, and small ones."""

import json
import zlib
from dataclasses import asdict

import numpy as np
import pytest
import torch

from models.vqgan import Codebook, FastDecoder, VQConfig, VQModel


def random_pixels(n):
    """[n, 3, 8, 8] in [-1, 1]."""
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def vq16(golden):
    """VQ-16 filled by the rule in the README of the golden values."""
    with torch.device("meta"):
        model = VQModel(VQConfig())
    state = {}
    for name, tensor in model.state_dict().items():
        random = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
        values = random.standard_normal(tuple(tensor.shape)).astype(np.float32)
        if values.ndim == 1:
            values = 1 + 0.1 * values if name.endswith("weight") else 0.02 * values
        else:
            values = 0.03 * values
        state[name] = torch.from_numpy(values.astype(np.float32))
    model.load_state_dict(state, assign=True)
    return model.eval()


@pytest.fixture(scope="module")
def published(golden):
    """What the published code gave: a dict of tensors."""
    with np.load(golden / "vq_public.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


# the published tokenizer


def test_state_dict_has_the_keys_and_shapes_of_the_released_weights(golden):
    schema = json.loads((golden / "checkpoint_schema.json").read_text())["vq_ds16_c2i"]
    with torch.device("meta"):
        state = VQModel(VQConfig()).state_dict()
    own = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()}
    assert own == schema


def test_tokens_are_those_of_the_published_code(vq16, published):
    with torch.no_grad():
        tokens = vq16.encode(published["image"])
    assert torch.equal(tokens, published["indices"].long())


def test_reconstruction_is_that_of_the_published_code(vq16, published):
    """Relative 1e-4: some forty layers in fp32, whose sums run in another order on another machine."""
    with torch.no_grad():
        pixels = vq16.decode(published["indices"].long())
    scale = published["recon"].abs().max().item()
    torch.testing.assert_close(pixels, published["recon"], rtol=0, atol=1e-4 * scale)


# any tokenizer


@pytest.mark.parametrize("multipliers, stride", [((1,), 1), ((1, 2), 2), ((1, 1, 2, 2, 4), 16)])
def test_stride_is_two_for_each_level_but_the_first(multipliers, stride):
    assert VQConfig(multipliers=multipliers).stride == stride


def test_encode_gives_one_token_for_a_patch_of_the_stride(tiny_vq):
    with torch.no_grad():
        tokens = tiny_vq.encode(random_pixels(3))
    assert tokens.shape == (3, 16) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < tiny_vq.config.vocab_size


def test_decode_gives_the_pixels_of_a_square_image(tiny_vq):
    with torch.no_grad():
        assert tiny_vq.decode(torch.arange(32).view(2, 16)).shape == (2, 3, 8, 8)


def test_tokens_are_in_raster_order(tiny_vq):
    """Top left is token 0 and the next to its right token 1, so columns run fastest: a code put at token 1
    changes the decoder's input in row 0, column 1 alone."""
    seen = []
    tiny_vq.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        tiny_vq.decode(torch.tensor([[0] * 16, [0, 5] + [0] * 14]))
    changed = (seen[0][0] != seen[0][1]).any(dim=0)  # [h, w]
    assert changed.nonzero().tolist() == [[0, 1]]


def test_a_code_is_nearest_to_itself_at_any_length():
    torch.manual_seed(0)
    codebook = Codebook(64, 8)
    ids = torch.arange(64)
    for length in (0.01, 1.0, 100.0):
        assert torch.equal(codebook.nearest(length * codebook(ids)), ids)


def test_nearest_is_the_least_euclidean_distance_between_unit_vectors():
    torch.manual_seed(0)
    codebook, z = Codebook(64, 8), torch.randn(500, 8)
    codes = torch.nn.functional.normalize(codebook.embedding.weight, dim=-1)
    distances = torch.cdist(torch.nn.functional.normalize(z, dim=-1).double(), codes.double())
    assert torch.equal(codebook.nearest(z), distances.argmin(dim=-1))


def test_an_image_that_is_no_multiple_of_the_stride_is_refused_with_its_size(tiny_vq):
    with pytest.raises(ValueError, match="10x7 pixels.* stride 2"):
        tiny_vq.encode(torch.zeros(1, 3, 7, 10))


def test_tokens_that_make_no_square_are_refused_with_their_number(tiny_vq):
    with pytest.raises(ValueError, match="15 tokens"):
        tiny_vq.decode(torch.zeros(1, 15, dtype=torch.int64))


@pytest.mark.parametrize(
    "wrong",
    [{"base_width": 48}, {"multipliers": ()}, {"vocab_size": 65537}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_impossible_sizes_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VQConfig(**wrong)


def test_a_config_survives_json():
    config = VQConfig(vocab_size=32, multipliers=(1, 2))
    assert VQConfig(**json.loads(json.dumps(asdict(config)))) == config


# training


def test_training_reconstructs_what_its_tokens_decode_to(tiny_vq):
    """1e-5: `through` is latent + (code - latent), the code but for fp32 rounding."""
    with torch.no_grad():
        reconstruction, latents, codes, tokens = tiny_vq(random_pixels(2))
        assert latents.shape == codes.shape == (2, 4, 4, 4) and tokens.shape == (2, 4, 4)
        torch.testing.assert_close(reconstruction, tiny_vq.decode(tokens.flatten(1)), rtol=0, atol=1e-5)


def test_the_gradient_of_the_pixels_goes_straight_through_to_the_latents(tiny_vq):
    """The latents get the decoder's gradient at the codes as it is, and the codebook gets none. Relative
    1e-3: the same products, at codes that differ by fp32 rounding; sums that cancel may leave 1e-6."""
    pixels = random_pixels(2)
    reconstruction, _, codes, _ = tiny_vq(pixels)
    (reconstruction - pixels).square().mean().backward()
    assert tiny_vq.quantize.embedding.weight.grad is None
    through = [parameter.grad.clone() for parameter in tiny_vq.encoder.parameters()]

    at_codes = codes.detach().requires_grad_()
    (tiny_vq.decode_codes(at_codes) - pixels).square().mean().backward()
    tiny_vq.zero_grad()
    tiny_vq.latents(pixels).backward(at_codes.grad)
    for parameter, grad in zip(tiny_vq.encoder.parameters(), through, strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-6)
    assert tiny_vq.encoder.conv_in.weight.grad.abs().max() > 1e-5


# the fast decoder


@pytest.mark.parametrize(
    "fused", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_fast_decoder_in_float32_gives_the_same_pixels(tiny_vq, fused):
    """1e-4: the same fp32 sums in another order, through ten convolutions; pixels are of size 1."""
    tokens = torch.arange(48).view(3, 16) % 32
    with torch.inference_mode():
        expected = tiny_vq.decode(tokens)
        pixels = FastDecoder(tiny_vq, torch.float32, fused=fused).decode(tokens)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-4)


def test_fast_decoder_in_bfloat16_stays_near_in_float32(tiny_vq):
    """bfloat16 has 8 bits: 2^-8 of a value a rounding, some forty of which add up as their root."""
    tokens = torch.arange(48).view(3, 16) % 32
    with torch.inference_mode():
        expected, pixels = tiny_vq.decode(tokens), FastDecoder(tiny_vq).decode(tokens)
    assert pixels.dtype == torch.float32
    assert (pixels - expected).square().mean() < (2**-5.3 * expected.std()) ** 2


def test_fast_decoder_leaves_the_tokenizer_as_it_was(tiny_vq):
    before = {name: value.clone() for name, value in tiny_vq.state_dict().items()}
    FastDecoder(tiny_vq)
    assert all(torch.equal(value, before[name]) for name, value in tiny_vq.state_dict().items())
    assert all(parameter.is_contiguous() for parameter in tiny_vq.parameters())


def test_fast_decoder_refuses_tokens_of_no_square_image(tiny_vq):
    with pytest.raises(ValueError, match="15 tokens make no square"):
        FastDecoder(tiny_vq).decode(torch.zeros(1, 15, dtype=torch.int64))
