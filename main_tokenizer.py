"""Train a VQ tokenizer on a folder of images.

    python main_tokenizer.py --data_path data/fashion_mnist --img_size 32 --output_dir output/tokenizer

Run the same command again to resume. Writes tokenizer.safetensors, reconstructions.png and report.json.
"""

import json
from pathlib import Path

from engine.checkpoint import save_weights
from engine.guard import LossNotFinite
from engine.train_tokenizer import TokenizerTrainConfig, evaluate_tokenizer, new_state, train_tokenizer
from models.vqgan import VQConfig
from util import cli, dist, pictures
from util.files import write_json
from util.images import list_images, split_folder


def parse_args(argv=None):
    parser = cli.Parser(description="Train a VQ tokenizer on a folder of images")
    parser.add_argument(
        "--data_path", metavar="DIR", help="CLASS/IMAGE folders, or a folder with train/ and val/"
    )
    parser.add_argument("--output_dir", metavar="DIR")
    parser.add_argument("--img_size", type=cli.number(int, 1), default=256)
    parser.add_argument("--vocab_size", type=cli.number(int, 2, 65536), default=16384)
    parser.add_argument("--code_dim", type=cli.number(int, 1), default=8)
    parser.add_argument("--base_width", type=cli.number(int, 32), default=128, help="a multiple of 32")
    parser.add_argument("--multipliers", type=cli.number(int, 1), nargs="+", default=[1, 1, 2, 2, 4])
    parser.add_argument("--num_res_blocks", type=cli.number(int, 1), default=2)
    parser.add_argument("--z_channels", type=cli.number(int, 1), default=256)
    parser.add_argument("--epochs", type=cli.number(float, 0), default=2.0)
    parser.add_argument("--batch_size", type=cli.number(int, 1), default=64, help="per process")
    parser.add_argument("--lr", type=cli.number(float, 0), default=1e-3)
    parser.add_argument("--warmup_steps", type=cli.number(int, 0), default=100)
    parser.add_argument("--bf16", action="store_true")
    cli.add_seed_flag(parser)
    parser.add_argument(
        "--save_every", type=cli.number(int, 1), default=500, help="steps between checkpoints"
    )
    cli.add_device_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    cli.required(args, "data_path", "output_dir")
    cli.existing_folder("--data_path", args.data_path)
    output_dir = cli.writable_folder("--output_dir", args.output_dir)
    with cli.checking():
        world = dist.init(args.device)
        config = TokenizerTrainConfig(
            model=VQConfig(
                args.vocab_size, args.code_dim, args.base_width, tuple(args.multipliers), args.num_res_blocks,
                args.z_channels,
            ),
            img_size=args.img_size, epochs=args.epochs, batch_size=args.batch_size * world.size, lr=args.lr,
            warmup_steps=args.warmup_steps, bf16=args.bf16, seed=args.seed,
        )  # fmt: skip
        if args.img_size % config.model.stride:
            raise ValueError(f"--img_size {args.img_size} is no multiple of the stride {config.model.stride}")
        folder = list_images(split_folder(args.data_path, "train"))
        held_out = list_images(split_folder(args.data_path, "val"))
        state = new_state(config, world.device)
        if (output_dir / "checkpoint-last.pth").exists():
            state.load(output_dir / "checkpoint-last.pth", config, world)
    with cli.sole_writer("--output_dir", output_dir, world):
        try:
            train_tokenizer(
                state, config, folder, output_dir, world, num_workers=args.num_workers,
                save_every=args.save_every,
            )  # fmt: skip
        except LossNotFinite as error:
            raise cli.Failure(error) from None
        if world.is_main:
            write_results(args, state, held_out, output_dir, world)
    dist.finish()


def write_results(args, state, held_out, output_dir, world):
    """The weights, and how well they reconstruct images that were held out."""
    report, sheet = evaluate_tokenizer(
        state.model, held_out, args.img_size, world.device, num_workers=args.num_workers
    )
    report |= {"data": str(Path(args.data_path).name), "img_size": args.img_size, "steps": state.step}
    pictures.save_png(output_dir / "reconstructions.png", sheet)
    save_weights(output_dir / "tokenizer.safetensors", state.model, report=report)
    write_json(output_dir / "report.json", report)
    print(json.dumps(report))


if __name__ == "__main__":
    cli.run(main)
