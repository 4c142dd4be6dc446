"""Images per second from JPEG files to batches, beside timm's transforms under torch's DataLoader.

    PYTHONPATH=.:tests python benchmarks/input_pipeline.py [--num-workers 2] [--rounds 5]

Both read the same files (made here: see `write_photos`), do the same transforms and give batches
of uint8 images; they take turns, and the median of the rounds counts. timm and torch are needed
for the comparison (`--alone` leaves them out). Then the time of reading one record in each form,
and of the first batch.
"""

import argparse
import contextlib
import functools
import io
import itertools
import os
import pathlib
import statistics
import tempfile
import time

import fake_imagenet
import numpy as np
from PIL import Image, ImageOps

from metaformer_jax.data import loader
from metaformer_jax.data.augment import TrainTransform
from metaformer_jax.data.folder import ImageFolder
from metaformer_jax.data.randaugment import parse_policy
from metaformer_jax.data.sources import open_source

POLICY = "rand-m9-mstd0.5-inc1"
BATCH_SIZE = 64
# What stands ready when a loader's turn begins does not count: it was made in the other's.
SKIPPED, COUNTED = 8, 30
# Each photo has so many names: drawing the order costs more per image in a small set than in
# ImageNet.
NAMES = 16


def write_photos(root, count):
    """A folder of photographs: parts of two real ones with the noise of a camera.

    About 500x375 pixels as in ImageNet. Seven in sixty are unusual: CMYK, grey, progressive,
    rotated by EXIF, tiny, or a PNG named JPEG.
    """
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for index in range(count):
        width, height = (int(side * rng.uniform(0.85, 1.15)) for side in (500, 375))
        left, top = rng.uniform(0, 0.4, 2)
        photo = photos[index % 2]
        part = rng.uniform(0.5, 0.6)
        box = (
            int(left * photo.width),
            int(top * photo.height),
            int((left + part) * photo.width),
            int((top + part) * photo.height),
        )
        image = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
        noise = rng.normal(0, 6, (height, width, 3))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
        folder = root / ("train" if index >= count // 8 else "val") / f"n{index % 4:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{index:05d}.JPEG"
        _save(image, path, index % 60)
        for name in range(1, NAMES):
            path.with_name(f"{index:05d}_{name:02d}.JPEG").hardlink_to(path)


def _save(image, path, kind):
    options = {"format": "JPEG", "quality": 90}
    if kind == 0:
        image = image.convert("CMYK")
    elif kind in (10, 11):
        image = image.convert("L")
    elif kind == 20:
        options["progressive"] = True
    elif kind == 30:
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    elif kind == 40:
        image = image.resize((48, 36))
    elif kind == 50:
        options = {"format": "PNG"}
    image.save(path, **options)


def ours(root, transform, num_workers, *, start_step=0):
    return loader.training_batches(
        ImageFolder(root, "train"),
        transform,
        share=loader.Share(batch_size=BATCH_SIZE),
        seed=0,
        start_step=start_step,
        workers=loader.Workers(num_workers=num_workers, num_threads=0 if num_workers else 2),
    )


def timms(root, policy, num_workers):
    import torch
    from timm.data import create_dataset, create_transform
    from timm.data.loader import fast_collate

    dataset = create_dataset("", root=str(root), split="train", is_training=True)
    dataset.transform = timm_transform(create_transform, policy)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**6)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=BATCH_SIZE,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=fast_collate,
        drop_last=True,
    )


def timm_transform(create_transform, policy):
    return create_transform(
        224,
        is_training=True,
        use_prefetcher=True,
        auto_augment=policy,
        interpolation="random",
        color_jitter=None,
    )


