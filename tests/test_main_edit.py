"""Editing pictures: the cells under a mask, borders, pasting, and the program that does it all."""

import json

import numpy as np
import programs
import pytest
from PIL import Image
from programs import SIZE, call, contents, edit_flags, finished, start

import main_edit
from engine.checkpoint import load_tokenizer
from util.images import center_crop, to_uint8, to_unit
from util.regions import as_pixels, cells_under, paste, with_border

STRIDE = programs.STRIDE


def marked(height, width, *pixels):
    mask = np.zeros((height, width), bool)
    mask[tuple(zip(*pixels, strict=True))] = True
    return mask


# masks


@pytest.mark.parametrize(
    "shape, pixels, cells",
    [
        ((16, 16), [(0, 0)], [0]),
        ((16, 16), [(3, 3), (4, 4)], [0, 5]),
        ((16, 16), [(15, 0)], [12]),
        ((16, 24), [(0, 3), (0, 20)], []),  # the centre is columns 4..19
        ((16, 24), [(0, 4), (0, 19)], [0, 3]),
        ((17, 16), [(0, 0), (16, 0)], [0, 12]),  # half a pixel is cut off on either side
        ((64, 64), [(17, 31)], [5]),
        ((2, 2), [(0, 1)], [2, 3, 6, 7]),  # a pixel as large as four cells
        ((6, 6), [(1, 4)], [2, 3, 6, 7]),  # a pixel over the edges of cells
    ],
)  # fmt: skip
def test_a_cell_is_generated_where_any_of_its_pixels_is_marked(shape, pixels, cells):
    assert np.flatnonzero(cells_under(marked(*shape, *pixels), 4)).tolist() == cells


def test_cells_lie_where_the_centre_crop_has_their_pixels():
    """A wide picture that is white where marked, cropped: white is under the cells and only there."""
    mask = np.zeros((32, 56), bool)
    mask[8:16, 28:36] = True
    cropped = center_crop(Image.fromarray(mask.repeat(2, 0).repeat(2, 1)).convert("RGB"), 16)[..., 0] > 127
    np.testing.assert_array_equal(as_pixels(cells_under(mask, 4)[None], 16)[0], cropped)


# borders


def test_a_border_is_generated_around_a_picture_made_smaller():
    image = Image.fromarray(np.full((40, 60, 3), 200, np.uint8))
    pixels, room = with_border(image, (4, 0, 3, 8), 16)
    assert pixels.shape == (16, 16, 3) and (pixels == 200).all()
    expected = np.ones((16, 16), bool)
    expected[0:8, 4:13] = False
    np.testing.assert_array_equal(room, expected)
    kept = ~cells_under(room, 4)
    assert np.flatnonzero(kept).tolist() == [1, 2, 5, 6]  # of cell column 3 only one pixel is the picture's


# pasting


