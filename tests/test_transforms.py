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
from metaformer_jax.data.augment import EvalTransform, TrainTransform
from metaformer_jax.data.randaugment import RandAugmentPolicy
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


@pytest.mark.parametrize("data", [encoded(), encoded(PHOTO.convert("CMYK")), encoded(kind="PNG")])
def test_any_part_of_an_image_can_be_cut_out(data):
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    height, width, _ = whole.shape
    for left, right in ((0, width), (0, 1), (width - 1, width), (7, 32)):
        for top, bottom in ((0, height), (0, 1), (height - 1, height), (5, 90)):
            part = decode(data, channels=3, crop=lambda *_, box=(left, top, right, bottom): box)
            np.testing.assert_array_equal(part, whole[top:bottom, left:right])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
def test_other_files_are_converted_as_pillow_converts_them(mode):
    data = encoded(PHOTO.convert(mode), "PNG")
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(decode(data, channels=3), expected)
    assert decode(data, channels=1).mode == "L"


def test_of_16_bits_the_upper_8_are_taken():
    grey = np.asarray(PHOTO.convert("L"))
    data = encoded(Image.fromarray(grey.astype(np.uint16) * 256 + 77), "PNG")
    for channels in (1, 3):
        decoded = np.asarray(decode(data, channels=channels))
        np.testing.assert_array_equal(decoded.reshape(*grey.shape, -1).min(-1), grey)
        np.testing.assert_array_equal(decoded.reshape(*grey.shape, -1).max(-1), grey)


@pytest.mark.parametrize(("largest", "ascii"), [(65535, False), (4095, False), (65535, True)])
def test_of_16_bits_in_a_pgm_file_the_upper_8_are_taken(largest, ascii):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    # 257 times as much is the same part of the whole.
    numbers = grey * 257 if largest == 65535 else np.round(grey / 255 * largest).astype(np.uint16)
    text = f"{'P2' if ascii else 'P5'} 16 16 {largest}\n".encode()
    pixels = " ".join(map(str, numbers.flat)).encode() if ascii else numbers.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(text + pixels, channels=1), grey)


def test_a_jpeg_of_unusual_subsampling_is_left_to_pillow():
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (120, 130, 140)).save(file, "JPEG", subsampling="4:2:0")
    data = bytearray(file.getvalue())
    # 4:4:1 has as many blocks of brightness, one above the other, as 4:2:0 has in a square; in one
    # colour they are all alike.
    sampling = data.index(b"\xff\xc0") + 11
    assert data[sampling] == 0x22
    data[sampling] = 0x14
    decoded = decode(bytes(data), channels=3)
    np.testing.assert_array_equal(decoded, Image.open(io.BytesIO(data)).convert("RGB"))


def _bomb():
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


def _with_an_empty_chunk():
    whole, end = encoded(kind="PNG"), 12
    chunk = struct.pack(">I", 0) + b"iCCP" + struct.pack(">I", zlib.crc32(b"iCCP"))
    return whole[:-end] + chunk + whole[-end:]


def _damaged_spider(place, number):
    whole = bytearray(encoded(PHOTO.convert("F"), "SPIDER"))
    struct.pack_into("f", whole, place, number)
    return bytes(whole)


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
        pytest.param(_with_an_empty_chunk(), id="a PNG whose profile is empty"),
        pytest.param(encoded(kind="WEBP")[:200], id="a WebP cut"),
        pytest.param(_bomb(), id="a decompression bomb"),
        pytest.param(encoded(PHOTO.convert("F"), "TIFF"), id="numbers of unknown range"),
        pytest.param(encoded(PHOTO.convert("I"), "TIFF"), id="whole numbers of unknown range"),
        pytest.param(_damaged_spider(92, np.inf), id="a Spider file of endless images"),
        pytest.param(_damaged_spider(104, 1), id="a Spider file in a stack that is not there"),
    ],
)
def test_what_is_no_whole_image_is_refused(data):
    for channels in (1, 3):
        with pytest.raises(BadImageError, match=r"\w"):
            decode(data, channels=channels)


