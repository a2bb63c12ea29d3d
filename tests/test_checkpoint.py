"""Weights on disk: ours and released ones; what is damaged, hostile or does not fit is refused."""

import argparse
import errno
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint import (
    LAST,
    PREVIOUS,
    load_checkpoint,
    load_last_checkpoint,
    load_lpd,
    load_state,
    load_tokenizer,
    read_weights,
    save_checkpoint,
    save_weights,
    start_from,
    state_digest,
)
from models.lpd import LPD, LPD_CONFIGS, LPDConfig, resize_pos_embed
from models.vqgan import VQConfig, VQModel


class MakesFolder:
    """Unpickling one makes a folder: harmless code in the place of a harmful one's."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save_pth(path, model):
    """A training checkpoint as `TrainState.save` writes it, as far as readers of weights look."""
    save_checkpoint(path, {"model": model.state_dict(), "info": {"config": model.config.__dict__}, "step": 3})


SAVERS = {".pth": save_pth, ".safetensors": save_weights}


@pytest.fixture(params=list(SAVERS))
def weights(request, tmp_path, tiny_lpd):
    """`tiny_lpd` in a file of each format."""
    path = tmp_path / f"weights{request.param}"
    SAVERS[path.suffix](path, tiny_lpd)
    return path


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# there and back


def test_a_model_comes_back_with_its_config(weights, tiny_lpd):
    model, _ = load_lpd(weights)
    assert model.config == tiny_lpd.config
    assert equal_states(model.state_dict(), tiny_lpd.state_dict())
    assert not model.training


@pytest.mark.parametrize("suffix", list(SAVERS))
def test_a_tokenizer_comes_back_with_its_config_and_without_gradients(tmp_path, tiny_vq, suffix):
    SAVERS[suffix](tmp_path / f"vq{suffix}", tiny_vq)
    model = load_tokenizer(tmp_path / f"vq{suffix}")
    assert model.config == tiny_vq.config
    assert equal_states(model.state_dict(), tiny_vq.state_dict())
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_safetensors_carry_what_is_said_of_the_weights(tmp_path, tiny_lpd):
    path = tmp_path / "weights.safetensors"
    save_weights(path, tiny_lpd, class_names=["a", "b"], tokenizer_digest="0123")
    _, info = load_lpd(path)
    assert info["class_names"] == ["a", "b"] and info["tokenizer_digest"] == "0123"


def test_the_moving_average_is_preferred(tmp_path, tiny_lpd):
    average = {name: tensor + 1 for name, tensor in tiny_lpd.state_dict().items()}
    save_checkpoint(tmp_path / "a.pth", {"model": tiny_lpd.state_dict(), "ema": average, "info": {}})
    state, _ = read_weights(tmp_path / "a.pth")
    assert equal_states(state, average)


def test_without_a_moving_average_the_weights_are_taken(tmp_path, tiny_lpd):
    save_checkpoint(tmp_path / "a.pth", {"model": tiny_lpd.state_dict(), "ema": {}, "info": {}})
    state, _ = read_weights(tmp_path / "a.pth")
    assert equal_states(state, tiny_lpd.state_dict())


def test_the_digest_does_not_depend_on_the_file(tmp_path, tiny_lpd):
    for suffix, save in SAVERS.items():
        save(tmp_path / f"a{suffix}", tiny_lpd)
    digests = {state_digest(load_lpd(tmp_path / f"a{suffix}")[0]) for suffix in SAVERS}
    assert digests == {state_digest(tiny_lpd)}


def test_the_digest_sees_one_changed_weight(tiny_lpd):
    before = state_digest(tiny_lpd)
    with torch.no_grad():
        tiny_lpd.head.weight[3, 5] += 1e-3
    assert state_digest(tiny_lpd) != before


# released files


@pytest.fixture
def small_released_size(monkeypatch, tiny_config):
    """The name of a size with `tiny_config`'s width and depth, but the published grid, codes and classes."""
    c = tiny_config
    size = LPDConfig(embed_dim=c.embed_dim, depth=c.depth, num_heads=c.num_heads)
    monkeypatch.setitem(LPD_CONFIGS, "released", size)
    return "released"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_released_checkpoint_with_a_namespace_loads(tmp_path, tiny_lpd, small_released_size, zipped):
    """Grid, codes and classes come from the shapes, width and depth from the named size."""
    args = argparse.Namespace(lr=1e-4, img_size=256)
    released = {"model": tiny_lpd.state_dict(), "args": args, "epoch": 449}
    torch.save(released, tmp_path / "released.pth", _use_new_zipfile_serialization=zipped)
    model, info = load_lpd(tmp_path / "released.pth", small_released_size)
    assert model.config == tiny_lpd.config and info == {}
    assert equal_states(model.state_dict(), tiny_lpd.state_dict())


