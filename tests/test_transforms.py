"""What happens on the host: exact where the published code gives figures, laws where it draws."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import reference
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images

from metaformer_jax.data import transforms
from metaformer_jax.data.augment import TrainTransform
from metaformer_jax.data.transforms import BadImageError, decode

FIGURES = np.load(reference.DATA / "eval_transform.npz")
PHOTO = Image.fromarray(load_sample_images().images[0]).resize((160, 107))


def encoded(image=PHOTO, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in FIGURES}))
def test_the_evaluation_transform_is_the_published_one(case):
    image = Image.fromarray(FIGURES[f"{case}/in"])
    actual = transforms.evaluation_transform(image, 224)
    np.testing.assert_array_equal(transforms.to_array(actual), FIGURES[f"{case}/out"])


def test_a_crop_fraction_enlarges_and_takes_the_middle():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1)))
    whole = transforms.resize_short_side(ramp, 64, transforms.BICUBIC)
    assert whole.size == (128, 64)
    middle = transforms.evaluation_transform(ramp, 56, crop_fraction=0.875)
    np.testing.assert_array_equal(np.asarray(middle), np.asarray(whole)[4:60, 36:92])
    assert transforms.evaluation_transform(PHOTO, 160, crop_fraction=1.0).size == (160, 160)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"quality": 35},
        {"quality": 100, "optimize": True},
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_decoded_as_pillow_decodes_them(mode, options):
    data = encoded(PHOTO.convert(mode), **options)
    for size in ((160, 107), (33, 17), (1, 1)):
        data = encoded(PHOTO.convert(mode).resize(size), **options)
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        np.testing.assert_array_equal(decode(data, channels=3), expected)
    grey = Image.open(io.BytesIO(data)).convert("L")
    np.testing.assert_array_equal(decode(data, channels=1), grey)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "I;16"])
def test_other_files_are_converted_as_pillow_converts_them(mode):
    image = PHOTO.convert("L").convert("I;16") if mode == "I;16" else PHOTO.convert(mode)
    data = encoded(image, "PNG")
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(decode(data, channels=3), expected)
    assert decode(data, channels=1).mode == "L"


def _bomb():
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"<html>not found</html>", id="text"),
        pytest.param(encoded()[:-200], id="a JPEG cut at the end"),
        pytest.param(encoded()[:300], id="a JPEG cut in its header"),
        pytest.param(encoded(PHOTO.convert("CMYK"))[:-300], id="a CMYK JPEG cut"),
        pytest.param(encoded()[:20], id="a JPEG's first bytes"),
        pytest.param(encoded(kind="PNG")[:-2000], id="a PNG cut"),
        pytest.param(encoded(kind="PNG")[:33], id="a PNG's header"),
        pytest.param(encoded(kind="WEBP")[:200], id="a WebP cut"),
        pytest.param(_bomb(), id="a decompression bomb"),
    ],
)
def test_what_is_no_whole_image_is_refused(data):
    for channels in (1, 3):
        with pytest.raises(BadImageError, match=r"\w"):
            decode(data, channels=channels)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow tells of what it skips.
def test_damaged_files_give_an_image_or_the_one_error():
    generator = rng()
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = np.frombuffer(encoded(PHOTO.resize((24, 24)), kind), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            places = generator.integers(len(whole), size=generator.integers(1, 6))
            damaged[places] = generator.integers(0, 256, len(places))
            with contextlib.suppress(BadImageError):
                assert decode(damaged.tobytes(), channels=3).mode == "RGB"


def boxes(width, height, count=4000, **kwargs):
    generator = rng()
    drawn = [transforms.crop_box(width, height, rng=generator, **kwargs) for _ in range(count)]
    left, top, right, bottom = np.array(drawn).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    return left, top, right - left, bottom - top


def test_crops_have_uniform_areas_log_uniform_shapes_and_any_place():
    # Small enough that every first try fits: the laws are not bent by what is drawn again.
    left, top, width, height = boxes(1000, 1000, scale=(0.1, 0.4))
    area = width * height / 1e6
    assert stats.kstest(area, stats.uniform(0.1, 0.3).cdf).pvalue > 1e-3
    shape = np.log(width / height)
    assert stats.kstest(shape, stats.uniform(np.log(3 / 4), np.log(16 / 9)).cdf).pvalue > 1e-3
    for start, length in ((left, width), (top, height)):
        place = start / (1000 - length)
        assert stats.kstest(place, stats.uniform().cdf).pvalue > 1e-3
    assert abs(np.corrcoef(area, shape)[0, 1]) < 0.06


def published_box(width, height, generator):
    """The rule of torchvision's `RandomResizedCrop`, written down once more."""
    for _ in range(10):
        area = height * width * generator.uniform(0.08, 1.0)
        shape = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * shape)), round(np.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return w, h
    return None


def test_tries_that_do_not_fit_are_drawn_again_as_published():
    _, _, width, height = boxes(500, 333)
    generator = rng(1)
    expected = [published_box(500, 333, generator) for _ in range(4000)]
    expected_width, expected_height = np.array([box for box in expected if box]).T
    assert stats.ks_2samp(width, expected_width).pvalue > 1e-3
    assert stats.ks_2samp(height, expected_height).pvalue > 1e-3


@pytest.mark.parametrize(
    ("size", "expected"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506))]
)
def test_what_never_fits_is_the_middle_of_an_allowed_shape(size, expected):
    assert transforms.crop_box(*size, rng=rng(), scale=(0.9, 1.0)) == expected
    assert transforms.crop_box(1, 1, rng=rng(), scale=(1.0, 1.0)) == (0, 0, 1, 1)


