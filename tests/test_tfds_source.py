import json
import os
import pathlib
import resource
import shutil

import fake_imagenet
import fsspec
import numpy as np
import pytest
import tensorflow_datasets as tfds

from metaformer_jax.data import tfds_metadata
from metaformer_jax.data.tfds_source import TfdsSource

FORMATS = ("array_record", "tfrecord")
IMAGE = b"not decoded here"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFORMER_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=FORMATS)
def folder(request, tmp_path):
    return fake_imagenet.write_dataset(tmp_path / "data", request.param)


def _open(folder, split="train", name="imagenet2012"):
    return TfdsSource(name, split, data_dir=str(folder.parents[1]))


def _labels(source):
    return [source[index]["label"] for index in range(len(source))]


def _digits(data_dir, **kwargs):
    """A small grey set of ten classes, as MNIST is."""
    arguments = {
        "name": "mnist",
        "version": "3.0.1",
        "features": {
            "image": tfds.features.Image(shape=(28, 28, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
        },
        "records": {
            split: [fake_imagenet.example(IMAGE, label) for label in range(count)]
            for split, count in (("train", 10), ("test", 4))
        },
        **kwargs,
    }
    return fake_imagenet.write_dataset(data_dir, "array_record", **arguments)


def test_a_grey_set_without_validation_is_evaluated_on_test(tmp_path):
    folder = _digits(tmp_path)
    source = _open(folder, "eval", "mnist")
    assert source.channels == 1
    assert source.class_names == tuple("0123456789")
    assert _labels(source) == [0, 1, 2, 3]
    assert source[2]["image"] == IMAGE


def test_validation_goes_before_test(tmp_path):
    records = [fake_imagenet.example(IMAGE, label) for label in range(6)]
    folder = _digits(tmp_path, records={"test": records[:2], "validation": records[2:]})
    assert _labels(_open(folder, "eval", "mnist")) == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("split", "chosen"),
    [
        ("train[:50%]", slice(0, 12)),
        ("train[5:9]", slice(5, 9)),
        ("train[-7:]", slice(17, 24)),
        ("train[6:12]", slice(6, 12)),
    ],
)
def test_slices_are_tfdss(folder, split, chosen):
    source = _open(folder, split)
    expected = fake_imagenet.photographs("train")[chosen]
    assert [source[index]["image"] for index in range(len(source))] == [e[1] for e in expected]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("dev", "must be one of imagenet2012/5.1.0's, train, validation, or a slice .* got 'dev'"),
        ("train[:", r"got 'train\[:'"),
        ("train[:200%]", r"got 'train\[:200%\]'"),
        ("train[:0]", r"must hold at least one record, got 'train\[:0\]'"),
    ],
)
def test_splits_that_are_not_there_are_refused(folder, split, message):
    with pytest.raises(ValueError, match=message):
        _open(folder, split)


def test_the_newest_version_is_taken_or_the_one_that_is_named(tmp_path):
    for version, count in (("3.0.9", 3), ("3.0.10", 10), ("2.0.0", 2)):
        records = {"train": [fake_imagenet.example(IMAGE, 0)] * count}
        _digits(tmp_path, version=version, records=records)
    (tmp_path / "mnist" / "incomplete.AB12CD_9.0.0").mkdir()

    def length(name):
        return len(TfdsSource(name, "train", data_dir=str(tmp_path)))

    assert length("mnist") == 10
    assert length("mnist:3.0.9") == 3
    assert length("mnist:2.*.*") == 2


def test_a_config_is_found_or_asked_for(tmp_path):
    _digits(tmp_path, config="small")
    assert len(TfdsSource("mnist", "train", data_dir=str(tmp_path))) == 10
    _digits(tmp_path, config="large", records={"train": [fake_imagenet.example(IMAGE, 0)]})
    assert len(TfdsSource("mnist/large", "train", data_dir=str(tmp_path))) == 1
    assert len(TfdsSource("mnist/small:3.0.1", "train", data_dir=str(tmp_path))) == 10
    with pytest.raises(ValueError, match=r"holds large, small: write mnist/large\."):
        TfdsSource("mnist", "train", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenet2012:3.0.0", r"no fitting version in .*imagenet2012 .* holds 5\.1\.0\)"),
        ("imagenet2012/small", r"no fitting version in .*imagenet2012/small"),
        (
            "cifar10",
            r"data holds imagenet2012\).*\n  python -c .* tfds.builder\('cifar10', data_dir='",
        ),
    ],
)
def test_a_set_that_is_not_prepared_is_told_how(folder, name, message):
    with pytest.raises(ValueError, match=f"`data.root` must be the folder .*{message}"):
        _open(folder, name=name)


