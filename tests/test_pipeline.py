"""The way from stored records to batches: the same in every form, however it is shared out."""

import hashlib
import itertools

import fake_imagenet
import numpy as np
import pytest

from metaformer_jax.data import loader
from metaformer_jax.data.augment import EvalTransform, TrainTransform
from metaformer_jax.data.loader import DataError, Share, Workers
from metaformer_jax.data.randaugment import parse_policy
from metaformer_jax.data.sources import open_source

BATCH_SIZE, STEPS = 12, 20
TRANSFORM = TrainTransform(image_size=24, randaugment=parse_policy("rand-m9-mstd0.5-inc1"))


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The fake ImageNet in its three forms, by the name and the root that a config gives."""
    folder = tmp_path_factory.mktemp("imagenet")
    for file_format in ("tfrecord", "array_record"):
        fake_imagenet.write_dataset(folder / file_format, file_format)
    return {
        "folder": ("folder", fake_imagenet.write_folder(folder / "folder")),
        "tfrecord": ("imagenet2012", str(folder / "tfrecord")),
        "array_record": ("imagenet2012:5.1.0", str(folder / "array_record")),
    }


def global_batches(place, *, start_step=0, num_processes=1, workers=None):
    """A hash of each of the batches from `start_step` to the twentieth."""
    name, root = place
    parts = []
    for index in range(num_processes):
        with loader.training_batches(
            open_source(name, "train", root=root),
            TRANSFORM,
            share=Share(batch_size=BATCH_SIZE, process_index=index, num_processes=num_processes),
            seed=5,
            start_step=start_step,
            workers=workers,
        ) as batches:
            parts.append(list(itertools.islice(batches, STEPS - start_step)))
    return [
        hashlib.sha256(
            b"".join(part[key].tobytes() for key in sorted(shares[0]) for part in shares)
        ).hexdigest()
        for shares in zip(*parts, strict=True)
    ]


@pytest.fixture(scope="module")
def expected(roots):
    hashes = global_batches(roots["folder"])
    assert len(set(hashes)) == STEPS
    return hashes


@pytest.mark.parametrize("form", ["tfrecord", "array_record"])
def test_records_in_any_form_give_the_same_batches(form, roots, expected):
    assert global_batches(roots[form]) == expected


@pytest.mark.parametrize(
    ("form", "num_processes", "num_workers", "start_step"),
    [
        ("folder", 2, 0, 0),
        ("folder", 2, 0, 13),
        ("tfrecord", 1, 1, 0),
        ("array_record", 1, 2, 13),
        ("tfrecord", 2, 3, 13),
    ],
)
def test_processes_workers_and_resuming_do_not_change_them(
    form, num_processes, num_workers, start_step, roots, expected
):
    actual = global_batches(
        roots[form],
        start_step=start_step,
        num_processes=num_processes,
        workers=Workers(num_workers=num_workers, num_threads=2),
    )
    assert actual == expected[start_step:]


@pytest.mark.parametrize("form", ["folder", "tfrecord", "array_record"])
def test_every_evaluation_image_counts_once_with_its_label(form, roots):
    name, root = roots[form]
    source = open_source(name, "eval", root=root)
    with loader.evaluation_batches(
        source, EvalTransform(image_size=24), share=Share(batch_size=4), workers=Workers()
    ) as batches:
        columns = [(b["index"][b["mask"]], b["label"][b["mask"]]) for b in batches]
    index, label = (np.concatenate(column) for column in zip(*columns, strict=True))
    assert index.tolist() == list(range(9))
    assert label.tolist() == [label for *_, label in fake_imagenet.photographs("val")]


def damage(form, root):
    """Cuts the file of one image, or flips a byte inside one record; gives a part of its name."""
    if form == "folder":
        (path,) = root.glob("train/*/*_010.JPEG")
        path.write_bytes(path.read_bytes()[:100])
        return path.name
    (path,) = root.rglob("*-train.*-00001-of-00004")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x55
    path.write_bytes(bytes(content))
    return path.name


@pytest.mark.parametrize("form", ["folder", "tfrecord"])
def test_a_damaged_record_is_replaced_and_beyond_the_limit_named(form, tmp_path):
    if form == "folder":
        fake_imagenet.write_folder(tmp_path)
    else:
        fake_imagenet.write_dataset(tmp_path, form)
    name = damage(form, tmp_path)
    source = open_source(
        "folder" if form == "folder" else "imagenet2012", "train", root=str(tmp_path)
    )
    arguments = {"share": Share(batch_size=BATCH_SIZE), "seed": 0}
    with loader.training_batches(source, TRANSFORM, max_bad_fraction=0.05, **arguments) as batches:
        for _ in range(4):
            next(batches)
    ((_, reason),) = batches.bad.items()
    assert name in reason
    with (
        loader.training_batches(source, TRANSFORM, **arguments) as batches,
        pytest.raises(DataError, match=f"`config.data.max_bad_fraction`.*\n.*{name}"),
    ):
        list(itertools.islice(batches, 4))
