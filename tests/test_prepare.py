import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys

import fake_imagenet
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from metaformer_jax.data import prepare, prepare_imagenet, to_array_record
from metaformer_jax.data.sources import open_source


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFORMER_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    return fake_imagenet.write_dataset(tmp_path / "source", "tfrecord")


@pytest.fixture
def tars(tmp_path):
    return fake_imagenet.write_tars(tmp_path / "tars")


def _all(root, split):
    source = open_source("imagenet2012", split, root=str(root))
    return [source[index] for index in range(len(source))]


def _convert(source, output, *others):
    return prepare.main(["arrayrecord", "--input", str(source), "--output", str(output), *others])


def _entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_converted_set_holds_the_same_records_in_the_same_order(source, tmp_path, capsys):
    assert _convert(source, tmp_path / "out") == 0
    folder = tmp_path / "out" / "imagenet2012" / "5.1.0"
    assert capsys.readouterr().out.splitlines() == [
        str(folder),
        f"Use it with data.name=imagenet2012 and data.root={tmp_path / 'out'}",
    ]
    for split in ("train", "validation"):
        assert _all(tmp_path / "out", split) == _all(source.parents[1], split)
    names = [name.replace("tfrecord", "array_record") for name in _entries(source)]
    assert _entries(folder) == names
    assert _entries(folder.parent) == ["5.1.0"]


def test_an_empty_split_is_no_reason_to_refuse_the_others(tmp_path):
    records = {"train": [fake_imagenet.example(b"jpeg", 0, file_name=b"")] * 3, "test": []}
    source = fake_imagenet.write_dataset(tmp_path / "source", "tfrecord", records=records)
    assert _convert(source, tmp_path / "out") == 0
    assert len(_all(tmp_path / "out", "train")) == 3


def test_tfds_reads_a_converted_set(source, tmp_path):
    folder = to_array_record.convert_dataset(source, tmp_path / "out")
    builder = tfds.builder_from_directory(folder)
    records = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    assert [(r["file_name"].decode(), r["image"], r["label"]) for r in records] == list(
        fake_imagenet.photographs("train")
    )


def test_an_earlier_result_is_replaced_on_request_only(source, tmp_path, capsys):
    assert _convert(source, tmp_path / "out") == 0
    folder = tmp_path / "out" / "imagenet2012" / "5.1.0"
    (folder / "mark").touch()
    assert _convert(source, tmp_path / "out") == 2
    assert f"must not hold the result yet, got {folder}" in capsys.readouterr().err
    assert (folder / "mark").exists()
    assert _convert(source, tmp_path / "out", "--force", "--num-threads", "1") == 0
    assert not (folder / "mark").exists()
    assert _entries(folder.parent) == ["5.1.0"]


def test_what_is_no_data_set_is_never_replaced(source, tmp_path, capsys):
    folder = tmp_path / "out" / "imagenet2012" / "5.1.0"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").touch()
    assert _convert(source, tmp_path / "out", "--force") == 2
    assert "got something else there" in capsys.readouterr().err
    assert _entries(folder) == ["thesis.txt"]


def test_the_source_is_never_replaced(source, capsys):
    before = _entries(source)
    assert _convert(source, source.parents[1], "--force") == 2
    assert "must not be where the source lies" in capsys.readouterr().err
    assert _entries(source) == before


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_source_leaves_nothing(source, tmp_path, capsys, damage):
    (path,) = source.glob("*train*-00003-of-00004")
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content[:-1] if damage == "cut" else content)
    assert _convert(source, tmp_path / "out") == 2
    message = "must have the 6 records" if damage == "cut" else "must have the checksum"
    assert message in capsys.readouterr().err
    assert _entries(tmp_path / "out" / "imagenet2012") == []


def test_a_result_that_lost_records_is_not_kept(source, tmp_path, monkeypatch, capsys):
    read = to_array_record.read_records
    monkeypatch.setattr(
        to_array_record, "read_records", lambda *args, **kwargs: list(read(*args, **kwargs))[1:]
    )
    assert _convert(source, tmp_path / "out") == 2
    assert "array_record-0000" in capsys.readouterr().err
    assert _entries(tmp_path / "out" / "imagenet2012") == []


