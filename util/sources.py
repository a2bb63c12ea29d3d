"""Where images lie: in a folder, or in tar, zip and parquet files, which are read in place, never unpacked.

What lies there is a list of (path, reason) pairs. The reason says why something is not used, and is empty for
an image. Images that have labels (WebDataset, parquet, dataset.json) get the path CLASS/NAME.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from util.archives import READERS, Member, is_hidden, other_ending, read_entries
from util.distributed import warn
from util.files import atomic, read_arrays
from util.images import EXTENSIONS

FORMAT = 1  # of the index files


def open_source(path, *, beside=None, endings=EXTENSIONS):
    """What holds the images of a path, a `Folder` or `Archives`, and the (path, reason) pairs that lie there.

    A path is a folder; a .tar, .zip or .parquet file, or a folder inside it, as x.zip/train; several files,
    as x-{000..123}.tar; or a folder of such files without images beside them. With `beside`, the path of an
    output, the index of archives is kept next to that and found there again. Raises ValueError: an archive
    is damaged, lacks a part, or has members of one name or labels without a class; OSError: not there.
    """
    root, files, inside = locate(path)
    beside_them = []
    if not files:
        found = list_files(root, endings)
        names = sorted(name for name, reason in found if reason in READERS)
        if not names or any(not reason for _, reason in found):
            return Folder(root), found
        _refuse_gaps(root, names)
        files = [root / name for name in names]
        beside_them = [pair for pair in found if pair[1] not in (*READERS, "no images")]
    source = replace(_open_archives(root, files, beside), inside=inside)
    return source, source.found() + beside_them


def locate(path):
    """The parts of a path that `open_source` takes: the folder or file, the archives that it names, empty for
    a folder, and the folder inside the archive. Raises FileNotFoundError, or ValueError: no such form."""
    path, inside = Path(path), ""
    if braces := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(path)):
        before, first, last, after = braces.groups()
        files = [Path(f"{before}{i:0{len(first)}}{after}") for i in range(int(first), int(last) + 1)]
    elif path.is_dir():
        return path, [], ""
    else:
        file = next((part for part in (path, *path.parents) if part.is_file()), path)
        files, inside = [file], "" if file == path else str(path.relative_to(file))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no such folder or archive: {file}")
        if file.suffix.lower() not in READERS:
            raise ValueError(f"{file} is not a folder of images, nor one of {', '.join(READERS)}")
    return file if inside else path, files, inside


# Folders.


@dataclass(frozen=True)
class Folder:
    """Images that are files below a folder."""

    root: Path
    class_names = labelled_sets = ()

    def file(self, path):
        """The Path of an image."""
        return self.root / path

    def outline(self, found):
        """The (path, reason) pairs whose folders say what is meant: all."""
        return found


def list_files(root, endings):
    """All that lies below a folder, in one pass. Links are followed."""
    found, folders = [], [("", ())]
    for folder, above in folders:  # which grows meanwhile
        place = os.path.realpath(root / folder)
        if place in above:
            found.append((folder, "a link to a folder above it"))
            continue
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path, reason = os.path.join(folder, entry.name), _why_not(entry, endings)
                if entry.is_dir() and not reason:
                    folders.append((path, (*above, place)))
                else:
                    found.append((path, reason))
    filled = {os.path.join(folder, name) for folder, names in folders_in(found).items() for name in names}
    filled |= dict(found).keys()
    return found + [(path, "no images") for path, _ in folders[1:] if path not in filled]


def _why_not(entry, endings):
    if is_hidden(entry.name):
        return "hidden"
    if entry.is_dir():
        return ""
    return other_ending(entry.name, endings) if entry.is_file() else "broken link or not a file"


def folders_in(found):
    """Folder -> the names of those in it that hold images, at any depth; "" is the whole."""
    inside = {"": set()}
    for folder in {os.path.dirname(path) for path, reason in found if not reason}:
        while folder:
            folder, name = os.path.split(folder)
            inside.setdefault(folder, set()).add(name)
    return inside


# Archives.


@dataclass(frozen=True)
class Archives:
    """Images that are members of archive files. `paths` are bytes [N], sorted; `places` int64 [N, 5]: of each
    the index of its reason and of its file, where it begins, its bytes there, and how it is kept.

    The path of a member is its file's prefix, its class if the images are `labelled`, and its name.
    """

    files: tuple[Path, ...]
    prefixes: tuple[str, ...]
    paths: np.ndarray
    places: np.ndarray
    reasons: tuple[str, ...]
    class_names: tuple[str, ...]
    labelled: bool
    inside: str = ""

    def file(self, path):
        """The `Member` of an image."""
        path = os.path.join(self.inside, path)
        _, file, *place = self.places[np.searchsorted(self.paths, os.fsencode(path))].tolist()
        name = path.removeprefix(self.prefixes[file]).split("/", self.labelled)[-1]
        return Member(self.files[file], name, *place)

    def found(self):
        """The (path, reason) pairs. Raises FileNotFoundError: there is nothing `inside`."""
        paths = map(os.fsdecode, self.paths.tolist())
        found = [(path, self.reasons[i]) for path, i in zip(paths, self.places[:, 0].tolist(), strict=True)]
        if self.inside:
            start = os.path.join(self.inside, "")
            found = [(path.removeprefix(start), reason) for path, reason in found if path.startswith(start)]
            if not found:
                raise FileNotFoundError(f"no such folder in {self.files[0]}: {self.inside}")
        return found

    @property
    def labelled_sets(self):
        """The names of sets of files with labels, if there are several."""
        return sorted({prefix.rstrip("/") for prefix in self.prefixes if prefix and self.labelled})

    def outline(self, found):
        """The (path, reason) pairs whose folders say what is meant: below a labelled class, these mean
        nothing."""
        if not self.labelled:
            return found
        made = 1 + any(self.prefixes)
        return [
            (path if reason else "/".join([*path.split("/")[:made], "image"]), reason)
            for path, reason in found
        ]


# The index of archives.


def _open_archives(root, files, beside):
    """The `Archives` of files, from the index next to `beside` if it is of these files as they are now."""
    kept = Path(beside).absolute().parent / f"{root.absolute().name}.index.npz" if beside else None
    names = [os.path.relpath(file, root.parent) for file in files]
    stamps = [(info.st_size, info.st_mtime_ns) for info in map(os.stat, files)]
    index = kept and kept.exists() and _read_index(kept, names, stamps)
    if not index:
        index = {"names": _packed(names), "stamps": np.array(stamps), "format": np.array(FORMAT)}
        index |= _make_index(files, _prefixes(root, files))
        if kept:
            try:
                with atomic(kept) as partial, partial.open("wb") as file:
                    np.savez(file, **index)
            except OSError as error:
                warn(f"{kept}: the index could not be kept ({error.strerror})")
    prefixes, reasons, class_names = (_texts(index[key]) for key in ("prefixes", "reasons", "class_names"))
    paths, places, labelled = index["paths"], index["places"], bool(index["labelled"])
    return Archives(tuple(files), prefixes, paths, places, reasons, class_names, labelled)


def _read_index(path, names, stamps):
    """The arrays of an index; None if it is damaged or of other files."""
    keys = "names", "stamps", "format", "prefixes", "reasons", "class_names", "paths", "places", "labelled"
    try:
        index = read_arrays(path, keys)
    except ValueError:
        return None
    same = index["format"] == FORMAT and _texts(index["names"]) == tuple(names)
    return index if same and index["stamps"].tolist() == [list(stamp) for stamp in stamps] else None


def _packed(texts):
    return np.array([os.fsencode(text) for text in texts] or [b""], dtype=bytes)[: len(texts)]


def _texts(array):
    return tuple(map(os.fsdecode, array.tolist()))


def _make_index(files, prefixes):
    """One pass over the headers of archives. Returns arrays as `Archives` has them."""
    entries, names = [], ()
    progress = tqdm(desc="reading the headers of archives", unit="member", delay=2, leave=False)
    for number, (file, prefix) in enumerate(zip(files, prefixes, strict=True)):
        own, own_names = read_entries(file)
        if names not in ((), own_names):
            raise ValueError(f"{file}: other class names than in {files[0]}")
        names = own_names
        entries += [(entry, number, prefix) for entry in own]
        progress.update(len(own))
    progress.close()
    names, labelled = _class_names(files, entries, names)
    rows = []
    for entry, number, prefix in entries:
        if labelled and entry.label is None and not entry.reason:
            entry = entry._replace(reason="no label")
        rows.append((os.fsencode(prefix + _with_class(entry, names)), entry.reason, number, entry))
    rows.sort(key=lambda row: row[:3])
    _refuse_duplicates(files, rows)
    reasons = sorted({row[1] for row in rows})
    code = {reason: i for i, reason in enumerate(reasons)}
    places = [(code[reason], number, *entry[3:6]) for _, reason, number, entry in rows]
    return {
        "prefixes": _packed(prefixes), "reasons": _packed(reasons), "class_names": _packed(names),
        "labelled": np.array(labelled), "paths": np.array([row[0] for row in rows] or [b""])[: len(rows)],
        "places": np.array(places, np.int64).reshape(-1, 5),
    }


def _refuse_duplicates(files, rows):
    for (path, reason, *_), (other, _, number, entry) in zip(rows, rows[1:], strict=False):
        if path == other and not reason:
            raise ValueError(f"{files[number]}: two members are {entry.name}")


def _class_names(files, entries, names):
    """The names of the classes in the order of labels that are numbers, and whether there are labels. Labels
    that are texts are sorted, like folders: of these there are none. Raises ValueError: a label without a
    name."""
    labels = {entry.label for entry, *_ in entries} - {None}
    texts = {label for label in labels if isinstance(label, str)}
    if texts and texts != labels:
        raise ValueError(f"{files[0]}: labels are numbers and names: {min(labels - texts)}, {min(texts)}")
    if not labels or texts:
        return (), bool(labels)
    names = names or tuple(str(i) for i in range(max(labels) + 1))
    if max(labels) >= len(names):
        entry, number, _ = next(row for row in entries if row[0].label == max(labels))
        raise ValueError(
            f"{files[number]}: {entry.name} has label {entry.label}, there are {len(names)} class names"
        )
    return names, True


def _with_class(entry, names):
    """The path of a member: its name, after its class if it has a label."""
    if entry.label is None:
        return entry.name
    return f"{names[entry.label] if names else entry.label.replace('/', '_')}/{entry.name}"


# Files that together are one data set.


def _refuse_gaps(root, names):
    """Raises ValueError if one of the numbered files in a folder is missing."""
    numbers = {}
    for match in filter(None, map(NUMBERED.fullmatch, names)):
        before, number, total, after = match.groups("")
        numbers.setdefault((before, total, after, len(number)), set()).add(int(number))
    for (before, total, after, width), there in numbers.items():
        span = range(int(total[4:])) if total else range(min(there), max(there))
        missing = sorted({*span} - there)
        if missing and (total or len(missing) < len(there)):  # else the numbers are dates, perhaps
            first = f"{before}{missing[0]:0{width}}{total}{after}"
            raise ValueError(f"{root / first} is missing; there are {len(there)} files of that kind")


NUMBERED = re.compile(r"(.*?[-_./]|)(\d+)(-of-\d+)?(\.\w+)")  # x-0012.tar, train-00003-of-00294.parquet


def _prefixes(root, files):
    """The folder in which the members of each file appear: none if the files are one numbered set, else
    SET/, the sets as train-*.tar and val-*.tar are named."""
    names = [os.path.relpath(file, root) if file != root else file.name for file in files]
    sets = []
    for name in names:
        match = NUMBERED.fullmatch(name)
        sets.append(match[1].rstrip("-_./") if match else os.path.splitext(name)[0])
    if len(set(sets)) == 1:
        return [""] * len(files)
    above = os.path.join(os.path.commonpath([os.path.dirname(name) for name in sets]), "")
    return [os.path.join(name.removeprefix(above), "") for name in sets]
