"""Published models by name, from a hub of this machine that has the published names and small weights."""

import argparse
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

import helpers
import pytest
import torch
from helpers import ON_CPU, call, call_main, contents, picture
from processes import REPO, finished

import main_edit
import main_lpd
import main_sample
from engine.generate import load_pair
from engine.published import PUBLISHED, TOKENIZER, WEIGHTS, order_file
from models.lpd import LPD, LPD_CONFIGS, LPDConfig
from models.vqgan import VQConfig, VQModel
from models.weights import save_weights
from orders.order_file import load_orders, save_orders
from scripts import fetch, own_images, plan

COMMIT = "1" * 40
SMALL = LPDConfig(vocab_size=64, embed_dim=32, depth=1, num_heads=2)


class Hub(BaseHTTPRequestHandler):
    """Serves the folder OWNER/REPO/FILE as huggingface_hub asks for it."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        words = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if words[:2] == ["api", "models"]:
            return self.describe(self.server.folder.joinpath(*words[2:4]), tree="tree" in words)
        file = self.server.folder.joinpath(*words[:2], *words[4:])  # OWNER/REPO/resolve/REVISION/FILE
        self.answer(file.read_bytes() if file.is_file() else None, ETag=f'"{file.name}"')

    do_GET = do_HEAD

    def describe(self, repo, tree):
        files = [
            {"type": "file", "path": p.name, "rfilename": p.name, "size": p.stat().st_size, "oid": p.name}
            for p in repo.glob("*")
        ]
        about = {"id": repo.name, "sha": COMMIT, "siblings": files, "tags": [], "downloads": 0, "likes": 0}
        self.answer(json.dumps(files if tree else about).encode() if files else None)

    def answer(self, content, **headers):
        self.send_response(404 if content is None else 200)
        headers |= {"Content-Length": len(content or b""), "X-Repo-Commit": COMMIT}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if content and self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder that the hub serves, with an empty cache before it; `hub.close()` takes it away."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.close = tmp_path / "served", lambda: (server.shutdown(), server.server_close())
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    constants = {
        "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
    }
    for name, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.chdir(tmp_path)
    yield server
    server.close()


@pytest.fixture
def published(hub, monkeypatch):
    """Small weights under the published names, saved as released files are."""
    for name, model in PUBLISHED.items():
        monkeypatch.setitem(LPD_CONFIGS, model.size, LPDConfig(embed_dim=32, depth=1, num_heads=2))
        config = LPDConfig(**{**SMALL.__dict__, "grid_size": model.img_size // 16})
        path = served(hub, f"{WEIGHTS.format(name)}/{name}.pth")
        torch.save({"model": LPD(config).state_dict(), "args": argparse.Namespace(lr=1e-4)}, path)
    tokenizer = VQModel(VQConfig(64, 4, base_width=32, multipliers=(1,) * 5, num_res_blocks=1, z_channels=32))
    torch.save({"model": tokenizer.state_dict()}, served(hub, TOKENIZER))
    served(hub, TOKENIZER).with_name("vq_ds8_c2i.pt").touch()
    return hub


def served(hub, name):
    path = hub.folder / name.removeprefix("hf://")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_name_and_classes_are_a_whole_command_which_works_again_without_the_hub(published, tmp_path):
    words = ["--model", "lpd_l_256", "--classes", 207, "--num_per_class", 1, "--generation_steps", 2, *ON_CPU]
    first = finished(call("sample", *words))
    assert "fetching hf://mit-han-lab/lpd_l_256: lpd_l_256.pth, 0.2 MB\n" in first.out
    assert f"fetching {TOKENIZER}: vq_ds16_c2i.pt, " in first.out
    published.close()
    second = finished(call("sample", *words))
    assert "fetching" not in second.out and "--pretrained_ckpt hf://mit-han-lab/lpd_l_256" in second.out
    images = [contents(tmp_path / f"output/sample-{run}/images_2_steps") for run in (1, 2)]
    assert images[0] == images[1] and len(images[0]) == 1
    assert picture(tmp_path / "output/sample-1/images_2_steps/207/00000.png").shape == (256, 256, 3)


def test_published_weights_edit_a_picture(published, tmp_path):
    words = ["--class", 207, "--variations", 0.01, "--num", 1, *ON_CPU]
    image = REPO / "assets/demo.png"
    outcome = finished(call("edit", "--model", "lpd_xl_256", "--image", image, *words))
    assert "--cfg 4.9" in outcome.out and (tmp_path / "output/edit-1/sheet.png").exists()


def test_all_that_an_evaluation_reads_is_fetched_ahead(published):
    """The 512 px weights too; without the hub all of it is still there."""
    orders = order_file(PUBLISHED["lpd_l_256"], 20)
    assert orders.endswith("lpd_orders/res256_steps20_repulsion2.json")
    for model in PUBLISHED.values():
        for steps in model.guidance:
            rows = torch.randperm(model.img_size**2 // 256)[None]
            save_orders(served(published, order_file(model, steps)), rows, {})
    *_, path = finished(call_main(fetch.main, "lpd_xl_512", "lpd_l_256")).out.splitlines()
    published.close()
    assert LPD.load(WEIGHTS.format("lpd_xl_512"), "lpd_xl")[0].config.grid_size == 32
    assert len(load_orders(path, 256)) == 1 and path.endswith("steps32_repulsion2.json")
    outcome = call_main(fetch.main, "hf://owner/none")
    assert outcome.status == 2 and "hf://owner/none is not in" in outcome.err and outcome.err.count("\n") == 1


def test_a_repository_of_weights_and_their_tokenizer_needs_one_name(hub, tiny_lpd, tiny_vq):
    for name, model in (("any.safetensors", tiny_lpd), ("tokenizer.safetensors", tiny_vq)):
        save_weights(served(hub, f"hf://owner/both/{name}"), model)
    for given in ((), ("hf://owner/both",)):
        model, tokenizer, _ = load_pair("hf://owner/both", *given)
        assert (model.config, tokenizer.config) == (tiny_lpd.config, tiny_vq.config)


@pytest.mark.parametrize("program", [main_sample, main_lpd])
@pytest.mark.parametrize("words, expected", [
    ("lpd_l_256", ("lpd_l", 256, 20, 4.8, 2)),
    ("lpd_xxl_256", ("lpd_xxl", 256, 20, 5.9, 3)),
    ("lpd_l_256 --generation_steps 30", ("lpd_l", 256, 30, 5.4, 2)),
    ("lpd_l_512 --cfg 2 --repulsion_threshold 1", ("lpd_l", 512, 48, 2, 1)),
    ("lpd_l_256 --group_sizes [1]*256", ("lpd_l", 256, 256, 5.4, 2)),
])
def test_flags_that_are_given_win_and_all_others_that_are_used_are_printed(program, words, expected, capsys):
    args = program.parse_args(["--model", *words.split(), "--pretrained_ckpt", "own.pth"])
    names = ("model", "img_size", "generation_steps", "cfg", "repulsion_threshold")
    assert tuple(getattr(args, name) for name in names) == expected and args.pretrained_ckpt == "own.pth"
    printed = capsys.readouterr().out
    assert printed.startswith(f"{words.split()[0]}: ") and printed.count("\n") == 1
    for name in (*names[1:], "vqgan_path"):
        used = f"--{name} {getattr(args, name)} " in f"{printed.strip()} "
        assert used != (f"--{name}" in words.split())
    assert "own.pth" not in printed


def test_own_images_tune_published_weights_where_these_are(published, tmp_path, monkeypatch, capsys):
    """On a GPU by default, elsewhere by name; without the hub a model of their own is trained there."""
    monkeypatch.setattr(plan, "faster", lambda make_step, device: (False, 4.0, 4.0))
    words = [helpers.images(), tmp_path / "out", "--dry_run"]
    out = finished(call_main(own_images.main, *words, "--model", "lpd_l_256")).out
    assert "main_tokenizer.py" not in out and "--pretrained_ckpt hf://mit-han-lab/lpd_l_256" in out
    assert out.count("--img_size 256") == 2 and "--model lpd_l " in out.replace("\\\n", " ")
    args, gpu = own_images.parse_args(["data"]), torch.device("cuda")
    assert own_images.choose(args, 100, gpu)[1]["pretrained_ckpt"] == WEIGHTS.format("lpd_l_256")
    published.close()
    shutil.rmtree(tmp_path / "cache")
    assert own_images.choose(args, 100, gpu)[1]["model"] == "lpd_tiny"
    assert "a model is trained from nothing" in capsys.readouterr().out


def test_a_size_alone_changes_no_other_flag(capsys):
    args = main_edit.parse_args(["--model", "lpd_l", "--variations", "0.5"])
    assert (args.pretrained_ckpt, args.vqgan_path, args.cfg) == (None, None, 1.0)
    assert capsys.readouterr().out == ""
