"""The image tokenizer, at small sizes."""

import pytest
import torch
import torch.nn.functional as F

from models.vqgan import Codebook, VQConfig, VQModel


def random_pixels(n):
    """[n, 3, 8, 8] in [-1, 1]."""
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("multipliers, stride", [((1,), 1), ((1, 2), 2), ((1, 1, 2, 2, 4), 16)])
def test_each_level_after_the_first_doubles_the_stride(multipliers, stride):
    assert VQConfig(multipliers=multipliers).stride == stride


def test_an_image_has_one_token_per_patch(tiny_vq):
    tokens = tiny_vq.encode(random_pixels(3))
    assert tokens.shape == (3, 16) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < tiny_vq.config.vocab_size
    assert tiny_vq.decode(tokens).shape == (3, 3, 8, 8)


def test_networks_of_patches_work_at_the_resolution_of_the_tokens():
    """The first layer sees each patch by itself."""
    config = VQConfig(vocab_size=16, code_dim=4, num_res_blocks=1, z_channels=32, groups=1, patch=4)
    model = VQModel(config)
    tokens = model.encode(random_pixels(3))
    assert config.stride == 4 and tokens.shape == (3, 4)
    assert model.decode(tokens).shape == model(random_pixels(3))[0].shape == (3, 3, 8, 8)
    seen = []
    model.encoder.blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.zeros(2, 3, 8, 8)
    pixels[1, 2, 3, 4] = 1  # in row 0, column 1 of the patches
    model.encode(pixels)
    assert (seen[0][0] != seen[0][1]).any(dim=0).nonzero().tolist() == [[0, 1]]


def test_tokens_are_in_raster_order(tiny_vq):
    """Token 1 lies in row 0, column 1: changing it changes the decoder's input there and nowhere else."""
    seen = []
    tiny_vq.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tiny_vq.decode(torch.tensor([[0] * 16, [0, 5] + [0] * 14]))
    changed = (seen[0][0] != seen[0][1]).any(dim=0)  # [h, w]
    assert changed.nonzero().tolist() == [[0, 1]]


def test_a_code_is_nearest_to_itself_at_any_length():
    torch.manual_seed(0)
    codebook = Codebook(64, 8)
    ids = torch.arange(64)
    for length in (0.01, 1.0, 100.0):
        assert torch.equal(codebook.nearest(length * codebook(ids)), ids)


def test_the_nearest_code_has_the_least_euclidean_distance_between_unit_vectors():
    torch.manual_seed(0)
    codebook, z = Codebook(64, 8), torch.randn(500, 8)
    codes = F.normalize(codebook.embedding.weight, dim=-1)
    distances = torch.cdist(F.normalize(z, dim=-1).double(), codes.double())
    assert torch.equal(codebook.nearest(z), distances.argmin(dim=-1))


# what is refused


def test_an_image_must_be_a_multiple_of_the_stride(tiny_vq):
    with pytest.raises(ValueError, match="10x7 pixels.* stride 2"):
        tiny_vq.encode(torch.zeros(1, 3, 7, 10))


def test_tokens_must_form_a_square(tiny_vq):
    with pytest.raises(ValueError, match="15 tokens"):
        tiny_vq.decode(torch.zeros(1, 15, dtype=torch.int64))


@pytest.mark.parametrize(
    "wrong",
    [{"base_width": 48}, {"multipliers": ()}, {"vocab_size": 65537}, {"z_channels": 48, "patch": 8}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_impossible_sizes_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VQConfig(**wrong)


def test_a_narrow_tokenizer_has_fewer_groups_and_the_same_weights():
    sizes = {"vocab_size": 16, "base_width": 32, "multipliers": (1, 2), "num_res_blocks": 1, "z_channels": 32}
    usual, fewer = (VQModel(VQConfig(**sizes, **given)) for given in ({}, {"groups": 4}))
    assert usual.state_dict().keys() == fewer.state_dict().keys()
    assert {m.num_groups for m in fewer.modules() if isinstance(m, torch.nn.GroupNorm)} == {4}
    assert VQConfig().groups == 32 and VQConfig(base_width=16, groups=4).stride == 16


# training


def test_the_training_pass_reconstructs_what_its_tokens_decode_to(tiny_vq):
    """1e-5: the decoder gets latent + (code - latent), which is the code up to fp32 rounding."""
    with torch.no_grad():
        reconstruction, latents, codes, tokens = tiny_vq(random_pixels(2))
        assert latents.shape == codes.shape == (2, 4, 4, 4) and tokens.shape == (2, 4, 4)
        torch.testing.assert_close(reconstruction, tiny_vq.decode(tokens.flatten(1)), rtol=0, atol=1e-5)


def test_the_gradient_passes_straight_through_the_quantisation(tiny_vq):
    """The latents get the decoder's gradient at the codes unchanged, and the codebook gets none. Relative
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
