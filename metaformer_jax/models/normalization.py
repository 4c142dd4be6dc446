"""Layer normalisation with Flax's parameters and this package's lowering."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from metaformer_jax.models.lowering import normalization_triton
from metaformer_jax.models.lowering.normalization import normalize, normalize_beside
from metaformer_jax.models.lowering.triton import has_kernels


class LayerNorm(nnx.LayerNorm):
    """Flax's layer normalisation with a custom backward pass; with a scale, optionally a bias.

    Statistics and the affine part are float32 (https://arxiv.org/abs/1607.06450).
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        use_bias: bool = True,
        reduction_axes: int | tuple[int, ...] = -1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Those settings of Flax's that are kept.

        Args:
            num_features: channels, the last axis.
            epsilon: added to the variance.
            use_bias: whether a bias is added.
            reduction_axes: over which mean and variance are taken.
            dtype: of the result; by default that which input and scale have together.
            param_dtype: of scale and bias.
            rngs: Flax asks for it.
        """
        super().__init__(
            num_features,
            epsilon=epsilon,
            use_bias=use_bias,
            reduction_axes=reduction_axes,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b *c"]) -> Float[Array, "b *c"]:  # type: ignore[override]
        return self.beside(x)[1]

    def beside(self, x: Float[Array, "b *c"]) -> tuple[Float[Array, "b *c"], Float[Array, "b *c"]]:
        """`x` itself, and `x` normalised: on GPUs one kernel adds up the gradients of both.

        Raises:
            ValueError: `x` has too few axes.
        """
        axes = self.reduction_axes
        axes = (axes,) if isinstance(axes, int) else axes
        if any(not -x.ndim <= axis < x.ndim for axis in axes):
            raise ValueError(
                f"`x` must have the axes {axes} that are normalised over, got shape {x.shape}. "
                "Give another norm, or reduction_axes."
            )
        axes = tuple(axis % x.ndim for axis in axes)
        scale: Array = self.scale[...]  # type: ignore[index]
        dtype = self.dtype or jnp.promote_types(x.dtype, scale.dtype)
        is_short = axes == (x.ndim - 1,) and x.shape[-1] <= normalization_triton.MOST_CHANNELS
        if is_short and self.bias is None and has_kernels(x, scale):
            return normalize_beside(x, scale, self.epsilon, dtype)
        normalized = normalize(x, scale, axes, self.epsilon)
        if self.bias is not None:
            normalized = normalized + self.bias[...]
        return x, normalized.astype(dtype)
