"""Nothing from a file runs, and no size it claims is believed: every reader meets files that would make a
marker or take all memory, and refuses them."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from safetensors.torch import save
from test_token_cache import write_cache

from engine.checkpoint import load_checkpoint, load_lpd, load_tokenizer, start_from
from engine.chunks import ChunkStore, DamagedChunk
from engine.features import Inception
from engine.metrics import load_statistics
from models.lpd import LPD, LPDConfig
from orders.order_file import load_orders
from util.images import UnreadableImage, load_image
from util.npz import open_array
from util.token_cache import MarCache, TokenCache

SMALL = LPDConfig(grid_size=2, vocab_size=4, num_classes=2, embed_dim=8, depth=1, num_heads=1)


class Marks:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


# What a hostile file may be made of: bytes that make the marker for a reader that runs them.


def bare(marker):
    return pickle.dumps({"model": Marks(marker)}, protocol=2)


def torch_zip(marker):
    file = io.BytesIO()
    torch.save({"model": {"head.weight": torch.zeros(2)}, "args": Marks(marker)}, file)
    return file.getvalue()


def torch_legacy(marker):
    file = io.BytesIO()
    torch.save({"model": Marks(marker)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def npy(marker):
    file = io.BytesIO()
    np.save(file, np.array([Marks(marker)] * 2, object), allow_pickle=True)
    return file.getvalue()


def npy_with_code_for_a_header(marker):
    """A header that is an expression, for a reader that evaluates it."""
    text = f"__import__('pathlib').Path({str(marker)!r}).touch()".ljust(253) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def npz(marker):
    keys = ("arr_0", "mu", "sigma", "indices", "indices_flip", "features")
    return zip_of({f"{key}.npy": npy(marker) for key in keys})


def npz_of_bare_pickles(marker):
    """numpy.load takes an entry without an .npy's magic bytes for what it is named."""
    keys = ("arr_0", "mu", "sigma", "indices", "indices_flip", "features")
    return zip_of({f"{key}.npy": bare(marker) for key in keys})


