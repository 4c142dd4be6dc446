"""Laws of what happens to a batch on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from metaformer_jax.data.device import DeviceTransform, check_groups, normalize
from metaformer_jax.data.erasing import draw_rectangle, random_erasing
from metaformer_jax.data.mixing import mix, soft_targets

SIZE = (24, 32)


def batch(groups, group_size, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (groups * group_size, *SIZE, 1), np.uint8)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, 9, groups * group_size))


@functools.cache
def mixed_pairs(mixup_alpha, cutmix_alpha, probability=1.0, size=SIZE):
    """Three thousand groups of a black and a white image, mixed."""
    images = jnp.tile(jnp.array([0, 255], jnp.uint8), 3000)[:, None, None, None]
    images = jnp.broadcast_to(images, (6000, *size, 1))
    arguments = {
        "mixup_alpha": mixup_alpha,
        "cutmix_alpha": cutmix_alpha,
        "probability": probability,
    }
    mixed = jax.jit(functools.partial(mix, **arguments))(
        images, jnp.tile(jnp.array([3, 5]), 3000), keys=jax.random.split(jax.random.key(1), 3000)
    )
    return jax.tree.map(np.asarray, mixed)


def published_cutmix_weights(count, seed=0, alpha=1.0):
    """The box of timm's `rand_bbox`, with the weight corrected for what the border cuts off."""
    rng = np.random.default_rng(seed)
    kept = rng.beta(alpha, alpha, count)
    outside = np.ones(count)
    for length in SIZE:
        half = (length * np.sqrt(1 - kept)).astype(int) // 2
        middle = rng.integers(0, length, count)
        sides = np.minimum(middle + half, length) - np.maximum(middle - half, 0)
        outside = outside * sides
    return 1 - outside / (SIZE[0] * SIZE[1])


def is_blended(mixed):
    values = mixed.images.reshape(len(mixed.images), -1)
    return (values == values[:, :1]).all(1) & ~np.isin(values[:, 0], [0, 255])


def test_of_each_image_the_share_that_is_its_own_is_its_weight():
    for alphas in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mixed = mixed_pairs(*alphas)
        white = mixed.images.reshape(-1, 2, SIZE[0] * SIZE[1]).mean(2, dtype=float) / 255
        weights = mixed.weights.reshape(-1, 2)
        np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
        # Mixup rounds to whole numbers, CutMix to whole pixels.
        np.testing.assert_allclose(white[:, 0], 1 - weights[:, 0], atol=0.5 / 255 + 1e-6)
        np.testing.assert_allclose(white[:, 1], weights[:, 1], atol=0.5 / 255 + 1e-6)


def test_cutmix_takes_a_rectangle_and_weighs_it_exactly():
    mixed = mixed_pairs(0.0, 1.0)
    for image, weight in zip(mixed.images[::2][:200], mixed.weights[::2], strict=False):
        rows, columns, _ = np.nonzero(image)
        area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) if len(rows) else 0
        assert (image[image != 0] == 255).all()
        assert len(rows) == area
        assert weight == pytest.approx(1 - area / (SIZE[0] * SIZE[1]), abs=1e-6)


