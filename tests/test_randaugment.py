"""The published policy: each operation exactly, and the laws of how they are drawn."""

import collections
import itertools

import numpy as np
import pytest
import reference
from PIL import Image, ImageEnhance

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


def drawn(policy, count):
    """The operation, magnitude, sign and filter of all that is applied to each image."""
    applied = []

    def record(image, operation, magnitude, *, sign, resample, fill):
        applied[-1].append((operation, magnitude, sign, resample))
        return image

    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randaugment, "apply", record)
        for _ in range(count):
            applied.append([])
            randaugment.randaugment(image(), rng=rng, policy=policy)
    return applied


@pytest.fixture(scope="module")
def draws():
    """All that ten thousand images undergo, and how many operations each."""
    applied = drawn(POLICY, 10_000)
    return list(itertools.chain(*applied)), [len(operations) for operations in applied]


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
    assert parse_policy("rand-inc1") == RandAugmentPolicy(
        magnitude=10, magnitude_std=0, num_operations=2, probability=0.5
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"magnitude": -1}, r"`magnitude` must be in \[0, 10\], got -1"),
        ({"magnitude_std": -0.5}, "`magnitude_std` must not be negative, got -0.5"),
        ({"num_operations": 0}, "`num_operations` must be positive, got 0"),
        ({"probability": 1.5}, r"`probability` must be in \[0, 1\], got 1.5"),
    ],
)
def test_policies_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        RandAugmentPolicy(**setting)


@pytest.mark.parametrize(("number", "probability"), [(3, 0.0), (3, 1.0), (1, 1.0), (4, 0.25)])
def test_a_policy_says_how_many_operations_and_how_often(number, probability):
    policy = RandAugmentPolicy(num_operations=number, probability=probability)
    counts = [len(operations) for operations in drawn(policy, 1000)]
    expected = number * probability
    # Where there is nothing to draw, nothing is left to chance.
    assert np.mean(counts) == pytest.approx(expected, abs=0.1 if 0 < probability < 1 else 0)
    assert max(counts) <= number


def test_an_operation_may_come_twice():
    policy = RandAugmentPolicy(num_operations=2, probability=1.0)
    twice = [one[0] is other[0] for one, other in drawn(policy, 3000)]
    assert np.mean(twice) == pytest.approx(1 / 15, abs=0.02)


def test_magnitudes_are_cut_at_none():
    policy = RandAugmentPolicy(magnitude=0.5, magnitude_std=1.0, probability=1.0)
    magnitudes = [magnitude for _, magnitude, *_ in itertools.chain(*drawn(policy, 1000))]
    assert min(magnitudes) == 0
    # Below half a standard deviation.
    assert np.mean(np.equal(magnitudes, 0)) == pytest.approx(0.309, abs=0.04)


@pytest.mark.parametrize(("std", "is_uniform"), [("100", False), ("100.5", True), ("999", True)])
def test_magnitudes_are_uniform_below_theirs_with_a_deviation_above_a_hundred(std, is_uniform):
    policy = parse_policy(f"rand-m8-mstd{std}-n4-p1-inc1")
    magnitudes = [magnitude for _, magnitude, *_ in itertools.chain(*drawn(policy, 1000))]
    # A normal distribution this wide is nearly always cut to 0 or 10.
    expected = [0.8, 2.4, 5.6, 7.2] if is_uniform else [0, 0, 10, 10]
    actual = np.quantile(magnitudes, [0.1, 0.3, 0.7, 0.9])
    np.testing.assert_allclose(actual, expected, atol=0.3)
    assert max(magnitudes) == pytest.approx(8 if is_uniform else 10, abs=0.05)


@pytest.mark.parametrize(("mode", "color"), [("RGB", (1, 2, 3)), ("L", (1,))])
def test_what_an_image_leaves_empty_gets_the_given_colour(mode, color):
    white = Image.new(mode, (24, 24), "white")
    policy = RandAugmentPolicy(num_operations=1, probability=1.0)
    rng = np.random.default_rng(0)
    results = (
        randaugment.randaugment(white, rng=rng, policy=policy, fill=(1, 2, 3)) for _ in range(600)
    )
    filled = [(np.atleast_3d(result) == color).all(-1).any() for result in results]
    # Five of the fifteen move pixels.
    assert np.mean(filled) == pytest.approx(1 / 3, abs=0.08)


@pytest.mark.parametrize(("name", "axis"), [("TranslateXRel", 1), ("TranslateYRel", 0)])
def test_translations_are_parts_of_the_side_along_which_they_move(name, axis):
    picture = Image.new("L", (40, 20), 255)
    moved = randaugment.apply(
        picture, OPERATIONS[name], 10.0, resample=Image.Resampling.BILINEAR, fill=0
    )
    kept = (np.asarray(moved) == 255).any(1 - axis).mean()
    assert kept == pytest.approx(1 - 0.45, abs=0.01)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 3), (4, 2), (31, 40)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sharpness_is_pillows_to_the_bit(mode, shape):
    rng = np.random.default_rng(0)
    operation = OPERATIONS["SharpnessIncreasing"]
    for magnitude, sign in itertools.product((0.0, 3.7, 9.0, 10.0), (1, -1)):
        # Noise, and what lies at the ends: sums of every remainder, and results that are cut.
        for low, high in ((0, 256), (0, 4), (250, 256)):
            picture = Image.fromarray(
                rng.integers(low, high, shape if mode == "L" else (*shape, 3), np.uint8)
            )
            expected = ImageEnhance.Sharpness(picture).enhance(operation.argument(magnitude, sign))
            actual = randaugment.apply(picture, operation, magnitude, sign=sign)
            np.testing.assert_array_equal(actual, expected)