def zip_of(entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def safetensors(marker):
    """Text in the places that we read as JSON."""
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    return save({"x": torch.zeros(1)}, metadata={"lpd": code, "__reduce__": code})


def postscript(marker):
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n({marker}) (w) file\n".encode()


CONTENTS = [
    bare, torch_zip, torch_legacy, npy, npy_with_code_for_a_header, npz, npz_of_bare_pickles, safetensors,
    postscript,
]  # fmt: skip


# The readers: each puts the bytes where it reads them.


def at(name, read):
    """A reader of one file of that name."""

    def reader(folder, content):
        (folder / name).write_bytes(content)
        read(folder / name)

    return reader


def in_cache(name):
    def reader(folder, content):
        cache = write_cache(folder / "cache", np.zeros((5, 2, 4), int))
        (cache / name).write_bytes(content)
        TokenCache(cache)

    return reader


def in_mar(folder, content):
    (folder / "cat").mkdir()
    (folder / "cat/1.npz").write_bytes(content)
    MarCache(folder, 64, 16)


def in_chunks(folder, content):
    store = ChunkStore(folder / "chunks", {"num_images": 2, "batch_size": 2})
    store.begin()
    store.path(0).write_bytes(content)
    list(store.read("features"))


READERS = {
    "checkpoint": at("checkpoint-last.pth", load_checkpoint),
    "weights .pth": at("lpd.pth", load_lpd),
    "weights .safetensors": at("lpd.safetensors", load_lpd),
    "weights to start from": at("lpd.pth", lambda path: start_from(LPD(SMALL), path)),
    "tokenizer .pt": at("vq.pt", load_tokenizer),
    "tokenizer .safetensors": at("vq.safetensors", load_tokenizer),
    "inception": at("inception.pth", lambda path: Inception(path, torch.device("cpu"))),
    "orders .npy": at("orders.npy", lambda path: load_orders(path, 4)),
    "orders .json": at("orders.json", lambda path: load_orders(path, 4)),
    "statistics": at("stats.npz", load_statistics),
    "reference batch": at("batch.npz", lambda path: open_array(path, "arr_0")),
    "cache tokens": in_cache("shard-00001.tokens.npy"),
    "cache labels": in_cache("shard-00001.labels.npy"),
    "cache description": in_cache("meta.json"),
    "MAR cache": in_mar,
    "chunk of an evaluation": in_chunks,
    "image": at("cat.png", lambda path: load_image(path, 8)),
}


@pytest.mark.parametrize("content", CONTENTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("reader", READERS)
def test_hostile_file_is_refused_and_does_not_run(tmp_path, reader, content):
    marker = tmp_path / "ran"
    with pytest.raises((ValueError, UnreadableImage, DamagedChunk)) as refusal:
        READERS[reader](tmp_path, content(marker))
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)
    assert not marker.exists()


@pytest.mark.parametrize("run", [
    lambda path: pickle.loads(bare(path)),
    lambda path: torch.load(io.BytesIO(torch_zip(path)), weights_only=False),
    lambda path: torch.load(io.BytesIO(torch_legacy(path)), weights_only=False),
    lambda path: np.load(io.BytesIO(npy(path)), allow_pickle=True),
    lambda path: np.load(io.BytesIO(npz(path)), allow_pickle=True)["mu"],
], ids=["pickle", "zip", "legacy", "npy", "npz"])  # fmt: skip
def test_hostile_files_of_these_tests_are_hostile(tmp_path, run):
    run(tmp_path / "ran")
    assert (tmp_path / "ran").exists()


# Sizes that a file claims are checked before memory is taken.


def weights_with(path, config, **tensors):
    """A small LPD's weights, with another config and other tensors."""
    state = {**LPD(SMALL).state_dict(), **tensors}
    torch.save({"model": state, "info": {"config": {**SMALL.__dict__, **config}}}, path)


@pytest.mark.parametrize("config", [
    {"depth": 10**9}, {"depth": 2**23}, {"embed_dim": 2**24}, {"vocab_size": 2**24}, {"grid_size": 2**24},
    {"num_classes": 2**60}, {"mlp_ratio": 1e300}, {"mlp_ratio": float("nan")}, {"num_heads": "1"},
    {"depth": True}, {"depth": None}, {"num_heads": 0},
], ids=str)  # fmt: skip
def test_weights_whose_config_claims_an_absurd_size_are_refused_at_once(tmp_path, config):
    weights_with(tmp_path / "lpd.pth", config)
    with pytest.raises(ValueError, match="lpd.pth"):
        load_lpd(tmp_path / "lpd.pth")


@pytest.mark.parametrize("config", [
    {"base_width": 2**22}, {"multipliers": [1] * 30}, {"multipliers": [2**20]}, {"multipliers": 3},
    {"num_res_blocks": 2**20}, {"z_channels": 2**24}, {"code_dim": 2**24}, {"multipliers": [[1]]},
], ids=str)  # fmt: skip
def test_tokenizer_whose_config_claims_an_absurd_size_is_refused_at_once(tmp_path, config):
    state = torch.load(programs_tokenizer(tmp_path), weights_only=True)
    torch.save({"model": state, "info": {"config": {**programs.VQ.__dict__, **config}}}, tmp_path / "vq.pth")
    with pytest.raises(ValueError, match="vq.pth"):
        load_tokenizer(tmp_path / "vq.pth")


def programs_tokenizer(folder):
    torch.save(load_tokenizer(programs.tokenizer()).state_dict(), folder / "state.pth")
    return folder / "state.pth"


@pytest.mark.parametrize(
    "shape", [(1, 2**40, 8), (1, 2**16 + 2, 8), (5, 8), (1, 0, 8), (2, 5, 8), (1, 5, 2**40)], ids=str
)
def test_table_of_positions_that_claims_an_absurd_grid_is_refused(tmp_path, shape):
    """One number, expanded: the file is small whatever the shape says."""
    weights_with(tmp_path / "lpd.pth", {}, pos_embed=torch.zeros(()).expand(shape))
    for read in (load_lpd, lambda path: start_from(LPD(SMALL), path)):
        with pytest.raises(ValueError, match="lpd.pth"):
            read(tmp_path / "lpd.pth")


def test_weights_that_repeat_one_number_a_billion_times_are_refused(tmp_path):
    big = torch.zeros(()).expand(2**14, 2**15)
    torch.save({"model": {**LPD(SMALL).state_dict(), "head.weight": big}}, tmp_path / "lpd.pth")
    with pytest.raises(ValueError, match="lpd.pth: weights of 21474[0-9]* bytes in a file of"):
        load_lpd(tmp_path / "lpd.pth", "lpd_tiny")


def test_checkpoint_whose_parts_would_inflate_is_refused(tmp_path):
    """As torch.save writes, but deflated: 64 MB of zeros in 64 KB."""
    torch.save({"model": {"x": torch.zeros(2**24)}}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, content in entries.items():
            bomb.writestr(name, content)
    with pytest.raises(ValueError, match="bomb.pth: its parts claim 6.* bytes, the file has 6"):
        load_checkpoint(tmp_path / "bomb.pth")


def test_npz_that_would_inflate_more_than_a_hundred_times_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", arr_0=np.zeros(2**27, np.uint8))
    with pytest.raises(ValueError, match="bomb.npz: .* bytes claim to inflate to 134217856"):
        open_array(tmp_path / "bomb.npz", "arr_0")


@pytest.mark.parametrize(
    "info", [[], "text", 3, {"class_names": 3}, {"class_names": [1]}, {"config": []}], ids=str
)
def test_weights_that_say_something_damaged_of_themselves_are_refused(tmp_path, info):
    torch.save({"model": LPD(SMALL).state_dict(), "info": info}, tmp_path / "lpd.pth")
    with pytest.raises(ValueError, match="lpd.pth"):
        load_lpd(tmp_path / "lpd.pth")


@pytest.mark.parametrize("row", ["[" * 10**6, "[" + "0, " * 10**6 + "0]", "[" + "9" * 10**6 + "]"], ids=len)
def test_absurd_row_of_an_order_file_is_refused(tmp_path, row):
    (tmp_path / "orders.json").write_text(f"[{row}]")
    with pytest.raises(ValueError, match="orders.json, row 0"):
        load_orders(tmp_path / "orders.json", 4)
