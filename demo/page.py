"""What the page shows and what its buttons do, in gradio. demo/app.py starts it, session.py does the work."""

import os
from contextlib import contextmanager

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would report every start to its makers

import gradio as gr
import numpy as np

from demo.session import Request, Worker, edit, generate
from engine.generate import ORDERS, default_steps

MAX_UPLOAD = "8mb"  # of a file; its pixels are limited by util.images.MAX_PIXELS
MAX_WAITING = 32  # visitors in the queue
ONE_AT_A_TIME = {"concurrency_id": "session", "concurrency_limit": 1, "show_progress": "minimal"}
FONTS = ["system-ui", "sans-serif"]  # the theme's own would be fetched from elsewhere


@contextmanager
def shown_errors():
    """Inside it a ValueError is the visitor's mistake: shown on the page, without a traceback."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from None


def request_controls(session, name):
    """The inputs of a Request, in its order."""

    def slider(name, value, label, step):
        return gr.Slider(*session.limits[name], value=value, step=step, label=label)

    return [
        gr.Dropdown(session.choices, value=session.choices[0][1], label="Class", elem_id=f"{name}-class"),
        slider("images", 1, "Images", 1),
        slider("steps", default_steps(session.model.config.num_tokens), "Steps", 1),
        gr.Dropdown(list(ORDERS), value="lpd", label="Order"),
        slider("guidance", session.sampling.cfg, "Guidance scale", 0.1),
        slider("temperature", session.sampling.temperature, "Temperature", 0.05),
        slider("top_p", session.sampling.top_p, "Top-p", 0.05),
        gr.Number(value=0, precision=0, label="Seed", elem_id=f"{name}-seed"),
    ]


def results(name):
    """The outputs of a picture in the making, by the names that session.py shows."""
    look = {"format": "png", "interactive": False, "show_label": False}
    with gr.Row():
        with gr.Column():
            gr.Markdown("Image")
            picture = gr.Image(label="Image", buttons=["download"], elem_id=f"{name}-picture", **look)
        with gr.Column():
            gr.Markdown("Step of each cell")
            order = gr.Image(label="Step of each cell", buttons=[], elem_id=f"{name}-order", **look)
    words = gr.Markdown(elem_id=f"{name}-words")
    return {"picture": picture, "order": order, "words": words, "made": gr.State(), "label": gr.State()}


def marked(drawing):
    """The painted area in the value of an ImageEditor: bool [H, W], or None without a layer."""
    layers = [layer[..., 3] >= 128 for layer in (drawing or {}).get("layers") or []]
    return sum(layers[1:], layers[0]) if layers else None


def generate_tab(session, worker):
    """Its controls and their events. Returns the components that hold results, by name."""

    def on_generate(*inputs):
        *request, compare = inputs
        with shown_errors():
            for parts in worker.stream(generate, session, Request(*request), compare=compare):
                yield {generated[name]: value for name, value in parts.items()}

    with gr.Column(scale=1):
        request = request_controls(session, "generated")
        compare = gr.Checkbox(label="Time one token at a time too", elem_id="compare")
        start = gr.Button("Generate", variant="primary", elem_id="generate")
    with gr.Column(scale=2):
        generated = results("generated")
    start.click(on_generate, [*request, compare], list(generated.values()), **ONE_AT_A_TIME)
    return generated


def picture_editor(session):
    """Where the picture is painted over."""
    canvas = session.sheet(np.zeros((1, session.side, session.side, 3), np.uint8)).shape[:2]
    return gr.ImageEditor(
        label="Picture", show_label=False, sources=(), transforms=(), layers=False,
        brush=gr.Brush(default_size=30, colors=["#ff2d2d"], color_mode="fixed"), format="png",
        canvas_size=canvas, fixed_canvas=True, elem_id="editor",
    )


def edit_tab(session, worker, generated):
    """Its controls and their events; `generated` are the results of the other tab."""

    def to_editor(pixels):
        return {"background": session.sheet(pixels[None]), "layers": [], "composite": None}, pixels

    def on_edit(*inputs):
        *request, own_pixels, drawing, pixels = inputs
        given = {"picture": pixels, "mask": marked(drawing), "own_pixels": own_pixels}
        with shown_errors():
            for parts in worker.stream(edit, session, Request(*request), **given):
                yield {edited[name]: value for name, value in parts.items()}

    def on_upload(path):
        with shown_errors():
            return to_editor(session.picture(path))

    def on_take(made, label):
        with shown_errors():
            if made is None:
                raise ValueError("nothing was generated yet")
            return *to_editor(made[0]), label

    with gr.Column(scale=1):
        with gr.Row():
            upload = gr.UploadButton("Upload a picture", file_types=["image"], elem_id="upload")
            take = gr.Button("Take the generated one", elem_id="take")
        gr.Markdown("Picture to edit: paint over what is to change.")
        editor, pixels = picture_editor(session), gr.State()
        request = request_controls(session, "edited")
        own_pixels = gr.Checkbox(value=True, label="Elsewhere keep the picture's own pixels")
        start = gr.Button("Edit", variant="primary", elem_id="edit")
    with gr.Column(scale=2):
        edited = results("edited")
    start.click(on_edit, [*request, own_pixels, editor, pixels], list(edited.values()), **ONE_AT_A_TIME)
    upload.upload(on_upload, upload, [editor, pixels], **ONE_AT_A_TIME)
    made = [generated["made"], generated["label"]]
    take.click(on_take, made, [editor, pixels, request[0]], **ONE_AT_A_TIME)


def build(session):
    """The page, `gr.Blocks`, with its queue: one generation at a time."""
    worker = Worker()
    with gr.Blocks(title="LPD", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# LPD: Locality-aware Parallel Decoding\n{session.about}")
        with gr.Tab("Generate"), gr.Row():
            generated = generate_tab(session, worker)
        with gr.Tab("Edit"), gr.Row():
            edit_tab(session, worker, generated)
    return page.queue(max_size=MAX_WAITING)


def serve(session, host, port):
    """Serve the page until it is stopped."""
    build(session).launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, max_file_size=MAX_UPLOAD,
        theme=gr.themes.Default(font=FONTS, font_mono=["monospace"]), footer_links=[],
    )
