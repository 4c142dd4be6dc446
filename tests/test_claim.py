"""Whether a workdir is one folder for all processes."""

import time

from metaformer_jax.training import claim


def test_what_another_host_writes_may_show_late(tmp_path, monkeypatch):
    token = tmp_path / "token"
    monkeypatch.setattr(time, "sleep", lambda _: token.touch())
    assert claim._shows(token)


def test_what_never_shows_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert not claim._shows(tmp_path / "token")
    assert not claim._shows(tmp_path / "no folder" / "token")
