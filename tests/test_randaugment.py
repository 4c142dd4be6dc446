"""The published policy: each operation exactly, and the laws of how they are drawn."""

import collections

import numpy as np
import pytest
import reference
from PIL import Image

from metaformer_jax.data import randaugment
from metaformer_jax.data.randaugment import OPERATIONS, RandAugmentPolicy, parse_policy

FIGURES = np.load(reference.DATA / "randaugment.npz")
CASES = sorted(key for key in FIGURES if key != "image" and not key.endswith("/arg"))
POLICY = parse_policy("rand-m9-mstd0.5-inc1")


def image(mode="RGB"):
    return Image.fromarray(FIGURES["image"]).convert(mode)


@pytest.mark.parametrize("case", CASES)
def test_every_operation_is_the_published_one(case):
    name, magnitude, sign, *resample = case.split("/")
    operation, magnitude = OPERATIONS[name], float(magnitude[1:])
    sign = 1 if sign == "pos" else -1
    argument = [] if operation.argument is None else [operation.argument(magnitude, sign)]
    np.testing.assert_allclose(argument, FIGURES[f"{case}/arg"], rtol=1e-12)
    filters = {"resample": Image.Resampling[resample[0].upper()]} if resample else {}
    assert operation.is_geometric == bool(resample)
    actual = randaugment.apply(image(), operation, magnitude, sign=sign, **filters)
    np.testing.assert_array_equal(actual, FIGURES[case])


def test_the_figures_cover_every_operation():
    assert {case.split("/")[0] for case in CASES} == set(OPERATIONS)
    assert len(OPERATIONS) == 15


def test_of_no_bits_nothing_but_black_is_left():
    black = randaugment.apply(image(), OPERATIONS["PosterizeIncreasing"], 10.0)
    assert black.getextrema() == ((0, 0),) * 3


@pytest.fixture(scope="module")
def draws():
    """Operations, magnitudes and signs of ten thousand images."""
    seen = []

    def record(image, operation, magnitude, *, sign, resample, fill):
        seen.append((operation, magnitude, sign, resample))
        return image

    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randaugment, "apply", record)
        counts = []
        for _ in range(10_000):
            before = len(seen)
            randaugment.randaugment(image(), rng=rng, policy=POLICY)
            counts.append(len(seen) - before)
    return seen, counts


def test_operations_are_drawn_alike_with_replacement_and_applied_half_of_the_time(draws):
    seen, counts = draws
    numbers = collections.Counter(id(operation) for operation, *_ in seen)
    assert set(numbers) == {id(operation) for operation in OPERATIONS.values()}
    # 20,000 draws, of which half are applied: 667 each, but for chance.
    assert all(abs(number - 10_000 / 15) < 130 for number in numbers.values())
    shares = np.bincount(counts, minlength=3) / len(counts)
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.02)


def test_magnitudes_are_normal_and_cut_at_ten(draws):
    magnitudes = np.array([magnitude for _, magnitude, *_ in draws[0]])
    assert magnitudes.max() == 10
    # Beyond two standard deviations: 2.3 % of all, whose posterised images are black.
    assert np.mean(magnitudes == 10) == pytest.approx(0.02275, abs=0.005)
    assert np.median(magnitudes) == pytest.approx(9, abs=0.03)
    assert np.mean(magnitudes < 8.5) == pytest.approx(0.1587, abs=0.015)


def test_signs_and_filters_are_fair_coins_where_they_matter(draws):
    signs = [sign for operation, _, sign, _ in draws[0] if operation.has_sign]
    assert np.mean(signs) == pytest.approx(0, abs=0.05)
    assert {sign for operation, _, sign, _ in draws[0] if not operation.has_sign} == {1}
    filters = collections.Counter(filter for *_, filter in draws[0])
    moved = sum(operation.is_geometric for operation, *_ in draws[0])
    for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
        assert filters[resample] / moved == pytest.approx(0.5, abs=0.04)


def test_the_generator_is_all_randomness():
    def augmented(seed):
        rng = np.random.default_rng(seed)
        policy = RandAugmentPolicy(num_operations=8)
        return np.asarray(randaugment.randaugment(image(), rng=rng, policy=policy))

    np.testing.assert_array_equal(augmented(1), augmented(1))
    assert (augmented(1) != augmented(2)).any()


@pytest.mark.parametrize("name", OPERATIONS)
def test_grey_images_are_augmented_as_grey_colour_images_are(name):
    operation = OPERATIONS[name]
    grey = image("L")
    arguments = {"resample": Image.Resampling.BICUBIC} if operation.is_geometric else {}
    actual = randaugment.apply(grey, operation, 9.0, fill=124, **arguments)
    assert actual.mode == "L"
    colour = randaugment.apply(
        grey.convert("RGB"), operation, 9.0, fill=(124, 124, 124), **arguments
    )
    np.testing.assert_allclose(np.asarray(actual), np.asarray(colour)[..., 0], atol=1)


def test_policies_in_words():
    assert parse_policy("rand-n3-m7-p0.25-inc1") == RandAugmentPolicy(
        magnitude=7, magnitude_std=0, num_operations=3, probability=0.25
    )
    for text in ("augmix-m3", "rand-m9-mstd0.5", "rand-m9-inc0", "rand-mm-inc1", "rand-m9-m8-inc1"):
        with pytest.raises(ValueError, match=rf"of the form .* got '{text}'"):
            parse_policy(text)
    with pytest.raises(ValueError, match=r"`magnitude` must be in \[0, 10\], got 11"):
        parse_policy("rand-m11-inc1")
