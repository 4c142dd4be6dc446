"""The five token mixers, and the interface that a token mixer must have."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from metaformer_jax.models.arguments import at_least, hidden_channels
from metaformer_jax.models.layers import Frozen, Linear, kernel_init
from metaformer_jax.models.lowering import depthwise_banded
from metaformer_jax.models.lowering.attention import self_attention, split_heads
from metaformer_jax.models.lowering.depthwise import depthwise_conv2d
from metaformer_jax.models.lowering.platform import is_for
from metaformer_jax.models.lowering.pooling import average_pool
from metaformer_jax.models.lowering.promotion import wide_dtype
from metaformer_jax.models.lowering.recomputation import PRODUCT
from metaformer_jax.models.lowering.star_relu_depthwise import star_relu_depthwise_conv2d
from metaformer_jax.models.star_relu import StarReLU, activate_and_apply


class TokenMixerFn(Protocol):
    """Builds the token mixer of one block: a module that maps `[b, h, w, c]` to the same shape.

    `resolution` is the stage's (height, width) in tokens at the image size that the model is built
    for. A mixer that works only at this resolution stores it as its attribute `resolution`, so that
    the model can refuse other images with a clear message; other mixers ignore it. Use
    `functools.partial` to fix further arguments.
    """

    def __call__(
        self, dim: int, *, resolution: tuple[int, int], dtype: Any, rngs: nnx.Rngs
    ) -> nnx.Module: ...


class IdentityMixing(nnx.Module):
    """Mixes nothing (IdentityFormer). All arguments are those of any mixer, and do not matter."""

    def __init__(
        self,
        dim: int,
        *,
        resolution: tuple[int, int] | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del dim, resolution, dtype, rngs

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return x


class RandomMixing(nnx.Module):
    """Mixes all tokens by one random matrix that is never trained (RandFormer).

    Each row is the softmax of uniform random numbers. The matrix fits one number of tokens only.

    Args:
        dim: channels, which do not matter.
        resolution: (height, width) in tokens of all inputs; others raise a ValueError.
        dtype: compute dtype.
        rngs: with a stream `params`.
    """

    def __init__(
        self,
        dim: int,
        *,
        resolution: tuple[int, int],
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del dim
        height, width = resolution
        self.resolution = (height, width)
        self.dtype = dtype
        num_tokens = height * width
        noise = jax.random.uniform(rngs.params(), (num_tokens, num_tokens), jnp.float32)
        self.random_matrix = Frozen(jax.nn.softmax(noise, axis=-1))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        if (h, w) != self.resolution:
            raise ValueError(
                f"`x` must have the {self.resolution[0]}x{self.resolution[1]} tokens that this "
                f"RandomMixing was built for, got {h}x{w}. Build it with resolution=({h}, {w})."
            )
        x, matrix = (jnp.asarray(a, self.dtype) for a in (x, self.random_matrix[...]))
        return jnp.einsum("mn,bnc->bmc", matrix, x.reshape(b, h * w, c)).reshape(b, h, w, c)


class Pooling(nnx.Module):
    """Local average minus the input (PoolFormer, https://arxiv.org/abs/2111.11418).

    Args:
        dim: channels, which do not matter.
        pool_size: side of the window in tokens, at stride 1. An even window has one token more
            below and to the right. Tokens outside the image do not count.
        resolution: does not matter.
        dtype: does not matter: averages are float32, the result has the dtype of the input.
        rngs: not used.

    Raises:
        ValueError: `pool_size` is no whole number from 1 on.
    """

    def __init__(
        self,
        dim: int,
        *,
        pool_size: int = 3,
        resolution: tuple[int, int] | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del dim, resolution, dtype, rngs
        self.pool_size = at_least(1, pool_size=pool_size)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        # The difference of two close numbers: in bfloat16 little of it would be left.
        wide = x.astype(wide_dtype(x.dtype))
        return (average_pool(wide, self.pool_size) - wide).astype(x.dtype)


class SepConv(nnx.Module):
    """MobileNetV2's inverted separable convolution (ConvFormer; https://arxiv.org/abs/1801.04381).

    A linear layer, a StarReLU, a depthwise convolution and a second linear layer, without biases.

    Args:
        dim: channels.
        expansion_ratio: channels between the linear layers, per channel.
        kernel_size: side of the depthwise filters in tokens; odd.
        resolution: does not matter.
        dtype: compute dtype.
        rngs: with a stream `params`.

    Raises:
        ValueError: `expansion_ratio` leaves no channel, or `kernel_size` is not odd.
    """

    def __init__(
        self,
        dim: int,
        *,
        expansion_ratio: float = 2,
        kernel_size: int = 7,
        resolution: tuple[int, int] | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del resolution
        hidden_dim = hidden_channels(dim, expansion_ratio=expansion_ratio)
        self.pwconv1 = Linear(dim, hidden_dim, dtype=dtype, rngs=rngs)
        self.act1 = StarReLU(rngs=rngs)
        self.dwconv = DepthwiseConv(hidden_dim, kernel_size=kernel_size, dtype=dtype, rngs=rngs)
        self.pwconv2 = Linear(hidden_dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        rows = self.fold(x)
        hidden = self.pwconv1(rows)
        hidden = hidden.reshape(*x.shape[:-1], hidden.shape[-1])
        mixed = activate_and_apply(self.act1, self.dwconv, hidden)
        mixed = mixed.reshape(*rows.shape[:-1], mixed.shape[-1])
        return self.pwconv2(mixed).reshape(x.shape)

    def fold(self, x: Float[Array, "b h w c"]) -> Float[Array, "b g rw c"]:
        """`x`, with rows side by side where TPUs convolve this form (`depthwise_banded`).

        The linear layers before and after are faster in the same form, too.
        """
        in_rows = (
            is_for("tpu")
            and isinstance(self.dwconv, DepthwiseConv)
            and depthwise_banded.takes_rows(x.shape, self.dwconv.kernel.shape)
        )
        return depthwise_banded.fold(x) if in_rows else x


class DepthwiseConv(nnx.Module):
    """One square filter per channel, without bias."""

    def __init__(self, dim: int, *, kernel_size: int, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kernel_size = at_least(1, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(
                f"`kernel_size` must be odd, got {kernel_size}. Only odd sizes keep the image's "
                "size with symmetric padding."
            )
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (kernel_size, kernel_size, dim)))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        kernel = jnp.asarray(self.kernel[...], self.dtype)
        return checkpoint_name(depthwise_conv2d(jnp.asarray(x, self.dtype), kernel), PRODUCT)

    def after_star_relu(
        self, x: Float[Array, "b h w c"], scale: Float[Array, " 1"], bias: Float[Array, " 1"]
    ) -> Float[Array, "b h w c"]:
        """See `star_relu.AfterStarReLU`."""
        kernel = jnp.asarray(self.kernel[...], self.dtype)
        mixed = star_relu_depthwise_conv2d(jnp.asarray(x, self.dtype), scale, bias, kernel)
        return checkpoint_name(mixed, PRODUCT)


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens, without biases (CAFormer; https://arxiv.org/abs/1706.03762).

    Args:
        dim: channels.
        head_dim: channels of a head. There are `dim // head_dim` heads, but at least one.
        resolution: does not matter.
        dtype: compute dtype; the softmax is float32.
        rngs: with a stream `params`.

    Raises:
        ValueError: `head_dim` is no whole number from 1 on.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        resolution: tuple[int, int] | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del resolution
        self.head_dim = at_least(1, head_dim=head_dim)
        self.num_heads = max(1, dim // self.head_dim)
        attention_dim = self.num_heads * self.head_dim
        self.qkv = Linear(dim, 3 * attention_dim, dtype=dtype, rngs=rngs)
        self.proj = Linear(attention_dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.proj(self_attention(self.qkv(x), self.num_heads))

    def weights(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k n n"]:
        """Attention weights of each token (third axis) for each token (last axis), in float32."""
        query, key, _ = split_heads(self.qkv(x), self.num_heads)
        scores = jnp.einsum("btkd,bskd->bkts", query, key, preferred_element_type=jnp.float32)
        return jax.nn.softmax(scores * self.head_dim**-0.5, axis=-1)
