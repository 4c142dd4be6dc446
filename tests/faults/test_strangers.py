"""Checkpoints from strangers: nothing of them is run, nothing is written where it should not be.

What a file that lies about its sizes would cost is not paid. Plain malice, and headers that are
too long or contradict themselves: see test_files.py.
"""

import argparse
import collections
import dataclasses
import io
import json
import os
import pathlib
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from damaged_weights import SPEC, record, same, variables, write_foreign, write_torch
from flax import nnx
from safetensors.numpy import save_file
from test_convert_torch_weights import load_program

from metaformer_jax import load_weights
from metaformer_jax.models import MetaFormer
from metaformer_jax.weights import CheckpointError, converted, files
from metaformer_jax.weights.convert import to_tensors
from metaformer_jax.weights.integrity import CHECKSUMS_NAME, write_checksums


@pytest.fixture(autouse=True)
def nothing_else_is_written(tmp_path, monkeypatch):
    """Strangers' files lie in `inner/folder`; what they would write beside it shows."""
    inner = tmp_path / "inner" / "folder"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    yield
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]
    assert [path.name for path in inner.parent.iterdir()] == ["folder"]
    assert not (inner / "canary").exists()
    assert not pathlib.Path("/tmp/canary-of-strangers").exists()


@pytest.fixture
def cheap():
    """The memory that a test takes, beside what it starts with, is a small part of a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


class Runs:
    """Unpickled without care, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


OPEN = "open('canary', 'w').close()"
CALLS = {
    "os.system": Runs(os.system, "touch canary"),
    "eval": Runs(eval, OPEN),
    "exec": Runs(exec, OPEN),
    "getattr": Runs(getattr, Runs(eval, OPEN), "x", None),
    "torch.load": Runs(torch.load, "canary", None),
}
PLACES = {
    "alone": lambda call: call,
    "in a state dict": lambda call: {"state_dict": {"a.weight": torch.zeros(2), "b.weight": call}},
    "as a name": lambda call: {"state_dict": {(call,): torch.zeros(2)}},
    "in arguments": lambda call: {"args": argparse.Namespace(lr=call), "model": {}},
    "deep": lambda call: {"model": [[({"x": [call]},)]]},
}


def test_the_calls_are_made_by_careless_loading(tmp_path):
    for name in ("os.system", "eval", "exec", "getattr"):
        pickle.loads(pickle.dumps(CALLS[name]))
        pathlib.Path("canary").unlink()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", CALLS)
def test_code_in_a_pickle_is_not_run_wherever_it_stands(call, place):
    content = PLACES[place](CALLS[call])
    torch.save(content, "zip.pth")
    torch.save(content, "legacy.pth", _use_new_zipfile_serialization=False)
    pathlib.Path("bare.pth").write_bytes(pickle.dumps(content))
    shutil.copy("zip.pth", "zip.safetensors")
    shutil.copy("legacy.pth", "legacy.safetensors")
    for path in pathlib.Path().glob("*.*"):
        with pytest.raises(CheckpointError):
            files.read_tensors(path)
        if path.suffix == ".safetensors":
            with pytest.raises(CheckpointError):
                files.read_metadata(path)


def write_zip(path, content, storage=b"\0" * 64, **others):
    """A zip file as torch.save makes it, of any content."""
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {
            "archive/data.pkl": content,
            "archive/byteorder": b"little",
            "archive/data/0": storage,
            "archive/version": b"3\n",
            **others,
        }.items():
            file.writestr(name, data)


class StoragePickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.fields if isinstance(value, Storage) else None


@dataclasses.dataclass
class Storage:
    fields: tuple


def tensor_of(shape, stride, num_elements, key="0"):
    """The pickle of a state dict with one tensor, whatever its storage holds."""
    storage = Storage(("storage", torch.FloatStorage, key, "cpu", num_elements))
    tensor = Runs(
        torch._utils._rebuild_tensor_v2, storage, 0, shape, stride, False, collections.OrderedDict()
    )
    content = io.BytesIO()
    StoragePickler(content, protocol=2).dump({"stages.0.0.norm1.weight": tensor})
    return content.getvalue()


def test_the_zip_files_made_here_are_read_as_torchs_are():
    write_zip("a.pth", tensor_of((4, 4), (4, 1), 16))
    tensors, _ = files.read_tensors("a.pth")
    np.testing.assert_array_equal(tensors["stages.0.0.norm1.weight"], np.zeros((4, 4)))


