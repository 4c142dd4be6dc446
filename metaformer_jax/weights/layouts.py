"""Where each parameter stands in a PyTorch checkpoint, and in which axis order."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of axis order between a PyTorch tensor and a parameter here, and its inverse."""

    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda tensor: tensor, lambda array: array)
# PyTorch keeps [out, in], Flax [in, out].
LINEAR = Transform(np.transpose, np.transpose)
# [out, in, height, width] and [height, width, in, out].
CONV = Transform(
    lambda tensor: tensor.transpose(2, 3, 1, 0), lambda array: array.transpose(3, 2, 0, 1)
)
# [channels, 1, height, width] and [height, width, channels].
DEPTHWISE = Transform(
    lambda tensor: tensor[:, 0].transpose(1, 2, 0),
    lambda array: array.transpose(2, 0, 1)[:, None],
)

# Parameter path -> (checkpoint key, transform); the first pattern that matches the whole path.
_SAIL: tuple[tuple[str, str, Transform], ...] = (
    (r"head\.fc\.kernel", r"head.weight", LINEAR),
    (r"head\.fc\.bias", r"head.bias", SAME),
    (r"(.*\.dwconv)\.kernel", r"\1.weight", DEPTHWISE),
    (r"(.*\.conv)\.kernel", r"\1.weight", CONV),
    (r"(.*)\.kernel", r"\1.weight", LINEAR),
    (r"((?:.*[._])?norm[12]?)\.scale", r"\1.weight", SAME),
    (r"(.*)", r"\1", SAME),
)


def sail_key(path: tuple[str | int, ...]) -> tuple[str, Transform]:
    """The key of a parameter in a checkpoint of the original code, and its transform.

    >>> sail_key(("stages", 0, 2, "mlp", "fc1", "kernel"))[0]
    'stages.0.2.mlp.fc1.weight'
    """
    name = ".".join(map(str, path))
    for pattern, template, transform in _SAIL:
        if match := re.fullmatch(pattern, name):
            return match.expand(template), transform
    raise AssertionError(f"the last pattern matches everything, but not {name!r}")
