"""Damaged data sets give the records that were written, or say that they are damaged.

TFRecord files have checksums of records but no index and no order: whole records in other places
would go unnoticed. No damage but a deliberate one does that.
"""

import os
import pathlib
import subprocess
import sys

import fake_imagenet
import numpy as np
import pytest
from mutations import FACTOR, attempt, mutations

from metaformer_jax.data import tfds_metadata, tfrecord
from metaformer_jax.data.records import ArrayRecords, Shard
from metaformer_jax.data.sources import BadRecordError
from metaformer_jax.data.tfds_source import TfdsSource
from metaformer_jax.data.tfrecord import TfRecords
from metaformer_jax.data.transforms import BadImageError, decode

RECORDS = [np.random.default_rng(index).bytes(37 * index) for index in range(8)]
# Inputs to one process that reads by native code.
_BATCH = 500


def read_all(opened, path):
    """The right records, but for those that are said to be damaged; and how many these are."""
    bad = 0
    for index, expected in enumerate(RECORDS):
        record, error = attempt(lambda index=index: opened[index], BadRecordError)
        assert str(path) in str(error) if error else record == expected
        bad += error is not None
    return bad


def open_and_read(kind, path, **arguments):
    """How an input ends: refused at opening, with so many bad records, or whole."""
    shards = [Shard(str(path), len(RECORDS), 0, len(RECORDS))]
    opened, error = attempt(lambda: kind(shards, **arguments), ValueError)
    if error:
        assert str(path) in str(error)
        return "refused"
    return "bad" if read_all(opened, path) else "whole"


def test_damaged_tfrecord_files_give_the_right_records_or_an_error(tmp_path):
    path = tmp_path / "set"
    fake_imagenet.write_tfrecord(path, RECORDS)
    whole = path.read_bytes()
    endings = set()
    for number, damaged in enumerate(mutations(whole, 1000)):
        path.write_bytes(damaged)
        endings.add(open_and_read(TfRecords, path, index_folder=tmp_path / "index"))
        in_order = []
        walk = tfrecord.read_records(str(path), num_records=len(RECORDS))
        _, error = attempt(lambda walk=walk, read=in_order: read.extend(walk), ValueError)
        assert error is None or str(path) in str(error)
        assert in_order == RECORDS[: len(in_order) if error else None]
        if number % 100 == 99:
            for index in (tmp_path / "index").iterdir():
                index.unlink()
    assert endings == {"refused", "bad"}


def test_files_damaged_after_they_were_indexed_give_the_right_records_or_an_error(tmp_path):
    path = tmp_path / "set"
    fake_imagenet.write_tfrecord(path, RECORDS)
    whole, status = path.read_bytes(), path.stat()
    shards = [Shard(str(path), len(RECORDS), 0, len(RECORDS))]
    opened = TfRecords(shards, index_folder=tmp_path / "index")
    num_bad = 0
    for damaged in mutations(whole, 1000, seed=1):
        path.write_bytes(damaged)
        # Nothing tells that it was.
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        num_bad += read_all(opened, path)
    assert num_bad


def test_a_damaged_index_never_leads_to_other_records(tmp_path):
    path = tmp_path / "set"
    fake_imagenet.write_tfrecord(path, RECORDS)
    folder = tmp_path / "index"
    assert open_and_read(TfRecords, path, index_folder=folder) == "whole"
    (index,) = folder.iterdir()
    whole = index.read_bytes()
    for damaged in mutations(whole, 1000, seed=2):
        index.write_bytes(damaged)
        assert open_and_read(TfRecords, path, index_folder=folder) == "whole"
        assert index.read_bytes() == whole


def damage_array_records(folder, group_size, first, number):
    """Reads damaged files of one process's share; a crash ends it."""
    from array_record.python import array_record_module

    path = pathlib.Path(folder) / "set"
    writer = array_record_module.ArrayRecordWriter(str(path), f"group_size:{group_size}")
    for record in RECORDS:
        writer.write(record)
    writer.close()
    whole = path.read_bytes()
    # Files are filled up with zeros, which mean nothing.
    within = np.flatnonzero(np.frombuffer(whole, np.uint8))
    endings = set()
    for input_ in list(mutations(whole, number, seed=first, within=within))[:number]:
        path.write_bytes(input_)
        endings.add(open_and_read(ArrayRecords, path))
    return endings


@pytest.mark.parametrize("group_size", [1, 3])
def test_damaged_array_record_files_give_the_right_records_or_an_error(group_size, tmp_path):
    for first in range(max(1, 500 * FACTOR // _BATCH)):
        code = (
            "import test_damaged_records as test\n"
            f"print(test.damage_array_records({str(tmp_path)!r}, {group_size}, {first}, {_BATCH}))"
        )
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "FUZZ_FACTOR": "1"},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert "refused" in ended.stdout


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return fake_imagenet.write_dataset(tmp_path_factory.mktemp("tfds"), "tfrecord")


def read_examples(data_dir):
    source = TfdsSource("imagenet2012", "eval", data_dir=str(data_dir))
    records = [source[index] for index in range(len(source))]
    # Names have no checksum: under that of another feature stands no image, and training says so.
    for record in records:
        decode(record["image"], channels=3)
    return [(record["image"], record["label"]) for record in records]


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_damaged_metadata_change_no_image_and_no_label(name, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("METAFORMER_JAX_CACHE", str(tmp_path))
    path = dataset / name
    whole = path.read_bytes()
    expected = [(image, label) for _, image, label in fake_imagenet.photographs("val")]
    endings = set()
    try:
        for damaged in mutations(whole, 150, seed=3):
            path.write_bytes(damaged)
            records, error = attempt(lambda: read_examples(dataset.parents[1]), ValueError)
            # In this project's words; the set's own name may be what is damaged.
            assert not error or " must " in str(error) or isinstance(error, BadImageError)
            assert error or records == expected
            endings.add("refused" if error else "whole")
    finally:
        path.write_bytes(whole)
    assert endings == {"refused", "whole"}


def test_records_of_any_content_are_examples_or_named(tmp_path, monkeypatch, dataset):
    whole = fake_imagenet.examples("val")
    folder = fake_imagenet.write_dataset(
        tmp_path, "tfrecord", records={"validation": whole[:1]}, num_shards={"validation": 1}
    )
    monkeypatch.setenv("METAFORMER_JAX_CACHE", str(tmp_path / "cache"))
    source = TfdsSource("imagenet2012", "eval", data_dir=str(tmp_path))
    (shard,) = tfds_metadata.read_split(str(folder), "eval").shards
    outcomes = set()
    for damaged in mutations(whole[0], 1000, seed=4):
        # As a file with the right checksums would give it.
        monkeypatch.setattr(source, "_records", _One(damaged, shard.path))
        record, error = attempt(lambda: source[0], ValueError)
        outcomes.add(type(error))
        if error:
            assert shard.path in str(error)
        else:
            assert isinstance(record["image"], bytes)
            assert 0 <= record["label"] < len(fake_imagenet.CLASSES)
    assert outcomes >= {type(None), BadRecordError}


class _One:
    def __init__(self, record, path):
        self._record, self._path = record, path

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self._record

    def describe(self, index):
        return f"record {index} of {self._path}"
