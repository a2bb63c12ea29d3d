"""Generate images of chosen classes: PNGs, a labelled grid, the order, a GIF of the decoding.

    python main_sample.py --pretrained_ckpt assets/fashion_mnist --classes sneaker 8
"""

from util import cli  # isort: skip
import dataclasses
import time
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from engine import published
from engine.decoding import generate_tokens
from engine.fast import FastGenerator, for_inference
from engine.generate import OrderChoice, generate_images, load_pair, resolve_settings
from engine.sampling import Sampling
from models.weights import ORDER_SUFFIXES, find
from orders.plot import steps_of_cells
from orders.schedule import cosine_group_sizes
from util import pictures
from util.device import choose_device, describe
from util.files import write_json
from util.images import to_uint8

RECORD = "sample.json"  # what was made and how; marks a folder as this program's


def parse_args(argv=None):
    parser = cli.Parser(description="Generate images of chosen classes")
    cli.add_weights_flags(parser, published.MODELS)
    cli.add_output_flags(parser)
    add = parser.add_argument
    add("--classes", nargs="+", metavar="CLASS", help="indices or names; default: the first ten")
    cli.add_class_names_flag(parser)
    add("--num_per_class", type=cli.number(int, 1), default=8)
    add("--batch_size", type=cli.number(int, 1), default=64)
    add("--compare_steps", type=cli.number(int, 1), help="make the same images in N steps too")
    cli.add_seed_flag(parser)
    add("--bf16", action="store_true", help="bfloat16; without it float32")
    add("--compile", action="store_true", help="generate by the fast path")
    cli.add_device_flags(parser)
    cli.add_settings(parser, OrderChoice)
    cli.add_settings(parser, Sampling)
    return published.parse(parser, argv)


def load(args):
    """Model, tokenizer, the settings to generate with (one or two), labels int64 [n], and class names."""
    model, tokenizer, info = load_pair(args.pretrained_ckpt, args.vqgan_path, args.model)
    cli.check_weights(args, model.config, tokenizer.config)
    names = cli.class_names(args, model.config.num_classes, info)
    chosen = [cli.find_class("--classes", text, names) for text in args.classes or ()]
    labels = torch.tensor(chosen or range(min(10, len(names)))).repeat_interleave(args.num_per_class)
    grid_size = model.config.grid_size
    settings = resolve_settings(
        grid_size, sampling=cli.settings_from(Sampling, args), seed=args.seed, num_images=len(labels),
        **cli.chosen(OrderChoice, args),
    )
    variants = [settings]
    if args.compare_steps:
        sizes = cosine_group_sizes(grid_size**2, args.compare_steps)
        variants.append(dataclasses.replace(settings, group_sizes=sizes))
    return model, tokenizer, variants, labels, names


def generate(make, settings, labels, batches):
    """Images, uint8 [b, H, W, 3] for each of `batches`, int64 [b] into labels [n], and seconds of each."""
    images, seconds, sizes, seed = [], [], settings.group_sizes, settings.seed
    for batch in tqdm(batches, unit="batch", desc=f"{len(sizes)} steps"):
        orders = settings.orders(batch.numpy())
        begin = time.perf_counter()
        made = make(labels[batch], orders, sizes, settings.sampling, seed=seed, image_ids=batch)
        images.append(made.cpu().numpy())
        seconds.append(time.perf_counter() - begin)
    return images, seconds


def compare(make, variants, labels, batches):
    """Images of the second variant, and the seconds for one of the first and of the second: a dict of both,
    alone (the least of three) and in a batch. First calls do not count."""
    seconds = {"alone": [], "in_batch": []}
    for settings in variants:
        _, alone = generate(make, settings, labels, [batches[0][:1]] * 4)
        images, in_batch = generate(make, settings, labels, batches[:1] + batches)
        seconds["alone"].append(min(alone[1:]))
        seconds["in_batch"].append(sum(in_batch[1:]) / len(labels))
    return np.concatenate(images[1:]), seconds


def save_images(output, steps, images, names, rows):
    """One PNG per image, in a folder of the name of its class. Returns the sheet of all; the dict `rows` has
    the first image and the title of each row."""
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        name = name.strip(".").replace("/", "_") or "_"  # it must not lead out of the folder
        pictures.save_png(output / f"images_{steps}_steps" / name / f"{i:05d}.png", image)
    return pictures.labelled_rows(images, list(rows.values()), title=f"{steps} steps")


def save_film_and_order(output, model, decoder, settings, labels, rows):
    """The film of the first images of `rows` (ten at most), and the order of the first."""
    ids, made = torch.tensor(list(rows)[:10]), []
    _, order = generate_tokens(
        model, labels[ids], settings.orders(ids.numpy()), settings.group_sizes, settings.sampling,
        seed=settings.seed, image_ids=ids, return_order=True,
        on_group=lambda tokens, *_: made.append(to_uint8(decoder.decode(tokens)).cpu().numpy()),
    )
    steps = steps_of_cells(order.cpu().numpy(), settings.group_sizes)
    steps = steps.reshape(len(ids), settings.grid_size, -1) + 1
    names = list(rows.values())
    frames = [pictures.film_frame(*film, steps, names) for film in enumerate([made[0], *made])]
    pictures.save_film(output / "film.gif", frames)
    title = f"{settings.order} order, {steps.max()} steps"
    pictures.save_png(output / "order.png", pictures.order_map(steps[0], title))


def main(argv=None):
    args = parse_args(argv)
    cli.required(args, "pretrained_ckpt")
    with cli.checking():
        args.lpd_order_file = args.lpd_order_file and find(args.lpd_order_file, ORDER_SUFFIXES)
        device = choose_device(args.device)
        model, tokenizer, variants, labels, names = load(args)
        output = cli.prepare_output(args, RECORD)
    print(describe(model, device, bf16=args.bf16))
    model, decoder = for_inference(model, tokenizer, device, bf16=args.bf16, compiled=args.compile)
    how = {"bf16": args.bf16, "compile": args.compile, "labels": labels.tolist()}
    record = {"settings": variants[0].as_json(), **how}
    write_json(output / RECORD, record)
    plain = partial(generate_images, model, decoder)
    make = FastGenerator(model, decoder).generate_images if args.compile else plain
    names = [names[label] for label in labels.tolist()]
    rows = {i: cli.plain_name(names[i]) for i in range(0, len(labels), args.num_per_class)}
    batches = list(torch.arange(len(labels)).split(args.batch_size))
    images, seconds = generate(make, variants[0], labels, batches)
    steps = [len(settings.group_sizes) for settings in variants]
    sheet = save_images(output, steps[0], np.concatenate(images), names, rows)
    pictures.save_png(output / "grid.png", sheet)
    save_film_and_order(output, model, decoder, variants[0], labels, rows)
    print(f"{len(labels)} images in {sum(seconds):.1f} s: {output}/grid.png, order.png, film.gif")
    if args.compare_steps:
        images, seconds = compare(make, variants, labels, batches)
        sheets = [sheet, save_images(output, steps[1], images, names, rows)]
        pictures.save_png(output / "comparison.png", pictures.side_by_side(sheets))
        write_json(output / RECORD, {**record, "steps": steps, "seconds_per_image": seconds})
        for how, (one, other) in seconds.items():
            print(f"{how}: {one:.4f} s in {steps[0]} steps, {other:.4f} s in {steps[1]}: {other / one:.1f}x")


if __name__ == "__main__":
    cli.run(main)
