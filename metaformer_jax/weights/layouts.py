"""Where each parameter stands in a checkpoint, and in which axis order: the sail and timm layouts.

A parameter's path here, `("stages", 0, 2, "mlp", "fc1", "kernel")`, and its key there,
`stages.0.2.mlp.fc1.weight` (the original code) or `stages.0.blocks.2.mlp.fc1.weight` (timm).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

Path = tuple[str | int, ...]
Rule = tuple[str, str, "Transform"]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of axis order between a PyTorch tensor and a parameter here, and its inverse."""

    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]

    def shape_in_torch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor that holds a parameter of this shape."""
        return self.to_torch(np.broadcast_to(np.False_, shape)).shape

    def shape_here(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the parameter that a tensor of this shape holds."""
        return self.from_torch(np.broadcast_to(np.False_, shape)).shape


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
# A linear layer kept as a 1x1 convolution, [out, in, 1, 1].
POINTWISE = Transform(lambda tensor: tensor[:, :, 0, 0].T, lambda array: array.T[:, :, None, None])

# (path pattern, key, transform); the first pattern that matches the whole path counts.
_SAIL: tuple[Rule, ...] = (
    (r"head\.fc\.kernel", r"head.weight", LINEAR),
    (r"head\.fc\.bias", r"head.bias", SAME),
    (r"(.*\.dwconv)\.kernel", r"\1.weight", DEPTHWISE),
    (r"(.*\.conv)\.kernel", r"\1.weight", CONV),
    (r"(.*)\.kernel", r"\1.weight", LINEAR),
    (r"((?:.*[._])?norm[12]?)\.scale", r"\1.weight", SAME),
    (r"(.*)", r"\1", SAME),
)
# Applied to the sail key: timm moves modules and keeps what is in them.
_TIMM_MODULES: tuple[tuple[str, str], ...] = (
    (r"downsample_layers\.0\.conv\.(.*)", r"stem.conv.\1"),
    (r"downsample_layers\.0\.post_norm\.(.*)", r"stem.norm.\1"),
    (r"downsample_layers\.(\d+)\.conv\.(.*)", r"stages.\1.downsample.conv.\2"),
    (r"downsample_layers\.(\d+)\.pre_norm\.(.*)", r"stages.\1.downsample.norm.\2"),
    (r"stages\.(\d+)\.(\d+)\.(.*)", r"stages.\1.blocks.\2.\3"),
    (r"norm\.(.*)", r"head.norm.\1"),
    (r"head\.(.*)", r"head.fc.\1"),
)

LAYOUTS = ("sail", "timm", "flax")


def dotted(path: Path) -> str:
    """The path as one name: the key of the parameter in this project's own files.

    >>> dotted(("stages", 0, 2, "mlp", "fc1", "kernel"))
    'stages.0.2.mlp.fc1.kernel'
    """
    return ".".join(map(str, path))


def sail_key(path: Path) -> tuple[str, Transform]:
    """The key of a parameter in a checkpoint of the original code, and its transform.

    >>> sail_key(("stages", 0, 2, "mlp", "fc1", "kernel"))[0]
    'stages.0.2.mlp.fc1.weight'
    """
    name = dotted(path)
    for pattern, template, transform in _SAIL:
        if match := re.fullmatch(pattern, name):
            return match.expand(template), transform
    raise AssertionError(f"the last pattern matches everything, but not {name!r}")


def timm_key(path: Path, *, in_convolutional_stage: bool) -> tuple[str, Transform]:
    """The key of a parameter in a checkpoint of timm, and its transform.

    Args:
        path: the parameter.
        in_convolutional_stage: whether its stage runs channels-first in timm, as all do whose
            mixer is not attention: linear layers are 1x1 convolutions there.

    >>> timm_key(("downsample_layers", 1, "conv", "kernel"), in_convolutional_stage=False)[0]
    'stages.1.downsample.conv.weight'
    """
    key, transform = sail_key(path)
    if transform is LINEAR and in_convolutional_stage:
        transform = POINTWISE
    for pattern, template in _TIMM_MODULES:
        if match := re.fullmatch(pattern, key):
            return match.expand(template), transform
    return key, transform


def key_table(paths: Iterable[Path], layout: str) -> dict[Path, tuple[str, Transform]]:
    """Key and transform of every parameter of one model, in the order given.

    Args:
        paths: all parameters of the model; what a stage mixes with follows from them.
        layout: `"sail"`, `"timm"` or `"flax"`, the project's own names and axes.

    Raises:
        ValueError: the layout is none of these.
    """
    paths = list(paths)
    if layout == "flax":
        return {path: (dotted(path), SAME) for path in paths}
    if layout == "sail":
        return {path: sail_key(path) for path in paths}
    if layout == "timm":
        attention = {path[1] for path in paths if path[0] == "stages" and "qkv" in path}
        return {
            path: timm_key(
                path, in_convolutional_stage=path[0] == "stages" and path[1] not in attention
            )
            for path in paths
        }
    raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {layout!r}.")


def without_head(tensors: Mapping[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint but those of its head, whatever that is.

    >>> list(without_head({"head.norm.weight": 0, "head.fc.weight": 0}, "timm"))
    ['head.norm.weight']
    """
    # timm keeps the norm before the head in it.
    prefix = "head.fc." if layout == "timm" else "head."
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
