"""What training and sampling cost, without a GPU: arithmetic, hours, memory, disk. Prints the tables of
docs/cost.md.

    python benchmarks/without_gpu/cost.py
    python benchmarks/without_gpu/cost.py --model lpd_small --img_size 128 --images 50000 --epochs 200
"""

import dataclasses
import tempfile
import time
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.without_gpu import count_training, fake_cuda
from engine.decoding import decode
from engine.fast import FastDecoder
from engine.generate import default_steps
from engine.loop import count_operations
from engine.sampling import Sampling
from models.lpd import LPD, LPD_CONFIGS, LPDConfig
from models.vqgan import VQConfig, VQModel
from orders.schedule import cosine_group_sizes
from util import cli
from util.images import center_crop, read_image
from util.token_cache import CacheMeta, CacheWriter, names_digest

GPUS = {"A100": 312e12, "H100": 989e12}  # operations a second, bfloat16 products of dense matrices, by NVIDIA
STRIDE, SHARD = 16, 4096
EVALUATED, FEATURES = 50_000, 2048 + 1008  # images of an evaluation; Inception's numbers of each


@dataclasses.dataclass(frozen=True)
class Run:
    """A training: `images` in its data, `epochs` of them."""

    name: str
    config: LPDConfig
    epochs: float
    images: int

    @property
    def img_size(self):
        return self.config.grid_size * STRIDE

    @property
    def group_sizes(self):
        return cosine_group_sizes(self.config.num_tokens, default_steps(self.config.num_tokens))


def parse_args(argv=None):
    parser = cli.Parser(description="What training and sampling cost, found without a GPU")
    add = parser.add_argument
    add("--model", choices=sorted(LPD_CONFIGS), help="default: the scripts of scripts/train")
    add("--img_size", type=cli.number(int, STRIDE), default=256)
    add("--images", type=cli.number(int, 1), default=1_281_167, help="default: those of ImageNet")
    add("--epochs", type=cli.number(float, 0), default=450)
    add("--share", type=cli.number(float, 0.01, 1), default=0.4, help="of the peak that training reaches")
    add("--micro_batches", type=cli.number(int, 1), nargs="+", default=[8, 16, 32, 64])
    return parser.parse_args(argv)


