"""Checkpoint files are read without running them, and refused unless they are whole."""

import argparse
import collections
import os
import pathlib
import resource
import stat
import sys

import numpy as np
import pytest
import torch

from metaformer_jax.weights import CheckpointError
from metaformer_jax.weights.files import read_metadata, read_tensors, sha256, write_tensors
from metaformer_jax.weights.write import is_file_name

TENSORS = {
    "stages.0.0.norm1.weight": np.arange(6, dtype=np.float32),
    "head.fc2.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
}


def torch_state_dict(prefix=""):
    return collections.OrderedDict((prefix + k, torch.from_numpy(v)) for k, v in TENSORS.items())


def assert_read(path, *, entry=None, **kwargs):
    tensors, found = read_tensors(path, **kwargs)
    assert found == entry
    assert set(tensors) == set(TENSORS)
    for key, tensor in TENSORS.items():
        np.testing.assert_array_equal(tensors[key], tensor)


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_plain_state_dict_of_either_torch_format_is_read(tmp_path, zip_format):
    path = tmp_path / "plain.pth"
    torch.save(torch_state_dict(), path, _use_new_zipfile_serialization=zip_format)
    assert_read(path)


@pytest.mark.parametrize("entry", ["state_dict", "model", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model._orig_mod."]
)
def test_what_training_scripts_save_is_unwrapped(tmp_path, entry, prefix):
    path = tmp_path / "training.pth.tar"
    content = {
        "epoch": 299,
        "arch": "caformer_s18",
        entry: torch_state_dict(prefix),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "args": argparse.Namespace(lr=4e-3, opt_betas=None),
        "metric": 83.6,
    }
    torch.save(content, path)
    assert_read(path, entry=entry)


@pytest.mark.parametrize("wraps", [False, True])
def test_what_averages_weights_is_unwrapped(tmp_path, wraps):
    model = torch.nn.Sequential(collections.OrderedDict(fc=torch.nn.Linear(3, 2)))
    averaged = torch.optim.swa_utils.AveragedModel(model).state_dict()
    torch.save({"model_ema": averaged} if wraps else averaged, tmp_path / "averaged.pth")
    tensors, entry = read_tensors(tmp_path / "averaged.pth")
    assert entry == ("model_ema" if wraps else None)
    assert set(tensors) == {"fc.weight", "fc.bias"}
    np.testing.assert_array_equal(tensors["fc.weight"], model.fc.weight.detach().numpy())


def test_figures_of_a_training_beside_the_weights_are_no_code(tmp_path):
    figures = {"best": np.float64(0.5), "epoch": np.int64(3), "is_best": np.bool_(True)}
    # The name of a torch file is that of a folder in it.
    path = tmp_path / "caformer..best.pth"
    torch.save({"state_dict_ema": {}, "state_dict": torch_state_dict(), **figures}, path)
    assert_read(path, entry="state_dict")


def test_a_count_of_anything_else_is_left_where_it_is(tmp_path):
    torch.save({**torch_state_dict(), "n_averaged": torch.tensor(3)}, tmp_path / "other.pth")
    assert set(read_tensors(tmp_path / "other.pth")[0]) == {*TENSORS, "n_averaged"}


def test_the_averaged_weights_come_first_and_the_others_on_request(tmp_path):
    path = tmp_path / "both.pth"
    other = {key: tensor + 1 for key, tensor in torch_state_dict().items()}
    torch.save({"state_dict": other, "state_dict_ema": torch_state_dict()}, path)
    assert_read(path, entry="state_dict_ema")
    tensors, entry = read_tensors(path, entry="state_dict")
    assert entry == "state_dict"
    assert tensors["stages.0.0.norm1.weight"][0] == 1
    with pytest.raises(
        CheckpointError, match=r"got 'ema'\. The file has state_dict, state_dict_ema"
    ):
        read_tensors(path, entry="ema")


class RunsCode:
    """Unpickled without care, it makes the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


class RunsShell(RunsCode):
    def __reduce__(self):
        import os

        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("kind", [RunsCode, RunsShell])
@pytest.mark.parametrize("zip_format", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path, kind, zip_format):
    marker, path = tmp_path / "it_ran", tmp_path / "malicious.pth"
    content = {"state_dict": torch_state_dict(), "extra": kind(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(CheckpointError, match=r"wants to run \S+\. It was not run") as caught:
        read_tensors(path)
    assert "weights_only" not in str(caught.value)
    assert not marker.exists()
    # The file is armed: careless loading runs it.
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(tmp_path, suffix, keep):
    path = tmp_path / f"whole{suffix}"
    write_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"truncated|empty|whole"):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"<html>Not found</html>", b"\x80\x02}", b"PK\x03\x04 zip"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"page{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(3), {"model": {"a": 1}}])
def test_a_torch_file_without_a_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="must hold a state dict"):
        read_tensors(path)


def test_tensors_without_dense_numbers_are_refused_by_key(tmp_path):
    path = tmp_path / "sparse.pth"
    torch.save({"weight": torch.eye(3).to_sparse()}, path)
    with pytest.raises(CheckpointError, match="'weight'"):
        read_tensors(path)
    torch.save({"weight": torch.empty(3, device="meta")}, path)
    with pytest.raises(CheckpointError, match="on meta under 'weight'"):
        read_tensors(path)


def test_a_safetensors_header_of_any_announced_length_costs_nothing(tmp_path):
    path = tmp_path / "huge.safetensors"
    for announced in (2**63, 17 << 20, 24):
        path.write_bytes(announced.to_bytes(8, "little") + b"{}" + b" " * 8)
        with pytest.raises(CheckpointError, match=f"header would take {announced}"):
            read_tensors(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header):
    path = tmp_path / "lies.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(CheckpointError):
        read_tensors(path)


def test_a_dtype_that_numpy_does_not_have_is_named(tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(2), "b": torch.zeros(4).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"^`b` must have a dtype .*, got F8_E4M3 .*bfloat16"):
        read_tensors(tmp_path / "short.safetensors")


def test_bfloat16_is_read_as_it_is_from_both_formats(tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.tensor([1.0, 0.1, -3.5e38]).to(torch.bfloat16)}
    torch.save(tensors, tmp_path / "half.pth")
    save_file(tensors, tmp_path / "half.safetensors")
    for name in ("half.pth", "half.safetensors"):
        read, _ = read_tensors(tmp_path / name)
        np.testing.assert_array_equal(read["a"].astype(np.float32), tensors["a"].float().numpy())


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors", "out.PTH", "out.SafeTensors"])
def test_written_files_hold_arrays_of_any_strides(tmp_path, name):
    strided = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    read_only = strided.copy()
    read_only.flags.writeable = False
    write_tensors(tmp_path / name, {"strided": strided, "read_only": read_only}, {"own": ""})
    assert is_file_name(name)
    assert ("own" in read_metadata(tmp_path / name)) == name.lower().endswith(".safetensors")
    tensors, _ = read_tensors(tmp_path / name)
    np.testing.assert_array_equal(tensors["strided"], strided)
    np.testing.assert_array_equal(tensors["read_only"], strided)


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_written_files_have_the_rights_that_the_umask_leaves(tmp_path, name):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / name, TENSORS, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_a_file_that_cannot_be_written_to_its_end_is_an_error_of_the_system(tmp_path, name):
    tensors = {"a": np.zeros(1 << 16, np.float32)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match=r"\S+ could not be written completely: "):
            write_tensors(tmp_path / name, tensors, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_paths_that_are_no_files_are_said_to_be_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="existing checkpoint"):
        read_tensors(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="something else"):
        read_tensors(tmp_path)


def test_an_entry_of_a_safetensors_file_is_refused(tmp_path):
    write_tensors(tmp_path / "a.safetensors", TENSORS, {})
    with pytest.raises(CheckpointError, match="`entry` must be left out"):
        read_tensors(tmp_path / "a.safetensors", entry="model")


def test_without_torch_a_pth_file_says_what_to_install_and_safetensors_works(tmp_path, monkeypatch):
    write_tensors(tmp_path / "a.pth", TENSORS, {})
    write_tensors(tmp_path / "a.safetensors", TENSORS, {})
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_read(tmp_path / "a.safetensors")
    with pytest.raises(ImportError, match=r"install metaformer-jax\[torch\]"):
        read_tensors(tmp_path / "a.pth")


def test_the_hash_is_that_of_the_content(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
