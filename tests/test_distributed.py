"""Whether a process finds out that it is one of several; nothing here connects to others."""

import contextlib
import http.server
import threading

import jax
import pytest

from metaformer_jax.training import distributed

_ENVIRONMENT = (
    *(*distributed._SIZES, *distributed._HOSTS),
    *("TPU_SKIP_MDS_QUERY", "JAX_PLATFORMS", "GCE_METADATA_IP"),
)
_SLICE = "name0:0:10.0.0.1,name1:1:10.0.0.2"


@pytest.fixture
def calls(monkeypatch):
    """How often JAX was asked to connect this process with others."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: calls.append(None))
    for name in _ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a TPU, as far as the system's list of its devices tells."""
    (tmp_path / "0000:00:04.0").mkdir()
    (tmp_path / "0000:00:04.0" / "vendor").write_text("0x1ae0\n")
    monkeypatch.setattr(distributed, "_PCI_DEVICES", tmp_path)


@contextlib.contextmanager
def _metadata_server(monkeypatch, *answers):
    """Gives one of these answers after another, codes of errors or texts; yields the requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers["Metadata-Flavor"]))
            answer = answers[len(requests) - 1]
            self.send_response(200 if isinstance(answer, str) else answer)
            self.end_headers()
            self.wfile.write(str(answer).encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(distributed.time, "sleep", lambda _: None)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        yield requests
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answers", "num_calls"),
    [
        ([_SLICE], 1),
        (["10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4"], 1),
        (["10.0.0.1"], 0),
        ([404], 0),
        ([503, 503, _SLICE], 1),
        ([503] * 6, 0),
    ],
)
def test_a_pod_of_tpu_machines_is_found_by_what_their_metadata_server_tells(
    answers, num_calls, calls, machine, monkeypatch
):
    with _metadata_server(monkeypatch, *answers) as requests:
        distributed.initialize()
    assert len(calls) == num_calls
    path = "/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    assert requests == [(path, "Google")] * len(answers)


@pytest.mark.parametrize(
    ("name", "value", "num_calls"),
    [
        ("TPU_WORKER_HOSTNAMES", "a,b", 1),
        ("TPU_WORKER_HOSTNAMES", "localhost", 0),
        ("TPU_PROCESS_ADDRESSES", "a:8476,b:8476", 1),
        ("MEGASCALE_NUM_SLICES", "2", 1),
        ("SLURM_NTASKS", "2", 1),
        ("SLURM_NTASKS", "1", 0),
        ("OMPI_COMM_WORLD_SIZE", "2", 1),
    ],
)
def test_launchers_tell_by_the_environment(name, value, num_calls, calls, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv(name, value)
    distributed.initialize()
    assert len(calls) == num_calls


@pytest.mark.parametrize(
    ("name", "value"),
    [("TPU_SKIP_MDS_QUERY", "1"), ("JAX_PLATFORMS", "cpu"), ("TPU_WORKER_HOSTNAMES", "localhost")],
)
def test_no_server_is_asked_where_no_tpu_is_used(name, value, calls, machine, monkeypatch):
    monkeypatch.setenv(name, value)
    with _metadata_server(monkeypatch) as requests:
        distributed.initialize()
    assert not calls
    assert not requests


def test_no_server_is_asked_on_machines_that_are_not_googles(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "_PCI_DEVICES", tmp_path)
    with _metadata_server(monkeypatch) as requests:
        distributed.initialize()
    assert not calls
    assert not requests


def test_a_number_of_processes_that_is_none_is_refused_by_its_name(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4x")
    with pytest.raises(ValueError, match=r"`SLURM_NTASKS` must be a number .* got '4x'"):
        distributed.initialize()


def test_devices_of_several_processes_that_are_not_connected_are_refused(calls, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match=r"`--distributed` must be given .* got 4 processes"):
        distributed.initialize(distributed=False)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    distributed.initialize(distributed=False)


@pytest.mark.parametrize("address", ["127.0.0.1", ":80", "host:", "host:x", "host:0", "host:65536"])
def test_an_address_without_host_and_port_is_refused(address, calls):
    with pytest.raises(ValueError, match="must be host:port of the first process"):
        distributed.initialize(address, 2, 0)
    assert not calls


def test_a_port_that_is_taken_is_named(monkeypatch):
    def initialize(*_, **__):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Failed to start RPC server\n...")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    message = "at --coordinator_address, got 'host:80': UNKNOWN: Failed to start RPC server. Give"
    with pytest.raises(distributed.ClusterError, match=message):
        distributed.initialize("host:80", 2, 0)
