import concurrent.futures
import io
import multiprocessing
import pickle
import subprocess
import sys

import fake_imagenet
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from metaformer_jax.data.sources import Digits, open_source

FORMS = {"folder": "folder", "tfrecord": "imagenet2012", "array_record": "imagenet2012"}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The folder of each form of the fake ImageNet."""
    folder = tmp_path_factory.mktemp("imagenet")
    fake_imagenet.write_folder(folder / "folder")
    for file_format in ("tfrecord", "array_record"):
        fake_imagenet.write_dataset(folder / file_format, file_format)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAFORMER_JAX_CACHE", str(folder / "cache"))
        yield {form: str(folder / form) for form in FORMS}


def _labels(source):
    return np.array([source[index]["label"] for index in range(len(source))])


def _pixels(record):
    image = Image.open(io.BytesIO(record["image"]))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))
    return np.asarray(image)


def test_the_embedded_digits_are_scikit_learns():
    published = load_digits()
    expected = sorted(
        (int(label), image.tobytes())
        for image, label in zip(
            np.rint(published.images * (255 / 16)).astype(np.uint8), published.target, strict=True
        )
    )
    records = [
        source[index]
        for source in (Digits("train"), Digits("test"))
        for index in range(len(source))
    ]
    actual = sorted((record["label"], _pixels(record).tobytes()) for record in records)
    assert actual == expected
    assert len(actual) == 1797


def test_a_fifth_of_every_class_is_held_out():
    train, test = np.bincount(_labels(Digits("train"))), np.bincount(_labels(Digits("test")))
    np.testing.assert_array_equal(test, (train + test) // 5)


def test_digits_say_what_they_are():
    source = open_source("digits", "eval")
    assert len(source) == 355
    assert source.channels == 1
    assert source.class_names == tuple("0123456789")
    assert source.describe(7) == "example 7 of the digits' test split"
    assert pickle.loads(pickle.dumps(source))[7] == source[7]


def test_unknown_splits_of_the_digits_are_refused():
    with pytest.raises(ValueError, match="`split` must be 'train' or 'test', got 'dev'"):
        Digits("dev")


def test_a_folder_needs_a_root():
    with pytest.raises(ValueError, match=r"`data.root` must be the folder .* got None"):
        open_source("folder", "train")


@pytest.mark.parametrize("name", ["imagenet 2012", "a/b/c", "mnist:latest", ""])
def test_what_no_data_set_can_be_called_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"`data.name` must be 'digits', 'folder' or the name"):
        open_source(name, "train", root=str(tmp_path))


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_bytes_and_labels_at_the_same_index(roots, form, split):
    source = open_source(FORMS[form], split, root=roots[form])
    expected = fake_imagenet.photographs("val" if split == "eval" else split)
    assert [source[index] for index in range(len(source))] == [
        {"image": image, "label": label} for _, image, label in expected
    ]
    assert all(type(source[index]["label"]) is int for index in range(len(source)))
    assert source.class_names == fake_imagenet.CLASSES
    assert source.channels == 3


def test_a_record_is_described_by_its_place(roots):
    def described(form, index):
        return open_source(FORMS[form], "train", root=roots[form]).describe(index)

    folder = f"{roots['tfrecord']}/imagenet2012/5.1.0"
    file = "imagenet2012-train.tfrecord-00001-of-00004"
    assert described("folder", 9) == f"{roots['folder']}/train/n01443537/n01443537_009.JPEG"
    assert described("tfrecord", 9) == f"record 3 of {folder}/{file}"
    assert described("array_record", 9) == (
        f"record 3 of {folder}/{file}".replace("tfrecord", "array_record")
    )


@pytest.mark.parametrize("form", ["digits", *FORMS])
def test_an_index_beyond_the_records_is_refused(roots, form):
    source = open_source(FORMS.get(form, form), "train", root=roots.get(form))
    for index in (-1, len(source)):
        message = rf"`index` must be in \[0, {len(source)}\), got {index}"
        with pytest.raises(IndexError, match=message):
            source[index]
        with pytest.raises(IndexError, match=message):
            source.describe(index)


@pytest.mark.parametrize("form", FORMS)
def test_a_source_travels_to_another_process_after_it_was_read(roots, form):
    source = open_source(FORMS[form], "train", root=roots[form])
    before = [source[index] for index in range(len(source))]
    again = pickle.loads(pickle.dumps(source))
    assert [again[index] for index in range(len(again))] == before
    assert [again.describe(index) for index in (0, 23)] == [
        source.describe(index) for index in (0, 23)
    ]


def test_spawned_processes_read_every_form(roots):
    sources = [open_source(FORMS[form], "train", root=roots[form]) for form in FORMS]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        for source in sources:
            assert pool.submit(source.__getitem__, 11).result() == source[11]


@pytest.mark.parametrize("form", FORMS)
def test_threads_share_a_source(roots, form):
    source = open_source(FORMS[form], "train", root=roots[form])
    expected = [source[index] for index in range(len(source))]
    fresh = open_source(FORMS[form], "train", root=roots[form])
    order = np.random.default_rng(0).permutation(np.arange(24).repeat(20)).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        records = list(pool.map(fresh.__getitem__, order))
    assert records == [expected[index] for index in order]


def _modules_after(code):
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_digits_and_folders_load_without_tfds(roots):
    modules = _modules_after(
        "from metaformer_jax.data.sources import open_source\n"
        "open_source('digits', 'train')[0]\n"
        f"open_source('folder', 'train', root={roots['folder']!r})[0]"
    )
    assert not modules & {"tensorflow_datasets", "tensorflow", "array_record", "fsspec"}


def test_tfds_forms_load_without_tensorflow(roots):
    modules = _modules_after(
        "from metaformer_jax.data.sources import open_source\n"
        f"for root in {[roots['tfrecord'], roots['array_record']]!r}:\n"
        "    open_source('imagenet2012', 'eval', root=root)[0]"
    )
    assert "tensorflow_datasets" in modules
    assert "tensorflow" not in modules
