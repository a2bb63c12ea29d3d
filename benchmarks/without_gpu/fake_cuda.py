"""An H100 that is not there: programs for CUDA run on fake tensors (shapes without numbers), and every kernel
they would launch is recorded. torch.compile generates its Triton code as on the GPU; none of it is executed.

`install()` replaces parts of torch in this process for good: call it first, in a program or subprocess.
"""

import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10, L2_cache_size=50 * 2**20, clock_rate=1980000,
    memory_clock_rate=2619000, memory_bus_width=5120, gcnArchName="", is_integrated=0, uuid="",
    pci_bus_id=0, pci_device_id=0, pci_domain_id=0,
)
# Operators that only make a view or allocate, beyond those that say so themselves.
NO_KERNEL = {
    "_reshape_alias", "_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty",
    "lift_fresh", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "device",
    "_nnpack_available", "dropout",  # in eval mode
}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "unique"}
PRODUCTS = {"mm", "addmm", "bmm", "linear", "matmul"}


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, the part of the program it belongs to, the bytes it reads and writes, and the
    operations of a product, two per multiply-add."""

    name: str
    part: str
    bytes: int
    operations: int = 0


class Recorder:
    """Kernels and waits of what runs while it is on; `part(name)` names what they belong to."""

    def __init__(self):
        self.kernels, self.waits, self.on, self.parts = [], Counter(), False, []

    @contextmanager
    def part(self, name):
        self.parts.append(name)
        try:
            yield
        finally:
            self.parts.pop()

    @contextmanager
    def recording(self):
        """A list that the kernels launched inside it fill."""
        self.kernels, self.waits, self.on = [], Counter(), True
        try:
            yield self.kernels
        finally:
            self.on = False

    def kernel(self, name, moved, operations=0):
        if self.on:
            kind = kind_of(name)
            part = self.parts[-1] if self.parts and kind != "linears" else kind
            self.kernels.append(Kernel(name, part, moved, operations))

    def operator(self, function, inputs, outputs):
        """Record an eager operator."""
        name = function.overloadpacket.__name__
        devices = {x.device.type for x in inputs + outputs if x.ndim or x.device.type == "cuda"}
        if not self.on or "cuda" not in devices or function.is_view or name in NO_KERNEL:
            return
        if name in WAITS or len(devices) > 1:
            self.waits[name] += 1
        read = moved_bytes(inputs, outputs, gather=name in ("embedding", "index", "gather"))
        written = 0 if name.endswith("_") else sum(map(extent, outputs))
        self.kernel(name, read + written, operations_of(name, inputs, outputs))


RECORDER = Recorder()


def operations_of(name, inputs, outputs):
    """Operations of a product or convolution, two per multiply-add; of other kernels only bytes matter."""
    matrices = [x for x in inputs if x.ndim > 1]
    if name in ("convolution", "conv2d"):
        return 2 * outputs[0].numel() * matrices[1][0].numel()
    if kind_of(name) == "linears":
        return 2 * outputs[0].numel() * matrices[0].shape[-1]
    return 0


def kind_of(name):
    """The part of a decoder that a kernel belongs to."""
    if name in PRODUCTS or "_tem_" in name:  # Inductor's own products are templates
        return "linears"
    return name if name == "attention" else "norms and the rest"


def extent(tensor):
    """Bytes of the memory that a tensor covers; an expanded dimension is there once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return int(count)


def moved_bytes(inputs, outputs, gather=False):
    """Bytes read from the inputs; a table that is looked up is read where the output needs it."""
    sizes = [extent(x) for x in inputs]
    if gather and sizes:
        sizes[0] = min(sizes[0], sum(map(extent, outputs)))
    return sum(sizes)


class RecordingMode(FakeTensorMode):
    """Fake tensors, and every operator recorded, but for those that only find out the shapes of another."""

    depth = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.depth += 1
        try:
            outputs = super().__torch_dispatch__(function, types, args, kwargs)
        finally:
            self.depth -= 1
        if self.depth:
            return outputs
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        RECORDER.operator(function, inputs, made)
        return outputs


