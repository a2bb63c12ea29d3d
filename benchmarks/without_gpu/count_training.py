"""Memory that each training script needs of a GPU, counted without one: weights, gradients, moments, and
everything that the backward pass of a micro-batch keeps.

    python benchmarks/without_gpu/count_training.py
    MAX_BATCH_PER_GPU=32 python benchmarks/without_gpu/count_training.py scripts/train/lpd_xxl_256.sh
"""

import dataclasses
import json
import os
import shlex
import subprocess
from pathlib import Path

import torch

import main_lpd
from benchmarks.without_gpu import fake_cuda
from engine.generate import default_steps
from models.lpd import LPD, LPD_CONFIGS, Execution
from models.masks import Mask
from orders.schedule import cosine_group_sizes
from util import cli

GB = 1e9
WORKSPACE = 3.0  # GB: CUDA itself, cuBLAS, NCCL and fragments of the allocator
SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "scripts/train").glob("*.sh"))


def parse_args(argv=None):
    parser = cli.Parser(description="Memory that training scripts need of a GPU, counted without one")
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, type=Path, help="default: all")
    parser.add_argument("--grad_checkpointing", action="store_true")
    return parser.parse_args(argv)


def flags_of(script):
    """The flags that a training script gives to main_lpd.py on one GPU."""
    names = ("CACHED_PATH", "VQGAN_PATH", "PRETRAINED_CKPT")
    environment = {**os.environ, **dict.fromkeys(names, os.devnull), "OUTPUT_DIR": "run", "NGPU": "1"}
    command, environment["DRY_RUN"] = ["bash", script], "1"
    line = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    words = shlex.split(line)
    return main_lpd.parse_args(words[[Path(word).name for word in words].index("main_lpd.py") + 1 :])


def kept_bytes(model, batch):
    """Bytes that autograd keeps of one micro-batch under bfloat16 autocast, each storage once; and of the
    largest tensor, a temporary of which the backward pass needs twice."""
    L, kept = model.config.num_tokens, {}
    tokens, order = (torch.zeros(batch, L, dtype=torch.int64, device="cuda") for _ in range(2))
    labels = torch.zeros(batch, dtype=torch.int64, device="cuda")

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[id(storage)] = storage  # held, so that no other takes its id
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cuda", torch.bfloat16):
            model.loss(tokens, labels, order, cosine_group_sizes(L, default_steps(L)))
    sizes = [storage.nbytes() for storage in kept.values()]
    return sum(sizes), max(sizes)


def memory(config, batch, *, grad_checkpointing=False, ema=False):
    """Gigabytes by what they are for."""
    with fake_cuda.FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            L, execution = config.num_tokens, Execution(grad_checkpointing=grad_checkpointing)
            mask, model = Mask(L, torch.empty(2 * L, 2 * L, dtype=torch.bool)), LPD(config, execution).train()
            model.training_mask = lambda *_: mask
        weights = sum(parameter.numel() for parameter in model.parameters())
        kept, largest = kept_bytes(model, batch)
    parts = {"state": weights * (16 + 4 * ema) / GB, "kept": kept / GB, "temporaries": 2 * largest / GB}
    return {**parts, "workspace": WORKSPACE, "all": sum(parts.values()) + WORKSPACE}


def main(argv=None):
    args = parse_args(argv)
    fake_cuda.install()
    for script in args.scripts:
        flags = flags_of(script)
        config = dataclasses.replace(LPD_CONFIGS[flags.model], grid_size=flags.img_size // 16)
        checkpointing = args.grad_checkpointing or flags.grad_checkpointing
        parts = memory(config, flags.batch_size, grad_checkpointing=checkpointing, ema=flags.ema > 0)
        row = {"script": script.name, "batch_size": flags.batch_size, "accum_iter": flags.accum_iter}
        print(json.dumps(row | {f"{name}_gb": round(value, 1) for name, value in parts.items()}), flush=True)


if __name__ == "__main__":
    cli.run(main)
