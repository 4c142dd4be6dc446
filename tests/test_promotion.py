"""Models under `jax.numpy_dtype_promotion("strict")`, which forbids JAX to promote by itself."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from metaformer_jax.models import FAMILIES, ImageKeys, MetaFormer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_promotion_is_explicit(family, dtype):
    spec = FAMILIES[family].spec(depths=(1,) * 4, dims=(8,) * 4)
    images, keys = jnp.ones((2, 32, 32, 3)), jax.random.split(jax.random.key(0), 2)
    with jax.numpy_dtype_promotion("strict"):
        model = MetaFormer(
            spec, num_classes=3, image_size=32, drop_path_rate=0.2, dtype=dtype, rngs=nnx.Rngs(0)
        )
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            logits = nnx.merge(graphdef, params, rest)(images, rngs=ImageKeys(keys))
            return logits.sum()

        jax.eval_shape(jax.value_and_grad(loss), params)
