"""The block of a MetaFormer (section 2 of the publication)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metaformer_jax.models import mlp_kernels
from metaformer_jax.models.arguments import check_rate
from metaformer_jax.models.layers import DropPath, ImageKeys, Mlp, NormFn, ResScale
from metaformer_jax.models.lowering.mlp_forms import ChannelsAlongLanes
from metaformer_jax.models.mixers import Attention, IdentityMixing, SepConv, TokenMixerFn
from metaformer_jax.models.normalization import LayerNorm

# Mixers to which it is all the same how the tokens of an image are divided among rows.
_TAKE_ANY_ROWS = (Attention, IdentityMixing)


class MetaFormerBlock(nnx.Module):
    """Two residual branches, token mixer and MLP, each with a norm and stochastic depth.

    Args:
        dim: channels.
        token_mixer: builds the mixer.
        norm: builds the two norms.
        resolution: (height, width) in tokens, for mixers that depend on it.
        mlp_ratio: hidden channels of the MLP, per channel.
        drop_path_rate: the probability that a branch is dropped for an image in training.
        res_scale_init: initial factors of the shortcuts, one per channel (ResScale,
            https://arxiv.org/abs/2110.09456); None for plain shortcuts.
        dtype: compute dtype.
        rngs: with a stream `params`, and `dropout` where branches are dropped.

    Raises:
        ValueError: `drop_path_rate` is not in [0, 1), or `mlp_ratio` leaves no hidden channel.
    """

    def __init__(
        self,
        dim: int,
        *,
        token_mixer: TokenMixerFn,
        norm: NormFn,
        resolution: tuple[int, int],
        mlp_ratio: float = 4,
        drop_path_rate: float = 0.0,
        res_scale_init: float | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        drop_path_rate = check_rate("drop_path_rate", drop_path_rate)
        self.dtype = dtype

        def drop_path() -> DropPath | None:
            return DropPath(drop_path_rate, rngs=rngs) if drop_path_rate > 0 else None

        def res_scale() -> ResScale | None:
            if res_scale_init is None:
                return None
            return ResScale(dim, init_value=res_scale_init, rngs=rngs)

        self.norm1 = norm(dim, dtype=dtype, rngs=rngs)
        self.token_mixer = token_mixer(dim, resolution=resolution, dtype=dtype, rngs=rngs)
        self.drop_path1 = nnx.data(drop_path())
        self.res_scale1 = nnx.data(res_scale())
        self.norm2 = norm(dim, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, expansion_ratio=mlp_ratio, dtype=dtype, rngs=rngs)
        self.drop_path2 = nnx.data(drop_path())
        self.res_scale2 = nnx.data(res_scale())

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        *,
        rngs: nnx.Rngs | ImageKeys | None = None,
        width: int | None = None,
    ) -> Float[Array, "b h w c"]:
        """Applies the block.

        Args:
            x: the feature maps, or their form after `fold`.
            rngs: as for the model.
            width: of the feature maps, needed where `x` has several of their rows side by side.
        """
        return self.transform_channels(self.mix_tokens(x, rngs=rngs, width=width), rngs=rngs)

    def fold(self, x: Float[Array, "b h w c"]) -> Float[Array, "b g rw c"]:
        """`x` in the form of the mixer (see `SepConv.fold`), or that of kernels for the MLP.

        Layers that may ask which tokens are neighbours, and are not this package's, get `x`.
        """
        if isinstance(self.token_mixer, SepConv):
            layers_take_any_rows = (
                mlp_kernels.takes_any_rows(self.norm1)
                and mlp_kernels.takes_any_rows(self.norm2)
                and mlp_kernels.is_published_mlp(self.mlp)
            )
            return self.token_mixer.fold(x) if layers_take_any_rows else x
        form = mlp_kernels.form_for(self, x) if type(self.token_mixer) in _TAKE_ANY_ROWS else None
        return form.enter(x) if isinstance(form, ChannelsAlongLanes) else x

    def mix_tokens(
        self,
        x: Float[Array, "b h w c"],
        *,
        rngs: nnx.Rngs | ImageKeys | None = None,
        width: int | None = None,
    ) -> Float[Array, "b h w c"]:
        """The first half of the block, with the token mixer."""
        x, normalized = _beside(self.norm1, x)
        images = normalized
        if width is not None and type(self.token_mixer) not in _TAKE_ANY_ROWS:
            b, rows, across, c = x.shape
            images = normalized.reshape(b, rows * across // width, width, c)
        # A mixer or a norm of one's own may not know of the compute dtype.
        dtype = jnp.promote_types(x.dtype, self.dtype)
        branch = self.token_mixer(images).reshape(x.shape).astype(dtype)
        return _add_branch(x, branch, self.drop_path1, self.res_scale1, rngs)

    def transform_channels(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | ImageKeys | None = None
    ) -> Float[Array, "b h w c"]:
        """The second half of the block, with the MLP."""
        if (form := mlp_kernels.form_for(self, x)) is not None:
            return mlp_kernels.transform(self, form, x, rngs)
        x, normalized = _beside(self.norm2, x)
        branch = self.mlp(normalized)
        return _add_branch(x, branch, self.drop_path2, self.res_scale2, rngs)


def _beside(norm: Any, x: Array) -> tuple[Array, Array]:
    """`x` itself, and `x` normalised."""
    # A subclass may compute something else.
    return norm.beside(x) if type(norm) is LayerNorm else (x, norm(x))


def _add_branch(
    x: Array,
    branch: Array,
    drop_path: DropPath | None,
    res_scale: ResScale | None,
    rngs: nnx.Rngs | ImageKeys | None,
) -> Array:
    if drop_path is not None:
        branch = drop_path(branch, rngs=rngs)
    if res_scale is not None:
        x = res_scale(x)
    return x + branch
