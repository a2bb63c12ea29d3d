"""Large `.npz` arrays: mapped without being read, written part by part, and nothing in them believed."""

import io
import zipfile

import numpy as np
import pytest

from util.npz import open_array, save_images

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
LABELS = np.arange(7)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.npz"


def test_stored_array_is_mapped_and_the_same(path):
    np.savez(path, arr_0=IMAGES, other=LABELS)
    found = open_array(path, "arr_0")
    assert isinstance(found, np.memmap) and np.array_equal(found, IMAGES)
    assert np.array_equal(open_array(path, "other"), LABELS)


def test_compressed_array_is_read(path):
    np.savez_compressed(path, arr_0=IMAGES)
    assert np.array_equal(open_array(path, "arr_0"), IMAGES)


@pytest.mark.parametrize("array", [np.zeros((0, 4), np.uint8), np.float64(3.5), np.zeros((2, 0))], ids=str)
def test_empty_and_scalar_arrays_are_read(array, path):
    np.savez(path, arr_0=array)
    assert np.array_equal(open_array(path, "arr_0"), array)


def test_written_images_are_read_by_numpy_in_adms_form(path):
    save_images(path, np.array_split(IMAGES, 3), 7, IMAGES.shape[1:], LABELS)
    with np.load(path, allow_pickle=False) as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8 and np.array_equal(arrays["arr_0"], IMAGES)
        assert arrays["arr_1"].dtype == np.int64 and np.array_equal(arrays["arr_1"], LABELS)
    assert np.array_equal(open_array(path, "arr_0"), IMAGES)


def test_too_few_images_leave_no_file(path, tmp_path):
    with pytest.raises(ValueError, match="6 images written, 7 promised"):
        save_images(path, [IMAGES[:6]], 7, IMAGES.shape[1:], LABELS)
    assert not list(tmp_path.iterdir())


# What is refused.


def entry(descr="|u1", shape=(7, 4, 5, 3)):
    """The bytes of an `.npy` with any header in front of any body."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + IMAGES.tobytes()


def refused(path, message):
    with pytest.raises(ValueError, match=message) as error:
        open_array(path, "arr_0")
    assert str(path) in str(error.value)


def test_missing_array_is_named(path):
    np.savez(path, mu=LABELS)
    refused(path, "no array arr_0")


@pytest.mark.parametrize("share", [0, 0.5, 0.95])
def test_file_cut_short_is_refused(share, path):
    np.savez(path, arr_0=IMAGES)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "no readable array arr_0")


@pytest.mark.parametrize(
    "shape", [(8, 4, 5, 3), (10**9, 10**9, 10**9, 3), (6, 4, 5, 3), (-7, 4, 5, 3)], ids=str
)
@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"]
)
def test_array_that_claims_other_than_its_bytes_is_refused_without_taking_memory(shape, compression, path):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("arr_0.npy", entry(shape=shape))
    refused(path, "no readable array arr_0")


def test_objects_are_refused_and_not_unpickled(path):
    ran = path.with_name("ran")

    class Hostile:
        def __reduce__(self):
            return ran.touch, ()

    np.savez(path, arr_0=np.array([Hostile()], object))
    refused(path, "no readable array arr_0")
    assert not ran.exists()


@pytest.mark.parametrize(
    "content", [b"", b"no npy", b"\x93NUMPY\x09\x00\x10\x00{}", entry(descr="|O")], ids=str
)
def test_entry_that_is_no_array_is_refused(content, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content)
    refused(path, "no readable array arr_0")


def test_local_header_that_points_past_the_end_is_refused(path):
    """The central directory says 420 bytes; the extra field's length in front of them is changed to 65535."""
    np.savez(path, arr_0=IMAGES)
    content = bytearray(path.read_bytes())
    content[28:30] = b"\xff\xff"
    path.write_bytes(content)
    refused(path, "no readable array arr_0")
