"""Fast paths: compiled training blocks, decoding as one CUDA graph, and models prepared for inference.

`--compile` selects the first two, and also ResidentTokens (engine/data.py).
Results equal those of the plain code up to rounding. On a CPU nothing is captured, and batches are padded all
the same; there `for_inference` packs the linears (benchmarks/LOG.md).

On a GPU a decoding step takes seven kernels a layer: four products, one attention, two additions with their
LayerNorm. Whatever lies between two products is one compiled function that all layers and group sizes share.
"""

import copy
from collections import OrderedDict
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from engine.decoding import Parts, decode, decoding_inputs, generate_tokens, step_shapes
from engine.generate import generate_images
from engine.sampling import Sampling, guidance_scales
from models.layers import MLP, AddNorm
from models.lpd import LPD, NO_LABEL, Execution
from models.masks import cached_decoding_masks
from models.vqgan import as_square
from util.device import GraphCapture, is_cuda
from util.images import to_uint8

FLEX_ROWS = 2048  # from this many rows on (512 px), FlexAttention skips 60-70 % of the blocks
LOSS_LOGITS = 2**26  # logits alive at once: 256 MB in float32
PLAIN_ONLY = {"known", "teacher", "on_group", "return_order"}  # not captured: edits have shapes of their own


# Training.


