import os
import pathlib
import pickle

import fake_imagenet
import fsspec
import numpy as np
import pytest

from metaformer_jax.data import tfrecord
from metaformer_jax.data.records import Shard
from metaformer_jax.data.tfrecord import TfRecords

RECORDS = [
    [np.random.default_rng([shard, record]).bytes(record * 37 + shard) for record in range(5)]
    for shard in range(3)
]


@pytest.fixture
def paths(tmp_path):
    paths = [str(tmp_path / f"set-{shard}") for shard in range(3)]
    for path, records in zip(paths, RECORDS, strict=True):
        fake_imagenet.write_tfrecord(path, records)
    return paths


def _shards(paths, num_records=5):
    return [Shard(path, num_records, skip=0, take=num_records) for path in paths]


def _open(paths, tmp_path):
    return TfRecords(_shards(paths), index_folder=tmp_path / "index")


def _all(records):
    return [records[index] for index in range(len(records))]


def _flat():
    return [record for shard in RECORDS for record in shard]


def _index_file(tmp_path):
    (path,) = (tmp_path / "index").iterdir()
    return path


def test_records_are_read_by_position(paths, tmp_path):
    records = _open(paths, tmp_path)
    assert _all(records) == _flat()
    assert records.describe(7) == f"record 2 of {paths[1]}"


def test_only_the_records_that_count_are_seen(paths, tmp_path):
    shards = [Shard(paths[0], 5, skip=3, take=2), Shard(paths[2], 5, skip=0, take=1)]
    records = TfRecords(shards, index_folder=tmp_path / "index")
    assert _all(records) == [*RECORDS[0][3:], RECORDS[2][0]]
    assert records.describe(1) == f"record 4 of {paths[0]}"


def test_whole_files_are_read_in_order(paths):
    assert list(tfrecord.read_records(paths[1], num_records=5)) == RECORDS[1]


def test_the_walk_is_done_once(paths, tmp_path, monkeypatch):
    _open(paths, tmp_path)

    def walk_again(*args, **kwargs):
        raise AssertionError("the files were walked over again")

    monkeypatch.setattr(tfrecord, "find_records", walk_again)
    assert _all(_open(paths, tmp_path)) == _flat()


@pytest.mark.parametrize("change", ["content", "time"])
def test_the_index_of_a_file_that_changed_is_not_used(paths, tmp_path, change):
    _open(paths, tmp_path)
    if change == "content":
        # Of the same size as before.
        swapped = [RECORDS[1][index] for index in (4, 3, 2, 1, 0)]
        fake_imagenet.write_tfrecord(paths[1], swapped)
    status = os.stat(paths[1])
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    records = _open(paths, tmp_path)
    assert records[5] == (RECORDS[1][4] if change == "content" else RECORDS[1][0])
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_an_index_of_other_files_under_this_name_is_not_used(paths, tmp_path):
    _open(paths, tmp_path)
    other = tmp_path / "other"
    TfRecords(_shards([paths[2], paths[1], paths[0]]), index_folder=other)
    (foreign,) = other.iterdir()
    foreign.replace(_index_file(tmp_path))
    assert _all(_open(paths, tmp_path)) == _flat()


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_index_is_made_anew(paths, tmp_path, seed):
    _open(paths, tmp_path)
    index = _index_file(tmp_path)
    whole = index.read_bytes()
    index.write_bytes(_mutated(whole, np.random.default_rng(seed)))
    assert _all(_open(paths, tmp_path)) == _flat()
    assert index.read_bytes() == whole


@pytest.mark.parametrize("seed", range(150))
def test_a_damaged_file_is_an_error_or_changes_nothing(paths, tmp_path, seed):
    rng = np.random.default_rng(seed)
    number = int(rng.integers(3))
    content = pathlib.Path(paths[number]).read_bytes()
    mutated = _mutated(content, rng)
    pathlib.Path(paths[number]).write_bytes(mutated)
    # Half of the files change after they were indexed, with nothing to tell it by.
    if seed % 2 and len(mutated) == len(content):
        status = os.stat(paths[number])
        pathlib.Path(paths[number]).write_bytes(content)
        os.utime(paths[number], ns=(status.st_atime_ns, status.st_mtime_ns))
        _open(paths, tmp_path)
        pathlib.Path(paths[number]).write_bytes(mutated)
        os.utime(paths[number], ns=(status.st_atime_ns, status.st_mtime_ns))
    seen = []
    try:
        records = _open(paths, tmp_path)
        seen.extend(records[index] for index in range(15))
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    # The right answers up to an error, which names the file.
    assert seen == _flat()[: len(seen)]
    assert len(seen) == 15 or paths[number] in message


