import numpy as np
from PIL import Image

from metaformer_jax.data import transforms


def test_resize_is_pillows_bicubic_for_grey_and_colour():
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((20, 20), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(transforms.resize(image, 20), expected)
    grey = transforms.resize(image[..., :1], 20)
    np.testing.assert_array_equal(grey[..., 0], expected[..., 0])


def test_shifts_reach_every_offset_alike_and_bring_in_black():
    image = np.zeros((9, 9, 1), np.uint8)
    image[4, 4] = 255
    rng = np.random.default_rng(0)
    counts = sum(transforms.random_shift(image, 2, rng=rng) // 255 for _ in range(2500))
    inside = counts[2:7, 2:7, 0]
    assert counts.sum() == inside.sum() == 2500
    # 25 offsets, 100 times each but for chance: five standard deviations.
    assert np.abs(inside - 100.0).max() < 50


def test_a_shift_moves_all_pixels_together():
    image = np.random.default_rng(0).integers(1, 256, (6, 7, 2), np.uint8)
    shifted = transforms.random_shift(image, 3, rng=np.random.default_rng(1))
    rows, columns = np.nonzero(shifted[..., 0])
    kept = shifted[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width, _ = kept.shape
    top, left = (0 if rows.min() else 6 - height), (0 if columns.min() else 7 - width)
    np.testing.assert_array_equal(kept, image[top : top + height, left : left + width])
