"""Whether processes belong together: here one, with what another would tell it."""

import time

import jax
import numpy as np
import pytest

from metaformer_jax.training import agreement, recipes

_DATA = {"class_names": ("cat", "dog"), "num_examples": {"training": 64}, "variables": {}}


@pytest.fixture
def second(monkeypatch):
    """As if this were the second of two processes; gives what the first one has sent, in order."""
    from_first = []

    def broadcast(array):
        return np.asarray(from_first.pop(0)) if from_first else array

    def allgather(mine):
        host = np.frombuffer(b"first".ljust(len(mine), b"\0"), np.uint8)
        return np.stack([host, mine])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "is_first_process", lambda: False)
    monkeypatch.setattr(agreement.socket, "gethostname", lambda: "second")
    monkeypatch.setattr(agreement.multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(agreement.multihost_utils, "process_allgather", allgather)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    return from_first


def _check(second, monkeypatch, config=None, **changes):
    """Compares with a first process that has the digits' config and `_DATA`."""
    sent = []
    with monkeypatch.context() as first:
        first.setattr(agreement, "_of_first", lambda content: sent.append(content) or content)
        agreement.check_same(recipes.digits(), **_DATA)
    second += [len(sent[0]), np.frombuffer(sent[0], np.uint8)]
    agreement.check_same(config or recipes.digits(), **_DATA | changes)


def test_paths_and_cores_may_differ_between_processes(second, monkeypatch):
    config = recipes.digits()
    config.data.update(root="/elsewhere", num_workers=3, num_threads=7)
    config.model.update(pretrained="/elsewhere", class_map="/elsewhere")
    _check(second, monkeypatch, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ("cat", "fox")}, "  class 1: dog -> fox"),
        ({"class_names": ("cat",)}, r"  class 1: dog -> \(absent\)"),
        ({"num_examples": {"training": 63}}, "  training examples: 64 -> 63"),
        (
            {"variables": {("a", 0): np.ones(2)}},
            "  CRC-32C of config.model.pretrained: .absent. -> ",
        ),
        ({"class_names": tuple("0123456789")}, "and 5 more\n"),
    ],
)
def test_other_data_or_weights_than_the_first_processs_are_refused(
    changes, message, second, monkeypatch
):
    told = rf"others than process 0 on first:\nprocess 1 on second:\n(.*\n)*{message}"
    with pytest.raises(agreement.DisagreementError, match=told):
        _check(second, monkeypatch, **changes)


@pytest.fixture
def workdir(tmp_path):
    for step in (46, 69):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    return tmp_path


def test_a_process_waits_until_it_sees_the_checkpoints_of_the_first(second, workdir, monkeypatch):
    second.append(46)
    # That of step 69 was set aside by the first.
    monkeypatch.setattr(time, "sleep", lambda _: (workdir / "checkpoints" / "69").rmdir())
    assert agreement.agreed_newest_step(workdir) == 46


def test_a_process_that_sees_other_checkpoints_than_the_first_ends(second, workdir, monkeypatch):
    second.append(46)
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.raises(
        agreement.DisagreementError, match=r"step 46 .* step 69 for process 1 on se"
    ):
        agreement.agreed_newest_step(workdir)


def test_what_another_host_writes_may_show_late(tmp_path, monkeypatch):
    token = tmp_path / "token"
    monkeypatch.setattr(time, "sleep", lambda _: token.touch())
    assert agreement._shows(token)


def test_what_never_shows_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert not agreement._shows(tmp_path / "token")
    assert not agreement._shows(tmp_path / "no folder" / "token")


def test_what_the_first_process_says_counts(second):
    second.append(1)
    assert agreement.of_first(False) is True
    second.append(0)
    assert agreement.of_first(True) is False
