"""Gradients are those of the published implementation."""

import numpy as np
import optax
import pytest
import reference
from flax import nnx

import metaformer_jax

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
