import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaformer_jax.models.lowering.lanes import images_along_lanes


def _lowered(batch_size, platform):
    def layer(x):
        return images_along_lanes(x, major_to_minor=(1, 2, 3, 0))

    x = jax.ShapeDtypeStruct((batch_size, 2, 3, 4), jnp.bfloat16)
    return jax.jit(layer).trace(x).lower(lowering_platforms=(platform,)).as_text()


def test_only_tpus_are_asked_and_only_where_images_fill_the_lanes():
    assert "result_layouts = [dense<[0, 3, 2, 1]>" in _lowered(256, "tpu")
    assert "LayoutConstraint" not in _lowered(192, "tpu")
    for platform in ("cpu", "cuda"):
        assert "LayoutConstraint" not in _lowered(256, platform)


@pytest.mark.parametrize("batch_size", [128, 3])
def test_values_and_gradients_stay(batch_size):
    x = jax.random.normal(jax.random.key(0), (batch_size, 2, 3, 4))
    value, vjp = jax.vjp(lambda x: images_along_lanes(x, major_to_minor=(1, 2, 3, 0)), x)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(vjp(x)[0], x)
