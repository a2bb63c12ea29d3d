"""What programs would do on a GPU, found on a machine without one, by fake tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="it comes with torch's CUDA builds")
PTXAS = list((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*"))
REPOSITORY = Path(__file__).resolve().parents[2]


def run(program, *flags):
    """What a program of benchmarks/ prints. It replaces parts of torch, so it runs in its own process."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, f"benchmarks/without_gpu/{program}", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_compiled_generation_keeps_its_budget_of_kernels_and_bytes():
    """lpd_l at 256 px, 20 steps, with guidance: 24 layers x 20 steps x 7 kernels are 3,360."""
    report = json.loads(run("count_kernels.py", "--no_decoder", "--paths", "compiled"))
    small, large = report["counts"]
    for row in (small, large):
        assert 3360 < row["parts"]["before the decoder"]["kernels"] <= 3500
        assert row["waits"] == {} and row["parts"]["sampling"]["kernels"] == 20
    assert large["batch"] == 64 and large["parts"]["before the decoder"]["gigabytes"] <= 190


@pytest.mark.long
def test_every_training_script_fits_a_gpu_of_80_gb():
    rows = [json.loads(line) for line in run("count_training.py").splitlines()]
    assert len(rows) == len(list((REPOSITORY / "scripts/train").glob("*.sh")))
    assert all(row["kept_gb"] > 20 and row["all_gb"] < 80 for row in rows)


@pytest.mark.long
@pytest.mark.skipif(not PTXAS, reason="ptxas is not here: it comes with Triton's wheels for NVIDIA")
def test_the_kernels_of_decoding_and_training_compile_for_an_h100():
    *kernels, summary = run("compile_kernels.py").splitlines()
    assert summary == f"{len(kernels)} kernels, 0 failures"
    for wanted in ("argmax", "tem_fused_addmm_gelu", "add_native_layer_norm"):  # draw, product, sum and norm
        assert any(wanted in line and int(line.split()[-2]) > 1000 for line in kernels)
