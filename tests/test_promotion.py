"""Models under `jax.numpy_dtype_promotion("strict")`, which forbids JAX to promote by itself."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from metaformer_jax.models import (
    FAMILIES,
    Attention,
    ImageKeys,
    MetaFormer,
    MetaFormerSpec,
    MlpHead,
    Pooling,
    SepConv,
)
from metaformer_jax.models.lowering.platform import compiled_for


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


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gradients_of_parameters_have_their_dtype_also_in_float64(platform):
    spec = MetaFormerSpec(
        depths=(1,) * 3,
        dims=(8,) * 3,
        token_mixers=(functools.partial(SepConv, kernel_size=3), Pooling, Attention),
        res_scale_init=(None, None, 1.0),
        head=MlpHead,
    )
    with jax.enable_x64(True), compiled_for(platform):
        model = nnx.eval_shape(
            lambda: MetaFormer(
                spec, num_classes=3, image_size=32, dtype=jnp.float64, rngs=nnx.Rngs(0)
            )
        )
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        images = jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.float64)

        def gradients(params, rest, images):
            def loss(params):
                return nnx.merge(graphdef, params, rest)(images).sum()

            return jax.grad(loss)(params)

        def of_gradients(*arguments):
            return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradients(*arguments)))

        for function in (gradients, jax.grad(of_gradients)):
            found = jax.eval_shape(function, params, rest, images)
            dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(found)}
            assert dtypes == {"float32"}