def test_what_is_wrong_with_an_image_is_told_with_the_type_of_the_error():
    for place, number, name in ((92, np.inf, "OverflowError"), (104, 1, "AttributeError")):
        with pytest.raises(BadImageError, match=f"^{name}: "):
            decode(_damaged_spider(place, number), channels=3)
    with pytest.raises(BadImageError, match=r"^5 bytes that are no image$"):
        decode(b"hello", channels=3)


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
@pytest.mark.parametrize("limits", [{}, {"scale": (0.2, 0.3), "ratio": (1.5, 2.0)}])
def test_a_crop_is_cut_out_and_then_resized_by_one_of_the_filters(data, limits):
    settings = {f"crop_{name}": value for name, value in limits.items()}
    transform = TrainTransform(image_size=32, flip_probability=0.0, **settings)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    used = []
    for seed in range(400):
        actual = transform(data, rng(seed))
        part = whole.crop(transforms.crop_box(*whole.size, rng=rng(seed), **limits))
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
    nothing = dict.fromkeys(("brightness", "contrast", "saturation"), 0.0)
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
    grey = PHOTO.convert("L")
    assert transforms.color_jitter(grey, rng=rng(), **{**nothing, "saturation": 0.4}) == grey


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


@pytest.mark.filterwarnings("ignore")  # Pillow tells of what it skips.
def test_any_damage_to_a_header_gives_an_image_or_the_one_error():
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "DDS", "AVIF"):
        whole = encoded(PHOTO.resize((24, 24)), kind)
        for place in range(100):
            for value in (0, 5, whole[place] ^ 1, whole[place] ^ 128):
                damaged = whole[:place] + bytes([value]) + whole[place + 1 :]
                with contextlib.suppress(BadImageError):
                    assert decode(damaged, channels=3).mode == "RGB"


def test_shapes_are_widths_over_heights():
    _, _, width, height = boxes(1000, 1000, count=200, scale=(0.1, 0.2), ratio=(2.0, 3.0))
    assert (width > 1.9 * height).all()


