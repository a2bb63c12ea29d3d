"""Editing pictures: cells under a mask, borders, pasting, and main_edit."""

import json

import helpers
import numpy as np
import processes
import pytest
from helpers import call, contents, edit_flags, picture
from PIL import Image
from processes import finished

from models.vqgan import VQModel
from util.images import cells_under, only_inside, paste, to_uint8, to_unit, with_border


@pytest.mark.parametrize(
    "shape, marked, cells",
    [
        ((16, 16), [(3, 3), (4, 4)], [0, 5]),
        ((16, 24), [(0, 3), (0, 4), (0, 20)], [0]),  # the centre is columns 4..19
        ((17, 16), [(0, 0), (16, 0)], [0, 12]),  # half a pixel is cut off on either side
        ((2, 2), [(0, 1)], [2, 3, 6, 7]),  # a pixel as large as four cells
    ],
)
def test_cell_is_generated_if_any_of_its_pixels_is_marked(shape, marked, cells):
    mask = np.zeros(shape, bool)
    mask[tuple(zip(*marked, strict=True))] = True
    assert np.flatnonzero(cells_under(mask, 4)).tolist() == cells


def test_a_picture_is_shown_without_the_border_that_was_made_up():
    shown = only_inside(np.full((8, 8, 3), 200, np.uint8), (2, 0, 1, 3))
    assert (shown[:5, 2:7] == 200).all() and (shown == 128).sum() == 3 * (64 - 25)


def test_border_surrounds_the_shrunk_picture():
    pixels, border = with_border(Image.fromarray(np.full((40, 60, 3), 200, np.uint8)), (4, 0, 3, 8), 16)
    expected = np.ones((16, 16), bool)
    expected[0:8, 4:13] = False
    np.testing.assert_array_equal(border, expected)
    assert pixels.shape == (16, 16, 3) and (pixels == 200).all()


@pytest.mark.parametrize("width, blend", [(0, [0, 0, 0]), (3, [60, 120, 180])])
def test_pasting_blends_beside_the_generated_cells_only(width, blend):
    original, edited = np.zeros((16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 240, np.uint8)
    lower_half = np.arange(16)[None] >= 8
    column = paste(original, edited, lower_half, width)[0, :, 5, 0].tolist()
    assert column == [0] * 5 + blend + [240] * 8


def run_edit(folder, part, **changes):
    """Run main_edit; returns the results, int [n, S, S, 3], and the generated cells of each."""
    finished(call("edit", *edit_flags(folder, part, **changes)))
    results = np.array([picture(path) for path in sorted((folder / "images").glob("*.png"))]).astype(int)
    return results, json.loads((folder / "edit.json").read_text())["generated_cells"]


def test_editing_writes_results_sheet_and_film(tmp_path):
    words = edit_flags("out", ["--box", 0, 4, 8, 16], cfg=2)
    outcome = finished(processes.start("edit", *words, cwd=tmp_path))
    assert "6 of 16 cells generated in 3 steps" in outcome.out
    names = [*(f"images/{i:05d}.png" for i in range(3)), "kept.png", "original.png", "sheet.png"]
    assert list(contents(tmp_path / "out")) == ["edit.json", "film.gif", *names]
    with Image.open(tmp_path / "out/film.gif") as film:
        assert film.n_frames == 1 + 3  # what is kept, then one for each step


def test_flag_decides_the_cells(tmp_path):
    _, cells = run_edit(tmp_path / "border", ["--outpaint", 4, 4, 0, 1])
    assert cells == [[0, 1, 2, 3, 4, 8, 12, 13, 14, 15]] * 3
    mask = np.pad(np.full((4, 4), 255, np.uint8), ((8, 4), (0, 12)))
    Image.fromarray(mask).save(tmp_path / "mask.png")
    _, cells = run_edit(tmp_path / "mask", ["--mask", tmp_path / "mask.png"])
    assert cells == [[8]] * 3
    _, cells = run_edit(tmp_path / "random", ["--variations", 0.5])
    assert [len(row) for row in cells] == [8, 8, 8] and len(set(map(tuple, cells))) == 3


def test_results_depend_on_the_seed_but_not_on_the_batch_size(tmp_path):
    part = ["--box", 0, 0, 16, 12]
    first, _ = run_edit(tmp_path / "a", part)
    again, _ = run_edit(tmp_path / "b", part, batch_size=2)
    other, _ = run_edit(tmp_path / "c", part, seed=1)
    assert np.abs(first - again).max() <= 1  # convolutions may sum in another order
    assert (np.abs(first - other).max(axis=(1, 2, 3)) > 1).all() and np.abs(first[0] - first[1]).max() > 1


def test_generating_every_cell_is_sampling(tmp_path):
    edited, _ = run_edit(tmp_path / "edit", ["--variations", 1], num=1, cfg=2, seed=7)
    words = helpers.sample_flags(tmp_path / "plain", generation_steps=3, cfg=2, seed=7)
    finished(call("sample", *words, "--classes", "rings"))
    plain = picture(tmp_path / "plain/images_3_steps/02_rings/00000.png")
    assert np.abs(edited[0] - plain).max() <= 1


def test_kept_tokens_are_those_of_the_picture(tmp_path, monkeypatch):
    """If nothing is edited, the result is the tokenizer's plain reconstruction."""
    monkeypatch.setattr("main_edit.edit_tokens", lambda model, tokens, *_, **__: tokens)
    edited, _ = run_edit(tmp_path, ["--box", 12, 12, 16, 16], num=1, no_paste=True)
    tokenizer, _ = VQModel.load(helpers.tokenizer())
    tokens = tokenizer.encode(to_unit(picture(tmp_path / "original.png")[None]))
    np.testing.assert_array_equal(edited[0], to_uint8(tokenizer.decode(tokens))[0].numpy())


@pytest.mark.parametrize("flags", [{"paste": 2}, {}])
def test_kept_pixels_are_those_of_the_picture(tmp_path, flags):
    edited, _ = run_edit(tmp_path, ["--box", 0, 8, 16, 16], **flags)
    original = picture(tmp_path / "original.png")
    assert (edited[:, :6] == original[:6]).all() and (edited[:, 8:] != original[8:]).any()
