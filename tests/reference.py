"""The reference weights, inputs and figures: what the published implementation computes.

`data/forward.npz` and `data/gradients.npz` hold float64 results of the original PyTorch code on
weights and images that depend on nothing but names, shapes and seeds, as drawn here.
"""

import gzip
import json
import pathlib
import zlib
from typing import Any

import numpy as np
from flax import nnx

import metaformer_jax
from metaformer_jax.models import Frozen, MetaFormer
from metaformer_jax.weights.layouts import sail_key

DATA = pathlib.Path(__file__).parent / "data"


def checkpoint_table() -> dict[str, Any]:
    """Names, sizes, URLs, parameter counts; every key and shape of each architecture."""
    with gzip.open(DATA / "sail_checkpoints.json.gz") as file:
        return json.load(file)


def timm_table() -> dict[str, Any]:
    """timm's hub ids; per architecture each of its keys -> [shape, the sail key that it holds]."""
    with gzip.open(DATA / "timm_checkpoints.json.gz") as file:
        return json.load(file)


def state_dict(architecture: str, layout: str = "sail") -> dict[str, np.ndarray]:
    """The reference weights as a checkpoint of the sail or the timm layout holds them."""
    if layout == "timm":
        entries = timm_table()["architectures"][architecture]
        sail_shapes = checkpoint_table()["architectures"][architecture]
        return {
            key: weight(sail_key, tuple(sail_shapes[sail_key])).reshape(shape)
            for key, (shape, sail_key) in entries.items()
        }
    shapes = checkpoint_table()["architectures"][architecture]
    return {key: weight(key, tuple(shape)) for key, shape in shapes.items()}


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The reference value of a checkpoint's tensor, in PyTorch's axis order."""
    noise = np.random.default_rng([zlib.crc32(key.encode()), 0]).standard_normal(shape)
    if key.endswith("random_matrix"):
        exponentials = np.exp(noise - noise.max(axis=-1, keepdims=True))
        noise = exponentials / exponentials.sum(axis=-1, keepdims=True)
    elif len(shape) == 1:
        noise = 0.1 * noise + (0 if key.endswith("bias") else 1)
    else:
        noise = noise / np.sqrt(np.prod(shape[1:]))
    return noise.astype(np.float32)


def images(batch: int, height: int, width: int, *, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((batch, height, width, 3))
    return noise.astype(np.float32)


def model(name: str, **kwargs: Any) -> MetaFormer:
    """A model with the reference weights, in evaluation mode."""
    abstract = nnx.eval_shape(lambda: metaformer_jax.create_model(name, **kwargs, rngs=nnx.Rngs(0)))
    graphdef, variables, rest = nnx.split(abstract, nnx.Any(nnx.Param, Frozen), ...)
    flat = nnx.to_flat_state(variables)
    filled = []
    for path, variable in flat:
        key, transform = sail_key(path)
        shape = transform.to_torch(np.empty(variable.shape, np.bool_)).shape
        filled.append((path, variable.replace(transform.from_torch(weight(key, shape)))))
    loaded = nnx.merge(graphdef, nnx.from_flat_state(filled), rest)
    loaded.eval()
    return loaded


def to_torch(state: nnx.State) -> dict[str, np.ndarray]:
    """Variables (or their gradients) by checkpoint key, in PyTorch's axis order."""
    tensors = {}
    for path, variable in nnx.to_flat_state(state):
        key, transform = sail_key(path)
        tensors[key] = transform.to_torch(np.asarray(variable[...]))
    return tensors


def relative_error(actual: Any, desired: Any) -> float:
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape
    return float(np.max(np.abs(actual - desired)) / np.max(np.abs(desired)))