def test_crops_lie_in_every_place_alike_and_are_never_empty():
    left, top, width, height = boxes(4, 4, count=2700, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    assert (width == 2).all()
    assert (height == 2).all()
    # Nine places, 300 times each but for chance: five standard deviations.
    assert np.abs(np.bincount(3 * top + left, minlength=9) - 300.0).max() < 85
    # Most areas drawn round to no pixel.
    _, _, width, height = boxes(1, 1, scale=(0.01, 0.3))
    assert (width * height == 1).all()


@pytest.mark.parametrize("ratio", [(1e3, 1e6), (1e-6, 1e-3)])
def test_a_crop_of_a_shape_that_no_part_has_is_one_pixel_wide(ratio):
    left, top, right, bottom = transforms.crop_box(24, 32, rng=rng(), ratio=ratio)
    assert min(right - left, bottom - top) == 1


def test_a_simple_crop_reaches_every_place_alike():
    pixels = np.zeros((20, 20), np.uint8)
    pixels[10, 10] = 255
    image, generator = Image.fromarray(pixels), rng()
    crops = (transforms.simple_random_crop(image, 20, rng=generator) for _ in range(8100))
    counts = sum(np.asarray(crop, int) // 255 for crop in crops)
    # Up to four pixels to each side, 100 times each place but for chance: five deviations.
    assert counts[6:15, 6:15].sum() == 8100
    assert np.abs(counts[6:15, 6:15] - 100).max() < 50


@pytest.mark.parametrize(
    ("width", "fraction", "expected"), [(224, 0.9, 248), (224, 0.95, 235), (50, 0.875, 57)]
)
def test_the_size_before_the_middle_is_taken_has_its_fraction_cut_off(width, fraction, expected):
    whole = transforms.resize_short_side(PHOTO, expected, transforms.BICUBIC)
    left, top = (round((side - width) / 2) for side in whole.size)
    actual = transforms.evaluation_transform(PHOTO, width, crop_fraction=fraction)
    np.testing.assert_array_equal(actual, whole.crop((left, top, left + width, top + width)))


@pytest.mark.parametrize(("width", "left"), [(224, 0), (225, 0), (226, 1), (227, 2), (229, 2)])
def test_the_middle_begins_at_the_even_one_of_two_halves(width, left):
    ramp = Image.fromarray(np.tile(np.arange(width, dtype=np.uint8), (224, 1)))
    assert np.asarray(transforms.evaluation_transform(ramp, 224))[0, 0] == left


class Greatest(np.random.Generator):
    """Draws the greatest factors: what is left to chance is the order."""

    def uniform(self, low, high):
        return high


def test_jitter_takes_its_changes_in_any_order():
    results = []
    for seed in range(100):
        generator = Greatest(np.random.PCG64(seed))
        jittered = transforms.color_jitter(
            PHOTO, rng=generator, brightness=0.4, contrast=0.4, saturation=0.0
        )
        results.append(jittered.tobytes())
    assert len(set(results)) == 2
    assert results.count(results[0]) == pytest.approx(50, abs=25)


def test_contrast_spreads_grey_values_and_never_inverts_them():
    grey = PHOTO.convert("L").convert("RGB")
    pixels = np.asarray(grey, float)
    for width, least, greatest in ((0.4, 0.6, 1.4), (3.0, 0.0, 4.0)):
        spreads = []
        for seed in range(100):
            spread = np.asarray(
                transforms.color_jitter(
                    grey, rng=rng(seed), brightness=0.0, contrast=width, saturation=0.0
                ),
                float,
            )
            spreads.append(spread.std() / pixels.std())
            assert ((spread - spread.mean()) * (pixels - pixels.mean())).mean() >= 0
        assert least - 0.01 < min(spreads) < least + 0.1
        assert max(spreads) < greatest
    assert max(spreads) > 1.5


def plain(**changes):
    """The whole image resized, and what is asked for."""
    settings = {"crop": "none", "interpolations": ("bicubic",), "flip_probability": 0.0}
    return TrainTransform(**{"image_size": 16, **settings, **changes})


def several(transform, image, count=200):
    data = encoded(image, "PNG")
    return np.stack([transform(data, rng(seed)) for seed in range(count)]).astype(float)


WHITE = Image.new("RGB", (16, 16), "white")


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0, None])
def test_a_recipe_mirrors_with_its_probability_or_half_of_the_time(probability):
    ramp = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8), (16, 1))).convert("RGB")
    settings = {} if probability is None else {"flip_probability": probability}
    transform = TrainTransform(image_size=16, crop="none", **settings)
    mirrored = several(transform, ramp)[:, 0, 0, 0] == 15
    expected = settings.get("flip_probability", 0.5)
    assert mirrored.mean() == pytest.approx(expected, abs=0.1 if 0 < expected < 1 else 0)


def test_a_recipe_takes_the_simple_crop_where_it_is_asked_for():
    for seed in range(5):
        expected = transforms.simple_random_crop(PHOTO, 16, rng=rng(seed))
        actual = plain(crop="simple")(encoded(kind="PNG"), rng(seed))
        np.testing.assert_array_equal(actual, expected)


def test_the_filter_of_a_simple_crop_is_drawn_for_each_image():
    names = ("nearest", "bilinear", "bicubic", "lanczos")
    # Of one square no part is drawn but along the border: the filter shows in the middle.
    data, square = encoded(PHOTO.resize((40, 40)), "PNG"), PHOTO.resize((40, 40))
    resized = [square.resize((16, 16), Image.Resampling[name.upper()]) for name in names]
    used = []
    for seed in range(200):
        crop = plain(crop="simple", interpolations=names)(data, rng(seed))
        used.append([_is_part_of(crop[4:12, 4:12], np.asarray(whole)) for whole in resized])
    assert (np.sum(used, 1) == 1).all()
    np.testing.assert_allclose(np.mean(used, 0), 0.25, atol=0.1)


