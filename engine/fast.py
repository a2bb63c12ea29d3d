"""Fast paths: compiled training blocks, decoding as one CUDA graph, and models prepared for inference.

`--compile` selects the first two (on a GPU with the steps of engine/fused.py), and also ResidentTokens
(engine/data.py) and fused AdamW (engine/train.py). Results equal those of the plain code up to rounding. On
a CPU nothing is captured; there `for_inference` packs the linears, which is all that can be gained
(benchmarks/LOG.md).
"""

import copy
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from engine.fused import FusedSteps
from engine.generate import decode_steps, decoding_inputs, generate_images, generate_tokens
from engine.sampling import Sampling
from models.lpd import NO_LABEL, Execution
from models.masks import cached_block_mask, cached_training_mask
from models.vqgan import as_square
from util.device import GraphCapture, is_cuda
from util.images import to_uint8

FLEX_ROWS = 2048  # from this many rows on (512 px), FlexAttention skips 60-70 % of the blocks
LOSS_LOGITS = 2**26  # logits alive at once: 256 MB in float32
PLAIN_ONLY = {"known", "on_group"}  # edits have shapes of their own, and a callback cannot be captured


def run_block(block, x, mask):
    """A training pass through a block, x [B, 2L, D]; one compiled function for all blocks."""
    return block(x, mask)


def compiled_execution(config, device, *, bf16=False, grad_checkpointing=False, backend="inductor"):
    """The `Execution` of a training pass with compiled blocks, chunked logits, and the fastest form of mask.

    The mask is an argument of the compiled function, so all layers and schedules share it. DDP must not cut
    it into pieces: each block is a graph of its own, so gradients are exchanged meanwhile all the same.
    """
    torch._dynamo.config.optimize_ddp = False
    mask = cached_training_mask
    if is_cuda(device):
        dtype = torch.bfloat16 if bf16 else torch.float32
        short = 2 * config.num_tokens < FLEX_ROWS
        mask = partial(cached_training_mask, dtype=dtype) if short else cached_block_mask
    return Execution(
        run_block=torch.compile(run_block, dynamic=False, backend=backend), mask=mask,
        loss_rows=max(1, LOSS_LOGITS // config.vocab_size), grad_checkpointing=grad_checkpointing,
    )


class FastGenerator:
    """`generate_tokens` and `generate_images` of one model, with the same arguments and results.

    Once batch, group sizes and sampling are fixed, all shapes are: the whole trajectory (steps, draws, and
    the decoder if images are asked for) is captured at the first call, then replayed. A smaller batch is
    padded to a captured one. Weights are captured by address: they must not move.

    `tokenizer` may be a `FastDecoder`. Beyond `capacity` trajectories the least recently used is dropped.
    `capture` turns a function without arguments into its replay. `fused` is as `FusedSteps`, which is the
    default on a GPU; without it the steps are those of `decode_steps`.
    """

    def __init__(self, model, tokenizer=None, *, capacity=8, capture=None, fused=None):
        device = model.pos_embed.device
        self.model = model
        self.fused = fused or (FusedSteps if is_cuda(device) else None)
        self.tokenizer = tokenizer
        self.capacity = capacity
        self.capture = capture or GraphCapture(device)
        self.trajectories = OrderedDict()  # (batch, settings) -> (inputs, replay), the last used at the end

    def generate_tokens(self, *inputs, **options):
        """As `engine.generate.generate_tokens`, without the model."""
        if PLAIN_ONLY & options.keys():
            return generate_tokens(self.model, *inputs, **options)
        return self._replay(False, *inputs, **options)

    def generate_images(self, *inputs, **options):
        """As `engine.generate.generate_images`, without the model and the tokenizer."""
        if PLAIN_ONLY & options.keys():
            return generate_images(self.model, self.tokenizer, *inputs, **options)
        return self._replay(True, *inputs, **options)

    @torch.inference_mode()
    def _replay(self, decode, labels, order, group_sizes, sampling=Sampling(), **options):
        given = decoding_inputs(self.model, labels, order, group_sizes, **options)
        inputs, replay = self._trajectory(len(labels), (decode, tuple(group_sizes), sampling))
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
        decode, group_sizes, sampling = settings
        device, L = self.model.pos_embed.device, self.model.config.num_tokens
        inputs = (
            torch.full((batch,), NO_LABEL, device=device),
            torch.arange(L, device=device).repeat(batch, 1),
            torch.zeros(batch, 2, dtype=torch.int64, device=device),
        )

        steps = partial(decode_steps, self.model, group_sizes=group_sizes, sampling=sampling)
        if self.fused:
            steps = self.fused(self.model, group_sizes, sampling)

        def generate():
            tokens = steps(inputs)
            return to_uint8(self.tokenizer.decode(tokens)) if decode else tokens

        return inputs, self.capture(generate)


class PackedLinear(nn.Module):
    """An `nn.Linear` for inference on a CPU, its weight in oneDNN's layout, on which a plain product of few
    rows spends a third of its time or more. Its operators are those of torch.compile's CPU code."""

    def __init__(self, weight, bias, rows=32):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias, self.dtype = bias, weight.dtype

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")


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
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
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