@pytest.fixture(scope="module")
def two_pictures():
    original, edited = np.zeros((16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 240, np.uint8)
    return original, edited, np.arange(16)[None] >= 8  # the lower half


def test_pasting_without_a_blend_is_a_hard_edge(two_pictures):
    pasted = paste(*two_pictures, 0)[0]
    assert (pasted[:8] == 0).all() and (pasted[8:] == 240).all()


def test_pasting_blends_beside_the_generated_cells_only(two_pictures):
    """Shares 3/4, 1/2 and 1/4 on the three rows above the region."""
    assert paste(*two_pictures, 3)[0, :, 5, 0].tolist() == [0] * 5 + [60, 120, 180] + [240] * 8


# the program


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def results(folder):
    return [picture(path) for path in sorted((folder / "images").glob("*.png"))]


def cells_of(folder):
    return json.loads((folder / "edit.json").read_text())["generated_cells"]


def test_editing_from_another_folder_writes_results_sheet_and_film(tmp_path):
    flags = edit_flags("out", ["--box", 0, 4, 8, 16], cfg=2)
    outcome = finished(start("edit", *flags, cwd=tmp_path))
    assert "6 of 16 cells generated in 3 steps" in outcome.out
    names = ["edit.json", "film.gif", *(f"images/{i:05d}.png" for i in range(3)), "kept.png", "original.png"]
    assert list(contents(tmp_path / "out")) == sorted([*names, "sheet.png"])
    assert cells_of(tmp_path / "out") == [[4, 5, 8, 9, 12, 13]] * 3
    assert all(image.shape == (SIZE, SIZE, 3) for image in results(tmp_path / "out"))
    with Image.open(tmp_path / "out/film.gif") as film:
        assert film.n_frames == 1 + 3  # what is kept, then one for each step


@pytest.mark.parametrize(
    "part, generated",
    [
        (["--outpaint", 4, 4, 0, 1], [0, 1, 2, 3, 4, 8, 12, 13, 14, 15]),
        (["--box", 15, 15, 16, 16], [15]),
    ],
    ids=["outpaint", "box"],
)
def test_the_flag_decides_the_cells(tmp_path, part, generated):
    finished(call("edit", *edit_flags(tmp_path / "out", part)))
    assert cells_of(tmp_path / "out") == [generated] * 3


def test_a_mask_is_white_where_to_generate(tmp_path):
    Image.fromarray(np.pad(np.full((4, 4), 255, np.uint8), ((8, 4), (0, 12)))).save(tmp_path / "mask.png")
    finished(call("edit", *edit_flags(tmp_path / "out", ["--mask", tmp_path / "mask.png"])))
    assert cells_of(tmp_path / "out") == [[8]] * 3


def test_variations_generate_a_share_of_cells_of_their_own(tmp_path):
    finished(call("edit", *edit_flags(tmp_path / "out", ["--variations", 0.5])))
    cells = cells_of(tmp_path / "out")
    assert [len(row) for row in cells] == [8, 8, 8] and len(set(map(tuple, cells))) == 3


def test_pasted_pixels_are_those_of_the_picture(tmp_path):
    finished(call("edit", *edit_flags(tmp_path / "out", ["--box", 0, 8, 16, 16], paste=2)))
    original = picture(tmp_path / "out/original.png")
    for image in results(tmp_path / "out"):
        np.testing.assert_array_equal(image[:6], original[:6])
        assert (image[8:] != original[8:]).any()


def test_everything_generated_is_what_main_sample_makes(tmp_path):
    """One grey level: another batch size, where the decoder's convolutions may sum in another order."""
    finished(call("edit", *edit_flags(tmp_path / "edit", ["--variations", 1], num=1, cfg=2, seed=7)))
    words = programs.sample_flags(tmp_path / "plain", generation_steps=3, cfg=2, seed=7)
    finished(call("sample", *words, "--classes", "rings"))
    plain = picture(tmp_path / "plain/images_3_steps/02_rings/00000.png").astype(int)
    assert np.abs(results(tmp_path / "edit")[0] - plain).max() <= 1


def test_results_are_the_same_again_for_any_batch_size_and_others_for_another_seed(tmp_path):
    part = ["--box", 0, 0, 16, 12]
    for name, changes in {"a": {}, "b": {"batch_size": 2}, "c": {"seed": 1}}.items():
        finished(call("edit", *edit_flags(tmp_path / name, part, **changes)))
    first, again, other = (np.array(results(tmp_path / name)).astype(int) for name in "abc")
    assert np.abs(first - again).max() <= 1  # as above
    assert (np.abs(first - other).max(axis=(1, 2, 3)) > 1).all()
    assert (np.abs(first[0] - first[1]).max() > 1) and (np.abs(first[1] - first[2]).max() > 1)


def test_more_steps_than_cells_are_as_many_as_cells(tmp_path):
    outcome = finished(call("edit", *edit_flags(tmp_path / "o", ["--box", 0, 0, 8, 4], generation_steps=9)))
    assert "2 of 16 cells generated in 2 steps" in outcome.out


def test_what_is_kept_are_the_tokens_of_the_picture(tmp_path, monkeypatch):
    """Of an editing that gives its input back, the result is the plain reconstruction."""
    given = []

    def played(model, tokens, keep, labels, *_, **__):
        given.append((keep, labels))
        return tokens

    monkeypatch.setattr(main_edit, "edit_tokens", played)
    finished(call("edit", *edit_flags(tmp_path / "out", ["--box", 12, 12, 16, 16], num=1)))
    keep, labels = given[0]
    assert keep.tolist() == [[True] * 15 + [False]] and labels.tolist() == [2]
    tokenizer = load_tokenizer(programs.tokenizer())
    original = np.array(picture(tmp_path / "out/original.png"))
    plain = to_uint8(tokenizer.decode(tokenizer.encode(to_unit(original[None]))))[0].numpy()
    np.testing.assert_array_equal(results(tmp_path / "out")[0], plain)