def _is_part_of(part, whole):
    windows = np.lib.stride_tricks.sliding_window_view(whole, part.shape)
    return (windows == part).all((-3, -2, -1)).any()


def test_a_recipe_augments_by_its_policy_and_fills_with_its_colour():
    policy = RandAugmentPolicy(num_operations=1, probability=1.0)
    results = several(plain(randaugment=policy, fill=(1, 2, 3)), WHITE)
    filled = (results == (1, 2, 3)).all(-1).any((1, 2)).mean()
    assert filled == pytest.approx(1 / 3, abs=0.12)


def test_a_recipe_jitters_brightness_and_contrast_by_its_width():
    # Two halves: their mean tells of the brightness, their difference over it of the contrast.
    pixels = np.full((16, 16, 3), 60, np.uint8)
    pixels[8:] = 180
    results = several(plain(color_jitter=0.1), Image.fromarray(pixels))
    dark, bright = results[:, :8].mean((1, 2, 3)), results[:, 8:].mean((1, 2, 3))
    for factors in ((bright + dark) / 240, (bright - dark) / (bright + dark)):
        assert factors.min() < 0.95 * np.median(factors)
        assert factors.max() > 1.05 * np.median(factors)
        assert np.abs(factors / np.median(factors) - 1).max() < 0.15


def test_a_recipe_jitters_saturation():
    (grey,) = several(plain(), PHOTO.convert("L").convert("RGB"), 1)
    assert (np.ptp(grey, -1) == 0).all()
    # Neither brightness nor contrast gives or takes colour where the mean is black.
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[0, 0] = 100, 80, 60
    corner = several(plain(color_jitter=0.4), Image.fromarray(pixels))[:, 0, 0]
    relative = np.ptp(corner, -1) / corner.mean(-1)
    assert relative.min() < 0.4 < 0.6 < relative.max()


def test_a_recipe_shifts_by_up_to_its_pixels():
    results = several(plain(max_shift=3), WHITE)
    black = (results == 0).all(-1)
    assert set(black.all(2).sum(1)) == set(black.all(1).sum(1)) == {0, 1, 2, 3}


def test_a_recipe_takes_one_of_the_three():
    results = several(plain(three_augment=True), PHOTO.resize((16, 16)))
    grey = (np.ptp(results, -1) == 0).all((1, 2))
    assert grey.mean() == pytest.approx(1 / 3, abs=0.12)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_an_evaluation_takes_its_fraction_filter_and_channels(name, channels):
    settings = {"crop_fraction": 0.8, "interpolation": name}
    actual = EvalTransform(image_size=32, channels=channels, **settings)(encoded(kind="PNG"))
    whole = transforms.resize_short_side(
        PHOTO.convert({1: "L", 3: "RGB"}[channels]), 40, Image.Resampling[name.upper()]
    )
    expected = transforms.to_array(transforms.evaluation_transform(whole, 32, crop_fraction=0.8))
    assert actual.shape == (32, 32, channels)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_size": 0}, "`image_size` must be positive, got 0"),
        ({"crop_scale": (1.0, 0.5)}, "`crop_scale` must be in order"),
        ({"crop_scale": (0.5, 1.5)}, r"`crop_scale` must be in order and in \(0, 1\], got"),
        ({"color_jitter": -0.1}, "`color_jitter` must not be negative, got -0.1"),
        ({"max_shift": -1}, "`max_shift` must not be negative, got -1"),
        ({"crop_ratio": (0.0, 0.5)}, "`crop_ratio` must be positive and in order"),
        ({"interpolations": ()}, "`interpolations` must name at least one"),
        ({"flip_probability": 1.5}, r"`flip_probability` must be in \[0, 1\], got 1.5"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        plain(**setting)
