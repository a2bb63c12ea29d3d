"""Edit a picture: cells of the token grid that contain a pixel to generate are generated, the rest is kept.

    python main_edit.py --pretrained_ckpt assets/fashion_mnist --image shirt.png --class coat --box 0 14 28 28
"""

from util import cli  # isort: skip
import numpy as np
import torch

from engine import published
from engine.decoding import edit_tokens
from engine.fast import for_inference
from engine.generate import OrderChoice, load_pair, resolve_settings
from engine.sampling import Sampling
from orders.lpd_order import random_orders
from util import images, pictures
from util.device import choose_device, describe
from util.files import write_json

RECORD = "edit.json"  # what was made and how; marks a folder as this program's
SHOWN = 8  # results on the sheet and in the GIF


def parse_args(argv=None):
    parser = cli.Parser(description="Edit a picture: keep a part, generate the rest as a class")
    add, count = parser.add_argument, cli.number(int, 0)
    add("--image", metavar="FILE", help="the picture")
    cli.add_reading_flags(parser)
    add("--class", metavar="CLASS", help="index or name of what the edited picture shows")
    part = parser.add_mutually_exclusive_group(required=True).add_argument
    part("--mask", metavar="FILE", help="picture of the same size, white where to generate")
    part("--box", type=count, nargs=4, metavar=("X0", "Y0", "X1", "Y1"), help="generate X0..X1-1, Y0..Y1-1")
    part("--outpaint", type=count, nargs=4, metavar=("L", "T", "R", "B"), help="generate borders this wide")
    part("--variations", type=cli.number(float, 0, 1), metavar="SHARE", help="generate random cells")
    add("--num", type=cli.number(int, 1), default=4, help="results, each with its own random draws")
    add("--paste", type=count, metavar="PIXELS", help="blend over this many; default: a 16th of the side")
    add("--no_paste", action="store_true", help="kept parts pass through the tokenizer too")
    cli.add_weights_flags(parser, published.MODELS)
    cli.add_output_flags(parser)
    cli.add_class_names_flag(parser)
    add("--batch_size", type=cli.number(int, 1), default=64)
    cli.add_seed_flag(parser)
    add("--bf16", action="store_true", help="bfloat16; without it float32")
    cli.add_device_flags(parser)
    cli.add_settings(parser, OrderChoice, "lpd_order_file")
    cli.add_settings(parser, Sampling)
    return published.parse(parser, argv)


def prepare(args, image, img_size, grid_size):
    """The picture as the model gets it, uint8 [S, S, 3], and the cells to generate, bool [num, L]."""
    pixels = images.center_crop(image, img_size)
    mask = np.zeros((image.height, image.width), bool)
    if args.mask:
        mask = images.read_mask(cli.existing_file("--mask", args.mask))
        if mask.shape[::-1] != image.size:
            raise ValueError(f"--mask has size {mask.shape[::-1]}, --image has {image.size}")
    elif args.box:
        x0, y0, x1, y1 = args.box
        if not (x0 < x1 <= image.width and y0 < y1 <= image.height):
            raise ValueError(f"--box {x0} {y0} {x1} {y1} is not within a picture of size {image.size}")
        mask[y0:y1, x0:x1] = True
    elif args.outpaint:
        pixels, mask = images.with_border(image, args.outpaint, img_size)
    cells = np.tile(images.cells_under(mask, grid_size), (args.num, 1))
    if args.variations is not None:
        ranks = random_orders(args.num, grid_size, seed=args.seed).argsort(axis=1)
        cells = ranks < round(args.variations * grid_size**2)
    if not cells.any():
        raise ValueError(f"nothing to generate: no cell of the centre {img_size}x{img_size} is chosen")
    if args.outpaint and cells.all():
        raise ValueError(f"--outpaint does not keep a whole cell of {img_size // grid_size} pixels")
    return pixels, cells


