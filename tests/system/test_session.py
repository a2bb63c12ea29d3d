"""The session behind the page, without gradio or a browser; the notebook."""

import json
import threading
from dataclasses import replace

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from processes import WAIT

from demo.session import Request, Session, Worker, edit, generate
from engine.generate import generate_images, resolve_settings

REQUEST = Request(label=1, images=2, steps=4, order="lpd", guidance=2.0, temperature=1.0, top_p=1.0, seed=3)


@pytest.fixture
def session(tiny_lpd, tiny_vq):
    """4x4 tokens, 8x8 pixels, five classes."""
    return Session(tiny_lpd, tiny_vq, ("0_a", "1_b", "c", "d", "e"), tiny_lpd.pos_embed.device)


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def shown_by(make, *args, **kwargs):
    """Everything that `make` shows."""
    shown = []
    make(*args, lambda **parts: shown.append(parts), **kwargs)
    return [parts for parts in shown if parts]


def last(shown, name):
    return [parts[name] for parts in shown if name in parts][-1]


@pytest.mark.parametrize(
    "wrong, limits",
    [
        ({"images": 17}, "1..16"), ({"images": 0}, "1..16"), ({"steps": 1}, "2..16"),
        ({"steps": 17}, "2..16"), ({"guidance": 21}, "0..20"), ({"guidance": float("nan")}, "0..20"),
        ({"temperature": -1}, "0..4"), ({"seed": -1}, "0..2147483647"), ({"seed": None}, "0..2147483647"),
        ({"label": 5}, "0..4"),
    ],
)
def test_request_out_of_limits_is_refused_with_both_limits(session, wrong, limits):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"^{name} is {value}, not in {limits}$"):
        shown_by(generate, session, replace(REQUEST, **wrong), compare=False)


def test_generated_images_are_those_of_the_engine(session):
    made = last(shown_by(generate, session, REQUEST, compare=False), "made")
    settings = resolve_settings(4, generation_steps=4, sampling=REQUEST.sampling, seed=3)
    expected = generate_images(
        session.model, session.tokenizer, torch.tensor([1, 1]), settings.orders([0, 1]), settings.group_sizes,
        settings.sampling, seed=3,
    )
    assert (made == expected.numpy()).all()


def test_a_picture_is_shown_after_each_step(session):
    shown = shown_by(generate, session, REQUEST, compare=False)
    sheets = [parts["picture"] for parts in shown if "picture" in parts]
    assert len(sheets) == REQUEST.steps
    assert not (sheets[0] == sheets[-1]).all()
    assert (sheets[-1] == session.sheet(last(shown, "made"))).all()


def test_comparison_reports_both_times_and_their_ratio(session):
    words = last(shown_by(generate, session, REQUEST, compare=True), "words")
    assert "4 steps" in words and "(16 steps)" in words and "times as long" in words


def test_editing_changes_the_marked_cell_and_keeps_the_other_pixels(session, picture):
    mask = np.zeros((80, 80), bool)
    mask[45:55, 25:35] = True  # in row 2, column 1 of four
    shown = shown_by(edit, session, REQUEST, picture=picture, mask=mask, own_pixels=True)
    changed = (last(shown, "made") != picture).any(axis=-1)
    assert changed[:, 4:6, 2:4].any()
    changed[:, 4:6, 2:4] = False
    assert not changed.any()


@pytest.mark.parametrize("mask", [None, np.zeros((8, 8), bool)])
def test_edit_with_nothing_marked_is_refused(session, picture, mask):
    with pytest.raises(ValueError, match="nothing is marked"):
        shown_by(edit, session, REQUEST, picture=picture, mask=mask, own_pixels=True)


def test_edit_without_a_picture_is_refused(session):
    with pytest.raises(ValueError, match="no picture yet"):
        shown_by(edit, session, REQUEST, picture=None, mask=np.ones((8, 8), bool), own_pixels=True)


def test_upload_is_cropped_to_the_size_of_the_weights(session, tmp_path):
    Image.new("L", (50, 20)).save(tmp_path / "wide.png")
    assert session.picture(tmp_path / "wide.png").shape == (8, 8, 3)


def test_upload_that_is_no_image_is_refused_without_its_path(session, tmp_path):
    (tmp_path / "words.png").write_text("no image")
    with pytest.raises(ValueError, match=r"words\.png: cannot identify") as refusal:
        session.picture(tmp_path / "words.png")
    assert str(tmp_path) not in str(refusal.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_upload_of_too_many_pixels_is_refused_unread(session, tmp_path):
    (tmp_path / "large.ppm").write_bytes(b"P6 12000 12000 255\n")  # read, it would be cut short
    with pytest.raises(ValueError, match="large.ppm: 12000x12000: has 144000000 pixels, the limit is"):
        session.picture(tmp_path / "large.ppm")


def test_worker_makes_one_picture_at_a_time():
    worker, making, most, begin = Worker(), [], [], threading.Barrier(4)

    def make(show):
        making.append(1)
        most.append(len(making))
        show(step=1)
        threading.Event().wait(0.02)  # long enough for another to come in, if it could
        making.pop()

    def visit():
        begin.wait(WAIT)
        assert list(worker.stream(make)) == [{"step": 1}]

    visitors = [threading.Thread(target=visit) for _ in range(4)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(WAIT)
    assert most == [1, 1, 1, 1]


def test_closed_stream_cancels_its_picture():
    closed, ended = threading.Event(), []

    def make(show):
        show(step=1)
        assert closed.wait(WAIT)
        show()
        ended.append("finished")

    worker = Worker()
    stream = worker.stream(make)
    assert next(stream) == {"step": 1}
    stream.close()
    closed.set()
    assert list(worker.stream(lambda show: show(step=2))) == [{"step": 2}]  # the thread is free again
    assert ended == []


def test_error_in_the_worker_reaches_the_caller():
    def make(show):
        raise ValueError("no such class")

    with pytest.raises(ValueError, match="no such class"):
        list(Worker().stream(make))


NOTEBOOK = processes.REPO / "demo" / "lpd.ipynb"


def test_notebook_runs_top_to_bottom(tmp_path):
    """Its code cells, in a Python of their own; each plt.show() leaves a picture. Kernels are not tested."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    first = "import matplotlib\n\nmatplotlib.use('Agg')\n"
    last = "print('pictures:', len(plt.get_fignums()))\n"
    (tmp_path / "notebook.py").write_text("\n\n".join([first, *code, last]))
    outcome = processes.finished(processes.forked(tmp_path / "notebook.py", cwd=tmp_path))
    assert "kept tokens unchanged: True" in outcome.out
    assert "pictures: 12\n" in outcome.out
