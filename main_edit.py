"""Edit a picture: a part of it is kept, the rest is generated anew as a class.

    python main_edit.py --image shirt.png --class coat --box 0 14 28 28 --num 8 \\
        --pretrained_ckpt assets/fashion_mnist/lpd.safetensors \\
        --vqgan_path assets/fashion_mnist/tokenizer.safetensors --output_dir output/edited

What is generated is given by one of --mask, --box, --outpaint and --variations. A cell of the token grid is
generated where any of its pixels is. The picture is centre-cropped to the size of the weights.
"""

from pathlib import Path

import numpy as np
import torch

from engine.checkpoint import load_lpd, load_tokenizer, state_digest
from engine.edit import edit_tokens, whole_order
from engine.settings import resolve_settings
from models.lpd import LPD_CONFIGS
from orders.lpd_order import random_orders
from util import cli, dist, pictures
from util.files import write_json
from util.images import UnreadableImage, center_crop, read_image, to_uint8, to_unit
from util.regions import cells_under, paste, with_border

RECORD = "edit.json"  # what was made and how; marks a folder as ours
SHOWN = 8  # results on the sheet and in the film


def parse_args(argv=None):
    parser = cli.Parser(description="Edit a picture: keep a part, generate the rest as a class")
    parser.add_argument("--image", metavar="FILE", help="the picture")
    parser.add_argument("--class", metavar="CLASS", help="index or name of what the edited picture shows")
    parts = parser.add_mutually_exclusive_group(required=True)
    parts.add_argument("--mask", metavar="FILE", help="picture of the same size, white where to generate")
    parts.add_argument(
        "--box", type=cli.number(int, 0), nargs=4, metavar=("X0", "Y0", "X1", "Y1"),
        help="generate the pixels from X0, Y0 on, X1 and Y1 not among them",
    )  # fmt: skip
    parts.add_argument(
        "--outpaint", type=cli.number(int, 0), nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="shrink the picture and generate so many pixels around it",
    )  # fmt: skip
    parts.add_argument(
        "--variations", type=cli.number(float, 0, 1), metavar="SHARE", help="generate a random share of cells"
    )
    parser.add_argument("--num", type=cli.number(int, 1), default=4, help="results, each with its own draws")
    parser.add_argument(
        "--paste", type=cli.number(int, 0), metavar="PIXELS",
        help="put the picture's own pixels back where cells are kept, blended over so many at the border",
    )  # fmt: skip
    parser.add_argument(
        "--pretrained_ckpt", metavar="FILE", help="LPD weights (.safetensors, .pth, a run folder)"
    )
    parser.add_argument("--model", choices=sorted(LPD_CONFIGS), help="size of weights that do not say it")
    cli.add_tokenizer_flags(parser)
    cli.add_output_flags(parser)
    parser.add_argument("--img_size", type=cli.number(int, 1), help="checked against the weights'")
    cli.add_class_names_flag(parser)
    parser.add_argument("--batch_size", type=cli.number(int, 1), default=64)
    cli.add_seed_flag(parser)
    parser.add_argument("--bf16", action="store_true")
    cli.add_device_flags(parser)
    cli.add_generation_flags(parser)
    return parser.parse_args(argv)


def read(flag, path, mode="RGB"):
    """The PIL image of a file that a flag names."""
    try:
        return read_image(cli.existing_file(flag, path), mode)
    except UnreadableImage as error:
        raise cli.UsageError(f"{flag}: {error}") from None


def marked(args, image):
    """The pixels to generate by --mask or --box: bool [H, W]; None with the other flags."""
    width, height = image.size
    if args.mask:
        mask = read("--mask", args.mask, "L")
        if mask.size != image.size:
            raise cli.UsageError(
                f"--mask is {mask.width}x{mask.height}, --image is {width}x{height}: they must be of one size"
            )
        pixels = np.asarray(mask) >= 128
        if not pixels.any():
            raise cli.UsageError(f"--mask {args.mask} has no white pixel: nothing to generate")
        return pixels
    if args.box:
        x0, y0, x1, y1 = args.box
        if not (x0 < x1 <= width and y0 < y1 <= height):
            raise cli.UsageError(
                f"--box {x0} {y0} {x1} {y1} is no part of {width}x{height} pixels: "
                "needed are X0 < X1 <= width and Y0 < Y1 <= height"
            )
        pixels = np.zeros((height, width), bool)
        pixels[y0:y1, x0:x1] = True
        return pixels
    if args.outpaint and not any(args.outpaint):
        raise cli.UsageError("--outpaint 0 0 0 0 leaves nothing to generate")
    return None


def prepare(args, image, mask, img_size, grid_size):
    """The picture as the model gets it, uint8 [S, S, 3], and the cells to generate, bool [num, L]."""
    if args.variations is not None:
        count = round(args.variations * grid_size**2)
        if not count:
            raise cli.UsageError(f"--variations {args.variations} of {grid_size**2} cells is none")
        places = random_orders(args.num, grid_size, seed=args.seed)
        return center_crop(image, img_size), places.argsort(axis=1) < count
    if args.outpaint:
        left, top, right, bottom = args.outpaint
        if left + right >= img_size or top + bottom >= img_size:
            raise cli.UsageError(
                f"--outpaint {left} {top} {right} {bottom} leaves no room for the picture in "
                f"{img_size}x{img_size} pixels"
            )
        pixels, mask = with_border(image, args.outpaint, img_size)
    else:
        pixels = center_crop(image, img_size)
    cells = cells_under(mask, grid_size)
    if not cells.any():
        raise cli.UsageError(f"what is to be generated lies outside the centre of {min(image.size)} pixels")
    if args.outpaint and cells.all():
        raise cli.UsageError(f"--outpaint keeps no whole cell of {img_size // grid_size} pixels")
    return pixels, np.tile(cells, (args.num, 1))