def test_the_weights_are_distributed_as_published():
    blended = mixed_pairs(0.8, 0.0).weights[::2]
    assert stats.kstest(blended, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3
    cut = mixed_pairs(0.0, 1.0).weights[::2]
    assert stats.ks_2samp(cut, published_cutmix_weights(3000)).pvalue > 1e-3


def test_half_of_the_groups_are_cut_where_both_are_there():
    # Few blends round to black or white, few boxes are empty.
    assert abs(is_blended(mixed_pairs(0.8, 1.0)).mean() - 0.5) < 0.04
    assert is_blended(mixed_pairs(0.8, 0.0)).mean() > 0.95
    assert is_blended(mixed_pairs(0.0, 1.0)).mean() < 0.01


def test_partners_are_the_group_reversed_and_groups_draw_apart():
    images, labels = batch(groups=3, group_size=4)
    mixed = mix(images, labels, keys=jax.random.split(jax.random.key(0), 3), cutmix_alpha=0.0)
    np.testing.assert_array_equal(mixed.partner_labels.reshape(3, 4), labels.reshape(3, 4)[:, ::-1])
    weights = np.asarray(mixed.weights).reshape(3, 4)
    assert (weights == weights[:, :1]).all()
    assert len(set(weights[:, 0])) == 3
    partners = np.asarray(images).reshape(3, 4, -1)[:, ::-1].reshape(12, -1)
    own = np.asarray(images).reshape(12, -1)
    share = np.asarray(mixed.weights)[:, None]
    blend = np.rint(share * own + (1 - share) * partners)
    np.testing.assert_allclose(np.asarray(mixed.images).reshape(12, -1), blend, atol=1)


def test_probability_is_that_of_mixing_at_all():
    images, labels = batch(groups=400, group_size=2)
    arguments = {"keys": jax.random.split(jax.random.key(2), 400)}
    some = mix(images, labels, probability=0.25, **arguments)
    assert abs(np.mean(np.asarray(some.weights)[::2] < 1) - 0.25) < 0.08
    untouched = np.asarray(some.weights) == 1
    np.testing.assert_array_equal(some.images[untouched], images[untouched])
    none = mix(images, labels, mixup_alpha=0, cutmix_alpha=0, **arguments)
    np.testing.assert_array_equal(none.images, images)


def test_targets_are_smoothed_mixed_and_sum_to_one():
    labels, partners = jnp.array([0, 6, 3]), jnp.array([3, 6, 0])
    weights = jnp.array([1.0, 0.5, 0.25])
    targets = soft_targets(labels, partners, weights, num_classes=7, label_smoothing=0.1)
    eye = 0.9 * np.eye(7) + 0.1 / 7
    share = np.asarray(weights)[:, None]
    np.testing.assert_allclose(targets, share * eye[labels] + (1 - share) * eye[partners], 1e-6)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        soft_targets(labels, num_classes=7, label_smoothing=0.1), eye[labels], rtol=1e-6
    )


@functools.cache
def erased_rectangles(count=6000):
    draw = functools.partial(
        draw_rectangle, size=(224, 224), probability=1.0, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3)
    )

    def sides(key):
        inside = draw(key)
        return inside.any(1).sum(), inside.any(0).sum(), inside.any(1).argmax()

    keys = jax.random.split(jax.random.key(0), count)
    return [np.asarray(column) for column in jax.lax.map(jax.jit(sides), keys, batch_size=100)]


def published_rectangles(count, seed=1):
    """timm's `RandomErasing`, the first of its tries that fits."""
    rng = np.random.default_rng(seed)
    sides = np.zeros((count, 3))
    for index in range(count):
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * 224 * 224
            ratio = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
            height, width = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if width < 224 and height < 224:
                sides[index] = height, width, rng.integers(0, 224 - height, endpoint=True)
                break
    return sides.T


def test_erased_rectangles_are_distributed_as_published():
    heights, widths, tops = erased_rectangles()
    expected = published_rectangles(6000)
    present = heights > 0
    assert present.mean() > 0.999
    for mine, theirs in (
        (heights * widths, expected[0] * expected[1]),
        (heights[present] / widths[present], expected[0] / np.maximum(expected[1], 1)),
        (tops, expected[2]),
    ):
        assert stats.ks_2samp(mine, theirs).pvalue > 1e-3


def test_erasing_puts_normal_noise_into_rectangles_of_some_images():
    images = jnp.full((400, 48, 40, 3), 50.0)
    keys = jax.random.split(jax.random.key(3), 400)
    erased = np.asarray(jax.jit(random_erasing)(images, keys=keys))
    changed = (erased != 50).all(-1)
    assert ((erased != 50).any(-1) == changed).all()
    assert abs(changed.any((1, 2)).mean() - 0.25) < 0.08
    for mask in changed[changed.any((1, 2))]:
        assert mask.sum() == mask.any(0).sum() * mask.any(1).sum()
    noise = erased[changed]
    assert stats.kstest(noise[:5000].ravel(), stats.norm.cdf).pvalue > 1e-3
    np.testing.assert_array_equal(random_erasing(images, keys=keys, probability=0), images)


def test_of_mixed_groups_half_are_cut_however_many_are_mixed():
    mixed = mixed_pairs(0.8, 1.0, probability=0.5)
    is_mixed = mixed.weights < 1
    assert abs(is_mixed.mean() - 0.5) < 0.04
    assert abs(is_blended(mixed)[is_mixed].mean() - 0.5) < 0.05


def test_mixup_and_cutmix_have_an_alpha_each():
    mixed = mixed_pairs(30.0, 0.2)
    blended, weights = is_blended(mixed)[::2], mixed.weights[::2]
    assert stats.kstest(weights[blended], stats.beta(30, 30).cdf).pvalue > 1e-3
    expected = published_cutmix_weights(3000, alpha=0.2)
    assert stats.ks_2samp(weights[~blended], expected).pvalue > 1e-3


