"""The page, driven in a headless Chromium.

Skipped with the reason if gradio, playwright or Chromium is missing; `bash scripts/test.sh` installs them.
"""

import io
import json
import re
import shutil
import socket
import sys
import urllib.error
import urllib.request
from importlib.util import find_spec

import helpers
import numpy as np
import processes
import pytest
from PIL import Image
from processes import WAIT, wait_for

from demo import app

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


# The page, which first tells what its buttons that compute wait for.
TELLING = """
import json, runpy, sys
from demo import page
plain = page.build
def build(session):
    built = plain(session)
    queues = {fn.name: (fn.concurrency_id, fn.concurrency_limit) for fn in built.fns.values()}
    print("QUEUES", json.dumps([queues, built._queue.max_size]), flush=True)
    return built
page.build = build
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(address, log file) of the page with the shipped weights, in a process of its own."""
    if not find_spec("gradio"):
        pytest.skip("needs requirements-app.txt: bash environment_setup.sh --app")
    log, port = tmp_path_factory.mktemp("page") / "log", processes.free_port()
    words = ["-c", TELLING, processes.REPO / "demo/app.py", "--port", port, "--device", "cpu"]
    uploads = {"GRADIO_TEMP_DIR": str(log.parent / "uploads")}
    server = processes.fork(*words, cwd=log.parent, out=log, err=log, **uploads)
    try:
        wait_for(lambda: server.exitcode is not None or "Running on" in log.read_text(), "the page")
        assert server.exitcode is None, log.read_text()
        yield f"http://127.0.0.1:{port}", log
    finally:
        server.terminate()
        server.join(WAIT)


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: requirements-dev.txt")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium, page):
    """The page, loaded in a browser tab."""
    tab = chromium.new_page(viewport={"width": 1280, "height": 800})
    tab.set_default_timeout(1000 * WAIT)
    tab.goto(page[0])
    yield tab
    tab.close()


def finished_picture(tab, name, start):
    """Click the button `start` and wait for another finished picture: uint8 [H, W, 3]."""
    image = tab.locator(f"#{name}-picture img")
    before = image.get_attribute("src") if image.count() else None
    tab.click(start)
    tab.wait_for_function(
        """([name, before]) => {
            const image = document.querySelector(`#${name}-picture img`)
            const words = document.querySelector(`#${name}-words`)
            return image && image.src != before && words.innerText.includes("image in")
        }""",
        arg=[name, before],
    )
    return np.asarray(
        Image.open(io.BytesIO(tab.request.get(image.get_attribute("src")).body())).convert("RGB")
    )


def test_page_names_its_weights_and_another_seed_gives_another_image(tab):
    tab.get_by_text("fashion_mnist/lpd.safetensors: 3.3 million parameters").wait_for()
    first = finished_picture(tab, "generated", "#generate")
    tab.fill("#generated-seed input", "1")
    second = finished_picture(tab, "generated", "#generate")
    assert first.shape == second.shape == (384, 384, 3)
    assert first.std() > 10  # not blank
    assert (first != second).any()


@pytest.mark.long
def test_painted_area_is_generated_as_another_class(tab):
    before = finished_picture(tab, "generated", "#generate").astype(int)
    tab.get_by_role("tab", name="Edit").click()
    tab.click("#take")
    tab.locator("#editor [aria-label='Brush']").wait_for()
    tab.click("#edited-class input")
    tab.get_by_role("option", name="trouser").click()
    box = tab.locator("#editor canvas").first.bounding_box()
    y = box["y"] + 0.75 * box["height"]
    tab.mouse.move(box["x"] + 0.35 * box["width"], y)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.65 * box["width"], y, steps=10)
    tab.mouse.up()
    after = finished_picture(tab, "edited", "#edit").astype(int)
    half = len(before) // 2
    assert (before[:half] == after[:half]).all()
    assert np.abs(before[half:] - after[half:]).max() > 50


def test_bad_upload_gives_a_message_and_no_traceback(tab, page, tmp_path):
    (tmp_path / "words.png").write_text("no image")
    tab.get_by_role("tab", name="Edit").click()
    with tab.expect_file_chooser() as chooser:
        tab.click("#upload")
    chooser.value.set_files(tmp_path / "words.png")
    tab.get_by_text("words.png: cannot identify image file").wait_for()
    assert "Traceback" not in page[1].read_text()


def test_edit_without_a_picture_gives_a_message(tab):
    tab.get_by_role("tab", name="Edit").click()
    tab.click("#edit")
    tab.get_by_text("there is no picture yet").wait_for()


@pytest.mark.parametrize("megabytes, status", [(7, 200), (9, 413)])
def test_uploads_are_limited_to_eight_megabytes(page, megabytes, status):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body += bytes(megabytes * 2**20) + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{page[0]}/gradio_api/upload", body, kind)
    try:
        answer = urllib.request.urlopen(request, timeout=WAIT)
    except urllib.error.HTTPError as refusal:
        answer = refusal
    assert answer.status == status


def test_page_listens_on_no_other_address(page):
    port = int(page[0].rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)  # all addresses would answer


def test_everything_that_computes_waits_in_one_queue(page):
    queues, waiting = json.loads(re.search("QUEUES (.*)", page[1].read_text())[1])
    for name in ("on_generate", "on_edit", "on_upload"):
        assert queues[name] == ["session", 1]
    assert waiting == 32


def test_port_in_use_is_reported_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        outcome = helpers.call_main(app.main, "--port", port)
    message = f"error: --host 127.0.0.1 --port {port}: Address already in use\n"
    assert (outcome.status, outcome.err) == (2, message)


def test_missing_gradio_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(app, "load", lambda args: None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    outcome = helpers.call_main(app.main, "--port", processes.free_port())
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and "bash scripts/app.sh" in outcome.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--pretrained_ckpt", "absent"), "no such file: absent"),
        (("--vqgan_path", "absent"), "no such file: absent"),
        (("--img_size", "64"), "--img_size is 64, the weights or data have 32"),
    ],
)
def test_wrong_flag_is_reported_in_one_line(flags, message):
    outcome = helpers.call_main(app.main, "--port", processes.free_port(), *flags)
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert message in outcome.err