def load(args, image):
    """Model, tokenizer, settings, label, the picture and the cells to generate."""
    model, tokenizer, info = load_pair(args.pretrained_ckpt, args.vqgan_path, args.model)
    cli.check_weights(args, model.config, tokenizer.config)
    names = cli.class_names(args, model.config.num_classes, info)
    label = cli.find_class("--class", getattr(args, "class"), names)
    grid_size = model.config.grid_size
    pixels, cells = prepare(args, image, grid_size * tokenizer.config.stride, grid_size)
    chosen = cli.chosen(OrderChoice, args)
    if args.generation_steps:
        chosen["generation_steps"] = min(args.generation_steps, int(cells[0].sum()))
    sampling = cli.settings_from(Sampling, args)
    settings = resolve_settings(grid_size, sampling=sampling, seed=args.seed, known=~cells, **chosen)
    return model, tokenizer, settings, label, pixels, cells


def edit(model, decoder, tokens, settings, label, batch_size):
    """The edited pictures, uint8 [num, S, S, 3], and a list of the first ones after each step, likewise."""
    edited, film = [], []
    for ids in torch.arange(len(settings.known)).split(batch_size):
        keep = torch.from_numpy(settings.known[ids.numpy()])

        def add_frame(tokens, slots, order):
            shown = images.to_uint8(decoder.decode(tokens[:SHOWN])).cpu().numpy()
            film.append(pictures.filled(shown, order[:SHOWN].cpu().numpy(), slots))

        made = edit_tokens(
            model, tokens.expand(len(ids), -1), keep.to(tokens.device), torch.full((len(ids),), label),
            settings.orders(ids.numpy()), settings.group_sizes, settings.sampling,
            seed=settings.seed, image_ids=ids, on_group=None if edited else add_frame,
        )
        edited.append(images.to_uint8(decoder.decode(made)).cpu())
    return torch.cat(edited).numpy(), film


def save(output, pixels, cells, edited, film):
    """PNGs of the picture, what is kept of it, and the results; a sheet; the film."""
    originals = np.tile(pixels, (min(SHOWN, len(edited)), 1, 1, 1))
    kept = pictures.only_cells(originals, ~cells[:SHOWN])
    pictures.save_png(output / "original.png", pixels)
    pictures.save_png(output / "kept.png", kept[0])
    for i, image in enumerate(edited):
        pictures.save_png(output / f"images/{i:05d}.png", image)
    rows = np.concatenate([originals, kept, edited[:SHOWN]])
    pictures.save_png(output / "sheet.png", pictures.labelled_rows(rows, ["original", "kept", "edited"]))
    pictures.save_film(output / "film.gif", [pictures.grid(shown, len(kept)) for shown in (kept, *film)])


@torch.inference_mode()
def main(argv=None):
    args = parse_args(argv)
    cli.required(args, "image", "class", "pretrained_ckpt")
    with cli.checking():
        device = choose_device(args.device)
        image = images.read_image(cli.existing_file("--image", args.image), reading=cli.reading(args))
        model, tokenizer, settings, label, pixels, cells = load(args, image)
        output = cli.prepare_output(args, RECORD)
    width = args.paste if args.paste is not None or args.no_paste else len(pixels) // 16
    print(describe(model, device, bf16=args.bf16))
    model, decoder = for_inference(model, tokenizer, device, bf16=args.bf16)
    write_json(output / RECORD, {
        "image": args.image, "num": args.num, "bf16": args.bf16, "paste": width, "label": label,
        "settings": settings.as_json(), "generated_cells": [np.flatnonzero(row).tolist() for row in cells],
    })
    tokens = tokenizer.encode(images.to_unit(np.array(pixels[None])).to(device))  # [1, L]
    edited, film = edit(model, decoder, tokens, settings, label, args.batch_size)
    edited = edited if width is None else images.paste(pixels, edited, cells, width)
    save(output, images.only_inside(pixels, args.outpaint or (0, 0, 0, 0)), cells, edited, film)
    generated = f"{cells[0].sum()} of {cells[0].size} cells generated in {len(settings.group_sizes)} steps"
    print(f"{generated}: {output}/sheet.png")


if __name__ == "__main__":
    cli.run(main)
