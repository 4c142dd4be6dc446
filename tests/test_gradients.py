"""Gradients are those of the published implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

import metaformer_jax
from metaformer_jax.models import FAMILIES, ImageKeys, MetaFormer, without_kernels

pytestmark = pytest.mark.optimized

GRADIENTS = np.load(reference.DATA / "gradients.npz")
GRADIENT_CASES = sorted({key.split("/")[0] for key in GRADIENTS.files})


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_loss_and_every_gradient_agree(name):
    size = 224 if name.startswith("randformer") else 64
    images = reference.images(4, size, size, seed=1)
    labels = np.array([1, 7, 500, 999])
    model = reference.model(name, image_size=size)

    def loss_fn(model):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = nnx.jit(nnx.value_and_grad(loss_fn))(model)
    assert reference.relative_error([loss], GRADIENTS[f"{name}/loss"]) <= 1e-4
    in_torch_order = reference.to_torch(gradients)
    expected = {
        key.partition("/")[2]: GRADIENTS[key]
        for key in GRADIENTS.files
        if key.startswith(f"{name}/") and not key.endswith("/loss")
    }
    assert set(in_torch_order) == set(expected)
    for key, figures in expected.items():
        gradient = in_torch_order[key].astype(np.float64)
        norm = np.linalg.norm(gradient)
        first_values = gradient.ravel()[:4]
        assert abs(norm - figures[0]) <= 1e-3 * figures[0], key
        # Single elements are held against the size of a typical one: some are nearly zero.
        typical = figures[0] / np.sqrt(gradient.size)
        np.testing.assert_allclose(
            first_values, figures[1 : 1 + len(first_values)], rtol=1e-3, atol=1e-3 * typical
        )


def test_random_matrices_get_no_gradient():
    def gradients_of_sum():
        model = metaformer_jax.create_model("randformer_s12", rngs=nnx.Rngs(0))
        return nnx.grad(lambda model: model(reference.images(1, 224, 224)).sum())(model)

    gradients = nnx.eval_shape(gradients_of_sum)
    paths = {path for path, _ in nnx.to_flat_state(gradients)}
    assert paths
    assert not any("random_matrix" in path for path in paths)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_exported_for_any_number_of_images(family):
    spec = FAMILIES[family].spec(depths=(1,) * 4, dims=(8,) * 4)
    model = MetaFormer(spec, num_classes=3, image_size=32, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, images):
        return nnx.merge(graphdef, params, rest)(images).sum()

    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    leaves, structure = jax.tree.flatten(params)
    gradient = jax.jit(
        lambda leaves, x: jax.value_and_grad(loss)(jax.tree.unflatten(structure, leaves), x)
    )
    with without_kernels():
        exported = jax.export.export(
            jax.jit(lambda leaves, x: jax.tree.leaves(gradient(leaves, x))),
            platforms=["cpu", "cuda", "tpu"],
        )(leaves, images)
    some = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    expected = jax.tree.leaves(gradient(leaves, some))
    for actual, wanted in zip(exported.call(leaves, some), expected, strict=True):
        assert jnp.allclose(actual, wanted, rtol=1e-3, atol=1e-4)
