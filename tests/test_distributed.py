"""Several processes do what one does: the same token cache, the same training."""

import programs
import pytest
import torch
from programs import TRAIN, cache_flags, call, contents, finished, torchrun, train_flags

from engine.checkpoint import load_checkpoint
from util import cli, dist
from util.images import UnreadableImage
from util.logging import read_metrics


def test_two_processes_make_the_token_cache_of_one(tmp_path):
    """Byte for byte, and each of the three shards is written by one process only."""
    outcome = finished(torchrun(2, "cache", *cache_flags(tmp_path / "cache")))
    assert outcome.out.count(f"{TRAIN} images, 3 shards") == 1
    assert contents(tmp_path / "cache") == contents(programs.token_cache())


def trainable(path):
    """The weights of a checkpoint but the biases of the attention's keys: these shift all scores of a query
    alike, so their gradient is nothing but rounding, of which AdamW makes steps of full size."""
    weights = load_checkpoint(path)["model"]
    for name, weight in weights.items():
        if name.endswith("attn.qkv.bias"):
            third = len(weight) // 3
            weight[third : 2 * third] = 0
    return weights


def test_two_processes_of_two_images_train_as_one_of_four(tmp_path):
    """1e-5, a tenth of one step of AdamW at this rate: the same sums in another order. AdamW does not see a
    gradient that is summed in place of averaged, its norm in the log does."""
    flags = {"epochs": 1, "lr": 1e-4, "proj_dropout": 0, "label_drop_prob": 0}
    finished(torchrun(2, "lpd", *train_flags(tmp_path / "two", batch_size=2, **flags)))
    finished(call("lpd", *train_flags(tmp_path / "one", batch_size=4, **flags)))
    logs = [read_metrics(tmp_path / run) for run in ("one", "two")]
    for name, rounding in (("loss", 2e-5), ("grad_norm", 2e-4)):  # written to 5 and to 4 places
        one, two = ([line[name] for line in log] for log in logs)
        assert len(one) == 5 and two == pytest.approx(one, abs=rounding)
    one, two = (trainable(tmp_path / run / "checkpoint-last.pth") for run in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5, msg=name)


class Store:
    """Counts, as torchrun's store, for all processes together."""

    def __init__(self, *address, **rest):
        pass

    counts = {}

    def add(self, key, amount):
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]


@pytest.mark.parametrize("error", [cli.UsageError, cli.Failure, UnreadableImage, OSError])
def test_fault_is_told_by_the_first_process_that_has_it_and_by_no_other(error, monkeypatch, capsys):
    """Whichever it is: a fault in the flags may be that of one machine alone."""

    def main():
        raise error("what happened")

    environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "TCPStore", Store)
    monkeypatch.setattr(Store, "counts", {})
    monkeypatch.setattr(dist.time, "sleep", lambda seconds: None)
    told = []
    for rank in "201":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            cli.run(main)
        assert end.value.code == (2 if error is cli.UsageError else 1)
        told.append(capsys.readouterr().err)
    assert told == ["error: what happened\n", "", ""]


def test_fault_of_a_process_alone_is_told(monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(SystemExit):
        cli.run(lambda: cli.existing_file("--flag", "/no/such"))
    assert capsys.readouterr().err == "error: --flag: no such file: /no/such\n"