def import_timm():
    """timm takes torchvision, of which it needs nothing compiled."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm
    from timm.data import auto_augment

    # timm's own fails where its recipe asks for 0 bits, since Pillow refuses them.
    def posterize(image, bits, **kwargs):
        return ImageOps.posterize(image, bits) if bits else image.point([0] * 256 * 3)

    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    return timm.__version__, torch.__version__, library


def images_per_second(iterator, batches):
    start = time.perf_counter()
    for _ in itertools.islice(iterator, batches):
        pass
    return batches * BATCH_SIZE / (time.perf_counter() - start)


def seconds_to_first(make):
    start = time.perf_counter()
    batches = make()
    next(iter(batches))
    elapsed = time.perf_counter() - start
    if hasattr(batches, "close"):
        batches.close()
    return elapsed


def single_core(root, transform, timm_transform, rounds):
    """Images per second of decoding and transforming alone, in one thread."""
    data = [path.read_bytes() for path in sorted(root.glob("train/*/?????.JPEG"))][:200]
    rng = np.random.default_rng(0)
    speeds = {"ours": [], "timm": []}
    for _ in range(rounds):
        start = time.perf_counter()
        for record in data:
            transform(record, rng)
        speeds["ours"].append(len(data) / (time.perf_counter() - start))
        if timm_transform is not None:
            start = time.perf_counter()
            for record in data:
                timm_transform(Image.open(io.BytesIO(record)).convert("RGB"))
            speeds["timm"].append(len(data) / (time.perf_counter() - start))
    return speeds


def loaders(root, transform, policy, num_workers, rounds, alone):
    """Images per second of whole loaders, which take turns."""
    speeds = {"ours": [], "timm": []}
    iterators = {"ours": ours(root, transform, num_workers)}
    if not alone:
        iterators["timm"] = iter(timms(root, policy, num_workers))
    for _ in range(rounds):
        for name, iterator in iterators.items():
            images_per_second(iterator, SKIPPED)
            speeds[name].append(images_per_second(iterator, COUNTED))
    iterators["ours"].close()
    # Its workers end with it, before the files go.
    iterators.pop("timm", None)
    return speeds


def microseconds_per_record(root, records_root, rounds):
    """Reading one record of a photo's size at random, by the form that it is stored in."""
    photos = [path.read_bytes() for path in sorted(root.glob("train/*/?????.JPEG"))]
    examples = [
        fake_imagenet.example(photo, index % 3)
        for index, photo in enumerate(itertools.islice(itertools.cycle(photos), 2000))
    ]
    sources = {"folder": ImageFolder(root, "train")}
    for form in ("tfrecord", "array_record"):
        fake_imagenet.write_dataset(
            records_root / form, form, records={"train": examples}, num_shards={"train": 4}
        )
        sources[form] = open_source("imagenet2012", "train", root=str(records_root / form))
    order = np.random.default_rng(0).permutation(2000).tolist()
    times = {form: [] for form in sources}
    for _ in range(rounds):
        for form, source in sources.items():
            start = time.perf_counter()
            for index in order:
                source[index]
            times[form].append((time.perf_counter() - start) / len(order) * 1e6)
    return {form: statistics.median(values) for form, values in times.items()}


@contextlib.contextmanager
def without_index_left():
    """The index of TFRecord files goes into a folder that goes."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["METAFORMER_JAX_CACHE"] = cache
        yield
        del os.environ["METAFORMER_JAX_CACHE"]


def report(what, speeds):
    medians = {name: statistics.median(values) for name, values in speeds.items() if values}
    cells = [f"{name} {median:7.1f}" for name, median in medians.items()]
    if len(medians) == 2:
        cells.append(f"{medians['ours'] / medians['timm']:.2f}x")
    print(f"{what:<46} {'   '.join(cells)}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="without timm and torch")
    args = parser.parse_args()
    if not args.alone:
        timm_version, torch_version, _library = import_timm()
        from timm.data import create_transform

        print(f"timm {timm_version}, torch {torch_version}, Pillow {Image.__version__}")
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        write_photos(root, args.images)
        sizes = [path.stat().st_size for path in root.glob("*/*/*")]
        size = statistics.mean(sizes) / 1000
        print(f"{args.images} photos of {size:.0f} kB under {len(sizes)} names; images per second:")
        for policy in (POLICY, None):
            transform = TrainTransform(
                image_size=224, randaugment=parse_policy(policy) if policy else None
            )
            what = "with RandAugment" if policy else "without RandAugment"
            theirs = None if args.alone else timm_transform(create_transform, policy)
            report(f"one thread, {what}", single_core(root, transform, theirs, args.rounds))
            speeds = loaders(root, transform, policy, args.num_workers, args.rounds, args.alone)
            report(f"{args.num_workers} workers, {what}", speeds)
        with tempfile.TemporaryDirectory() as records, without_index_left():
            times = microseconds_per_record(root, pathlib.Path(records), args.rounds)
        for form, microseconds in times.items():
            print(f"one record, {form}: {microseconds:.0f} us")
        for num_workers in (0, args.num_workers):
            for start_step in (0, 1_000_000):
                make = functools.partial(ours, root, transform, num_workers, start_step=start_step)
                seconds = statistics.median(seconds_to_first(make) for _ in range(args.rounds))
                print(f"first batch at step {start_step:,}, {num_workers} workers: {seconds:.2f} s")


if __name__ == "__main__":
    main()