def runs_of(args):
    """The Run of the flags, or those of the training scripts."""
    if args.model:
        config = dataclasses.replace(LPD_CONFIGS[args.model], grid_size=args.img_size // STRIDE)
        return [Run(f"{args.model}, {args.img_size} px", config, args.epochs, args.images)]
    runs = []
    for script in count_training.SCRIPTS:
        flags = count_training.flags_of(script)
        config = dataclasses.replace(LPD_CONFIGS[flags.model], grid_size=flags.img_size // STRIDE)
        runs.append(Run(script.stem, config, flags.epochs, args.images))
    return runs


def table(header, rows):
    """A Markdown table; the first column names its rows."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


# Arithmetic and hours.


def training_operations(run):
    """Of a training step, forward and backward, for one image."""

    def loss_of_one():
        order = torch.zeros(1, run.config.num_tokens, dtype=torch.long)
        return LPD(run.config).loss(order, order[:, 0], order, run.group_sizes)

    return count_operations(loss_of_one)


def encoding_operations(img_size):
    """Of the tokens of an image and of its mirror image, by the VQ-16 tokenizer."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        VQModel(VQConfig()).encode(torch.zeros(2, 3, img_size, img_size))
    return counter.get_total_flops()


def sampling_operations(run):
    """Of the tokens of one image, with guidance, and of their decoder. All layers but the last are alike: one
    and two tell what all of them do."""
    totals = []
    for depth in (1, 2):
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            inputs = (torch.zeros(1, n, dtype=torch.long) for n in (run.config.num_tokens, 2))
            model = LPD(dataclasses.replace(run.config, depth=depth)).eval()
            decode(model, [torch.zeros(1, dtype=torch.long), *inputs], run.group_sizes, Sampling(cfg=2.0))
        totals.append(counter.get_total_flops())
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        VQModel(VQConfig()).decode(torch.zeros(1, run.config.num_tokens, dtype=torch.long))
    return totals[0] + (run.config.depth - 1) * (totals[1] - totals[0]), counter.get_total_flops()


def hours(operations, share):
    """GPU hours at a share of the peak, for each of GPUS."""
    return [f"{operations / (share * peak) / 3600:,.0f}" for peak in GPUS.values()]


def training_table(runs, share):
    rows = []
    for run in runs:
        each = training_operations(run)
        total = each * run.images * run.epochs
        rows.append([
            run.name, f"{run.images * run.epochs / 1e6:,.1f} M", f"{each / 1e12:.2f}", f"{total / 1e18:,.1f}",
            *hours(total, share),
        ])
    names = [f"{name} hours (estimated)" for name in GPUS]
    return table(["recipe", "images seen", "TFLOP an image (counted)", "EFLOP (counted)", *names], rows)


def sampling_table(runs, share):
    rows = []
    for run in runs:
        tokens, decoder = sampling_operations(run)
        total = EVALUATED * (tokens + decoder)
        rows.append([
            run.name, len(run.group_sizes), *(f"{x / 1e12:.2f}" for x in (tokens, decoder)),
            *(f"{total / (share * peak) / 60:,.0f}" for peak in GPUS.values()),
        ])
    counted = ("TFLOP of an image's tokens (counted)", "of its decoder (counted)")
    names = [f"50,000 images, {name} minutes (estimated)" for name in GPUS]
    return table(["sampling", "steps", *counted, *names], rows)


def caching_table(runs, share):
    rows, rate = [], reading_rate()
    for size in sorted({run.img_size for run in runs}):
        each, images = encoding_operations(size), runs[0].images
        minutes = (f"{each * images / (share * peak) / 60:,.0f}" for peak in GPUS.values())
        rows.append([f"{size} px", f"{each / 1e12:.2f}", *minutes, f"{images / rate(size) / 60:,.0f}"])
    names = [f"{name} minutes (estimated)" for name in GPUS]
    reading = "minutes of one core that reads JPEGs (measured)"
    return table(["caching", "TFLOP an image and its mirror image (counted)", *names, reading], rows)


def reading_rate(count=40):
    """A function from a size in pixels to images that one core reads and crops a second: noisy JPEGs of
    500x375 pixels, about ImageNet's, in the processor's time."""
    noise = np.random.default_rng(0).integers(0, 256, (47, 63, 3), np.uint8)
    picture = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)

    def rate(size):
        with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
            picture.save(file.name, quality=95)
            begin = time.process_time()
            for _ in range(count):
                center_crop(read_image(Path(file.name)), size)
            return count / (time.process_time() - begin)

    return rate


# Memory.


class LiveBytes(TorchDispatchMode):
    """`most` is the bytes of tensors made inside it that lived at once."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(made) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.most = max(self.most, sum(self.live.values()))
        return made


def sampling_memory(config):
    """Bytes of the weights, as of --bf16, and of each image: KV cache, with guidance, and decoder."""
    with fake_cuda.FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        with torch.device("cuda"):
            model, tokenizer = LPD(config).eval().bf16_linears(), VQModel(VQConfig()).eval()
            tokens = torch.empty(1, config.num_tokens, dtype=torch.long)
        decoder, kv_cache = FastDecoder(tokenizer), model.new_kv_cache(2)
        with LiveBytes() as made:
            decoder.decode(tokens)
        weights = [*model.parameters(), *decoder.decoder.parameters(), *tokenizer.encoder.parameters()]
        return sum(x.nbytes for x in weights), kv_cache.nbytes, made.most


def sampling_memory_table(runs, batches=(1, 64)):
    rows = []
    for run in runs:
        weights, *each = (size / 1e9 for size in sampling_memory(run.config))
        sums = (weights + n * sum(each) + count_training.WORKSPACE for n in batches)
        rows.append([run.name, f"{weights:.1f}", *(f"{x:.2f}" for x in each), *(f"{x:.0f}" for x in sums)])
    names = ["weights", "KV cache of an image", "decoder of an image", *(f"all, batch {n}" for n in batches)]
    return table(["GB of GPU memory, sampling (counted)", *names], rows)


def memory_table(runs, micro_batches):
    rows = [
        [run.name, *(f"{count_training.memory(run.config, n)['all']:.0f}" for n in micro_batches)]
        for run in runs
    ]
    return table(["GB of GPU memory (counted)", *(f"micro-batch {n}" for n in micro_batches)], rows)


# Disk.


def cache_bytes(config, images):
    """Of a token cache of this many images, from a shard of 64 that is written."""
    names = [f"n01440764/n01440764_{i}.JPEG" for i in range(10000, 10064)]
    meta = CacheMeta(
        img_size=config.grid_size * STRIDE, grid_size=config.grid_size, vocab_size=config.vocab_size,
        class_names=("n01440764",), tokenizer_digest="0123", num_images=len(names), shard_size=SHARD,
        names_digest=names_digest(names),
    )
    with tempfile.TemporaryDirectory() as folder:
        writer = CacheWriter(folder, meta)
        writer.begin()
        writer.write_shard(0, np.zeros((64, 2, config.num_tokens)), np.zeros(64), names)
        return images * sum(file.stat().st_size for file in Path(folder).glob("shard*")) // len(names)


def checkpoint_bytes(config):
    """Of a checkpoint: weights and the optimizer's two moments, float32."""
    with torch.device("meta"):
        return 12 * sum(parameter.numel() for parameter in LPD(config).parameters())


def disk_table(runs):
    rows = []
    for run in runs:
        saved = checkpoint_bytes(run.config) / 1e9
        sizes = cache_bytes(run.config, run.images) / 1e9, saved, saved / 3, 2 * saved + saved / 3
        rows.append([run.name, *(f"{size:.1f}" for size in sizes)])
    names = ["token cache", "checkpoint", "weights alone", "a run: two checkpoints and the weights"]
    return table(["GB of disk (counted)", *names], rows)


def evaluation_table(runs):
    rows = [
        [f"{size} px", f"{EVALUATED * FEATURES * 4 / 1e9:.1f}", f"{EVALUATED * size**2 * 3 / 1e9:.1f}"]
        for size in sorted({run.img_size for run in runs})
    ]
    names = ["features, until the result is written", "with --save_npz"]
    return table(["GB of disk, 50,000 images (counted)", *names], rows)


def main(argv=None):
    args = parse_args(argv)
    runs = runs_of(args)
    tables = (
        training_table(runs, args.share), sampling_table(runs, args.share), caching_table(runs, args.share),
        disk_table(runs), evaluation_table(runs),
    )
    print("\n".join(tables))
    if find_spec("triton"):
        fake_cuda.install()  # replaces parts of torch in this process for good
        print(memory_table(runs, args.micro_batches))
        print(sampling_memory_table(runs), end="")
    else:
        print("GPU memory is not counted: Triton, which comes with torch's CUDA builds, is not installed")


if __name__ == "__main__":
    cli.run(main)
