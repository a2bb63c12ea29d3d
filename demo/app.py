"""A page to generate and edit images in a browser; `bash scripts/app.sh` installs its needs and starts it.

    python demo/app.py
    python demo/app.py --pretrained_ckpt lpd_l_256.pth --model lpd_l --vqgan_path tokenizers/vq_ds16_c2i.pt

Knows gradio: what stands where and what calls what. What is done is studio.py's. It listens on this machine
alone unless --host says otherwise.
"""

import os
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPO)  # imports start from the repository's root, not from this folder
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would tell its makers of each start

try:
    import gradio as gr
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: `bash scripts/app.sh` installs it and starts the page")

import numpy as np  # noqa: E402

from demo.studio import Studio, Wish, Worker, edit, generate  # noqa: E402
from engine.checkpoint import load_lpd, load_tokenizer, state_digest  # noqa: E402
from engine.settings import default_steps  # noqa: E402
from models.lpd import LPD_CONFIGS  # noqa: E402
from orders.lpd_order import ORDER_KINDS  # noqa: E402
from util import cli, dist  # noqa: E402

UPLOAD = "8mb"  # of a file; of its pixels `util.images.MOST_PIXELS`
WAITING = 32  # visitors in the queue
SHIPPED = REPO / "assets" / "fashion_mnist"
FONTS = ["system-ui", "sans-serif"]  # the theme's own would be fetched from elsewhere


def parse_args(argv=None):
    parser = cli.Parser(description="A page to generate and edit images in a browser")
    parser.add_argument(
        "--pretrained_ckpt", metavar="FILE", default=SHIPPED / "lpd.safetensors",
        help="LPD weights (.safetensors, .pth, a run folder)",
    )  # fmt: skip
    parser.add_argument("--model", choices=sorted(LPD_CONFIGS), help="size of weights that do not say it")
    cli.add_tokenizer_flags(parser)
    parser.set_defaults(vqgan_path=SHIPPED / "tokenizer.safetensors")
    parser.add_argument("--img_size", type=cli.number(int, 1), help="checked against the weights'")
    cli.add_class_names_flag(parser)
    parser.add_argument("--device", default="auto", help="auto is a GPU where there is one")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=cli.number(int, 1, 65535), default=7860)
    return parser.parse_args(argv)


def load(args):
    """The Studio of the weights that the flags name, checked."""
    cli.find_files(args)
    device = dist.choose_device(args.device)
    tokenizer = load_tokenizer(args.vqgan_path)
    cli.check_tokenizer_flags(args, tokenizer.config)
    model, info = load_lpd(args.pretrained_ckpt, args.model)
    cli.check_fit(args, model, tokenizer, info, state_digest(tokenizer))
    names = tuple(cli.class_names(args, model.config.num_classes, info))
    return Studio(model.to(device), tokenizer.to(device), names, device)


def check_port(host, port):
    """Refuse an address that another process has, or that is not ours to take, before weights are read."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise cli.UsageError(f"--host {host} --port {port}: {error.strerror.split(' (')[0]}") from None


@contextmanager
def told():
    """Inside it a ValueError is about what the visitor gave: told on the page, without a traceback."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from None


def wish_controls(studio, name):
    """The inputs of a Wish, in its order."""

    def slider(name, value, label, step):
        return gr.Slider(*studio.limits[name], value=value, step=step, label=label)

    return [
        gr.Dropdown(studio.choices, value=studio.choices[0][1], label="Class", elem_id=f"{name}-class"),
        slider("images", 1, "Images", 1),
        slider("steps", default_steps(studio.model.config.num_tokens), "Steps", 1),
        gr.Dropdown(list(ORDER_KINDS), value="lpd", label="Order"),
        slider("guidance", 4, "Guidance scale", 0.1),
        slider("temperature", 1, "Temperature", 0.05),
        gr.Number(value=0, precision=0, label="Seed", elem_id=f"{name}-seed"),
    ]