def test_imagenet_has_a_command_of_its_own(tmp_path):
    message = (
        rf"got '{tmp_path}': .* holds nothing\).*\n"
        rf"  python -m metaformer_jax.data.prepare imagenet --tars TARS --output {tmp_path}"
    )
    with pytest.raises(ValueError, match=message):
        TfdsSource("imagenet2012", "train", data_dir=str(tmp_path))


def test_the_data_dir_is_by_default_tfdss(folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder.parents[1]))
    assert len(TfdsSource("imagenet2012", "train")) == 24
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert tfds_metadata.default_data_dir() == "~/tensorflow_datasets"


@pytest.mark.parametrize("file_format", FORMATS)
def test_more_files_than_a_program_may_open_by_default_are_read(tmp_path, file_format):
    records = {"train": [fake_imagenet.example(IMAGE, 0)] * 80}
    folder = fake_imagenet.write_dataset(
        tmp_path, file_format, records=records, num_shards={"train": 80}
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 50, hard))
    try:
        assert _labels(_open(folder)) == [0] * 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_files_with_other_counts_than_the_metadata_are_refused(folder):
    info = json.loads((folder / "dataset_info.json").read_text())
    lengths = info["splits"][0]["shardLengths"]
    info["splits"][0]["shardLengths"] = [lengths[0], "7", *lengths[2:]]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"-00001-of-00004 must have the 7 records .* got 6"):
        _open(folder)


def test_a_missing_file_is_refused_at_opening(folder):
    (missing,) = folder.glob("*train*-00002-of-00004")
    missing.unlink()
    with pytest.raises(ValueError, match=rf"All 4 files .* got 3: {missing} is missing"):
        _open(folder)


@pytest.mark.parametrize("kept", [0.0, 0.6])
def test_a_cut_file_is_refused_at_opening(folder, kept):
    (cut,) = folder.glob("*train*-00002-of-00004")
    os.truncate(cut, int(cut.stat().st_size * kept))
    with pytest.raises(ValueError, match=rf"{cut} must have the 6 records .* got [0-5]\D"):
        _open(folder)


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_an_error_or_changes_nothing(folder, seed):
    rng = np.random.default_rng(seed)
    (damaged,) = folder.glob("*train*-00001-of-00004")
    content = bytearray(damaged.read_bytes())
    # ArrayRecord fills up files to 64 KiB: most of a small one means nothing.
    at = int(rng.integers(min(len(content), 12_000)))
    content[at] ^= 1 << int(rng.integers(8))
    damaged.write_bytes(content)
    seen = []
    message = ""
    try:
        source = _open(folder)
        seen.extend(source[index] for index in range(24))
    except ValueError as error:
        message = str(error)
    expected = fake_imagenet.photographs("train")
    assert [(r["image"], r["label"]) for r in seen] == [e[1:] for e in expected[: len(seen)]]
    assert len(seen) == 24 or str(damaged) in message


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\xff\xff\xff", "one 'image' and one 'label', got something else"),
        (fake_imagenet.example(IMAGE, b"3"), "one 'image' and one 'label', got something else"),
        (b"", "one 'image' and one 'label', got something else"),
        (fake_imagenet.example(IMAGE, -1), "'label' of record 1 of .* the 10 classes, got -1"),
        (fake_imagenet.example(IMAGE, 10), "'label' of record 1 of .* the 10 classes, got 10"),
    ],
)
def test_a_record_that_is_no_labelled_image_is_named(tmp_path, record, message):
    whole = fake_imagenet.example(IMAGE, 9)
    _digits(tmp_path, records={"train": [whole, record]})
    source = TfdsSource("mnist", "train", data_dir=str(tmp_path))
    assert source[0] == {"image": IMAGE, "label": 9}
    with pytest.raises(ValueError, match=message) as caught:
        source[1]
    assert source.describe(1) in str(caught.value)


CLASSES = tfds.features.ClassLabel(num_classes=10)
PICTURE = tfds.features.Image()


