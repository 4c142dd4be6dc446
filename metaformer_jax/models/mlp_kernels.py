"""The second half of a block by kernels for TPUs: which blocks they take, and with which arrays."""

from types import NoneType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metaformer_jax.models.layers import DropPath, ImageKeys, Linear, Mlp, ResScale
from metaformer_jax.models.lowering import mlp_mosaic
from metaformer_jax.models.lowering.mlp_forms import Form, Norm
from metaformer_jax.models.lowering.residual_mlp import residual_mlp
from metaformer_jax.models.mixers import Attention
from metaformer_jax.models.normalization import LayerNorm
from metaformer_jax.models.star_relu import StarReLU

# Axes over which norms have kernels.
_OVER_CHANNELS, _OVER_IMAGES = (-1, (-1,)), (1, 2, 3)


def form_for(block: Any, x: Float[Array, "b h w c"]) -> Form | None:
    """The form in which kernels take `x` for norm, MLP and shortcut; None if XLA computes them.

    There are kernels for the published layers, not for subclasses of them.

    Args:
        block: a `MetaFormerBlock`.
        x: the input of its second half.
    """
    norm, mlp = block.norm2, block.mlp
    is_published = (
        takes_any_rows(norm)
        and norm.bias is None
        and is_published_mlp(mlp)
        and type(block.drop_path2) in (DropPath, NoneType)
        and type(block.res_scale2) in (ResScale, NoneType)
        and mlp.fc1.dtype == mlp.fc2.dtype == x.dtype
    )
    if not is_published:
        return None
    return mlp_mosaic.form_of(
        x,
        mlp.fc1.out_features,
        norm=_norm_of(block),
        # Attention takes matrices of the tokens of an image.
        takes_any_form=not isinstance(block.token_mixer, Attention),
    )


def transform(
    block: Any, form: Form, x: Float[Array, "b h w c"], rngs: nnx.Rngs | ImageKeys | None
) -> Float[Array, "b h w c"]:
    """The second half of a block, for which `form_for` gives this form."""
    fc1, act, fc2 = block.mlp.fc1, block.mlp.act, block.mlp.fc2
    keep = jnp.ones((x.shape[0], 1, 1, 1), jnp.float32)
    if block.drop_path2 is not None:
        keep = block.drop_path2(keep, rngs=rngs)
    norm_scale, up, scale, bias, down = (
        jnp.asarray(param[...], jnp.float32)
        for param in (block.norm2.scale, fc1.kernel, act.scale, act.bias, fc2.kernel)
    )
    shortcut = None
    if block.res_scale2 is not None:
        shortcut = jnp.asarray(block.res_scale2.scale[...], jnp.float32)
    return residual_mlp(
        form,
        x,
        keep.reshape(-1),
        shortcut,
        norm_scale[:, None] * up,
        scale * down,
        bias * down.sum(0),
        norm=_norm_of(block),
    )


def takes_any_rows(norm: Any) -> bool:
    """Whether it is all the same to a norm how the tokens of an image are divided among rows."""
    return type(norm) is LayerNorm and norm.reduction_axes in (*_OVER_CHANNELS, _OVER_IMAGES)


def is_published_mlp(mlp: Any) -> bool:
    """Whether an MLP consists of the published layers, none of which a subclass may replace."""
    parts = [Linear, StarReLU, Linear]
    return type(mlp) is Mlp and [*map(type, (mlp.fc1, mlp.act, mlp.fc2))] == parts


def _norm_of(block: Any) -> Norm:
    norm = block.norm2
    return Norm(norm.epsilon, is_over_images=norm.reduction_axes == _OVER_IMAGES)
