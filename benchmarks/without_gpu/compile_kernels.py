"""Compile every kernel that Inductor writes for decoding and training to machine code of an H100 (sm_90),
without one: Triton and ptxas do all of their work, and nothing is run.

    python benchmarks/without_gpu/compile_kernels.py --all
"""

import copy
import dataclasses

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_map

from benchmarks.without_gpu import fake_cuda
from benchmarks.without_gpu.count_kernels import fake_inputs
from engine.decoding import decode as decode_steps
from engine.fast import FLEX_ROWS, FastDecoder, compiled_lpd, compiled_parts, with_compiled_layers
from engine.sampling import Sampling
from models import layers
from models.lpd import LPD, LPD_CONFIGS
from models.masks import Mask, _mask_mod, cached_decoding_masks
from models.vqgan import VQConfig, VQModel
from orders.schedule import cosine_group_sizes
from util import cli


def parse_args(argv=None):
    parser = cli.Parser(description="Compile all kernels for sm_90 without a GPU")
    help = "with top-k and top-p, the decoder of VQ-16, 512 px, checkpointing, and all forms of each kernel"
    parser.add_argument("--all", action="store_true", help=help)
    return parser.parse_args(argv)


def decode(sampling, batch, decoder=False):
    """One trajectory of lpd_l with a single block, and VQ-16's decoder if asked for."""
    config = dataclasses.replace(LPD_CONFIGS["lpd_l"], depth=1)
    with fake_cuda.RecordingMode(allow_non_fake_inputs=True), torch.inference_mode():
        with torch.device("cuda"):
            model, tokenizer = LPD(config).eval().bf16_linears(), VQModel(VQConfig()).eval()
        cached_decoding_masks.cache_clear()  # its tensors belong to the mode before
        given = fake_inputs(batch, 256), cosine_group_sizes(256, 4), sampling
        tokens, _ = decode_steps(with_compiled_layers(model), *given, parts=compiled_parts())
        decoding = FastDecoder(tokenizer, torch.bfloat16, fused=True)
        if decoder:
            decoding.decode(tokens)


def fake_mask(L):
    """What the rows of a training pass see, in the form that `compiled_lpd` chooses, without values."""
    if 2 * L < FLEX_ROWS:
        return torch.zeros(2 * L, 2 * L, dtype=torch.bfloat16)
    blocks = 2 * L // 128
    number = torch.zeros(1, 1, blocks, dtype=torch.int32)
    index = torch.zeros(1, 1, blocks, blocks, dtype=torch.int32)
    of_keys = {f"{full}kv_{what}": x.clone() for full in ("", "full_")
               for what, x in (("num_blocks", number), ("indices", index))}
    of_queries = {name.replace("kv_", "q_"): x.clone() for name, x in of_keys.items()}
    rule = _mask_mod(torch.zeros(2 * L, dtype=torch.int64))
    return BlockMask((2 * L, 2 * L), **of_keys, **of_queries, BLOCK_SIZE=(128, 128), mask_mod=rule)


def moved(value, mode):
    """A tensor, or a structure of them, on the GPU."""

    def move(x):
        if not isinstance(x, torch.Tensor):
            return torch.device("cuda", 0) if isinstance(x, torch.device) else x
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    return tree_map(move, value)


def compile_for_gpu(graph, inputs):
    """A compiler for AOTAutograd: what was traced on a CPU is compiled for the GPU, then run as traced. (The
    backward pass cannot be traced on a GPU that is not there.)"""
    mode, copied = detect_fake_mode(inputs), copy.deepcopy(graph)
    for part in (module for module in copied.modules() if isinstance(module, torch.fx.GraphModule)):
        for node in part.graph.nodes:
            node.meta = {name: value for name, value in node.meta.items() if name == "val"}
            node.meta = {name: moved(value, mode) for name, value in node.meta.items()}
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), lambda x: moved(x, mode))
        part.recompile()
    compile_fx_inner(copied, moved(list(inputs), mode))
    return make_boxed_func(graph.forward)


def attend_on_gpu(q, k, v, mask):
    """`attend` as a GPU takes it."""
    if isinstance(mask.seen, BlockMask):
        return flex_attention.flex_attention(q, k, v, block_mask=mask.seen)
    return fake_cuda.SDPA(q, k, v, attn_mask=mask.seen)


def train(grid_size, batch, checkpointing=False):
    """Forward and backward pass of one block of lpd_l."""
    config = dataclasses.replace(LPD_CONFIGS["lpd_l"], grid_size=grid_size, depth=1)
    compiler, L = {"fw_compiler": compile_for_gpu, "bw_compiler": compile_for_gpu}, grid_size**2
    backend = aot_autograd(**compiler, decompositions=select_decomp_table(), partition_fn=partition)
    given = {"backend": backend, "grad_checkpointing": checkpointing, "loss_rows": None}
    with FakeTensorMode(allow_non_fake_inputs=True):
        mask = Mask(L, fake_mask(L))
        model = compiled_lpd(config, torch.device("cpu"), **given).train()
        model.training_mask = lambda *_: mask
        tokens, order = (torch.zeros(batch, L, dtype=torch.int64) for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(tokens, torch.zeros(batch).long(), order, cosine_group_sizes(L, 8))
        loss.backward()


def partition(graph, inputs, **options):
    """Inductor's choice of what the forward pass keeps."""
    with V.set_fake_mode(detect_fake_mode(inputs)):
        joint_graph_passes(graph)
    options = {name: value for name, value in options.items() if name != "compiler"}
    return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **options)


def main(argv=None):
    args = parse_args(argv)
    fake_cuda.install()
    layers.attend, flex_attention._validate_device = attend_on_gpu, lambda *_, **__: None
    decode(Sampling(cfg=4.8), 2)
    train(16, 4)
    if args.all:
        decode(Sampling(cfg=4.8, top_k=100, top_p=0.9), 64, decoder=True)
        decode(Sampling(), 1)
        train(16, 4, checkpointing=True)
        train(32, 2)
    failed = 0
    for kernel in fake_cuda.TritonKernel.made:
        for form in kernel.forms() if args.all else kernel.forms()[:1]:
            try:
                print(f"{kernel.name}: {kernel.machine_code(form)} bytes", flush=True)
            except Exception as error:  # whatever Triton or ptxas raises
                failed += 1
                print(f"{kernel.name} FAILED: {type(error).__name__}: {error}", flush=True)
    print(f"{len(fake_cuda.TritonKernel.made)} kernels, {failed} failures")


if __name__ == "__main__":
    cli.run(main)