@pytest.mark.parametrize(
    ("features", "supervised_keys", "keys"),
    [
        ({"image": PICTURE, "label": CLASSES}, None, ("image", "label")),
        ({"picture": PICTURE, "kind": CLASSES}, ("picture", "kind"), ("picture", "kind")),
        (
            {"image": PICTURE, "label": CLASSES, "coarse_label": CLASSES},
            ("image", "label"),
            ("image", "label"),
        ),
    ],
)
def test_image_and_label_are_found_by_supervised_keys_or_by_kind(
    tmp_path, features, supervised_keys, keys
):
    folder = _digits(tmp_path, features=features, supervised_keys=supervised_keys)
    metadata = tfds_metadata.read_split(str(folder), "train")
    assert (metadata.image_key, metadata.label_key) == keys


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"text": tfds.features.Text(), "label": CLASSES}, r"got label \(ClassLabel\), text \(Tex"),
        ({"image": PICTURE, "label": tfds.features.Scalar(np.int64)}, "must be an image classif"),
        ({"image": PICTURE, "a": CLASSES, "b": CLASSES}, "must be an image classification set"),
        ({"image": tfds.features.Image(dtype=np.uint16), "label": CLASSES}, "must have 8 bits"),
        ({"image": PICTURE, "label": tfds.features.ClassLabel()}, "how many classes it has"),
    ],
)
def test_what_is_no_image_classification_is_refused(tmp_path, features, message):
    folder = _digits(tmp_path, features=features, supervised_keys=None)
    with pytest.raises(ValueError, match=message):
        _open(folder, name="mnist")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_missing_and_damaged_metadata_are_refused(folder, name):
    whole = (folder / name).read_text()
    (folder / name).write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="files that TFDS does not read"):
        _open(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"must hold dataset_info.json .* got no {name}"):
        _open(folder)


def test_a_format_that_cannot_be_read_by_position_is_refused(folder):
    _change_info(folder, fileFormat="riegeli")
    with pytest.raises(ValueError, match="must be prepared as array_record or tfrecord, got rie"):
        _open(folder)


def test_of_two_forms_in_one_folder_array_records_are_read(tmp_path):
    folder = fake_imagenet.write_dataset(tmp_path / "data", "tfrecord")
    other = fake_imagenet.write_dataset(tmp_path / "other", "array_record")
    for path in other.glob("*array_record*"):
        shutil.copy(path, folder)
    _change_info(folder, alternativeFileFormats=["array_record"])
    source = _open(folder)
    assert ".array_record-" in source.describe(0)
    assert source[23]["image"] == fake_imagenet.photographs("train")[23][1]


def _change_info(folder, **fields):
    path = pathlib.Path(folder) / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _upload(folder, root):
    files = fsspec.filesystem("memory")
    files.put(str(folder.parents[1]), root, recursive=True)
    return f"memory:/{root}"


def test_a_remote_tfrecord_set_is_read(tmp_path):
    data_dir = _upload(fake_imagenet.write_dataset(tmp_path / "x", "tfrecord"), f"/{tmp_path.name}")
    source = TfdsSource("imagenet2012", "eval", data_dir=data_dir)
    expected = [example[1:] for example in fake_imagenet.photographs("val")]
    assert [(source[index]["image"], source[index]["label"]) for index in range(9)] == expected
    assert source.describe(0).startswith(f"record 0 of {data_dir}/imagenet2012/5.1.0/imagenet2012-")
    with pytest.raises(ValueError, match=rf"got '{data_dir}': .* holds imagenet2012\)"):
        TfdsSource("mnist", "train", data_dir=data_dir)


def test_array_records_on_other_stores_than_gs_are_refused(tmp_path):
    folder = fake_imagenet.write_dataset(tmp_path / "x", "array_record")
    data_dir = _upload(folder, f"/{tmp_path.name}")
    with pytest.raises(ValueError, match="ArrayRecord files must be local or on gs://, got memory"):
        TfdsSource("imagenet2012", "train", data_dir=data_dir)


def test_a_set_without_a_held_out_split_cannot_be_evaluated_on(tmp_path):
    folder = _digits(tmp_path, records={"train": [fake_imagenet.example(IMAGE, 0)] * 3})
    assert len(_open(folder, name="mnist")) == 3
    with pytest.raises(
        ValueError, match=r"must have a split 'validation' or 'test', .*got train al"
    ):
        _open(folder, "eval", "mnist")