@pytest.mark.parametrize("call", CALLS)
def test_code_inside_a_tensor_is_not_run(call):
    for place in range(4):
        fields = [(4, 4), (4, 1), 16, "0"]
        fields[place] = CALLS[call]
        write_zip("a.pth", tensor_of(*fields))
        with pytest.raises(CheckpointError):
            files.read_tensors("a.pth")


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    ("shape", "stride", "num_elements"),
    [
        ((2**60,), (1,), 2**60),
        ((2**60,), (1,), 16),
        ((2**31, 2**31), (2**31, 1), 16),
        ((2**40, 2**40), (0, 0), 16),
        ((-1, 16), (1, 1), 16),
        ((4, 4), (-4, 1), 16),
        ((2**60,), (0,), 16),
    ],
)
def test_a_pytorch_file_of_vast_tensors_costs_nothing(shape, stride, num_elements):
    write_zip("vast.pth", tensor_of(shape, stride, num_elements))
    with pytest.raises(CheckpointError):
        load_weights(model(), "vast.pth")


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    ("shape", "end"),
    [
        ([2**60], 2**62),
        ([2**60], 64),
        ([2**32, 2**32], 64),
        ([2**62, 4], 64),
        ([2**64], 64),
        ([-1], 64),
        ([2**60, 0], 0),
    ],
)
def test_a_safetensors_file_of_vast_tensors_costs_nothing(shape, end):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    header = json.dumps({"stages.0.0.norm1.weight": entry}).encode()
    pathlib.Path("vast.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"\0" * min(end, 64)
    )
    with pytest.raises(CheckpointError):
        load_weights(model(), "vast.safetensors")


@pytest.mark.usefixtures("cheap")
def test_a_compressed_pytorch_file_is_not_unpacked():
    with zipfile.ZipFile("bomb.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", tensor_of((2**28,), (1,), 2**28))
        with file.open("archive/data/0", "w") as member:
            for _ in range(1024):
                member.write(bytes(1 << 20))
    with pytest.raises(CheckpointError, match=r"'archive/data.pkl' is compressed"):
        files.read_tensors("bomb.pth")


@pytest.mark.usefixtures("cheap")
def test_a_pytorch_file_whose_members_are_one_is_not_read_again_and_again():
    write_zip("once.pth", tensor_of((4,), (1,), 4), storage=bytes(1 << 20))
    with zipfile.ZipFile("once.pth", "a") as file:
        whole = file.getinfo("archive/data/0")
        for index in range(2000):
            again = zipfile.ZipInfo(f"archive/data/{index + 1}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(again, field, getattr(whole, field))
            file.filelist.append(again)
        file._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="overlap"):
        files.read_tensors("once.pth")


@pytest.mark.parametrize(
    "name", ["../../evil", "/tmp/canary-of-strangers", "archive/../../../evil"]
)
def test_names_of_other_places_in_a_zip_file_are_refused(name):
    write_zip("a.pth", tensor_of((4, 4), (4, 1), 16), **{name: b"evil"})
    with pytest.raises(CheckpointError, match="names another place"):
        files.read_tensors("a.pth")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused():
    write_zip("a.pth", tensor_of((4, 4), (4, 1), 16))
    with zipfile.ZipFile("a.pth", "a") as file:
        file.writestr("archive/data/0", b"x" * 64)
    with pytest.raises(CheckpointError, match="one name"):
        files.read_tensors("a.pth")


def test_a_tensor_marked_as_a_folder_is_refused():
    write_zip("a.pth", tensor_of((4, 4), (4, 1), 16))
    with zipfile.ZipFile("a.pth", "a") as file:
        file.getinfo("archive/data/0").external_attr |= 0x10
        file._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="is marked as a folder"):
        files.read_tensors("a.pth")


def test_a_zip_file_without_its_end_is_refused_as_damaged():
    write_zip("a.pth", tensor_of((4, 4), (4, 1), 16))
    whole = bytearray(pathlib.Path("a.pth").read_bytes())
    for disks in (1, 0xFFFF):
        # In the record at its end: the file says to be one of several.
        whole[-18:-14] = disks.to_bytes(2, "little") * 2
        pathlib.Path("a.pth").write_bytes(whole)
        with pytest.raises(CheckpointError):
            files.read_tensors("a.pth")


