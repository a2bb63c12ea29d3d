"""Damaged files of every format: a declared error in one line, or a right result, in bounded memory.

A bounded, seeded part of tests/faults/fuzz.py, which goes on for as long as it is told.
"""

import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import fuzz  # noqa: E402

PLACES, PAYLOADS = st.floats(0, 1, exclude_max=True), st.binary(min_size=2, max_size=24)
EDITS = st.lists(st.tuples(st.sampled_from(fuzz.CHOICES), PLACES, PAYLOADS), min_size=1, max_size=4)
BOUNDED = settings(
    max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.filterwarnings("ignore")  # numpy and PIL warn of what is then refused
@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_damaged_file_is_refused_or_read_right(name):
    with tempfile.TemporaryDirectory() as folder:
        bench, before = fuzz.Bench(name, folder), fuzz.memory()

        @BOUNDED
        @given(EDITS)
        def check(edits):
            bench.try_edits(edits)  # raises a Fault for anything else

        check()
        assert fuzz.memory() - before < fuzz.MOST_MEMORY


def test_the_judge_of_these_tests_finds_faults(tmp_path):
    """Readers that do wrong: another error, a value out of range, a message of two lines."""

    def raises(error):
        def read(_):
            raise error

        return read

    for read in (raises(KeyError("x")), raises(ValueError("two\nlines")), lambda _: fuzz.np.zeros((1, 16))):
        form = fuzz.Format(None, read, fuzz.check_orders)
        with pytest.raises(fuzz.Fault):
            fuzz.outcome(form, tmp_path, None)
    assert fuzz.outcome(fuzz.Format(None, raises(ValueError("x")), None), tmp_path, None) == "refused"


@pytest.mark.parametrize("name", ["orders .json", "MAR .npz", "weights .pth", "weights .safetensors"])
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_every_kind_of_damage_changes_a_file(tmp_path, name, kind):
    form = fuzz.FORMATS[name]
    content = form.make(tmp_path).read_bytes()
    assert fuzz.damaged(content, [(kind, 0.5, b"\3\1")], form.inside) != content
