"""Decoding in few, large GPU kernels: what `decode_steps` (engine/generate.py) computes, for `--compile`.

Seven kernels a layer and step: four products, one attention, two additions with their LayerNorm. Whatever
lies between two products is one compiled function that all layers and group sizes share. Rows are kept
sequence first, so a product writes keys and values where they are cached; one call with a small mask attends
for context and queries alike.

B images, R rows of the batch (2B with guidance, else B), c context rows and n queries of a step, N = c + n,
M rows attended to, D width, H heads, d = D / H, V codes.
"""

from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F

from engine.sampling import guidance_scales, guide, gumbel_noise, sample
from models.lpd import NO_LABEL
from util.device import is_cuda


def add_norm(x, y, norm, dtype):
    """x + y in float32, and its LayerNorm in the dtype of the linears."""
    x = x + y
    return x, norm(x).to(dtype)


def first_norm(x, norm, dtype):
    """LayerNorm in the dtype of the linears."""
    return norm(x).to(dtype)


def linear_gelu(x, linear, _size):
    """GELU of a linear layer. The size class of x is a text, so that each class has a kernel of its own."""
    return F.gelu(linear(x))


def draw(x, head, scales, inputs, slot, sampling):
    """x [n, R, D] -> ids int64 [B, n] of the slots from `slot` on: guidance, noise and the draw.

    Slices are taken here, since a compiled function copies inputs that begin at odd addresses.
    """
    _labels, order, words = inputs  # [B], [B, L], [B, 2]
    n = x.shape[0]
    logits = head(x).transpose(0, 1).float()  # [R, n, V]
    if scales is not None:
        logits = guide(*logits.chunk(2), scales[slot : slot + n])  # [B, n, V]
    noise = None
    if sampling.temperature > 0:
        noise = gumbel_noise(words, order[:, slot : slot + n], logits.shape[-1])  # [B, n, V]
    return sample(logits, noise, sampling, step=2)


def next_rows(embed_tokens, query_table, ids, order, slot, sizes):
    """The rows of the next step, float32 [N, R, D]: context, which is the ids [B, c] of the slots from `slot`
    on, then the queries of the n slots after them. `sizes` are n and R / B."""
    (n, branches), end = sizes, slot + ids.shape[1]
    context = embed_tokens(ids, order[:, slot:end])  # [B, c, D]
    x = torch.cat([context, query_table[order[:, end : end + n]]], dim=1)  # [B, N, D]
    return x.transpose(0, 1).repeat(1, branches, 1)  # [N, R, D]


@lru_cache
def compiled(function, backend, triton):
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


def step_mask(context, queries, total, dtype, device):
    """What is added to the scores of a step: -inf where a context row would see a query. [N, M].

    Its rows lie 8 values apart or a multiple, as attention kernels want them.
    """
    mask = torch.zeros(context + queries, -(-total // 8) * 8, dtype=dtype, device=device)[:, :total]
    mask[:context, total - queries :] = float("-inf")
    return mask


class FusedSteps:
    """`decode_steps` of one model, group sizes and sampling; called with `decoding_inputs`, it returns tokens
    int64 [B, L] in raster order. Nothing waits for the device, so a CUDA graph can record all of it."""

    def __init__(self, model, group_sizes, sampling, *, backend="inductor"):
        self.model, self.sampling, self.group_sizes = model, sampling, group_sizes
        device, self.dtype = model.pos_embed.device, model.head.weight.dtype
        guided = sampling.cfg != 1
        self.branches = 2 if guided else 1
        self.scales = guidance_scales(sampling, model.config.num_tokens, device) if guided else None  # [L]
        offsets = accumulate(group_sizes, initial=0)
        self.masks = [
            step_mask(c, n, 1 + offset + n, self.dtype, device)
            for c, n, offset in zip((1, *group_sizes), group_sizes, offsets, strict=False)
        ]
        self.first_norm, self.add_norm, self.draw, self.next_rows = (
            compiled(function, backend, False) for function in (first_norm, add_norm, draw, next_rows)
        )
        self.linear_gelu = compiled(linear_gelu, backend, is_cuda(device))

    def __call__(self, inputs):
        labels, order, _words = inputs  # [B], [B, L], [B, 2]
        model, c, ids, slot = self.model, 1, [], 0
        query_table = model.query_table()  # [L, D]
        x = self.first_rows(labels, query_table[order[:, : self.group_sizes[0]]])
        kv = torch.empty(
            model.config.depth, order.shape[1] + 1, x.shape[1], 3 * model.config.embed_dim,
            dtype=self.dtype, device=x.device,
        )
        for n, mask, following in zip(self.group_sizes, self.masks, (*self.group_sizes[1:], 0), strict=True):
            h = self.through_blocks(x, kv, mask, c)
            ids.append(self.draw(h, model.head, self.scales, inputs, slot, self.sampling))
            if following:
                sizes = following, self.branches
                x = self.next_rows(model.embed_tokens, query_table, ids[-1], order, slot, sizes)
            c, slot = n, slot + n
        return torch.empty_like(order).scatter_(1, order, torch.cat(ids, dim=1))

    def first_rows(self, labels, queries):
        """As `next_rows`, for the class token; queries [B, n, D]."""
        if self.branches == 2:
            labels = torch.cat([labels, torch.full_like(labels, NO_LABEL)])  # [R]
        queries = queries.repeat(self.branches, 1, 1)  # [R, n, D]
        return torch.cat([self.model.embed_labels(labels), queries], dim=1).transpose(0, 1).contiguous()

    def through_blocks(self, x, kv, mask, c):
        """x float32 [N, R, D], c rows of context first -> what enters the head, [n, R, D] of the queries."""
        model, total = self.model, mask.shape[1]
        blocks, start = model.blocks, total - len(x)
        rows = f"4^{((x.shape[0] * x.shape[1]).bit_length() + 1) // 2}"
        h = self.first_norm(x, blocks[0].norm1, self.dtype)
        for layer, block in enumerate(blocks):
            last = layer == len(blocks) - 1
            qkv = kv[layer, start:total]  # [N, R, 3D]
            torch.addmm(block.attn.qkv.bias, h.flatten(0, 1), block.attn.qkv.weight.T, out=qkv.flatten(0, 1))
            q, k, v = (
                kv[layer, :total].unflatten(2, (3, model.config.num_heads, -1)).permute(2, 1, 3, 0, 4)
            )  # each [R, H, M, d]
            if last:  # the output of context rows is not needed
                x, start, mask = x[c:], start + c, None
            y = F.scaled_dot_product_attention(q[:, :, start:], k, v, attn_mask=mask)  # [R, H, N, d]
            x, h = self.add_norm(x, project(block.attn.proj, y), block.norm2, self.dtype)
            y = block.mlp.fc2(self.linear_gelu(h.flatten(0, 1), block.mlp.fc1, rows)).view_as(x)
            x, h = self.add_norm(x, y, model.norm if last else blocks[layer + 1].norm1, self.dtype)
        return h


def project(linear, y):
    """A linear of attention's result y [R, H, N, d] -> [N, R, D]. No copy, whichever way y is laid out."""
    sequence_first = y.stride(2) > y.stride(0)
    y = y.permute(2, 0, 1, 3) if sequence_first else y.permute(0, 2, 1, 3)
    y = linear(y.flatten(2))
    return y if sequence_first else y.transpose(0, 1)