def test_storages_of_other_places_are_refused():
    pathlib.Path("secret").write_bytes(bytes(64))
    for key in ("../../secret", "/etc/passwd", os.path.abspath("secret")):
        write_zip("a.pth", tensor_of((4, 4), (4, 1), 16, key=key))
        with pytest.raises(CheckpointError):
            files.read_tensors("a.pth")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.REGTYPE])
def test_the_tar_files_of_old_torch_are_refused(kind):
    with tarfile.open("old.pth", "w") as file:
        for name in ("storages", "tensors", "pickle", "../../evil"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
    with pytest.raises(CheckpointError):
        files.read_tensors("old.pth")


def model(**changes):
    spec = dataclasses.replace(SPEC, **changes)
    return nnx.eval_shape(lambda: MetaFormer(spec, num_classes=3, image_size=16, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    "key", ["../../x", "/tmp/canary-of-strangers", "stages.0.0.norm1.\0weight"]
)
def test_tensors_named_like_paths_are_unexpected_tensors(key):
    tensors = to_tensors(variables(), "sail")
    save_file(tensors | {key: np.zeros(3, np.float32)}, "a.safetensors")
    with pytest.raises(CheckpointError, match="1 unexpected"):
        load_weights(model(), "a.safetensors")


def test_weights_of_another_architecture_are_refused():
    write_foreign("a.safetensors")
    write_torch("a.pth", zip_format=True)
    converted.write_folder("folder", variables(), record())
    for path in ("a.safetensors", "a.pth", "folder"):
        load_weights(model(), path)
        for changes in ({"depths": (1, 2)}, {"dims": (8, 16)}, {"res_scale_init": (1.0, 1.0)}):
            with pytest.raises(CheckpointError, match=r"missing|mis-shaped"):
                load_weights(model(**changes), path)


def data_file(folder):
    """The largest file of a converted folder."""
    return max(folder.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)


def test_links_out_of_a_folder_give_what_was_written_or_are_refused(tmp_path):
    folder = pathlib.Path("folder")
    converted.write_folder(folder, variables(), record())
    expected, _ = converted.read_folder(folder)
    linked = data_file(folder)
    # As the cache of the Hugging Face hub keeps files.
    linked.rename("blob")
    linked.symlink_to(os.path.abspath("blob"))
    assert same(converted.read_folder(folder)[0], expected)
    whole = pathlib.Path("blob").read_bytes()
    pathlib.Path("other").write_bytes(whole[:-1] + b"x")
    for target in ("other", "/etc/passwd", "/dev/zero", "nowhere", "."):
        linked.unlink()
        linked.symlink_to(os.path.abspath(target))
        with pytest.raises(CheckpointError):
            converted.read_folder(folder)


def test_a_folder_that_refers_to_others_is_refused():
    folder, other = pathlib.Path("folder"), pathlib.Path("other")
    for path in (folder, other):
        converted.write_folder(path, variables(), record())
    # A manifest that refers to files which lie elsewhere, under checksums that are right.
    manifest = pathlib.Path("variables", "manifest.ocdbt")
    shutil.copy(other / manifest, folder / manifest)
    for part in (folder / "variables").glob("ocdbt.process_*"):
        shutil.rmtree(part)
    (folder / CHECKSUMS_NAME).unlink()
    write_checksums(folder)
    # In a process of its own, for Orbax leaves what it had begun to read to itself.
    code = "from metaformer_jax.weights import converted; converted.read_folder('folder')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "CheckpointError: " in ended.stderr
    assert "must be a whole Orbax checkpoint" in ended.stderr


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "", 5, ["caformer_s18"], None])
def test_a_record_of_a_model_that_is_none_is_refused(name, capsys):
    folder = pathlib.Path("folder")
    converted.write_folder(folder, variables(), record())
    path = folder / "metaformer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": name}))
    (folder / CHECKSUMS_NAME).unlink()
    write_checksums(folder)
    assert load_program().main(["folder", "--reverse", "--output", "out.pth"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not pathlib.Path("out.pth").exists()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}", "null", "5", '{"files": {"../../x": [1, "0"]}}']
)
@pytest.mark.parametrize("name", ["metaformer.json", CHECKSUMS_NAME])
def test_json_of_any_kind_is_refused(name, text):
    folder = pathlib.Path("folder")
    converted.write_folder(folder, variables(), record())
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError):
        converted.read_folder(folder)
