"""Train a VQ tokenizer on a folder of images.

    python main_tokenizer.py --data_path data/fashion_mnist --img_size 32 --output_dir output/tokenizer

Run the same command again to resume; with more --epochs it goes on from where it ended. Writes
tokenizer.safetensors, with every checkpoint too, reconstructions.png, loss.png and report.json.
"""

import dataclasses
from pathlib import Path

from engine import report, train_tokenizer
from engine.checkpoint import LAST
from engine.loop import LossNotFinite, RunSettings
from engine.train_tokenizer import VALIDATIONS, TokenizerTrainConfig
from models.vqgan import VQConfig, VQModel
from models.weights import TOKENIZER, save_weights
from util import cli, distributed, pictures
from util.files import refuse_changes, write_json
from util.token_cache import names_digest

SIZES = {  # of a VQConfig, in words
    "vocab_size": "codes", "code_dim": "numbers of a code", "base_width": "channels at full resolution",
    "multipliers": "channels at each resolution, in base widths; k of them: 2^(k-1) pixels a token",
    "num_res_blocks": "residual blocks at each resolution", "z_channels": "channels of the coarsest",
    "groups": "of GroupNorm",
    "patch": "pixels a token, if the networks shall work at the tokens' resolution, z_channels wide; else 0",
}


def parse_args(argv=None):
    parser = cli.Parser(description="Train a VQ tokenizer on a folder of images")
    add = parser.add_argument
    cli.add_folder_flags(parser)
    add("--output_dir", metavar="DIR")
    add("--pretrained_ckpt", metavar="FILE", help="start from these tokenizer weights; their sizes count")
    for name, default in dataclasses.asdict(VQConfig()).items():
        several = {"nargs": "+"} if name == "multipliers" else {}
        shown = " ".join(map(str, default)) if several else default
        words = f"{SIZES[name]}; default: {shown}"
        least = 0 if name == "patch" else 1
        add(f"--{name}", type=cli.number(int, least, 65536), help=words, **several)
    cli.add_settings(parser, TokenizerTrainConfig)
    add("--save_every", type=cli.number(int, 1), help="steps between checkpoints; default: every 5 minutes")
    cli.add_seed_flag(parser)
    cli.add_device_flags(parser)
    cli.add_timeout_flag(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    cli.required(args, "data_path", "output_dir")
    cli.existing_images("--data_path", args.data_path)
    output_dir = cli.writable_folder("--output_dir", args.output_dir)
    with cli.checking():
        world = distributed.init(args.device, args.timeout)
        pretrained = VQModel.load(args.pretrained_ckpt)[0] if args.pretrained_ckpt else None
        model = model_config(args, pretrained)
        folder, held_out = cli.open_folders(args, args.img_size, world, output_dir)
        state = train_state(args, model, folder, pretrained, world)
        steps = state.config.num_steps(len(folder))
    with cli.sole_writer("--output_dir", output_dir, world):
        every = max(1, steps // VALIDATIONS)
        run = RunSettings(output_dir, save_last_freq=args.save_every, val_freq=every)
        data = {"path": args.data_path, "images": len(folder), "names_digest": names_digest(folder.names)}
        log = report.start_run(output_dir, state, steps, data, world)
        try:
            train_tokenizer.train_tokenizer(state, (folder, held_out), run, world, log, args.num_workers)
        except LossNotFinite as error:
            raise cli.Failure(error) from None
        if world.is_main:
            write_results(args, state, (folder, held_out), output_dir, world)


def model_config(args, pretrained):
    """The VQConfig of the flags, the rest that of the pretrained model or VQ-16."""
    base = pretrained.config if pretrained else VQConfig()
    sizes = {name: getattr(args, name) for name in dataclasses.asdict(base)}
    stated = {name: value for name, value in sizes.items() if value is not None}
    model = dataclasses.replace(base, **stated)
    if pretrained:
        refuse_changes(args.pretrained_ckpt, dataclasses.asdict(base), stated, "leave that flag out")
    unused = [f"--{name}" for name in ("base_width", "multipliers") if model.patch and name in stated]
    if unused:
        raise ValueError(f"{' and '.join(unused)}: networks of patches are --z_channels wide, leave that out")
    if args.img_size % model.stride:
        raise ValueError(f"--img_size {args.img_size} is not a multiple of the stride {model.stride}")
    return model


def train_state(args, model, folder, pretrained, world):
    """The training state: resumed, with pretrained weights, or new."""
    config = cli.settings_from(
        TokenizerTrainConfig, args, model=model, batch_size=args.batch_size * world.size, seed=args.seed
    )
    state = train_tokenizer.new_state(config.for_images(len(folder)), world.device)
    last = Path(args.output_dir) / LAST
    if last.exists():
        state.load(last, world)
    elif pretrained:
        state.model.load_state_dict(pretrained.state_dict())
    elif config.keep_tokens:
        raise ValueError("--keep_tokens needs a tokenizer to start from, --pretrained_ckpt")
    return state


def write_results(args, state, folders, output_dir, world):
    """Write the weights, and how well they reconstruct images: those held out, if there are any."""
    folder, held_out = folders
    which, images = ("held-out images", held_out) if held_out else ("training images", folder)
    result, sheet = train_tokenizer.evaluate_tokenizer(
        state.model, images, args.img_size, world.device, num_workers=args.num_workers, title=which
    )
    facts = {"images": which, "data": Path(args.data_path).name, "img_size": args.img_size}
    result |= {**facts, "steps": state.step}
    pictures.save_png(output_dir / "reconstructions.png", sheet)
    save_weights(output_dir / TOKENIZER, state.model, report=result)
    write_json(output_dir / "report.json", result)
    curves = {"training images": "reconstruction", "held-out images": "val_reconstruction"}
    report.plot_losses(output_dir, curves, "reconstruction, L1 + L2")
    quality = f"{result['psnr']:.1f} dB PSNR, {result['codebook_use']:.0%} of the codes used"
    print(f"{output_dir / TOKENIZER}: {quality} on {result['n']} {which}")


if __name__ == "__main__":
    cli.run(main)
