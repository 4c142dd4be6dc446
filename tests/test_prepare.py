import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import types

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
    assert "`--tars` must be a folder with the archives of https://image-net.org" in error
    with pytest.raises(ValueError, match=r"img_train.tar has the MD5 .*img_val.tar has the MD5 "):
        prepare_imagenet.check_contents(tars)
    (tars / "ILSVRC2012_img_val.tar").unlink()
    assert prepare.main([*arguments, "--any-size", "--md5"]) == 2
    assert "ILSVRC2012_img_val.tar is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def builder(monkeypatch):
    """In TFDS's place one that is called with the folder that it prepares into."""
    prepares = []

    def build(name, *, data_dir, file_format):
        folder = pathlib.Path(data_dir, *name.split(":"))
        return types.SimpleNamespace(download_and_prepare=lambda **_: prepares[0](folder))

    monkeypatch.setattr(prepare_imagenet, "_check_importable", lambda *_: None)
    monkeypatch.setattr(tfds, "builder", build)
    return prepares


def _prepare(tars, output, *others):
    return prepare.main(["imagenet", "--tars", str(tars), "--output", str(output), *others])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            (2, 3, 4),
            "got ILSVRC2012_val_00000002.JPEG in the place of ILSVRC2012_val_00000001.JPEG",
        ),
        (
            (1, 2, 4),
            "got ILSVRC2012_val_00000004.JPEG in the place of ILSVRC2012_val_00000003.JPEG",
        ),
    ],
)
def test_validation_images_that_would_get_the_labels_of_others_are_refused(
    tars, tmp_path, builder, capsys, names, message
):
    with tarfile.open(tars / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in names:
            tar.addfile(tarfile.TarInfo(f"ILSVRC2012_val_{number:08}.JPEG"))
    assert _prepare(tars, tmp_path / "out", "--any-size") == 2
    assert message in capsys.readouterr().err
    (tars / "ILSVRC2012_img_val.tar").write_bytes(b"no tar")
    assert _prepare(tars, tmp_path / "out", "--any-size") == 2
    assert "img_val.tar must be a tar archive, got: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/data"), "error: /data: Permission denied"),
        (RuntimeError("write: No space left on device"), "`--output` must have room for the"),
        (KeyError("x"), "`--tars` must hold archives that TFDS prepares, got {}: KeyError: 'x'. "),
    ],
)
def test_what_ails_tfdss_builder_is_told_apart(tars, tmp_path, builder, capsys, error, message):
    def fail(_):
        raise error

    builder.append(fail)
    assert _prepare(tars, tmp_path / "out", "--any-size") == 2
    assert message.format(tars) in capsys.readouterr().err


def test_a_result_without_all_images_is_put_aside(tars, tmp_path, builder, capsys, monkeypatch):
    builder.append(lambda folder: fake_imagenet.write_dataset(folder.parents[1], "array_record"))
    monkeypatch.setattr(prepare_imagenet, "check_archives", lambda *_, **__: None)
    monkeypatch.setattr(prepare_imagenet, "_check_validation_images", lambda *_, **__: None)
    assert _prepare(tars, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "img_train.tar must have 1,281,167 train images, got 24." in error
    assert _entries(tmp_path / "out" / "imagenet2012") == ["5.1.0.not_whole"]


def test_a_place_without_room_or_on_another_machine_is_refused(
    tars, tmp_path, builder, capsys, monkeypatch
):
    with pytest.raises(SystemExit):
        _prepare(tars, "gs://bucket/tfds")
    assert "argument --output: must be a local folder, got gs://bucket/tfds" in (
        capsys.readouterr().err
    )
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(prepare_imagenet.shutil, "disk_usage", lambda _: usage)
    assert _prepare(tars, tmp_path / "out", "--any-size") == 2
    assert f"`--output` must have room for about 0.0 GB, got {tmp_path / 'out'} with 0.0 GB" in (
        capsys.readouterr().err
    )
    (tmp_path / "file").touch()
    assert _prepare(tars, tmp_path / "file" / "out", "--any-size") == 2
    assert f"and of {tmp_path / 'file'}: Not a directory" in capsys.readouterr().err


def test_what_killed_preparations_left_is_told(source, tars, tmp_path, builder, capsys):
    folder = tmp_path / "out" / "imagenet2012"
    (folder / "incomplete.ABC_5.1.0").mkdir(parents=True)
    (folder / ".5.1.0.partial-123").mkdir()
    builder.append(lambda folder: fake_imagenet.write_dataset(folder.parents[1], "array_record"))
    assert _prepare(tars, tmp_path / "out", "--any-size") == 0
    assert f"note: {folder / 'incomplete.ABC_5.1.0'} is of a preparation" in capsys.readouterr().err
    assert _convert(source, tmp_path / "out", "--force") == 0
    assert f"note: {folder / '.5.1.0.partial-123'} is of a conversion" in capsys.readouterr().err


def test_a_conversion_on_a_full_disk_is_one_line_and_leaves_nothing(
    source, tmp_path, capsys, monkeypatch
):
    class Full:
        def __init__(self, path, _):
            pathlib.Path(path).touch()

        def write(self, _):
            raise RuntimeError("write() failed: No space left on device")

        def close(self):
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(to_array_record.array_record_module, "ArrayRecordWriter", Full)
    assert _convert(source, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not be written: write() failed: No space left on device. Nothing" in line
    assert _entries(tmp_path / "out" / "imagenet2012") == []


def test_a_folder_above_or_inside_a_version_is_told_where_to_go(source, tmp_path, capsys):
    for above in (source.parent, source.parents[1]):
        assert _convert(above, tmp_path / "out") == 2
        assert f"and no features.json. Give {source}." in capsys.readouterr().err
    for inside in (source, source.parent):
        with pytest.raises(ValueError, match=f"which is inside .* Give '{source.parents[1]}'"):
            open_source("imagenet2012", "train", root=str(inside))


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
