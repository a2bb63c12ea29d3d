"""Train a VQ tokenizer on a folder of images.

    python main_tokenizer.py --data_path data/fashion_mnist --img_size 32 --output_dir output/tokenizer

Run the same command again to resume. Writes tokenizer.safetensors, reconstructions.png and report.json.
"""

import json
from pathlib import Path

from engine.checkpoint import LAST
from engine.loop import LossNotFinite, RunSettings
from engine.train_tokenizer import TokenizerTrainConfig, evaluate_tokenizer, new_state, train_tokenizer
from models.vqgan import VQConfig
from models.weights import save_weights
from util import cli, distributed, pictures
from util.files import write_json


def parse_args(argv=None):
    parser = cli.Parser(description="Train a VQ tokenizer on a folder of images")
    add = parser.add_argument
    cli.add_folder_flags(parser)
    add("--output_dir", metavar="DIR")
    add("--vocab_size", type=cli.number(int, 2, 65536), default=16384)
    add("--code_dim", type=cli.number(int, 1), default=8)
    add("--base_width", type=cli.number(int, 32), default=128, help="a multiple of 32")
    add("--multipliers", type=cli.number(int, 1), nargs="+", default=[1, 1, 2, 2, 4])
    add("--num_res_blocks", type=cli.number(int, 1), default=2)
    add("--z_channels", type=cli.number(int, 1), default=256)
    cli.add_settings(parser, TokenizerTrainConfig)
    add("--save_every", type=cli.number(int, 1), default=500, help="steps between checkpoints")
    cli.add_seed_flag(parser)
    cli.add_device_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    cli.required(args, "data_path", "output_dir")
    cli.existing_folder("--data_path", args.data_path)
    output_dir = cli.writable_folder("--output_dir", args.output_dir)
    with cli.checking():
        world = distributed.init(args.device)
        config = train_config(args, world)
        folder, held_out = cli.open_folders(args, args.img_size, world)
        state = new_state(config, world.device)
        if (output_dir / LAST).exists():
            state.load(output_dir / LAST, world)
    with cli.sole_writer("--output_dir", output_dir, world):
        run = RunSettings(output_dir, save_last_freq=args.save_every)
        try:
            train_tokenizer(state, folder, run, world, args.num_workers)
        except LossNotFinite as error:
            raise cli.Failure(error) from None
        if world.is_main:
            write_results(args, state, held_out or folder, output_dir, world)
    distributed.finish()


def train_config(args, world):
    """The flags as one checked config."""
    model = VQConfig(
        args.vocab_size, args.code_dim, args.base_width, tuple(args.multipliers), args.num_res_blocks,
        args.z_channels,
    )
    if args.img_size % model.stride:
        raise ValueError(f"--img_size {args.img_size} is no multiple of the stride {model.stride}")
    batch_size = args.batch_size * world.size
    return cli.settings_from(TokenizerTrainConfig, args, model=model, batch_size=batch_size, seed=args.seed)


def write_results(args, state, images, output_dir, world):
    """Write the weights, and how well they reconstruct images."""
    report, sheet = evaluate_tokenizer(
        state.model, images, args.img_size, world.device, num_workers=args.num_workers
    )
    report |= {"data": str(Path(args.data_path).name), "img_size": args.img_size, "steps": state.step}
    pictures.save_png(output_dir / "reconstructions.png", sheet)
    save_weights(output_dir / "tokenizer.safetensors", state.model, report=report)
    write_json(output_dir / "report.json", report)
    print(json.dumps(report))


if __name__ == "__main__":
    cli.run(main)