class FusedAttention(torch.autograd.Function):
    """Attention that keeps what flash and cutlass keep: inputs, result, and a float32 for each row."""

    @staticmethod
    def forward(context, q, k, v):
        output = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        context.save_for_backward(q, k, v, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(context, gradient):
        return tuple(torch.empty_like(x) for x in context.saved_tensors[:3])


@torch.library.custom_op("fake_cuda::attention", mutates_args=())
def attention_operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as compiled functions call it."""
    return torch.empty_like(q)


attention_operator.register_fake(lambda q, k, v: torch.empty_like(q))


def attention(q, k, v, attn_mask=None, **options):
    """One fused attention kernel, its result laid out as flash and cutlass do."""
    if q.device.type != "cuda":
        return SDPA(q, k, v, attn_mask=attn_mask, **options)
    if torch.compiler.is_compiling():  # what is recorded while a function is traced would replace its kernels
        return attention_operator(q, k, v)
    output = FusedAttention.apply(q, k, v)
    given = [q, k, v, output, *([] if attn_mask is None else [attn_mask])]
    RECORDER.kernel("attention", sum(map(extent, given)), 4 * q.numel() * k.shape[-2])
    return output


SDPA = F.scaled_dot_product_attention


class TritonKernel:
    """A kernel that Inductor made: its source, and a launch that is only recorded."""

    made = []  # all of this process

    def __init__(self, name, source):
        self.name, self.source = name, source
        self.made.append(self)

    def tuner(self):
        """Inductor's object around the kernel, which compiles it."""
        from torch._inductor.codecache import PyCodeCache

        return getattr(PyCodeCache.load(self.source), self.name)

    def forms(self):
        """The block sizes and so on among which Inductor would choose by timing."""
        return self.tuner().configs

    def machine_code(self, form):
        """Compile a form for sm_90; returns the bytes of machine code."""
        made = self.tuner()._precompile_config(form).kernel
        code = made.asm["cubin"] if hasattr(made, "asm") else made.cubin_raw  # Inductor's own launcher
        return len(code or Path(made.cubin_path).read_bytes())

    def run(self, *arguments, **_):
        names = self.source.split(f"def {self.name}(")[-1].split(")")[0].split(", ")
        tensors = [pair for pair in zip(names, arguments, strict=False) if isinstance(pair[1], torch.Tensor)]
        written = [x for name, x in tensors if "out_ptr" in name]
        moved, most = sum(map(extent, written)), max(map(extent, written))
        for name, x in tensors:
            if "out_ptr" in name and not name.startswith("in_out"):
                continue
            # a parameter of two dimensions may be a table, of which only the rows looked up are read
            table = name.startswith("in_ptr") and isinstance(x, torch.nn.Parameter) and x.ndim > 1
            moved += min(extent(x), most) if table else extent(x)
        read = [x for name, x in tensors if "out_ptr" not in name]
        RECORDER.kernel(self.name, moved, operations_of(self.name, read, written))


def aligned(tensor):
    """What Inductor does with an input that is not aligned to 16 bytes: it copies it."""
    return tensor.clone() if tensor.storage_offset() * tensor.element_size() % 16 else tensor


class NoDevice:
    """In place of torch.cuda.device: a context that does nothing."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        return False


class NoDriver:
    """In place of Triton's driver: an H100."""

    utils = SimpleNamespace(get_device_properties=lambda *_: {
        "max_shared_mem": 227 * 2**10, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32,
    })

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_current_device(self):
        return 0

    def get_current_stream(self, *_):
        return 0

    def get_device_interface(self):
        return torch.cuda

    def get_benchmarker(self):
        return None

    def is_active(self):
        return True


def install():
    """Make torch, Inductor and Triton believe in one H100."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    import torch._dynamo.device_interface as interfaces
    import torch._subclasses.fake_tensor as fake_tensor
    import torch.cuda.graphs
    from torch._inductor import async_compile, config, select_algorithm
    from torch._inductor.runtime import triton_helpers
    from triton.runtime.driver import driver

    shared = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_properties": lambda *_: H100, "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: None, "set_device": lambda *_: None, "device": NoDevice,
        "current_stream": lambda *_: SimpleNamespace(cuda_stream=0),
    }
    replace(torch.cuda, **shared, _DeviceGuard=NoDevice, get_device_capability=lambda *_: (9, 0),
            get_device_name=lambda *_: H100.name, is_initialized=lambda: False, _lazy_init=lambda: None,
            get_arch_list=lambda: ["sm_90"], is_current_stream_capturing=lambda: False,
            get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8), set_rng_state=lambda *_: None)
    cuda = interfaces.CudaInterface
    functions = {name: staticmethod(value) for name, value in shared.items() if name != "device"}
    replace(cuda, **functions, device=NoDevice, get_compute_capability=staticmethod(lambda *_: 90),
            get_raw_stream=staticmethod(lambda *_: 0), exchange_device=staticmethod(lambda *_: 0),
            maybe_exchange_device=staticmethod(lambda *_: 0), is_triton_capable=staticmethod(lambda *_: True),
            raise_if_triton_unavailable=staticmethod(lambda *_: None))
    worker = ("get_device_properties", "current_device", "set_device")
    replace(cuda.Worker, **{name: functions[name] for name in worker})
    replace(torch.cuda.graphs, is_current_stream_capturing=lambda: False,
            _cuda_isCurrentStreamCapturing=lambda: False)
    replace(fake_tensor, init_gpu_context=lambda *_: None)
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    # A copied tensor would copy its mode with weak references to storages, which would then be freed twice.
    FakeTensorMode.__deepcopy__ = lambda self, memo: self
    driver.set_active(NoDriver())
    replace(torch._C, _cuda_getCurrentRawStream=lambda _: 0)
    replace(torch._C._dynamo.guards, _reinterpret_tensor=torch.as_strided, _empty_strided_cuda=(
        lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device="cuda")
    ), copy_if_misaligned=aligned)
    replace(async_compile.AsyncCompile, wait=lambda self, scope: None,
            triton=lambda self, name, source, *_, **__: TritonKernel(name, source))
    # On a GPU Inductor times the forms of a product and of what it takes in; here it takes the first.
    config.benchmark_epilogue_fusion = config.joint_graph_constant_folding = False
    replace(select_algorithm.AlgorithmSelectorCache, benchmark=(
        lambda self, choices, *_, **__: {choice: float(i) for i, choice in enumerate(choices)}
    ))
    append = select_algorithm.TritonTemplate.maybe_append_choice
    replace(select_algorithm.TritonTemplate, maybe_append_choice=(
        lambda self, choices, **form: None if choices else append(self, choices, **form)
    ))
    replace(triton_helpers, set_driver_to_gpu=lambda: None, set_driver_to_cpu=lambda: None)
    replace(F, scaled_dot_product_attention=attention)
    torch.nn.Module._apply = convert


def convert(module, function, recurse=True):
    """`nn.Module._apply`, which cannot convert fake parameters in place: they are exchanged."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = torch.nn.Parameter(function(weight.detach()), weight.requires_grad)
        for name, tensor in part._buffers.items():
            part._buffers[name] = function(tensor)
    return module


def replace(module, **names):
    for name, value in names.items():
        setattr(module, name, value)
