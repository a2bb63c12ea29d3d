"""Generate images of chosen classes: PNGs, a labelled grid, the order, a film of the image filling in.

    python main_sample.py --pretrained_ckpt assets/fashion_mnist/lpd.safetensors --classes sneaker 8 \\
        --vqgan_path assets/fashion_mnist/tokenizer.safetensors --output_dir output/samples

With --compare_steps N the same images are also made in N steps (64 of 64: one token at a time), timed and put
beside the others.
"""

import dataclasses
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.checkpoint import load_lpd, load_tokenizer, state_digest
from engine.fast_generate import FastGenerator
from engine.generate import generate_images, generate_tokens
from engine.settings import resolve_settings
from models.lpd import LPD_CONFIGS
from models.vqgan import FastDecoder
from orders.measure import steps_of_cells
from orders.schedule import cosine_group_sizes
from util import cli, dist, pictures
from util.files import write_json
from util.images import to_uint8

RECORD = "sample.json"  # what was made and how; marks a folder as ours


def parse_args(argv=None):
    parser = cli.Parser(description="Generate images of chosen classes")
    parser.add_argument(
        "--pretrained_ckpt", metavar="FILE", help="LPD weights (.safetensors, .pth, folder, hf://owner/repo)"
    )
    parser.add_argument("--model", choices=sorted(LPD_CONFIGS), help="size of weights that do not say it")
    cli.add_tokenizer_flags(parser)
    cli.add_output_flags(parser)
    parser.add_argument("--img_size", type=cli.number(int, 1), help="checked against the weights'")
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="indices or names; default: the first ten"
    )
    cli.add_class_names_flag(parser)
    parser.add_argument("--num_per_class", type=cli.number(int, 1), default=8)
    parser.add_argument("--batch_size", type=cli.number(int, 1), default=64)
    parser.add_argument(
        "--compare_steps", type=cli.number(int, 1), help="make the same images in so many steps too"
    )
    cli.add_seed_flag(parser)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true", help="generate by the fast path; untried on a GPU")
    cli.add_device_flags(parser)
    cli.add_generation_flags(parser)
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds an image, decoding included: alone (batch 1, the least of three), and as one of a batch."""

    name: str
    steps: int
    alone: float
    in_batch: float


def timed(make, settings, labels, image_ids, device):
    """Images of one batch as uint8 [b, H, W, 3] on the CPU, and the seconds they took."""
    orders = settings.orders(image_ids)
    dist.synchronize(device)
    start = time.perf_counter()
    images = make(
        labels, orders, settings.group_sizes, image_ids=torch.as_tensor(image_ids), **settings.decoding()
    ).cpu()
    return images, time.perf_counter() - start


def generate(make, settings, labels, batch_size, device):
    """Images of labels int64 [n] as uint8 [n, H, W, 3] by `make`, and their Timing."""
    steps = len(settings.group_sizes)
    alone = [timed(make, settings, labels[:1], [0], device)[1] for _ in range(4)][1:]
    made = [
        timed(make, settings, labels[batch], batch.numpy(), device)
        for batch in tqdm(torch.arange(len(labels)).split(batch_size), unit="batch", desc=f"{steps} steps")
    ]
    images, seconds = zip(*made, strict=True)
    timing = Timing(f"{settings.order} order", steps, min(alone), sum(seconds) / len(labels))
    return torch.cat(images).numpy(), timing


def film(model, tokenizer, settings, labels, image_ids, columns):
    """Frames of images filling in, one per step; places not generated yet are grey."""
    orders = settings.orders(image_ids)
    frames = []

    def add_frame(tokens, filled):
        images = pictures.filled(to_uint8(tokenizer.decode(tokens)).cpu().numpy(), orders.numpy(), filled)
        frames.append(pictures.grid(images, columns, scale=max(1, 96 // images.shape[1])))

    generate_tokens(
        model, labels, orders, settings.group_sizes, image_ids=torch.as_tensor(image_ids), on_group=add_frame,
        **settings.decoding(),
    )  # fmt: skip
    return [np.full_like(frames[0], pictures.GREY), *frames]


def save_images(folder, images, labels, names):
    """One PNG per image, in a folder per class."""
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        name = names[label].strip(".").replace("/", "_") or "_"  # names come out of files: never a way up
        pictures.save_png(folder / name / f"{i:05d}.png", image)


def table(timings):
    """Lines of text, a row for each Timing, each with its speed against the last."""
    lines = [f"{'':16}{'steps':>6}{'s, one image alone':>20}{'s/image in a batch':>20}"]
    for t in timings:
        alone, in_batch = timings[-1].alone / t.alone, timings[-1].in_batch / t.in_batch
        lines.append(
            f"{t.name:16}{t.steps:6d}{t.alone:12.4f} ({alone:4.1f}x){t.in_batch:12.4f} ({in_batch:4.1f}x)"
        )
    return "\n".join(lines)


def load(args, device):
    """Model, tokenizer, the settings to generate with (one or two), labels and class names, all checked."""
    tokenizer = load_tokenizer(args.vqgan_path)
    cli.check_tokenizer_flags(args, tokenizer.config)
    model, info = load_lpd(args.pretrained_ckpt, args.model)
    cli.check_fit(args, model, tokenizer, info, state_digest(tokenizer))
    names = cli.class_names(args, model.config.num_classes, info)
    chosen = args.classes or [str(i) for i in range(min(10, len(names)))]
    labels = torch.tensor([cli.find_class("--classes", text, names) for text in chosen])
    labels = labels.repeat_interleave(args.num_per_class)
    chosen_settings = {k: getattr(args, k) for k in cli.GENERATION_FLAGS}
    variants = [resolve_settings(model.config.grid_size, num_images=len(labels), **chosen_settings)]
    if args.compare_steps:
        sizes = cosine_group_sizes(model.config.num_tokens, args.compare_steps)
        if len(sizes) == len(variants[0].group_sizes):
            raise ValueError(f"--compare_steps {len(sizes)} is what is compared with: give another number")
        variants.append(dataclasses.replace(variants[0], group_sizes=sizes))
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return model.to(device, dtype), tokenizer.to(device), variants, labels, names


def make_variant(args, output, make, settings, labels, names, device):
    """Generate and save the images of one setting; their sheet and their Timing."""
    steps = len(settings.group_sizes)
    images, timing = generate(make, settings, labels, args.batch_size, device)
    save_images(output / f"images_{steps}_steps", images, labels, names)
    rows = [re.sub(r"^\d+_", "", names[label]) for label in labels[:: args.num_per_class].tolist()]
    sheet = pictures.labelled_rows(images, rows, scale=max(1, 64 // images.shape[1]), title=f"{steps} steps")
    return sheet, timing


def save_film_and_order(output, model, tokenizer, settings, labels, num_per_class):
    """The film of the first image of each class (ten at most), and the order of the first image."""
    shown = list(range(0, len(labels), num_per_class))[:10]
    frames = film(model, tokenizer, settings, labels[shown], shown, columns=min(5, len(shown)))
    pictures.save_film(output / "film.gif", frames, seconds=max(0.06, 3.0 / len(frames)))
    cells = steps_of_cells(settings.orders([0]).numpy(), settings.group_sizes)[0]
    title = f"{settings.order} order, {len(settings.group_sizes)} steps"
    pictures.save_order_map(output / "order.png", cells.reshape(settings.grid_size, -1), title)


def main(argv=None):
    args = parse_args(argv)
    cli.required(args, "pretrained_ckpt", "vqgan_path", "output_dir")
    cli.find_files(args)
    with cli.checking():
        world = dist.init(args.device)
        model, tokenizer, variants, labels, names = load(args, world.device)
        cli.prepare_output(args, RECORD)
    output = Path(args.output_dir)
    record = {
        "settings": variants[0].as_json(), "labels": labels.tolist(), "bf16": args.bf16,
        "compile": args.compile,
    }  # fmt: skip
    write_json(output / RECORD, record)
    make = partial(generate_images, model, tokenizer)
    if args.compile:
        make = FastGenerator(model, FastDecoder(tokenizer, model.pos_embed.dtype)).generate_images
    made = [make_variant(args, output, make, settings, labels, names, world.device) for settings in variants]
    sheets, timings = zip(*made, strict=True)
    pictures.save_png(output / "grid.png", sheets[0])
    if len(sheets) > 1:
        pictures.save_png(output / "comparison.png", pictures.side_by_side(sheets))
    save_film_and_order(output, model, tokenizer, variants[0], labels, args.num_per_class)
    record["seconds_per_image"] = [dataclasses.asdict(timing) for timing in timings]
    write_json(output / RECORD, record)
    print(table(timings))
    print(
        f"pictures: {output}/grid.png, order.png, film.gif{', comparison.png' if args.compare_steps else ''}"
    )
    dist.finish()


if __name__ == "__main__":
    cli.run(main)
