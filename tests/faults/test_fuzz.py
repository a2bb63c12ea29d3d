"""Some damaged files of every format; tests/faults/fuzz.py tries as many as it is given time for."""

import pytest
from faults import fuzz


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_damaged_file_is_refused_in_one_line_or_read_as_a_sound_value(name):
    results = list(fuzz.try_seeds(name, range(30)))
    faults = [(seed, text) for seed, outcome, text in results if outcome == "fault"]
    assert not faults
    assert "refused" in [outcome for _, outcome, _ in results]  # not all damage went unnoticed


def raising(error):
    def read(folder):
        raise error

    return read


def test_fuzzer_finds_another_error_a_longer_message_and_a_value_that_is_not_sound(tmp_path):
    for read in (raising(KeyError("x")), raising(ValueError("two\nlines")), lambda folder: "a value"):
        with pytest.raises(fuzz.Fault):
            fuzz.try_reading(fuzz.Format("x", None, read, lambda value: False), tmp_path)
