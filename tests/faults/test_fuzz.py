"""Some damaged files of every format; tests/faults/fuzz.py tries as many as it is given time for."""

import pytest
from faults import fuzz


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_damaged_file_is_refused_in_one_line_or_read_as_a_sound_value(name):
    results = list(fuzz.try_seeds(name, range(30)))
    assert not [(seed, text) for seed, outcome, text in results if outcome == "fault"]
    assert "refused" in [outcome for _, outcome, _ in results]  # not all damage went unnoticed


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError("not sound"), ValueError("two\nlines")])
def test_fuzzer_finds_other_errors_unsound_values_and_long_messages(error):
    def read(path):
        raise error

    assert fuzz.try_reading(read, None)[0] == "fault"