def test_boxes_lie_anywhere_and_have_even_sides_away_from_the_border():
    length = 16
    mixed = mixed_pairs(0.0, 1.0, size=(length, length))
    # Each second image is white, and so black in its box.
    inside = mixed.images[1::2, ..., 0] == 0
    rows, columns = inside.any(2), inside.any(1)
    present = rows.any(1)
    centres = [
        (side[present] * np.arange(length)).sum(1) / side[present].sum(1)
        for side in (rows, columns)
    ]
    assert abs(np.corrcoef(*centres)[0, 1]) < 0.08
    for side, centre in zip((rows, columns), centres, strict=True):
        assert centre.mean() == pytest.approx((length - 1) / 2, abs=0.6)
        is_whole = ~side[:, 0] & ~side[:, -1]
        assert (side[is_whole].sum(1) % 2 == 0).all()


def test_mixing_is_by_default_the_published():
    images, labels = batch(groups=16, group_size=2)
    keys = jax.random.split(jax.random.key(0), 16)
    published = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch_probability": 0.5}
    explicit = functools.partial(mix, probability=1.0, **published)
    actual, expected = (jax.jit(mixer)(images, labels, keys=keys) for mixer in (mix, explicit))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@functools.cache
def erased(count, size, **settings):
    """Which pixels of each image change."""
    images = jnp.full((count, *size, 1), 1e3)
    erase = jax.jit(functools.partial(random_erasing, **settings))
    return np.asarray(erase(images, keys=jax.random.split(jax.random.key(7), count)) != 1e3)[..., 0]


def test_erasing_is_by_default_of_the_published_size():
    inside = erased(3000, (64, 64), probability=1.0)
    area, height, width = inside.mean((1, 2)), inside.any(2).sum(1), inside.any(1).sum(1)
    expected = np.random.default_rng(0).uniform(0.02, 1 / 3, 3000)
    # Sides are whole numbers of pixels, and a few long ones are drawn again.
    assert np.abs(np.quantile(area, [0, 0.5, 1]) - np.quantile(expected, [0, 0.5, 1])).max() < 0.02
    shape = np.log(height / width)
    assert np.abs(np.quantile(shape, [0.02, 0.98]) / np.log(1 / 0.3) - [-0.96, 0.96]).max() < 0.06


def test_the_aspect_is_height_over_width():
    inside = erased(100, (64, 64), probability=1.0, area=(0.05, 0.1), aspect=(2.0, 3.0))
    ratio = inside.any(2).sum(1) / inside.any(1).sum(1)
    assert ratio.min() > 1.7
    assert ratio.max() < 3.4


def test_rectangles_lie_in_every_place_alike():
    inside = erased(2500, (6, 6), probability=1.0, area=(1 / 9, 1 / 9), aspect=(1.0, 1.0))
    rows, columns = inside.any(2), inside.any(1)
    assert (rows.sum(1) == 2).all()
    assert (columns.sum(1) == 2).all()
    counts = np.bincount(5 * rows.argmax(1) + columns.argmax(1), minlength=25)
    # 25 places, 100 times each but for chance: five standard deviations.
    assert np.abs(counts - 100.0).max() < 50


@pytest.mark.parametrize(
    ("area", "aspect"), [(1.0, 1.0), (0.5, 4.0), (0.5, 0.25)], ids=["both", "height", "width"]
)
def test_what_would_span_the_image_is_not_erased(area, aspect):
    inside = erased(50, (6, 6), probability=1.0, area=(area, area), aspect=(aspect, aspect))
    assert not inside.any()


def test_of_what_does_not_fit_other_tries_are_drawn():
    # Every second try fits: one in a thousand images has none.
    inside = erased(400, (32, 32), probability=1.0, area=(0.2, 1.8), aspect=(1.0, 1.0))
    assert inside.any((1, 2)).mean() > 0.98


def test_whether_an_image_is_erased_does_not_hang_on_the_rectangle():
    inside = erased(3000, (24, 24), probability=0.3, area=(0.1, 0.5), aspect=(1.0, 1.0))
    area = inside.mean((1, 2))
    assert (area > 0).mean() == pytest.approx(0.3, abs=0.04)
    assert area[area > 0].mean() == pytest.approx(0.3, abs=0.02)