def test_plain_weights_in_safetensors_load(tmp_path, tiny_lpd, small_released_size):
    save_file(tiny_lpd.state_dict(), tmp_path / "plain.safetensors")
    model, _ = load_lpd(tmp_path / "plain.safetensors", small_released_size)
    assert equal_states(model.state_dict(), tiny_lpd.state_dict())


def test_weights_that_do_not_say_their_size_ask_for_it(tmp_path, tiny_lpd):
    torch.save({"model": tiny_lpd.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth does not say its size: give --model"):
        load_lpd(tmp_path / "a.pth")


def test_weights_of_another_size_than_named_are_refused_with_both_numbers(tmp_path, tiny_lpd):
    torch.save({"model": tiny_lpd.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth has width 32, --model lpd_l has 1024"):
        load_lpd(tmp_path / "a.pth", "lpd_l")


def test_a_file_of_another_size_than_named_is_refused_though_it_says_its_own(weights):
    with pytest.raises(ValueError, match="weights.*width .*--model lpd_l has 1024 and 24"):
        load_lpd(weights, "lpd_l")


def test_a_config_with_unknown_fields_is_refused_in_one_line_that_names_the_file(tmp_path, tiny_lpd):
    state = {name: tensor.clone() for name, tensor in tiny_lpd.state_dict().items()}
    path = tmp_path / "weights.pth"
    save_checkpoint(path, {"model": state, "info": {"config": {"heads": 3}}})
    with pytest.raises(ValueError, match="weights.pth: its config is none of LPDConfig .*heads") as error:
        load_lpd(path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_config_must_be_vq16(tmp_path, tiny_vq):
    torch.save({"model": tiny_vq.state_dict()}, tmp_path / "small.pt")
    with pytest.raises(ValueError, match="small.pt: [0-9]+ weights missing"):
        load_tokenizer(tmp_path / "small.pt")


def test_a_tokenizer_without_a_config_is_read_as_vq16(tmp_path):
    """Zeros of the released shapes under the key `model`; expanded, so that the file is small."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VQModel(VQConfig()).state_dict().items()}
    zeros = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    torch.save({"model": zeros}, tmp_path / "vq_ds16_c2i.pt")
    assert load_tokenizer(tmp_path / "vq_ds16_c2i.pt").config == VQConfig()


# starting a larger grid


def test_256_px_weights_start_a_512_px_model(weights, tiny_lpd):
    """Twice the grid: position embeddings are resized, all else is taken as it is."""
    model = LPD(replace(tiny_lpd.config, grid_size=8))
    start_from(model, weights)
    expected = tiny_lpd.state_dict() | {"pos_embed": resize_pos_embed(tiny_lpd.pos_embed.detach(), 8)}
    assert equal_states(model.state_dict(), expected)


def test_starting_from_other_classes_is_refused_with_both_shapes(weights, tiny_lpd):
    model = LPD(replace(tiny_lpd.config, num_classes=7))
    with pytest.raises(ValueError, match=r"class_emb.weight has shape \[5, 32\], the model \[7, 32\]"):
        start_from(model, weights)


# what does not fit


def test_missing_and_unknown_weights_are_counted_and_the_first_named(tiny_lpd):
    state = tiny_lpd.state_dict()
    extra = {"zoo": torch.zeros(1), "zap": torch.zeros(1)}
    without = {name: tensor for name, tensor in state.items() if name != "head.weight"}
    with pytest.raises(ValueError, match="some.pth: 1 weights missing, 2 unknown, first head.weight"):
        load_state(tiny_lpd, without | extra, "some.pth")
    with pytest.raises(ValueError, match="some.pth: 0 weights missing, 2 unknown, first zap"):
        load_state(tiny_lpd, state | extra, "some.pth")


def test_a_wrong_shape_is_named_with_both_shapes(tiny_lpd):
    state = tiny_lpd.state_dict() | {"head.weight": torch.zeros(31, 32)}
    with pytest.raises(ValueError, match=r"some.pth: head.weight has shape \[31, 32\], the model \[32, 32\]"):
        load_state(tiny_lpd, state, "some.pth")


def test_refused_weights_leave_the_model_as_it_was(tiny_lpd):
    before = state_digest(tiny_lpd)
    state = {name: tensor + 1 for name, tensor in tiny_lpd.state_dict().items()}
    with pytest.raises(ValueError):
        load_state(tiny_lpd, state | {"head.weight": torch.zeros(31, 32)}, "some.pth")
    assert state_digest(tiny_lpd) == before


@pytest.mark.parametrize("suffix", list(SAVERS))
def test_a_model_and_a_tokenizer_in_each_others_place_are_refused(tmp_path, tiny_lpd, tiny_vq, suffix):
    lpd, vq = tmp_path / f"lpd{suffix}", tmp_path / f"vq{suffix}"
    SAVERS[suffix](lpd, tiny_lpd)
    SAVERS[suffix](vq, tiny_vq)
    with pytest.raises(ValueError, match=f"vq{suffix}: no LPD weights"):
        load_lpd(vq)
    with pytest.raises(ValueError, match=f"vq{suffix}: no LPD weights"):
        start_from(tiny_lpd, vq)
    with pytest.raises(ValueError, match=f"lpd{suffix}: no tokenizer weights"):
        load_tokenizer(lpd)


# damaged and hostile files


@pytest.mark.parametrize("part", [0, 0.001, 0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_cut_short_is_refused_in_one_line_that_names_it(tmp_path, tiny_lpd, kind, part):
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pth")
    if kind == "safetensors":
        save_weights(path, tiny_lpd)
    else:
        torch.save({"model": tiny_lpd.state_dict()}, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors"])
def test_a_file_of_something_else_is_refused_in_one_line_that_names_it(tmp_path, name):
    (tmp_path / name).write_text("These are no weights.\n" * 100)
    with pytest.raises(ValueError) as caught:
        read_weights(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors"])
def test_an_absent_file_is_an_os_error_that_names_it(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(1)], {"model": [1, 2]}, {"model": {"a": "text"}}],
    ids=["list", "no dict", "no tensor"],
)
def test_a_checkpoint_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: holds"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("place", ["under args", "in a namespace", "legacy", "bare pickle"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, tiny_lpd, place):
    marker, path = tmp_path / "marker", tmp_path / "hostile.pth"
    code = MakesFolder(marker)
    content = {"model": tiny_lpd.state_dict(), "args": code}
    if place == "in a namespace":
        content["args"] = argparse.Namespace(lr=code)
    if place == "bare pickle":
        path.write_bytes(pickle.dumps({"args": code}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=place != "legacy")
    with pytest.raises(ValueError, match="hostile.pth: refused, not plain weights .*mkdir"):
        load_checkpoint(path)
    assert not marker.exists()


def test_the_hostile_object_of_these_tests_is_hostile(tmp_path):
    pickle.loads(pickle.dumps(MakesFolder(tmp_path / "marker")))
    assert (tmp_path / "marker").is_dir()


# writing


@pytest.mark.parametrize("suffix", list(SAVERS))
def test_a_save_on_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, tiny_lpd, suffix, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / f"a{suffix}"
    SAVERS[suffix](path, tiny_lpd)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    torch.nn.init.zeros_(tiny_lpd.head.weight)
    with pytest.raises(OSError, match="No space left"):
        SAVERS[suffix](path, tiny_lpd)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_breaks_off_leaves_the_old_file_and_nothing_else(tmp_path, tiny_lpd):
    """A function cannot be pickled, which torch.save finds out when the file is begun."""
    save_pth(tmp_path / "a.pth", tiny_lpd)
    before = (tmp_path / "a.pth").read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(tmp_path / "a.pth", {"model": tiny_lpd.state_dict(), "bad": lambda: None})
    assert (tmp_path / "a.pth").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pth"]


@pytest.mark.parametrize("suffix", list(SAVERS))
def test_a_save_makes_one_file_in_a_new_folder(tmp_path, tiny_lpd, suffix):
    SAVERS[suffix](tmp_path / "new" / f"a{suffix}", tiny_lpd)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"a{suffix}"]


# The last checkpoint, damaged.


def damaged(path, damage):
    """Write a checkpoint's bytes back, cut short or with one bit turned in the middle of a tensor."""
    data = bytearray(path.read_bytes())
    if damage == "cut short":
        data = data[: len(data) // 2]
    elif damage == "one bit":
        data[len(data) // 2] ^= 1
    else:
        data = bytearray()
    path.unlink()  # PREVIOUS may be the same file by another name
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty"])
def test_of_a_damaged_last_checkpoint_the_one_before_is_used_and_told(damage, tmp_path, capsys):
    path = tmp_path / LAST
    for step in (1, 2):
        save_checkpoint(path, {"step": step, "model": {"w": torch.full((10000,), float(step))}})
    assert load_last_checkpoint(path)["step"] == 2 and capsys.readouterr().err == ""
    damaged(path, damage)
    assert load_last_checkpoint(path)["step"] == 1
    message = capsys.readouterr().err
    assert str(path) in message and f"going on from {tmp_path / PREVIOUS}" in message


def test_two_damaged_checkpoints_are_an_error(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path / LAST, {"step": step})
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint-previous.pth: cut short"):
        load_last_checkpoint(tmp_path / LAST)


def test_same_checkpoint_is_the_same_bytes_whoever_writes_it(tmp_path, monkeypatch):
    """Killed and repeated runs are compared byte by byte."""
    for pid in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        save_checkpoint(tmp_path / f"{pid}.pth", {"w": torch.ones(3)})
    assert (tmp_path / "1.pth").read_bytes() == (tmp_path / "2.pth").read_bytes()
