"""Images from zips, tars, WebDataset shards and parquet files: the same pictures, whatever they lie in."""

import errno
import io
import json
import multiprocessing
import re
import sys
import tarfile
import zipfile
from functools import lru_cache

import helpers
import numpy as np
import processes
import pytest
from PIL import Image

from util import sources
from util.archives import Member
from util.folders import all_images, list_images, split_folder

CLASSES = 3


def encoded(label, seed):
    file = io.BytesIO()
    Image.fromarray(helpers.draw(label, seed)).save(file, "JPEG", quality=95)
    return file.getvalue()


def pictures(part, each):
    """Path -> contents of images in folders 0, 1, 2, which are also their labels."""
    first = {"train": 0, "val": 100}[part]
    names = [(label, first + i) for label in range(CLASSES) for i in range(each)]
    return {f"{label}/{part}_{label}_{i:03d}.jpg": encoded(label, i) for label, i in names}


PARTS = {"train": pictures("train", 5), "val": pictures("val", 2)}
ALL = {f"{part}/{name}": content for part, files in PARTS.items() for name, content in files.items()}


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_zip(path, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in reversed(files.items()):
            archive.writestr(name, content)
    return path


def tar_bytes(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_tar(path, files):
    path.write_bytes(tar_bytes(files))
    return path


def shuffled(files):
    """(label, name in its class, contents), in an order that is not that of the labels."""
    order = np.random.default_rng(0).permutation(len(files))
    triples = [(int(name[0]), name[2:], content) for name, content in files.items()]
    return [triples[i] for i in order]


def webdataset(path, parts, label_of):
    """Shards of two samples, PART-0000.tar and so on, with labels that `label_of` writes."""
    path.mkdir()
    for part, files in parts.items():
        triples = shuffled(files)
        for start in range(0, len(triples), 2):
            members = {}
            for label, name, content in triples[start : start + 2]:
                members |= {name: content, **label_of(name.removesuffix(".jpg"), label)}
            write_tar(path / f"x-{part}-{start // 2:04d}.tar", members)
    return path


def parquet(path, parts, names=None, rows=4, group=3):
    import pyarrow
    import pyarrow.parquet

    path.mkdir()
    for part, files in parts.items():
        triples = shuffled(files)
        count = -(-len(triples) // rows)
        for number in range(count):
            some = triples[number * rows : (number + 1) * rows]
            table = pyarrow.table({
                "image": [{"bytes": content, "path": name} for _, name, content in some],
                "label": [label for label, *_ in some],
            })
            if names:
                features = {"label": {"names": names, "_type": "ClassLabel"}}
                described = json.dumps({"info": {"features": features}})
                table = table.replace_schema_metadata({"huggingface": described})
            split = {"val": "validation"}.get(part, part)
            place = path / f"{split}-{number:05d}-of-{count:05d}.parquet"
            pyarrow.parquet.write_table(table, place, row_group_size=group)
    return path


def with_dataset_json(path, files):
    labels = [[f"00000/{name}", label] for label, name, _ in shuffled(files)]
    members = {f"00000/{name}": content for _, name, content in shuffled(files)}
    return write_zip(path, {"dataset.json": json.dumps({"labels": labels}).encode(), **members})


def by_class(files):
    """The members of a tar with a tar per class."""
    inner = {}
    for name, content in files.items():
        inner.setdefault(name[0], {})[name[2:]] = content
    return {f"{label}.tar": tar_bytes(members) for label, members in reversed(inner.items())}


NAMES = [str(i) for i in range(CLASSES)]
FORMS = {
    "zip": lambda path: write_zip(path / "x.zip", ALL),
    "deflated zip": lambda path: write_zip(path / "x.zip", ALL, zipfile.ZIP_DEFLATED),
    "folder in a zip": lambda path: write_zip(path / "x.zip", {f"a/{n}": c for n, c in ALL.items()}) / "a",
    "tar": lambda path: write_tar(path / "x.tar", {f"./{name}": content for name, content in ALL.items()}),
    "tars of tars": lambda path: write_folder(
        path / "x", {f"ILSVRC_img_{part}.tar": tar_bytes(by_class(files)) for part, files in PARTS.items()}
    ),
    "cls": lambda path: webdataset(path / "x", PARTS, lambda key, label: {f"{key}.cls": b"%d" % label}),
    "json": lambda path: webdataset(
        path / "x", PARTS, lambda key, label: {f"{key}.json": json.dumps({"label": label}).encode()}
    ),
    "tar of tars": lambda path: write_tar(
        path / "x.tar", {f"{part}.tar": tar_bytes(by_class(files)) for part, files in PARTS.items()}
    ),
    "parquet": lambda path: parquet(path / "x", PARTS),
    "parquet with names": lambda path: parquet(path / "x", PARTS, NAMES),
}


@pytest.mark.parametrize("form", FORMS)
def test_same_images_whatever_they_lie_in(form, tmp_path):
    place = FORMS[form](tmp_path)
    for images, expected in zip(split_folder(place), PARTS.values(), strict=True):
        assert images.class_names == tuple(NAMES)
        assert images.names == tuple(sorted(expected))
        contents = [images.file(i).read_bytes() for i in range(len(images))]
        assert contents == [expected[name] for name in images.names]
        assert images.labels.tolist() == [int(name[0]) for name in images.names]
        assert images.left_out == ()


@lru_cache(maxsize=1)
def cache_of_a_folder():
    """The files of the token cache of the images in a folder."""
    root = helpers.workspace() / "sources"
    data = write_folder(root / "data", ALL)
    processes.finished(helpers.call("cache", *helpers.cache_flags(root / "cache", data_path=data)))
    return helpers.contents(root / "cache")


@pytest.mark.parametrize("form", FORMS)
def test_token_cache_is_the_same_to_the_byte_whatever_the_images_lie_in(form, tmp_path):
    data, out = FORMS[form](tmp_path), tmp_path / "out"
    processes.finished(helpers.call("cache", *helpers.cache_flags(out, data_path=data)))
    assert helpers.contents(out) == cache_of_a_folder()


@pytest.mark.parametrize("form", ["zip", "tars of tars", "json", "parquet"])
def test_processes_and_workers_read_every_kind_of_archive(form, tmp_path):
    data, out = FORMS[form](tmp_path), tmp_path / "out"
    with_workers = [*helpers.cache_flags(out, data_path=data, num_workers=1)]
    processes.finished(processes.torchrun(2, "cache", *with_workers))
    assert helpers.contents(out) == cache_of_a_folder()


# Labels.


def test_labels_of_a_dataset_json_are_the_classes(tmp_path):
    """As EDM2 and StyleGAN write it: the folders are no classes."""
    images = list_images(with_dataset_json(tmp_path / "x.zip", PARTS["train"]))
    assert images.names[:2] == ("0/00000/train_0_000.jpg", "0/00000/train_0_001.jpg")
    assert images.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert str(images.file(7)) == f"{tmp_path / 'x.zip'}: 00000/train_1_002.jpg"
    assert images.file(7).read_bytes() == PARTS["train"]["1/train_1_002.jpg"]


def numbered(path, labels):
    """A shard of an image for each label."""
    pairs = [{f"{i:02d}.jpg": b"", f"{i:02d}.cls": str(label).encode()} for i, label in enumerate(labels)]
    return write_tar(path / "x.tar", {name: content for pair in pairs for name, content in pair.items()})


def test_label_is_the_index_of_its_class_however_it_is_written(tmp_path):
    """Numbers keep their order beyond 9, and their gaps. Names are sorted, unless they go with numbers."""
    images = list_images(numbered(tmp_path, [10, 2, 0, 12]))
    assert images.class_names == tuple(map(str, range(13))) and images.labels.tolist() == [0, 2, 10, 12]
    images = list_images(numbered(tmp_path, ["tench", "cock/hen", "tench"]))
    assert images.class_names == ("cock_hen", "tench") and images.labels.tolist() == [0, 1, 1]
    names = ["tench", "crane", "a/b", "crane"]
    files = {f"{label}/{label}.jpg": b"" for label in (3, 0, 2)}
    images = list_images(parquet(tmp_path / "y", {"train": files}, names))
    assert images.class_names == ("tench", "crane", "a_b", "crane (3)")
    assert images.labels.tolist() == [0, 2, 3] and images.names[2] == "crane (3)/3.jpg"


def test_images_without_a_label_are_named_as_not_used(tmp_path):
    images = list_images(numbered(tmp_path, [0, -1, 1]))
    assert len(images) == 2 and images.left_out == ("01.jpg (label -1)",)
    write_tar(tmp_path / "x.tar", {"0.jpg": b"", "0.cls": b"0", "1.jpg": b""})
    assert list_images(tmp_path / "x.tar").left_out == ("1.jpg (no label)",)


def test_every_image_of_a_source_is_one_set(tmp_path):
    """At any depth, also where folders are no classes."""
    members = {"c/d/1.png": b"1", "b.png": b"2", "a/2.png": b"3", "a/note.txt": b""}
    for place in (write_zip(tmp_path / "x.zip", members), write_folder(tmp_path / "x", members)):
        images = all_images(place)
        assert images.names == ("a/2.png", "b.png", "c/d/1.png") and images.labels.tolist() == [0, 0, 0]
        assert [images.file(i).read_bytes() for i in range(3)] == [b"3", b"2", b"1"]
        assert images.left_out == ("a/note.txt (.txt)",)


# What is damaged, or may not be used.


def truncated(path, size):
    path.write_bytes(path.read_bytes()[:size])
    return path


def encrypted(path):
    """The first entry says that it is encrypted."""
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    return path


def with_link(path, kind, target):
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("0/link.jpg")
        info.type, info.linkname = kind, target
        archive.addfile(info)
    return path


def without(path, name):
    (path / name).unlink()
    return path


def doubled(path):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("0/train_0_000.jpg", b"")
    return path


ONE = PARTS["train"]
CUT = 512 + -(-len(ONE["0/train_0_000.jpg"]) // 512) * 512  # the first member of a tar ends there
SHARDS = {"train": ONE}


def zipped(path, **members):
    """x.zip; keywords are members, their contents."""
    return write_zip(path / "x.zip", {name: content.encode() for name, content in members.items()})


def tar(path, more=(), files=ONE):
    return write_tar(path / "x.tar", {**files, **dict(more)})


def unlabelled(path):
    return webdataset(path / "x", SHARDS, lambda *_: {})


def two_sets(path):
    shard = tar_bytes({"1.jpg": b"", "1.cls": b"1"})
    return write_folder(path / "x", {"a.tar": shard, "b.tar": shard})


NTH = "train-{:05d}-of-00004.parquet"
DAMAGED_ARCHIVE = "damaged or no readable"
REFUSED = {
    "cut in a member": (lambda p: truncated(tar(p), 2000), f"x.tar: {DAMAGED_ARCHIVE} tar"),
    "cut between members": (lambda p: truncated(tar(p), CUT), f"x.tar: {DAMAGED_ARCHIVE} .*at byte {CUT}"),
    "cut tar in a tar": (
        lambda p: tar(p, files={"a.tar": tar_bytes(ONE)[:CUT]}),
        f"x.tar: {DAMAGED_ARCHIVE} .*at byte {CUT + 512}",
    ),
    "cut zip": (lambda p: truncated(write_zip(p / "x.zip", ONE), 2000), f"x.zip: {DAMAGED_ARCHIVE} zip"),
    "cut parquet": (
        lambda p: truncated(parquet(p / "x", SHARDS) / NTH.format(0), 900).parent,
        f"{NTH.format(0)}: {DAMAGED_ARCHIVE} parquet",
    ),
    "empty": (lambda p: truncated(tar(p), 0), f"x.tar: {DAMAGED_ARCHIVE} tar"),
    "two of one name": (
        lambda p: doubled(write_zip(p / "x.zip", ONE)), "x.zip: two members are 0/train_0_000.jpg"
    ),
    "all encrypted": (lambda p: encrypted(zipped(p, **{"a/1.jpg": ""})), "no class sub.*a/1.jpg .encrypted"),
    "missing shard": (lambda p: without(unlabelled(p), "x-train-0003.tar"), "x-train-0003.tar is missing"),
    "missing last": (
        lambda p: without(parquet(p / "x", SHARDS), NTH.format(3)), f"{NTH.format(3)} is missing"
    ),
    "missing of braces": (lambda p: unlabelled(p) / "x-train-{0000..0008}.tar", "no such .*x-train-0008.tar"),
    "label too large": (lambda p: parquet(p / "x", SHARDS, NAMES[:2]), "label 2, there are 2 class names"),
    "label of nothing": (
        lambda p: zipped(p, **{"dataset.json": '{"labels": [["a.png", 1]]}'}), "a.png, which is not there"
    ),
    "label of another kind": (
        lambda p: zipped(p, **{"a.png": "", "dataset.json": '{"labels": [["a.png", [1]]]}'}),
        "a.png has label",
    ),
    "no JSON": (lambda p: zipped(p, **{"dataset.json": "{"}), f"x.zip: {DAMAGED_ARCHIVE}"),
    "compressed tar": (lambda p: tar(p).rename(p / "x.tar.gz"), "x.tar.gz is not a folder of images"),
    "no such folder inside": (lambda p: write_zip(p / "x.zip", ONE) / "y", "no such folder in .*x.zip: y"),
    "sets of unknown names": (two_sets, "x holds a, b: give the files of one of them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_or_ambiguous_archive_is_refused_in_one_line(case, tmp_path):
    make, message = REFUSED[case]
    (tmp_path / "data").mkdir()
    data, before = make(tmp_path / "data"), helpers.contents(tmp_path)
    outcome = helpers.call("cache", *helpers.cache_flags(tmp_path / "out/cache", data_path=data))
    assert outcome.status == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert re.search(message, outcome.err), outcome.err
    index = {name for name in helpers.contents(tmp_path) if name.endswith(".index.npz")}
    assert helpers.contents(tmp_path).keys() - index == before.keys() and len(index) <= 1


LEFT_OUT = {
    "no image": (lambda p: tar(p, {"0/a.txt": b""}), "0/a.txt (.txt)"),
    "hidden": (lambda p: tar(p, {"__MACOSX/0/._1.jpg": b""}), "__MACOSX/0/._1.jpg (hidden)"),
    "absolute": (lambda p: tar(p, {"/0/a.jpg": b""}), "/0/a.jpg (absolute name or .. in it)"),
    "upwards": (lambda p: tar(p, {"0/../../a.jpg": b""}), "0/../../a.jpg (absolute name or .. in it)"),
    "link": (lambda p: with_link(tar(p), tarfile.SYMTYPE, "/etc/passwd"), "0/link.jpg (a link)"),
    "hard link": (lambda p: with_link(tar(p), tarfile.LNKTYPE, "0/b.jpg"), "0/link.jpg (a link)"),
    "encrypted": (lambda p: encrypted(write_zip(p / "x.zip", ONE)), "2/train_2_004.jpg (encrypted)"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_member_that_cannot_be_used_is_named_with_the_reason(case, tmp_path):
    make, message = LEFT_OUT[case]
    images = list_images(make(tmp_path))
    assert images.left_out == (message,) and len(images) == 15 - (case == "encrypted")


def test_compression_that_is_not_read_is_named(tmp_path):
    write_zip(tmp_path / "x.zip", ONE, zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match="no class sub-folders .*12 more .compressed by method 12"):
        list_images(tmp_path / "x.zip")


DAMAGED = {**ONE, "1/train_1_000.jpg": ONE["1/train_1_000.jpg"][:300]}
HOLDERS = {
    "zip": lambda p: write_zip(p / "x.zip", DAMAGED, zipfile.ZIP_DEFLATED),
    "tar": lambda p: write_tar(p / "x.tar", DAMAGED),
    "parquet": lambda p: parquet(p / "x", {"train": DAMAGED}),
}


@pytest.mark.parametrize("form", HOLDERS)
def test_damaged_image_in_an_archive_is_named_and_left_out_on_request(form, tmp_path):
    flags = helpers.cache_flags(tmp_path / "cache", data_path=HOLDERS[form](tmp_path))
    refused = helpers.call("cache", *flags)
    named = r"unreadable: \S*x(.tar|.zip|/train-\S*.parquet): (1/)?train_1_000.jpg: "
    assert refused.status == 1 and re.search(named, refused.err)
    outcome = processes.finished(helpers.call("cache", *flags, "--skip_unreadable"))
    assert "14 images" in outcome.out and "1 unreadable images left out" in outcome.err


# The index.


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_read_archives_under_every_start_method(method, tmp_path):
    """Files that are open here stay here, and the set of images is pickled."""
    places = write_zip(tmp_path / "x.zip", ONE), parquet(tmp_path / "y", SHARDS)
    sets = [list_images(place) for place in places]
    expected = [[images.file(i).read_bytes() for i in range(15)] for images in sets]
    with multiprocessing.get_context(method).Pool(1) as pool:
        members = [pool.map(images.file, range(15)) for images in sets]
        assert [pool.map(Member.read_bytes, each) for each in members] == expected


def test_headers_are_read_again_only_if_an_archive_has_changed(tmp_path, monkeypatch):
    """Another output in the same folder uses the same index; a damaged one is made again."""
    read, read_entries = [], sources.read_entries
    monkeypatch.setattr(sources, "read_entries", lambda path: read.append(path) or read_entries(path))
    data, kept = write_tar(tmp_path / "x.tar", ONE), tmp_path / "out/x.tar.index.npz"
    first = split_folder(data, 0, beside=tmp_path / "out/a")[0]
    assert split_folder(data, 0, beside=tmp_path / "out/b")[0].names == first.names and len(read) == 1
    assert helpers.contents(tmp_path).keys() == {"x.tar", "out/x.tar.index.npz"}
    write_tar(data, PARTS["val"])
    assert len(split_folder(data, 0, beside=tmp_path / "out/a")[0]) == 6 and len(read) == 2
    truncated(kept, 500)
    assert len(split_folder(data, 0, beside=tmp_path / "out/a")[0]) == 6 and len(read) == 3


def test_archive_is_used_where_no_index_can_be_kept(tmp_path, monkeypatch, capsys):
    def full(path):
        raise OSError(errno.ENOSPC, "no space", str(path))

    monkeypatch.setattr(sources, "atomic", full)
    assert len(split_folder(tar(tmp_path), 0, beside=tmp_path / "out/a")[0]) == 15
    assert "x.tar.index.npz: the index could not be kept" in capsys.readouterr().err


def test_parquet_without_pyarrow_names_what_to_install(tmp_path, monkeypatch):
    place = parquet(tmp_path / "x", SHARDS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="needs pyarrow: pip install -r requirements-data.txt"):
        list_images(place)
