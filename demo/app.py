"""A page to generate and edit images in a browser; `bash scripts/app.sh` installs gradio and starts it.

    python demo/app.py
    python demo/app.py --pretrained_ckpt lpd_l_256.pth --model lpd_l --vqgan_path tokenizers/vq_ds16_c2i.pt

It listens on this machine only, unless --host says otherwise.
"""

from util import cli  # isort: skip
import socket
from pathlib import Path

from demo.session import Session
from engine import published
from engine.fast import for_inference
from engine.generate import load_pair
from engine.sampling import Sampling
from util.device import choose_device

SHIPPED = Path(__file__).resolve().parents[1] / "assets" / "fashion_mnist"


def parse_args(argv=None):
    parser = cli.Parser(description="A page to generate and edit images in a browser")
    cli.add_weights_flags(parser, published.MODELS)
    parser.set_defaults(pretrained_ckpt=SHIPPED / "lpd.safetensors")
    cli.add_class_names_flag(parser)
    cli.add_device_flag(parser)
    parser.add_argument("--compile", action="store_true", help="compile the decoder of images, on a GPU")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=cli.number(int, 1, 65535), default=7860)
    return published.parse(parser, argv)


def load(args):
    """The Session of the weights that the flags name, checked."""
    device = choose_device(args.device)
    model, tokenizer, info = load_pair(args.pretrained_ckpt, args.vqgan_path, args.model)
    cli.check_weights(args, model.config, tokenizer.config)
    names = tuple(cli.class_names(args, model.config.num_classes, info))
    about = describe(args.pretrained_ckpt, model, tokenizer)  # before the model is repacked
    how = Sampling(**{"cfg": 4.0, **info.get("sampling", {})})  # as in training, if it drew samples
    return Session(*for_inference(model, tokenizer, device, compiled=args.compile), names, device, about, how)


def describe(path, model, tokenizer):
    """A line that says which weights these are."""
    name = "/".join(Path(path).parts[-2:])  # the folder often says more than the file
    millions, side = sum(p.numel() for p in model.parameters()) / 1e6, model.config.grid_size
    pixels = side * tokenizer.config.stride
    image = f"{pixels}x{pixels} pixels in {side}x{side} tokens"
    return f"{name}: {millions:,.1f} million parameters, {model.config.num_classes} classes, {image}"


def check_port(host, port):
    """Refuse an address that is taken or not ours, before weights are read."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise cli.UsageError(f"--host {host} --port {port}: {error.strerror.split(' (')[0]}") from None


def main(argv=None):
    args = parse_args(argv)
    check_port(args.host, args.port)
    with cli.checking():
        session = load(args)
    try:
        from demo import page  # gradio takes seconds to import: mistakes in the flags are told before
    except ImportError as error:  # gradio, or what it needs
        raise cli.UsageError(f"{error}: `bash scripts/app.sh` installs gradio and starts the page") from None
    page.serve(session, args.host, args.port)


if __name__ == "__main__":
    cli.run(main)
