"""The models compute what the published implementation computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

pytestmark = pytest.mark.optimized

FORWARD = np.load(reference.DATA / "forward.npz")
FORWARD_CASES = sorted({key.split("/")[0] for key in FORWARD.files})
FAMILIES = ["identityformer_s12", "randformer_s12", "poolformerv2_s12", "convformer_s18"]
FAMILIES += ["caformer_s18"]
# Beyond the smallest of each family at 224 pixels: minutes, left out by -m "not slow".
FORWARD_PARAMS = [
    case
    if case in [f"{name}@224" for name in FAMILIES]
    else pytest.param(case, marks=pytest.mark.slow)
    for case in FORWARD_CASES
]
ARCHITECTURES = reference.checkpoint_table()["architectures"]


def _name_and_images(case: str) -> tuple[str, np.ndarray]:
    name, _, size = case.partition("@")
    sides = [int(side) for side in size.split("x")]
    return name, reference.images(len(FORWARD[f"{case}/logits"]), sides[0], sides[-1])


def test_the_reference_figures_cover_every_architecture():
    assert {case.split("@")[0] for case in FORWARD_CASES} >= set(ARCHITECTURES)


# Run operation by operation: each is compiled once and serves every architecture in which it
# occurs, where jitting would compile every network for itself. Further down, five are jitted.
@pytest.mark.parametrize("case", FORWARD_PARAMS)
def test_stages_pooled_feature_and_logits_agree(case):
    name, images = _name_and_images(case)
    model = reference.model(name, image_size=images.shape[1:3])
    stages = model.features(images)
    pooled = model.pool(stages[-1])
    errors = {
        "pooled": reference.relative_error(pooled, FORWARD[f"{case}/pooled"]),
        "logits": reference.relative_error(model.head(pooled), FORWARD[f"{case}/logits"]),
    }
    for index, stage in enumerate(stages):
        figures = FORWARD[f"{case}/stage{index}"]
        assert stage.shape == tuple(figures[:4])
        actual = np.concatenate([[stage.mean(), stage.std()], stage[0, 0, 0, :8]])
        errors[f"stage{index}"] = reference.relative_error(actual, figures[4:])
    print(case, {part: f"{error:.1e}" for part, error in errors.items()})
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.parametrize("name", FAMILIES)
def test_a_jitted_call_agrees(name):
    case = f"{name}@224"
    _, images = _name_and_images(case)
    logits = nnx.jit(lambda model, images: model(images))(reference.model(name), images)
    assert reference.relative_error(logits, FORWARD[f"{case}/logits"]) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["randformer_s12", "caformer_s18"])
def test_bfloat16_stays_close_and_keeps_float32_parameters_and_logits(name):
    case = f"{name}@224"
    _, images = _name_and_images(case)
    model = reference.model(name, dtype=jnp.bfloat16)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    stages = model.features(images)
    assert all(stage.dtype == jnp.bfloat16 for stage in stages)
    logits = model.head(model.pool(stages[-1]))
    assert logits.dtype == np.float32
    assert reference.relative_error(logits, FORWARD[f"{case}/logits"]) <= 5e-2