def _mutated(content, rng):
    content = bytearray(content)
    at = int(rng.integers(len(content)))
    kind = rng.integers(4)
    if kind == 0:
        content[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        content[at:at] = rng.bytes(int(rng.integers(1, 40)))
    else:
        stretch = slice(at, at + int(rng.integers(1, 40)))
        content[stretch] = rng.bytes(len(content[stretch]))
    return bytes(content)


def test_a_damaged_record_is_named_when_it_is_read(paths, tmp_path):
    content = bytearray(pathlib.Path(paths[1]).read_bytes())
    content[-5] ^= 1
    pathlib.Path(paths[1]).write_bytes(content)
    records = _open(paths, tmp_path)
    assert records[8] == RECORDS[1][3]
    with pytest.raises(ValueError, match=rf"record 4 of {paths[1]} must have the checksum"):
        records[9]
    with pytest.raises(ValueError, match=rf"record 4 of {paths[1]} must have the checksum"):
        list(tfrecord.read_records(paths[1], num_records=5))


def test_a_cut_file_is_refused_at_opening(paths, tmp_path):
    os.truncate(paths[1], os.path.getsize(paths[1]) - 1)
    with pytest.raises(ValueError, match=rf"{paths[1]} must have the 5 records .* got 4 whole"):
        _open(paths, tmp_path)


def test_a_damaged_length_is_refused_at_opening(paths, tmp_path):
    content = bytearray(pathlib.Path(paths[0]).read_bytes())
    # The first record is empty: its frame is 16 bytes, and the next length's checksum follows.
    content[16 + 8] ^= 1
    pathlib.Path(paths[0]).write_bytes(content)
    with pytest.raises(ValueError, match="got 1 before a damaged one at byte 16"):
        _open(paths, tmp_path)


def test_another_number_of_records_is_refused_at_opening(paths, tmp_path):
    with pytest.raises(ValueError, match=r"must have the 6 records that .*json announces, got 5\."):
        TfRecords(_shards(paths, 6), index_folder=tmp_path / "index")


def test_missing_files_are_refused_at_opening(paths, tmp_path):
    os.remove(paths[0])
    os.remove(paths[2])
    message = rf"All 3 files .* got 1: {paths[0]} is missing, and 1 more"
    with pytest.raises(ValueError, match=message):
        _open(paths, tmp_path)


def test_a_folder_that_cannot_be_written_costs_the_index_alone(paths, tmp_path):
    (tmp_path / "index").write_text("a file")
    with pytest.warns(UserWarning, match="cannot be kept in .* Set METAFORMER_JAX_CACHE"):
        assert _all(_open(paths, tmp_path)) == _flat()


def test_the_index_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("METAFORMER_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tfrecord.default_index_folder() == tmp_path / "metaformer_jax" / "index"
    monkeypatch.setenv("METAFORMER_JAX_CACHE", str(tmp_path / "own"))
    assert tfrecord.default_index_folder() == tmp_path / "own" / "index"


@pytest.fixture
def remote_paths(tmp_path, paths):
    """The files in a file system that only fsspec reaches, as gs:// is."""
    files = fsspec.filesystem("memory")
    folder = f"/{tmp_path.name}"
    for shard, local in enumerate(paths):
        files.pipe_file(f"{folder}/set-{shard}", pathlib.Path(local).read_bytes())
    yield [f"memory:/{folder}/set-{shard}" for shard in range(3)]
    files.rm(folder, recursive=True)


@pytest.mark.parametrize("window_bytes", [12, 50, 1 << 20])
def test_remote_files_are_read_by_ranges(remote_paths, tmp_path, monkeypatch, window_bytes):
    monkeypatch.setattr(tfrecord, "_REMOTE_WINDOW_BYTES", window_bytes)
    records = _open(remote_paths, tmp_path)
    assert _all(records) == _flat()
    assert _all(pickle.loads(pickle.dumps(records))) == _flat()


def test_remote_files_are_checked_like_local_ones(remote_paths, tmp_path):
    files = fsspec.filesystem("memory")
    content = files.cat_file(remote_paths[1])
    files.pipe_file(remote_paths[1], content[:-1])
    with pytest.raises(ValueError, match=r"set-1 must have the 5 records .* got 4 whole"):
        _open(remote_paths, tmp_path)
    files.rm(remote_paths[1])
    with pytest.raises(ValueError, match="set-1 is missing"):
        _open(remote_paths, tmp_path)


def test_a_scheme_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(ValueError, match="must be a path that fsspec reads, got: "):
        _open(["nosuch://bucket/set-0"], tmp_path)