def test_no_two_pixels_channels_or_images_have_the_same_noise():
    keys = jax.random.split(jax.random.key(3), 50)
    erase = jax.jit(functools.partial(random_erasing, probability=1.0))
    noise = np.asarray(erase(jnp.full((50, 16, 16, 3), 50.0), keys=keys))
    noise = noise[noise != 50]
    assert len(np.unique(noise)) > 0.99 * len(noise)


def test_each_channel_has_a_mean_and_a_deviation_of_its_own():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8))
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    actual = normalize(images, mean=mean, std=std)
    expected = (np.asarray(images) / 255 - mean) / std
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def transformed(count=256, **settings):
    """Black and white images in turn, each of its own class within its group of four."""
    images = jnp.tile(jnp.array([0, 255], jnp.uint8), count // 2)[:, None, None, None]
    images = jnp.broadcast_to(images, (count, 16, 16, 1))
    defaults = {"num_classes": 4, "mean": (0.4,), "std": (0.2,), "mixing_group_size": 4}
    transform = DeviceTransform(**{**defaults, **settings})

    @jax.jit
    def inputs(images, labels):
        group_keys, image_keys = transform.keys(jax.random.key(0), count)
        return transform.training(transform.mix(images, labels, group_keys), image_keys)

    pixels, targets = inputs(images, jnp.arange(count) % 4)
    return np.asarray(pixels)[..., 0] * 0.2 + 0.4, np.asarray(targets)


def own_share(targets):
    return targets[np.arange(len(targets)), np.arange(len(targets)) % 4]


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_what_the_loss_compares_is_mixed_alike(alphas):
    pixels, targets = transformed(mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    share = own_share(targets)
    assert np.mean(share < 1) > 0.9
    # The partner in a group of four is at the place mirrored, and of the other colour.
    partners = 3 - np.arange(256) % 4
    np.testing.assert_allclose(targets[np.arange(256), partners], 1 - share, atol=1e-6)
    is_white = np.arange(256) % 2 == 1
    white = np.where(is_white, share, 1 - share)
    np.testing.assert_allclose(pixels.mean((1, 2)), white, atol=0.5 / 255 + 1e-5)
    # Four share a draw, and no more do.
    groups = share.reshape(-1, 4)
    np.testing.assert_allclose(groups, groups[:, :1].repeat(4, 1), atol=1e-6)
    assert len(np.unique(groups[:, 0].round(6))) > 30


def test_each_setting_of_the_mixing_counts():
    both = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    for switch in (0.0, 1.0):
        pixels, _ = transformed(switch_probability=switch, **both)
        is_flat = np.ptp(pixels, (1, 2)) < 1e-5
        assert is_flat.mean() == pytest.approx(1 - switch, abs=0.1)
    _, targets = transformed(count=2048, mixing_probability=0.25, **both)
    assert np.mean(own_share(targets) < 1) == pytest.approx(0.25, abs=0.08)
    _, targets = transformed(mixup_alpha=30.0)
    assert np.abs(own_share(targets) - 0.5).max() < 0.3
    _, targets = transformed(label_smoothing=0.2)
    np.testing.assert_allclose(targets, 0.8 * np.eye(4)[np.arange(256) % 4] + 0.05, atol=1e-6)


def test_each_image_is_erased_apart_with_noise_of_the_normalised_kind():
    pixels, _ = transformed()
    np.testing.assert_allclose(pixels, (np.arange(256) % 2)[:, None, None] + 0 * pixels, atol=1e-6)
    normalised, _ = transformed(erasing_probability=1.0)
    whole = (np.arange(256) % 2)[:, None, None]
    inside = np.abs(normalised - whole) > 1e-6
    assert inside.any((1, 2)).mean() > 0.98
    assert len({mask.tobytes() for mask in inside}) > 200
    noise = (normalised[inside] - 0.4) / 0.2
    assert stats.kstest(noise[:5000], stats.norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize("settings", [{}, {"mixup_alpha": 0.8, "mixing_probability": 0.0}])
def test_what_does_not_mix_needs_no_groups(settings):
    pixels, targets = transformed(count=6, mixing_group_size=128, **settings)
    np.testing.assert_allclose(pixels.mean((1, 2)), np.arange(6) % 2, atol=1e-6)
    np.testing.assert_array_equal(targets, np.eye(4)[np.arange(6) % 4])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((12, 2, 4), r"6 of 12 images, got 4. Use 2, or a batch of 8\."),
        ((10, 4, 2), "`batch_size` must divide by the 4 devices, got 10"),
    ],
)
def test_groups_and_devices_that_do_not_divide_the_batch_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_groups(*sizes)
