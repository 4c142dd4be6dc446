"""Laws of what happens to a batch on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from metaformer_jax.data.device import normalize
from metaformer_jax.data.erasing import draw_rectangle, random_erasing
from metaformer_jax.data.mixing import mix, soft_targets

SIZE = (24, 32)


def batch(groups, group_size, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (groups * group_size, *SIZE, 1), np.uint8)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, 9, groups * group_size))


@functools.cache
def mixed_pairs(mixup_alpha, cutmix_alpha):
    """Three thousand groups of a black and a white image, mixed."""
    images = jnp.tile(jnp.array([0, 255], jnp.uint8), 3000)[:, None, None, None]
    images = jnp.broadcast_to(images, (6000, *SIZE, 1))
    arguments = {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha}
    mixed = jax.jit(functools.partial(mix, **arguments))(
        images, jnp.tile(jnp.array([3, 5]), 3000), keys=jax.random.split(jax.random.key(1), 3000)
    )
    return jax.tree.map(np.asarray, mixed)


def published_cutmix_weights(count, seed=0):
    """The box of timm's `rand_bbox`, with the weight corrected for what the border cuts off."""
    rng = np.random.default_rng(seed)
    kept = rng.beta(1.0, 1.0, count)
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


def test_normalising_is_its_formula():
    images, _ = batch(1, 2)
    expected = (np.asarray(images) / 255 - 0.4) / 0.2
    np.testing.assert_allclose(
        normalize(images, mean=(0.4,), std=(0.2,)), expected, rtol=1e-5, atol=1e-6
    )