def load(args, image, mask, device):
    """Model, tokenizer, settings, label, the picture and the cells to generate, all checked."""
    tokenizer = load_tokenizer(args.vqgan_path)
    cli.check_tokenizer_flags(args, tokenizer.config)
    model, info = load_lpd(args.pretrained_ckpt, args.model)
    cli.check_fit(args, model, tokenizer, info, state_digest(tokenizer))
    names = cli.class_names(args, model.config.num_classes, info)
    label = cli.find_class("--class", getattr(args, "class"), names)
    grid_size = model.config.grid_size
    pixels, cells = prepare(args, image, mask, grid_size * tokenizer.config.stride, grid_size)
    chosen = {name: getattr(args, name) for name in cli.GENERATION_FLAGS}
    if args.generation_steps:
        chosen["generation_steps"] = min(args.generation_steps, int(cells[0].sum()))
    settings = resolve_settings(grid_size, known=~cells, num_images=args.num, **chosen)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return model.to(device, dtype), tokenizer.to(device), settings, label, pixels, cells


def edit(model, tokenizer, settings, label, pixels, batch_size, device):
    """The edited pictures, uint8 [num, S, S, 3], and of the first ones the film, a list of such arrays."""
    tokens = tokenizer.encode(to_unit(np.array(pixels[None])).to(device))  # [1, L]
    edited, film = [], []
    for ids in torch.arange(len(settings.known)).split(batch_size):
        keep, order = torch.from_numpy(settings.known[ids.numpy()]), settings.orders(ids.numpy())
        whole = whole_order(keep, order)[:SHOWN].numpy()

        def show(tokens, slots, whole=whole):
            images = to_uint8(tokenizer.decode(tokens[:SHOWN])).cpu().numpy()
            film.append(pictures.filled(images, whole, slots))

        made = edit_tokens(
            model, tokens.expand(len(ids), -1), keep.to(device), torch.full((len(ids),), label), order,
            settings.group_sizes, image_ids=ids, on_group=None if edited else show, **settings.decoding(),
        )  # fmt: skip
        edited.append(to_uint8(tokenizer.decode(made)).cpu())
    return torch.cat(edited).numpy(), film


def save(output, pixels, cells, edited, film):
    """PNGs of the picture, what is kept of it and the results; the sheet; the film."""
    originals = np.tile(pixels, (min(SHOWN, len(edited)), 1, 1, 1))
    kept = pictures.only_cells(originals, ~cells[:SHOWN])
    pictures.save_png(output / "original.png", pixels)
    pictures.save_png(output / "kept.png", kept[0])
    for i, image in enumerate(edited):
        pictures.save_png(output / f"images/{i:05d}.png", image)
    rows = np.concatenate([originals, kept, edited[:SHOWN]])
    scale = max(1, 64 // len(pixels))
    sheet = pictures.labelled_rows(rows, ["original", "kept", "edited"], scale=scale)
    pictures.save_png(output / "sheet.png", sheet)
    scale = max(1, 96 // len(pixels))
    frames = [pictures.grid(images, len(kept), scale=scale) for images in (kept, *film)]
    pictures.save_film(output / "film.gif", frames, seconds=max(0.06, 3.0 / len(frames)))


@torch.inference_mode()
def main(argv=None):
    args = parse_args(argv)
    cli.required(args, "image", "class", "pretrained_ckpt", "vqgan_path", "output_dir")
    args.pretrained_ckpt = cli.weights_file("--pretrained_ckpt", args.pretrained_ckpt)
    cli.existing_file("--vqgan_path", args.vqgan_path)
    with cli.checking():
        image = read("--image", args.image)
        mask = marked(args, image)
        world = dist.init(args.device)
        model, tokenizer, settings, label, pixels, cells = load(args, image, mask, world.device)
        cli.prepare_output(args, RECORD)
    output = Path(args.output_dir)
    write_json(output / RECORD, {
        "settings": settings.as_json(), "label": label, "bf16": args.bf16, "num": args.num,
        "image": str(args.image), "paste": args.paste,
        "generated_cells": [np.flatnonzero(row).tolist() for row in cells],
    })  # fmt: skip
    edited, film = edit(model, tokenizer, settings, label, pixels, args.batch_size, world.device)
    if args.paste is not None:
        edited = paste(pixels, edited, cells, args.paste)
    save(output, pixels, cells, edited, film)
    print(
        f"{int(cells[0].sum())} of {cells.shape[1]} cells generated in {len(settings.group_sizes)} steps; "
        f"pictures: {output}/sheet.png, film.gif, images/"
    )
    dist.finish()


if __name__ == "__main__":
    cli.run(main)