def compiled_lpd(config, device, *, bf16=False, backend="inductor", **execution):
    """An LPD for training on a device: compiled blocks, logits in chunks, and the mask that suits both. In
    `execution` is what else its `Execution` is to have.

    The mask is an argument of the compiled function, so all layers and schedules share it. DDP must not cut
    it into pieces: each block is a graph of its own, so gradients are exchanged meanwhile all the same.
    """
    chosen = {"loss_rows": max(1, LOSS_LOGITS // config.vocab_size)}
    if is_cuda(device):
        dtype = torch.bfloat16 if bf16 else torch.float32
        chosen["mask"] = dtype if 2 * config.num_tokens < FLEX_ROWS else "flex"
    model = LPD(config, Execution(**{**chosen, **execution}))
    torch._dynamo.config.optimize_ddp = False
    for block in model.blocks:
        block.compile(dynamic=False, backend=backend)
    return model


# Decoding.


@lru_cache
def compiled(function, backend="inductor", triton=False):
    """A function compiled for all sizes. With `triton` its products become Triton kernels, which take in what
    follows them; Inductor times several forms of each at the first call."""
    # Beyond the limit torch would silently run uncompiled. Sizes of 1 and new settings take a frame each.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    options = {}
    if backend == "inductor":
        # The noise is computed where it is used, not stored; a row of logits is read by one kernel.
        options |= {"realize_opcount_threshold": 1000, "split_reductions": False}
    if triton:
        options |= {"max_autotune_gemm": True, "max_autotune_gemm_backends": "TRITON"}
    return torch.compile(function, dynamic=True, backend=backend, options=options)


def compiled_parts(backend="inductor"):
    """The functions of the decoding loop, compiled."""
    return Parts(*(compiled(function, backend) for function in Parts()))


def first_norm(x, norm, dtype):
    """LayerNorm in the dtype of the linears."""
    return norm(x).to(dtype)


def add_norm(x, y, norm, dtype):
    """x + y in float32, and its LayerNorm in the dtype of the linears."""
    x = x + y
    return x, norm(x).to(dtype)


def linear_gelu(x, linear, _size):
    """GELU of a linear layer. The size class of x is a text, so that each class has a kernel of its own."""
    return F.gelu(linear(x))


class CompiledAddNorm(nn.Module):
    """An `AddNorm` as one kernel, its result in the dtype of the linears."""

    def __init__(self, norm, dtype, backend):
        super().__init__()
        self.dtype, self.backend = dtype, backend
        self.norm = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
        self.norm.weight, self.norm.bias = norm.weight, norm.bias

    def forward(self, x, y=None):
        if y is None:
            return x, compiled(first_norm, self.backend)(x, self.norm, self.dtype)
        return compiled(add_norm, self.backend)(x, y, self.norm, self.dtype)


class CompiledLinearGELU(nn.Module):
    """A linear and the GELU after it, on a GPU as one kernel."""

    def __init__(self, linear, backend):
        super().__init__()
        self.linear, self.backend = linear, backend

    def forward(self, x):
        rows = f"4^{((x.shape[0] * x.shape[1]).bit_length() + 1) // 2}"
        function = compiled(linear_gelu, self.backend, is_cuda(x.device))
        return function(x.flatten(0, 1), self.linear, rows).unflatten(0, x.shape[:2])


def sharing(model):
    """A copy of a model that shares its weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def with_compiled_layers(model, backend="inductor"):
    """A copy of a model for decoding, whose additions, LayerNorms and GELUs are compiled; it shares all
    weights."""
    model, dtype = sharing(model), model.head.weight.dtype
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, AddNorm):
                setattr(module, name, CompiledAddNorm(child, dtype, backend))
        if isinstance(module, MLP):
            module.fc1, module.act = CompiledLinearGELU(module.fc1, backend), nn.Identity()
    return model


class FastGenerator:
    """`generate_tokens` and `generate_images` of one model, with the same arguments and results.

    Once batch, group sizes and sampling are fixed, all shapes are: the whole trajectory (steps, draws, and
    the decoder if images are asked for) is captured at the first call, then replayed. A smaller batch is
    padded to a captured one. Weights are captured by address: they must not move.

    `tokenizer` may be a `FastDecoder`. Beyond `capacity` trajectories the least recently used is dropped.
    `capture` turns a function without arguments into its replay. `backend` compiles layers and the loop's
    parts: "inductor" on a GPU; None is not to compile.
    """

    def __init__(self, model, tokenizer=None, *, capacity=8, capture=None, backend=None):
        device = model.pos_embed.device
        backend = backend or ("inductor" if is_cuda(device) else None)
        self.plain, self.tokenizer, self.capacity = model, tokenizer, capacity
        self.model = with_compiled_layers(model, backend) if backend else model
        self.parts = compiled_parts(backend) if backend else Parts()
        self.capture = capture or GraphCapture(device)
        # (batch, settings) -> (inputs, replay, constants); the last used is at the end
        self.trajectories = OrderedDict()

    def generate_tokens(self, *inputs, **options):
        """As `engine.decoding.generate_tokens`, without the model."""
        if PLAIN_ONLY & options.keys():
            return generate_tokens(self.plain, *inputs, **options)
        return self._replay(False, *inputs, **options)

    def generate_images(self, *inputs, **options):
        """As `engine.generate.generate_images`, without the model and the tokenizer."""
        if PLAIN_ONLY & options.keys():
            return generate_images(self.plain, self.tokenizer, *inputs, **options)
        return self._replay(True, *inputs, **options)

    @torch.inference_mode()
    def _replay(self, pixels, labels, order, group_sizes, sampling=Sampling(), **options):
        policy = order if callable(order) else None
        given = decoding_inputs(self.model, labels, order, group_sizes, **options)
        inputs, replay, _ = self._trajectory(len(labels), (pixels, policy, tuple(group_sizes), sampling))
        for static, values in zip(inputs, given, strict=True):
            static[: len(values)].copy_(values, non_blocking=True)
        return replay()[: len(labels)].clone()

    def _trajectory(self, needed, settings):
        """The smallest captured trajectory of at least this batch, else a new one."""
        batches = [batch for batch, known in self.trajectories if known == settings and batch >= needed]
        key = min(batches, default=needed), settings
        trajectory = self.trajectories.pop(key, None)
        self.trajectories[key] = trajectory or self._capture(*key)
        while len(self.trajectories) > self.capacity:
            self.trajectories.popitem(last=False)
        return self.trajectories[key]

    def _capture(self, batch, settings):
        pixels, policy, group_sizes, sampling = settings
        device, L = self.model.pos_embed.device, self.model.config.num_tokens
        inputs = (
            torch.full((batch,), NO_LABEL, device=device),
            torch.arange(L, device=device).repeat(batch, 1),
            torch.zeros(batch, 2, dtype=torch.int64, device=device),
        )

        def generate():
            tokens, _ = decode(self.model, inputs, group_sizes, sampling, policy=policy, parts=self.parts)
            return to_uint8(self.tokenizer.decode(tokens)) if pixels else tokens

        steps = step_shapes(group_sizes, L, policy is not None and policy.looks)
        constants = (  # those of `decode`, which a graph reads by address
            cached_decoding_masks(steps, self.model.head.weight.dtype, device),
            guidance_scales(sampling, L, device),
        )
        return inputs, self.capture(generate), constants


# Models prepared for inference.


class PackedLinear(nn.Module):
    """An `nn.Linear` for inference on a CPU, its weight in oneDNN's layout, on which a plain product of few
    rows spends a third of its time or more. Its operators are those of torch.compile's CPU code."""

    def __init__(self, weight, bias, rows=32):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias, self.dtype = bias, weight.dtype

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")

    def write(self, x, out):
        """As `Linear.write`."""
        out.copy_(self(x))


def can_pack(dtype):
    """Whether `PackedLinear` works here: oneDNN may be missing or not know the dtype on this CPU, and the
    operators are private (the same from torch 2.6.0 to 2.15.0)."""
    identity = torch.eye(2, dtype=dtype)
    try:
        return torch.equal(PackedLinear(identity, None)(identity), identity)
    except (AttributeError, RuntimeError, TypeError):
        return False


def packed(model):
    """On a CPU a copy of a model with packed linears, which shares all other weights; where none can be
    packed, the model."""
    if model.pos_embed.device.type != "cpu" or not can_pack(model.head.weight.dtype):
        return model
    model = sharing(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
    return model


def for_inference(model, tokenizer, device, *, bf16=False, compiled=False):
    """The model and the decoder of its tokenizer on a device, in the precision of all programs.

    With `bf16`, linears and decoder compute in bfloat16, LayerNorms, the residual stream and the conversion
    to bytes in float32: as near to float32 as autocast (docs/evaluation.md). On a CPU the linears are packed.
    """
    model, tokenizer = model.to(device), tokenizer.to(device)
    if bf16:
        model.bf16_linears()
    if bf16 or compiled:
        dtype = torch.bfloat16 if bf16 else torch.float32
        tokenizer = FastDecoder(tokenizer, dtype, fused=compiled and is_cuda(device))
    return packed(model), tokenizer


class FastDecoder:
    """A copy of a `VQModel`'s decoder for inference in another dtype; `decode` as there, float32 out.
    `encode` is the tokenizer's own.

    Codes pass normalisation and `post_quant_conv` once, into a table; channels come last in memory, as
    convolutions in bfloat16 want them. `fused` compiles it for all batches, which takes a minute at the first
    call, and again for one image alone.
    """

    def __init__(self, tokenizer, dtype=torch.bfloat16, *, fused=False):
        self.config, self.encode = tokenizer.config, tokenizer.encode
        project = tokenizer.post_quant_conv
        with torch.no_grad():
            codes = F.normalize(tokenizer.quantize.embedding.weight, dim=-1)  # [V, e]
            self.table = F.linear(codes, project.weight.flatten(1), project.bias).to(dtype)  # [V, z_channels]
        decoder = copy.deepcopy(tokenizer.decoder).to(dtype=dtype, memory_format=torch.channels_last)
        self.fused = fused
        self.decoder = torch.compile(decoder) if fused else decoder

    def decode(self, tokens):
        """tokens int64 [B, L] in raster order, of a square image -> pixels [B, 3, H, W], about [-1, 1]."""
        z = F.embedding(as_square(tokens), self.table)  # [B, h, w, z_channels]
        if self.fused:
            torch._dynamo.maybe_mark_dynamic(z, 0)
        return self.decoder(z.permute(0, 3, 1, 2)).float()
