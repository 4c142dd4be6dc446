"""The block of a MetaFormer (section 2 of the publication)."""

from types import NoneType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metaformer_jax.models import mlp_mosaic
from metaformer_jax.models.layers import DropPath, ImageKeys, Linear, Mlp, NormFn, ResScale
from metaformer_jax.models.mixers import Attention, IdentityMixing, SepConv, TokenMixerFn
from metaformer_jax.models.mlp_forms import Form, Norm, Rows
from metaformer_jax.models.normalization import LayerNorm
from metaformer_jax.models.residual_mlp import residual_mlp
from metaformer_jax.models.star_relu import StarReLU

# Mixers that do not know which tokens are neighbours.
_TAKE_ANY_ROWS = (Attention, IdentityMixing)
# Axes over which norms have kernels.
_OVER_CHANNELS, _OVER_IMAGES = (-1, (-1,)), (1, 2, 3)


class MetaFormerBlock(nnx.Module):
    """Two residual branches, token mixer and MLP, each with a norm and stochastic depth."""

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
            return self.token_mixer.fold(x) if self._takes_any_rows_around_mixer() else x
        form = self.mlp_form(x) if type(self.token_mixer) in _TAKE_ANY_ROWS else None
        return form.enter(x) if isinstance(form, Rows) else x

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
        branch = self.token_mixer(images).reshape(x.shape)
        return _add_branch(x, branch, self.drop_path1, self.res_scale1, rngs)

    def transform_channels(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | ImageKeys | None = None
    ) -> Float[Array, "b h w c"]:
        """The second half of the block, with the MLP."""
        if (form := self.mlp_form(x)) is not None:
            return self._transform_by_kernels(form, x, rngs)
        x, normalized = _beside(self.norm2, x)
        branch = self.mlp(normalized)
        return _add_branch(x, branch, self.drop_path2, self.res_scale2, rngs)

    def mlp_form(self, x: Float[Array, "b h w c"]) -> Form | None:
        """That in which kernels for TPUs take `x` for the second half; None without kernels.

        There are some for the published layers, not for subclasses of them.
        """
        norm: Any = self.norm2
        mlp = self.mlp
        is_published = (
            _takes_any_rows(norm)
            and norm.bias is None
            and _is_published_mlp(mlp)
            and type(self.drop_path2) in (DropPath, NoneType)
            and type(self.res_scale2) in (ResScale, NoneType)
            and mlp.fc1.dtype == mlp.fc2.dtype == x.dtype
        )
        if not is_published:
            return None
        # Attention takes matrices of the tokens of an image.
        may_turn = not isinstance(self.token_mixer, Attention)
        return mlp_mosaic.form_of(
            x, mlp.fc1.out_features, norm=self._norm_of_kernels(), may_turn=may_turn
        )

    def _takes_any_rows_around_mixer(self) -> bool:
        norms = (self.norm1, self.norm2)
        return all(map(_takes_any_rows, norms)) and _is_published_mlp(self.mlp)

    def _norm_of_kernels(self) -> Norm:
        norm: Any = self.norm2
        return Norm(norm.epsilon, is_over_images=norm.reduction_axes == _OVER_IMAGES)

    def _transform_by_kernels(
        self, form: Form, x: Float[Array, "b h w c"], rngs: nnx.Rngs | ImageKeys | None
    ) -> Float[Array, "b h w c"]:
        norm: Any = self.norm2
        fc1, act, fc2 = self.mlp.fc1, self.mlp.act, self.mlp.fc2
        keep = jnp.ones((x.shape[0], 1, 1, 1), jnp.float32)
        if self.drop_path2 is not None:
            keep = self.drop_path2(keep, rngs=rngs)
        norm_scale, up, scale, bias, down = (
            jnp.asarray(param[...], jnp.float32)
            for param in (norm.scale, fc1.kernel, act.scale, act.bias, fc2.kernel)
        )
        shortcut = None
        if self.res_scale2 is not None:
            shortcut = jnp.asarray(self.res_scale2.scale[...], jnp.float32)
        return residual_mlp(
            form,
            x,
            keep.reshape(-1),
            shortcut,
            norm_scale[:, None] * up,
            scale * down,
            bias * down.sum(0),
            norm=self._norm_of_kernels(),
        )


def _takes_any_rows(norm: Any) -> bool:
    return type(norm) is LayerNorm and norm.reduction_axes in (*_OVER_CHANNELS, _OVER_IMAGES)


def _is_published_mlp(mlp: Any) -> bool:
    parts = [Linear, StarReLU, Linear]
    return type(mlp) is Mlp and [*map(type, (mlp.fc1, mlp.act, mlp.fc2))] == parts


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