def test_array_records_are_not_converted_again(tmp_path, capsys):
    folder = fake_imagenet.write_dataset(tmp_path / "x", "array_record")
    assert _convert(folder, tmp_path / "out") == 2
    assert "must hold TFRecord files" in capsys.readouterr().err
    assert _convert(tmp_path / "x", tmp_path / "out") == 2
    assert "must hold dataset_info.json and features.json" in capsys.readouterr().err


def test_the_archives_are_checked_before_anything_else(tars, tmp_path, capsys):
    arguments = ["imagenet", "--tars", str(tars), "--output", str(tmp_path / "out")]
    assert prepare.main(arguments) == 2
    error = capsys.readouterr().err
    for archive in prepare_imagenet.ARCHIVES:
        size = (tars / archive.name).stat().st_size
        assert f"{archive.name} has {size:,} bytes instead of {archive.size:,}" in error
    (tars / "ILSVRC2012_img_val.tar").unlink()
    assert prepare.main([*arguments, "--any-size", "--md5"]) == 2
    error = capsys.readouterr().err
    assert "ILSVRC2012_img_val.tar is missing" in error
    assert "ILSVRC2012_img_train.tar has the MD5 " in error
    assert not (tmp_path / "out").exists()


def test_an_earlier_preparation_is_not_taken_for_a_new_one(tars, tmp_path, capsys):
    (tmp_path / "imagenet2012" / "5.1.0").mkdir(parents=True)
    arguments = ["imagenet", "--tars", str(tars), "--output", str(tmp_path), "--any-size"]
    assert prepare.main(arguments) == 2
    assert "must not hold the result yet" in capsys.readouterr().err


def test_without_tensorflow_the_extra_is_named(tars, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    arguments = ["imagenet", "--tars", str(tars), "--output", str(tmp_path), "--any-size"]
    assert prepare.main(arguments) == 2
    assert "needs tensorflow, which is not installed: install metaformer-jax[prepare]" in (
        capsys.readouterr().err
    )


def test_parquet_is_refused(tars, tmp_path, capsys):
    arguments = ["imagenet", "--tars", str(tars), "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        prepare.main([*arguments, "--file-format", "parquet"])
    assert "invalid choice: 'parquet'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`file_format` must be array_record or tfrecord, got 'pa"):
        prepare_imagenet.prepare_imagenet(tars, tmp_path, file_format="parquet")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="TFDS's builder needs TensorFlow: pip install metaformer-jax[prepare]",
)
@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_tfdss_builder_makes_what_is_read(tars, tmp_path, file_format):
    command = [sys.executable, "-m", "metaformer_jax.data.prepare", "imagenet", "--any-size"]
    command += ["--tars", tars, "--output", tmp_path, "--file-format", file_format]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)}
    )
    assert result.returncode == 0, result.stderr
    # TFDS shuffles.
    actual = sorted((r["label"], r["image"]) for r in _all(tmp_path, "train"))
    names = open_source("imagenet2012", "train", root=str(tmp_path)).class_names
    expected = sorted(
        (names.index(fake_imagenet.CLASSES[label]), image)
        for _, image, label in fake_imagenet.photographs("train")
    )
    corrected = [pair[1] for pair in actual if pair not in expected]
    assert len(actual) == len(expected) == 24
    # The CMYK and the PNG file.
    assert len(corrected) == 2
    for image in corrected:
        assert Image.open(io.BytesIO(image)).format == "JPEG"
        assert Image.open(io.BytesIO(image)).mode == "RGB"
    labels = pathlib.Path(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt"))
    held_out = {r["image"]: names[r["label"]] for r in _all(tmp_path, "validation")}
    photographs = [image for _, image, _ in fake_imagenet.photographs("val")]
    assert [held_out[image] for image in photographs] == labels.read_text().split()[:9]
    info = json.loads((tmp_path / "imagenet2012/5.1.0/dataset_info.json").read_text())
    assert info["fileFormat"] == file_format