@pytest.mark.parametrize("data", [encoded(), encoded(PHOTO.convert("CMYK")), encoded(kind="PNG")])
def test_a_crop_is_cut_out_and_then_resized_by_one_of_the_filters(data):
    transform = TrainTransform(image_size=32, flip_probability=0.0)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    used = []
    for seed in range(400):
        actual = transform(data, rng(seed))
        part = whole.crop(transforms.crop_box(*whole.size, rng=rng(seed)))
        matches = [
            np.array_equal(actual, part.resize((32, 32), filter))
            for filter in (transforms.BILINEAR, transforms.BICUBIC)
        ]
        assert sum(matches) == 1
        used.append(matches[1])
    assert np.mean(used) == pytest.approx(0.5, abs=0.1)


def test_without_a_crop_the_whole_image_becomes_a_square():
    pixels = rng().integers(0, 256, (9, 12), np.uint8)
    settings = {"crop": "none", "interpolations": ("bicubic",), "flip_probability": 0.0}
    transform = TrainTransform(image_size=20, channels=1, **settings)
    squeezed = transform(encoded(Image.fromarray(pixels), "PNG"), rng())
    assert squeezed.shape == (20, 20, 1)
    expected = Image.fromarray(pixels).resize((20, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(squeezed[..., 0], expected)


def test_a_recipe_of_ones_own_takes_each_part():
    settings = {"crop": "simple", "three_augment": True, "color_jitter": 0.3, "max_shift": 2}
    transform = TrainTransform(image_size=32, **settings)
    first, again, other = (transform(encoded(), rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (32, 32, 3)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_half_of_the_images_are_mirrored():
    mirrored = np.asarray(PHOTO)[:, ::-1]
    generator = rng()
    results = [np.asarray(transforms.random_flip(PHOTO, rng=generator)) for _ in range(400)]
    flipped = [np.array_equal(result, mirrored) for result in results]
    assert all(
        np.array_equal(r, mirrored if f else PHOTO) for r, f in zip(results, flipped, strict=True)
    )
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.1)


def test_shifts_reach_every_offset_alike_and_bring_in_black():
    pixels = np.zeros((9, 9), np.uint8)
    pixels[4, 4] = 255
    image, generator = Image.fromarray(pixels), rng()
    shifts = (transforms.random_shift(image, 2, rng=generator) for _ in range(2500))
    counts = sum(np.asarray(shifted) // 255 for shifted in shifts)
    inside = counts[2:7, 2:7]
    assert counts.sum() == inside.sum() == 2500
    # 25 offsets, 100 times each but for chance: five standard deviations.
    assert np.abs(inside - 100.0).max() < 50


def test_a_shift_moves_all_pixels_together():
    image = rng().integers(1, 256, (6, 7, 3), np.uint8)
    shifted = np.asarray(transforms.random_shift(Image.fromarray(image), 3, rng=rng(1)))
    rows, columns = np.nonzero(shifted[..., 0])
    kept = shifted[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width, _ = kept.shape
    top, left = (0 if rows.min() else 6 - height), (0 if columns.min() else 7 - width)
    np.testing.assert_array_equal(kept, image[top : top + height, left : left + width])


def test_a_simple_crop_is_a_part_of_the_resized_image_with_a_mirrored_border():
    whole = np.asarray(transforms.resize_short_side(PHOTO, 48, transforms.BICUBIC))
    padded = np.pad(whole, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (48, 48), (0, 1))
    places = set()
    for seed in range(40):
        crop = np.asarray(transforms.simple_random_crop(PHOTO, 48, rng=rng(seed)))
        (match,) = np.argwhere((windows[:, :, 0, :, :] == crop[..., 0]).all((2, 3)))
        np.testing.assert_array_equal(
            padded[match[0] : match[0] + 48, match[1] : match[1] + 48], crop
        )
        places.add(tuple(match))
    assert len(places) > 20


def test_jitter_of_no_width_changes_nothing_and_each_part_does_what_it_says():
    nothing = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    assert transforms.color_jitter(PHOTO, rng=rng(), **nothing) == PHOTO
    pixels = np.asarray(PHOTO, float)
    factors = []
    for seed in range(200):
        bright = transforms.color_jitter(PHOTO, rng=rng(seed), **{**nothing, "brightness": 0.4})
        factors.append(np.mean(np.asarray(bright)) / pixels.mean())
    # Pillow cuts fractions off.
    assert 0.595 < min(factors) < 0.65
    assert 1.2 < max(factors) <= 1.4
    flat = Image.new("RGB", (8, 8), (90, 40, 10))
    contrast = transforms.color_jitter(flat, rng=rng(), **{**nothing, "contrast": 0.4})
    assert all(low == high for low, high in contrast.getextrema())
    turned = transforms.color_jitter(PHOTO, rng=rng(), **{**nothing, "hue": 0.5}).convert("HSV")
    np.testing.assert_allclose(
        np.asarray(turned)[..., 2], np.asarray(PHOTO.convert("HSV"))[..., 2], atol=3
    )
    grey = PHOTO.convert("L")
    saturated = transforms.color_jitter(
        grey, rng=rng(), **{**nothing, "saturation": 0.4, "hue": 0.1}
    )
    assert saturated == grey


def test_three_augment_takes_each_of_its_three_as_often():
    pixels, grey = np.asarray(PHOTO), np.asarray(PHOTO.convert("L").convert("RGB"))
    solarised = np.where(pixels < 128, pixels, 255 - pixels)
    kinds = []
    generator = rng()
    for _ in range(300):
        result = np.asarray(transforms.three_augment(PHOTO, rng=generator))
        kinds.append([(result == other).all() for other in (grey, solarised)])
        if not any(kinds[-1]):
            assert result.std() < pixels.std()
    counts = np.sum(kinds, axis=0)
    np.testing.assert_allclose([*counts, 300 - counts.sum()], 100, atol=40)
