"""Published weights arrive whole, are converted once, and are there without a network then."""

import hashlib
import os
import subprocess
import sys
import textwrap

import hub_server
import huggingface_hub
import numpy as np
import pytest
import reference
from flax import nnx
from huggingface_hub import constants, file_download

from metaformer_jax import create_model
from metaformer_jax.paths import cache_folder
from metaformer_jax.weights import CheckpointError, DownloadError, hub, read_record
from metaformer_jax.weights.convert import to_variables, variables_of
from metaformer_jax.weights.files import write_tensors
from metaformer_jax.weights.pretrained import build_abstract

FROM_TIMM = "poolformerv2_s12"
FROM_SAIL = "identityformer_s12"
PATHS = {
    FROM_TIMM: "/timm/poolformerv2_s12.sail_in1k/resolve/main/model.safetensors",
    FROM_SAIL: "/sail/dl/resolve/main/identityformer/identityformer_s12.pth",
}


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    write_tensors(folder / "a.safetensors", reference.state_dict(FROM_TIMM, "timm"), {})
    write_tensors(folder / "a.pth", reference.state_dict(FROM_SAIL, "sail"), {})
    return {
        FROM_TIMM: (folder / "a.safetensors").read_bytes(),
        FROM_SAIL: (folder / "a.pth").read_bytes(),
    }


@pytest.fixture
def server(contents, tmp_path, monkeypatch):
    monkeypatch.setenv("METAFORMER_JAX_CACHE", str(tmp_path / "converted"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # The library waits between attempts.
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    with hub_server.serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.files = {PATHS[name]: content for name, content in contents.items()}
        yield server
    huggingface_hub.close_session()


def assert_loads(name):
    model = create_model(name, pretrained=True, rngs=nnx.Rngs(0))
    expected = to_variables(reference.state_dict(name), build_abstract(name))
    actual = variables_of(model)
    assert set(actual) == set(expected)
    for path, array in expected.items():
        assert np.array_equal(actual[path][...], array), path


def left_in(folder):
    """Files that hold content; the hub's cache also has locks, references and a tag."""
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1000]


@pytest.mark.parametrize("name", [FROM_TIMM, FROM_SAIL])
def test_a_name_is_downloaded_and_converted_once(server, contents, name):
    assert_loads(name)
    assert {method for method, _, _ in server.requests} == {"HEAD", "GET"}
    assert {path for _, path, _ in server.requests} == {PATHS[name]}
    record = read_record(cache_folder() / f"{name}.safetensors")
    assert record.model == name
    assert record.source_sha256 == hashlib.sha256(contents[name]).hexdigest()
    assert record.source_file == PATHS[name].replace("/resolve/main", "")[1:]
    server.requests.clear()
    assert_loads(name)
    assert server.requests == []


def test_the_cached_form_needs_neither_network_nor_torch_nor_the_download(server, tmp_path):
    hub.converted_file(FROM_TIMM)
    os.rename(tmp_path / "hub", tmp_path / "moved")
    program = f"""
        import sys
        sys.modules["torch"] = sys.modules["huggingface_hub"] = None
        import metaformer_jax
        from flax import nnx
        metaformer_jax.create_model({FROM_TIMM!r}, pretrained=True, rngs=nnx.Rngs(0))
    """
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, env=env)


def test_the_timm_source_is_read_without_torch(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    hub.converted_file(FROM_TIMM)
    with pytest.raises(ImportError, match=r"metaformer-jax\[torch\]"):
        hub.converted_file(FROM_SAIL)
    # That was clear before anything was fetched.
    assert {path for _, path, _ in server.requests} == {PATHS[FROM_TIMM]}


def test_a_missing_file_says_so_and_gives_the_manual_way(server, tmp_path):
    server.files.clear()
    with pytest.raises(DownloadError, match="404") as caught:
        create_model(FROM_TIMM, pretrained=True, rngs=nnx.Rngs(0))
    message = str(caught.value)
    assert (
        "huggingface.co/timm/poolformerv2_s12.sail_in1k/resolve/main/model.safetensors" in message
    )
    assert "metaformer_jax.convert model.safetensors --model poolformerv2_s12" in message
    assert not left_in(tmp_path)


def test_a_transfer_that_breaks_once_is_resumed(server, contents):
    server.broken_transfers = 1
    assert_loads(FROM_TIMM)
    ranges = [asked for method, _, asked in server.requests if method == "GET"]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert 0 < int(ranges[1].removeprefix("bytes=").rstrip("-")) < len(contents[FROM_TIMM])


def test_a_transfer_that_keeps_breaking_leaves_nothing(server, tmp_path, contents):
    # Small, for every attempt brings half of what is left.
    server.files[PATHS[FROM_TIMM]] = contents[FROM_TIMM][:2000]
    server.broken_transfers = 10_000
    with pytest.raises(DownloadError, match=r"could not be: \w+"):
        create_model(FROM_TIMM, pretrained=True, rngs=nnx.Rngs(0))
    assert not left_in(tmp_path)
    server.files[PATHS[FROM_TIMM]] = contents[FROM_TIMM]
    server.broken_transfers = 0
    assert_loads(FROM_TIMM)


def test_content_of_another_hash_is_refused_and_deleted(server, tmp_path):
    good = server.files[PATHS[FROM_TIMM]]
    server.announced = good
    server.files[PATHS[FROM_TIMM]] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(DownloadError, match=r"must have the SHA-256 .* got .*try again"):
        create_model(FROM_TIMM, pretrained=True, rngs=nnx.Rngs(0))
    assert not left_in(tmp_path)
    server.files[PATHS[FROM_TIMM]] = good
    assert_loads(FROM_TIMM)


def test_without_a_server_the_error_gives_the_manual_way(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="Without a network, fetch that file elsewhere"):
        create_model(FROM_SAIL, pretrained=True, rngs=nnx.Rngs(0))
    assert not left_in(tmp_path)


def test_offline_mode_asks_nobody_and_uses_what_was_downloaded(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"(?s)could not be.*Without a network"):
        create_model(FROM_TIMM, pretrained=True, rngs=nnx.Rngs(0))
    assert server.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.download(hub.timm_source(FROM_TIMM), name=FROM_TIMM)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert_loads(FROM_TIMM)
    assert server.requests == []


def test_a_download_that_does_not_fit_is_not_cached(server, contents, tmp_path):
    server.files[PATHS[FROM_TIMM]] = contents[FROM_TIMM][:-4]
    with pytest.raises(CheckpointError):
        create_model(FROM_TIMM, pretrained=True, rngs=nnx.Rngs(0))
    assert not (tmp_path / "converted").exists()


def test_an_unknown_name_asks_nobody(server):
    with pytest.raises(ValueError, match="Did you mean caformer_s18"):
        create_model("caformer_s81", pretrained=True, rngs=nnx.Rngs(0))
    assert server.requests == []


def test_a_cache_that_cannot_be_written_asks_nobody(server, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("METAFORMER_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=f"in a folder that can be written to, got .*{FROM_TIMM}"):
        create_model(FROM_TIMM, pretrained=True, rngs=nnx.Rngs(0))
    assert server.requests == []


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("METAFORMER_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "metaformer_jax"
    monkeypatch.setenv("METAFORMER_JAX_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_what_a_mirror_answers_is_said(server, monkeypatch):
    server.refuses_by = 403
    with pytest.raises(DownloadError, match=rf"403.*, from {server.url}\."):
        create_model(FROM_TIMM, pretrained=True, rngs=nnx.Rngs(0))
