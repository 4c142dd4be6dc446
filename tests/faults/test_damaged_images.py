"""Damaged and hostile image files give an image or the one error, at no great cost."""

import collections
import io
import json
import os
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from mutations import FACTOR, attempt, mutations
from PIL import Image

from metaformer_jax.data.augment import EvalTransform, TrainTransform
from metaformer_jax.data.sources import BadRecordError
from metaformer_jax.data.transforms import BadImageError, decode

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
# For the readers of 6 formats; more than a damaged header of a small image can claim.
_MAX_BYTES = 4 << 30


def encoded(kind, **options):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    file = io.BytesIO()
    small.resize((40, 32), Image.Resampling.BICUBIC).save(file, kind, **options)
    return file.getvalue()


def decode_damaged(seed, number):
    """How many inputs of each format end how, in a process that a crash may end."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    train, evaluation = TrainTransform(image_size=16), EvalTransform(image_size=16)
    endings = collections.Counter()
    for kind in FORMATS:
        for index, damaged in enumerate(mutations(encoded(kind), number, seed=seed)):
            rng = np.random.default_rng(index)
            image, error = attempt(lambda data=damaged: decode(data, channels=1), BadImageError)
            assert error or image.mode == "L"
            for transform in (lambda data, rng=rng: train(data, rng), evaluation):
                pixels, error = attempt(
                    lambda data=damaged, transform=transform: transform(data), BadRecordError
                )
                assert error or (pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8)
            endings[f"{kind} {'refused' if error else 'image'}"] += 1
    print(json.dumps(endings))


def test_damaged_images_are_decoded_or_refused():
    for seed in range(FACTOR):
        ended = subprocess.run(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                f"import test_damaged_images as test\ntest.decode_damaged({seed}, 150)",
            ],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "FUZZ_FACTOR": "1"},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        endings = json.loads(ended.stdout)
        assert all(endings[f"{kind} refused"] > 10 for kind in FORMATS), endings


def png_of(width, height):
    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def patched(kind, places, side):
    """A small image whose header claims this many pixels on each side."""
    data = bytearray(encoded(kind))
    for place, form in places:
        at = place if isinstance(place, int) else data.index(place[0]) + place[1]
        struct.pack_into(form, data, at, side)
    return bytes(data)


SOF = b"\xff\xc0\0\x11\x08"
BOMBS = {
    "PNG": png_of(60_000, 60_000),
    "PNG of 2^31": png_of(2**31 - 1, 2**31 - 1),
    "JPEG": patched("JPEG", [((SOF, 5), ">H"), ((SOF, 7), ">H")], 65_500),
    "GIF": patched("GIF", [(6, "<H"), (8, "<H")], 65_535),
    "BMP": patched("BMP", [(18, "<i"), (22, "<i")], 60_000),
    "TIFF": patched(
        "TIFF", [((b"\0\1\4\0\1\0\0\0", 8), "<I"), ((b"\1\1\4\0\1\0\0\0", 8), "<I")], 60_000
    ),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BOMBS)
def test_an_image_that_claims_a_vast_size_is_refused_by_its_header(kind):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for channels in (1, 3):
        with pytest.raises(BadImageError, match=r"\w"):
            decode(BOMBS[kind], channels=channels)
    # In KiB; an image of that size would take gigabytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_an_image_as_narrow_as_a_hair_is_refused_before_it_is_resized():
    file = io.BytesIO()
    Image.new("RGB", (1, 30_000)).save(file, "PNG")
    with pytest.raises(
        BadImageError, match="1x30000 pixels are too long and thin to resize to 224 on "
    ):
        EvalTransform(image_size=224)(file.getvalue())
    narrow = TrainTransform(image_size=16)(file.getvalue(), np.random.default_rng(0))
    assert narrow.shape == (16, 16, 3)


def test_an_image_that_another_program_would_read_starts_none(monkeypatch):
    from PIL import EpsImagePlugin

    def start(*args, **kwargs):
        raise AssertionError("Ghostscript was asked for")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", start)
    data = encoded("EPS")
    with pytest.raises(BadImageError, match="no image"):
        decode(data, channels=3)