def results(name):
    """The outputs of a picture in the making, by what `studio.py` calls them."""
    look = {"format": "png", "interactive": False, "show_label": False}
    with gr.Row():
        picture = gr.Image(label="Image", buttons=["download"], elem_id=f"{name}-picture", **look)
        order = gr.Image(label="Step of each cell", buttons=[], elem_id=f"{name}-order", **look)
    words = gr.Markdown(elem_id=f"{name}-words")
    return {"picture": picture, "order": order, "words": words, "made": gr.State()}


def marked(drawing):
    """What is painted over in the value of an ImageEditor: bool [H, W], or None where there is no layer."""
    layers = [layer[..., 3] >= 128 for layer in (drawing or {}).get("layers") or []]
    return sum(layers[1:], layers[0]) if layers else None


def build(studio):
    """The page, `gr.Blocks`, its queue set up: one generation at a time."""
    worker = Worker()
    canvas = studio.sheet(np.zeros((1, studio.side, studio.side, 3), np.uint8)).shape[:2]
    one_at_a_time = {"concurrency_id": "studio", "concurrency_limit": 1, "show_progress": "minimal"}

    def to_editor(pixels):
        return {"background": studio.sheet(pixels[None]), "layers": [], "composite": None}, pixels

    def on_generate(*inputs):
        *wish, compare = inputs
        with told():
            for parts in worker.stream(generate, studio, Wish(*wish), compare=compare):
                yield {generated[name]: value for name, value in parts.items()}

    def on_edit(*inputs):
        *wish, own_pixels, drawing, pixels = inputs
        given = {"picture": pixels, "mask": marked(drawing), "own_pixels": own_pixels}
        with told():
            for parts in worker.stream(edit, studio, Wish(*wish), **given):
                yield {edited[name]: value for name, value in parts.items()}

    def on_upload(path):
        with told():
            return to_editor(studio.picture(path))

    def on_take(made):
        with told():
            if made is None:
                raise ValueError("nothing was generated yet")
            return to_editor(made[0])

    with gr.Blocks(title="LPD", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# LPD: Locality-aware Parallel Decoding")
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=1):
                wish = wish_controls(studio, "generated")
                compare = gr.Checkbox(label="Time one token at a time too", elem_id="compare")
                start = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=2):
                generated = results("generated")
        with gr.Tab("Edit"), gr.Row():
            with gr.Column(scale=1):
                with gr.Row():
                    upload = gr.UploadButton("Upload a picture", file_types=["image"], elem_id="upload")
                    take = gr.Button("Take the generated one", elem_id="take")
                gr.Markdown("Paint over what is to change.")
                editor = gr.ImageEditor(
                    label="Picture", show_label=False, sources=(), transforms=(), layers=False,
                    brush=gr.Brush(default_size=30, colors=["#ff2d2d"], color_mode="fixed"), format="png",
                    canvas_size=canvas, fixed_canvas=True, elem_id="editor",
                )  # fmt: skip
                pixels = gr.State()
                edit_wish = wish_controls(studio, "edited")
                own_pixels = gr.Checkbox(value=True, label="Elsewhere keep the picture's own pixels")
                start_edit = gr.Button("Edit", variant="primary", elem_id="edit")
            with gr.Column(scale=2):
                edited = results("edited")
        start.click(on_generate, [*wish, compare], list(generated.values()), **one_at_a_time)
        given = [*edit_wish, own_pixels, editor, pixels]
        start_edit.click(on_edit, given, list(edited.values()), **one_at_a_time)
        upload.upload(on_upload, upload, [editor, pixels], **one_at_a_time)
        take.click(on_take, generated["made"], [editor, pixels])
    return page.queue(max_size=WAITING)


def main(argv=None):
    args = parse_args(argv)
    check_port(args.host, args.port)
    with cli.checking():
        studio = load(args)
    build(studio).launch(
        server_name=args.host, server_port=args.port, share=False, ssr_mode=False, max_file_size=UPLOAD,
        theme=gr.themes.Default(font=FONTS, font_mono=["monospace"]), footer_links=[],
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
