"""What programs would do on a GPU, found on a machine without one, by fake tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="counting needs Triton, which comes with torch's CUDA builds")
REPOSITORY = Path(__file__).resolve().parents[2]


def counts(tmp_path, *flags):
    """The rows of count_kernels.py, by (batch, path); it replaces parts of torch, so it runs apart."""
    out = tmp_path / "counts.json"
    command = [sys.executable, "benchmarks/count_kernels.py", *flags, "--output_file", out]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {(row["batch"], row["path"]): row for row in json.loads(out.read_text())["counts"]}


@pytest.mark.slow
def test_compiled_generation_keeps_its_budget_of_kernels_and_bytes(tmp_path):
    """lpd_l at 256 px, 20 steps, with guidance: 24 layers x 20 steps x 7 kernels are 3,360."""
    rows = counts(tmp_path, "--no_decoder", "--paths", "compiled")
    for batch in (1, 64):
        row = rows[batch, "compiled"]
        assert 3360 < row["parts"]["before the decoder"]["kernels"] <= 3500
        assert row["waits"] == {} and row["parts"]["sampling"]["kernels"] == 20
    assert rows[64, "compiled"]["parts"]["before the decoder"]["gigabytes"] <= 190
