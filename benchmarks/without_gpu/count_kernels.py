"""Count what generation asks of a GPU, on a machine without one: kernels, bytes and waits, part by part.

    python benchmarks/without_gpu/count_kernels.py --model lpd_l --batch_sizes 1 64 --output_file counts.json

Counts are of operators and of the kernels that Inductor writes; a library may start more inside an operator.
Bytes are those of inputs and results, once each. `estimated_ms` is not a measurement: each kernel takes its
bytes at 3 TB/s or its operations at 550 TFLOP/s (an H100), whichever is longer, and 2.3 microseconds.
"""

import dataclasses
import json
from collections import defaultdict

import torch

from benchmarks.without_gpu import fake_cuda
from benchmarks.without_gpu.fake_cuda import RECORDER
from engine.decoding import Parts, decode
from engine.fast import FastDecoder, compiled_parts, with_compiled_layers
from engine.sampling import Sampling
from models.lpd import LPD, LPD_CONFIGS
from models.vqgan import VQConfig, VQModel
from orders.schedule import cosine_group_sizes
from util import cli
from util.files import write_json

BYTES_PER_S, OPERATIONS_PER_S, SECONDS_PER_KERNEL = 3e12, 5.5e14, 2.3e-6


def parse_args(argv=None):
    parser = cli.Parser(description="Count the kernels of generation without a GPU")
    add = parser.add_argument
    add("--model", choices=sorted(LPD_CONFIGS), default="lpd_l")
    add("--grid_size", type=cli.number(int, 1), default=16, help="32 for 512 px")
    add("--generation_steps", type=cli.number(int, 1), default=20)
    cli.add_settings(parser, Sampling)
    parser.set_defaults(cfg=4.8)
    add("--float32", action="store_true", help="default: bfloat16, as --bf16 of the programs")
    add("--batch_sizes", type=cli.number(int, 1), nargs="+", default=[1, 64])
    add("--paths", choices=["plain", "compiled"], nargs="+", default=["plain", "compiled"])
    add("--no_decoder", action="store_true", help="tokens only")
    add("--output_file", metavar="FILE", help=".json to write")
    return parser.parse_args(argv)


def in_part(name, function):
    """The function, its kernels recorded as a part of that name."""

    def inside(*args, **kwargs):
        with RECORDER.part(name):
            return function(*args, **kwargs)

    return inside


def paths(model, tokenizer, group_sizes, sampling):
    """(steps, decoder) of each path by name; steps turn `decoding_inputs` into tokens."""
    dtype = model.head.weight.dtype

    def steps(model, parts):
        parts = parts._replace(draw=in_part("sampling", parts.draw))
        return lambda inputs: decode(model, inputs, group_sizes, sampling, parts=parts)[0]

    return {
        "plain": (steps(model, Parts()), FastDecoder(tokenizer, dtype)),
        "compiled": (
            steps(with_compiled_layers(model), compiled_parts()), FastDecoder(tokenizer, dtype, fused=True)
        ),
    }


def fake_inputs(batch, num_tokens):
    """`decoding_inputs` without values."""
    shapes = (batch,), (batch, num_tokens), (batch, 2)
    return [torch.empty(shape, dtype=torch.int64, device="cuda") for shape in shapes]


def seconds(kernel):
    """An estimate of a kernel's time."""
    longest = max(kernel.bytes / BYTES_PER_S, kernel.operations / OPERATIONS_PER_S)
    return longest + SECONDS_PER_KERNEL


def count(steps, decoder, inputs):
    """Kernels, gigabytes and estimated milliseconds of each part of one batch, their sum before the decoder,
    and the operators that wait for the device."""

    def run():
        tokens = steps(inputs)
        if decoder:
            with RECORDER.part("decoder"):
                decoder.decode(tokens)

    run()  # compiles
    with RECORDER.recording() as kernels:
        run()
    parts = defaultdict(lambda: {"kernels": 0, "gigabytes": 0.0, "estimated_ms": 0.0})
    for kernel in kernels:
        for name in (kernel.part, *(["before the decoder"] if kernel.part != "decoder" else [])):
            parts[name]["kernels"] += 1
            parts[name]["gigabytes"] += kernel.bytes / 1e9
            parts[name]["estimated_ms"] += 1000 * seconds(kernel)
    rounded = {name: {k: round(v, 2) for k, v in values.items()} for name, values in parts.items()}
    return {"parts": rounded, "waits": dict(RECORDER.waits)}


def counted(args):
    """The counts of each path and batch size."""
    config = dataclasses.replace(LPD_CONFIGS[args.model], grid_size=args.grid_size)
    sampling = cli.settings_from(Sampling, args)
    group_sizes = cosine_group_sizes(config.num_tokens, args.generation_steps)
    rows = []
    with fake_cuda.RecordingMode(allow_non_fake_inputs=True), torch.inference_mode():
        with torch.device("cuda"):
            model, tokenizer = LPD(config).eval(), VQModel(VQConfig()).eval()
        model = model if args.float32 else model.bf16_linears()
        ways = paths(model, tokenizer, group_sizes, sampling)
        for batch in args.batch_sizes:
            for path in args.paths:
                steps, decoder = ways[path]
                inputs = fake_inputs(batch, config.num_tokens)
                result = count(steps, None if args.no_decoder else decoder, inputs)
                rows.append({"batch": batch, "path": path, **result})
    return rows


def main(argv=None):
    args = parse_args(argv)
    fake_cuda.install()
    report = {"torch": torch.__version__, "settings": vars(args), "counts": counted(args)}
    print(json.dumps(report, indent=1))
    if args.output_file:
        write_json(args.output_file, report)


if __name__ == "__main__":
    cli.run(main)
