"""The layers that every MetaFormer is made of, apart from the token mixers."""

import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from metaformer_jax.models.arguments import check_rate, hidden_channels
from metaformer_jax.models.lowering.matmul import matmul
from metaformer_jax.models.lowering.promotion import promoted
from metaformer_jax.models.lowering.recomputation import PRODUCT
from metaformer_jax.models.lowering.star_relu import squared_relu, star_relu_matmul
from metaformer_jax.models.normalization import LayerNorm
from metaformer_jax.models.star_relu import StarReLU, activate_and_apply

_BLOCK = 2**16


@functools.partial(jax.jit, static_argnames="num_blocks")
def _normal_blocks(key: Array, num_blocks: int) -> Float[Array, "num_blocks block"]:
    keys = jax.random.split(key, num_blocks)
    return jax.lax.map(lambda key: jax.random.normal(key, (_BLOCK,), jnp.float32), keys)


def kernel_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Draws from a normal distribution of standard deviation 0.02.

    The publication truncates the distribution at +-2.0. That is a hundred standard deviations away,
    so nothing is ever truncated.

    Compiling the random numbers of each new shape takes a quarter of a second. The numbers are
    therefore drawn in a power of two of blocks, so that all shapes of a model share a few programs.
    """
    size = math.prod(shape)
    num_blocks = 1 << (math.ceil(size / _BLOCK) - 1).bit_length()
    noise = _normal_blocks(key, num_blocks).ravel()[:size].reshape(shape)
    return (0.02 * noise).astype(dtype)


class Frozen(nnx.Variable):
    """A variable that is drawn once and never trained (RandFormer's mixing matrices).

    It is not an `nnx.Param`, so gradients, optimisers and weight decay never see it.
    """


class NormFn(Protocol):
    """Builds a normalisation of `[b, h, w, c]` (or `[b, c]`) arrays."""

    def __call__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Module: ...


class HeadFn(Protocol):
    """Builds a classifier of `[b, c]` features; its module is called with `(x, *, rngs=None)`.

    A head with dropout should use `Dropout`, which accepts both kinds of `rngs`.
    """

    def __call__(
        self, dim: int, num_classes: int, *, dropout: float, rngs: nnx.Rngs
    ) -> nnx.Module: ...


def layer_norm(
    dim: int,
    *,
    axes: int | tuple[int, ...] = -1,
    use_bias: bool = False,
    epsilon: float = 1e-6,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> LayerNorm:
    """Layer normalisation, by default over the channels; statistics and affine part are float32.

    Args:
        dim: channels.
        axes: over which mean and variance are taken.
        use_bias: whether a bias is added after the scale.
        epsilon: added to the variance.
        dtype: of the result.
        rngs: Flax asks for it.
    """
    return LayerNorm(
        dim,
        epsilon=epsilon,
        use_bias=use_bias,
        reduction_axes=axes,
        dtype=dtype,
        rngs=rngs,
    )


def image_layer_norm(dim: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs) -> LayerNorm:
    """Layer normalisation over height, width and channels together, scaled per channel.

    PoolFormer's Modified Layer Normalization (https://arxiv.org/abs/2111.11418), without bias.
    """
    return layer_norm(dim, axes=(1, 2, 3), dtype=dtype, rngs=rngs)


class Linear(nnx.Linear):
    """A matrix product over the last axis, without bias."""

    def __init__(self, dim: int, out_dim: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(
            dim, out_dim, use_bias=False, kernel_init=kernel_init, dtype=dtype, rngs=rngs
        )

    def __call__(self, inputs: Float[Array, "*b c"]) -> Float[Array, "*b d"]:  # type: ignore[override]
        kernel = jnp.asarray(self.kernel[...], self.dtype)
        return checkpoint_name(matmul(jnp.asarray(inputs, self.dtype), kernel), PRODUCT)

    def after_star_relu(
        self, x: Float[Array, "*b c"], scale: Float[Array, " 1"], bias: Float[Array, " 1"]
    ) -> Float[Array, "*b d"]:
        """See `star_relu.AfterStarReLU`."""
        kernel = jnp.asarray(self.kernel[...], self.dtype)
        product = star_relu_matmul(jnp.asarray(x, self.dtype), scale, bias, kernel)
        return checkpoint_name(product, PRODUCT)


class ResScale(nnx.Module):
    """Multiplies a block's shortcut by a learned vector (https://arxiv.org/abs/2110.09456)."""

    def __init__(self, dim: int, *, init_value: float = 1.0, rngs: nnx.Rngs):
        init = nnx.initializers.constant(init_value)
        self.scale = nnx.Param(init(rngs.params(), (dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        wide, scale = promoted(x, self.scale[...])
        return (wide * scale).astype(x.dtype)


class ImageKeys:
    """Random keys for dropout, one per image of a batch; pass it to a model instead of `nnx.Rngs`.

    The masks of an image then depend on its own key alone: not on the other images of the batch,
    its position, the devices that share the batch, or the division into micro-batches.

    Args:
        keys: one for each image.
        num_draws: how often keys were drawn before.

    Raises:
        ValueError: `keys` is not a one-dimensional array of random keys.
    """

    def __init__(self, keys: Key[Array, " b"], *, num_draws: int | Int[Array, ""] = 0):
        is_array = isinstance(keys, jax.Array | np.ndarray)
        if is_array and keys.dtype == jnp.uint32 and keys.shape[1:] == _key_data_shape():
            keys = jax.random.wrap_key_data(keys)
        is_keys = is_array and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
        if not is_keys or keys.ndim != 1:
            got = f"{keys.dtype}{list(keys.shape)}" if is_array else type(keys).__name__
            raise ValueError(
                f"`keys` must be random keys, one for each image, got {got}. Give "
                "jax.random.split(jax.random.key(seed), num_images)."
            )
        # RBG's keys, of which TPUs draw faster, all draw as the first one does under `jax.vmap`.
        if "rbg" in str(jax.random.key_impl(keys)):
            data = jax.random.key_data(keys)[:, :2]
            keys = jax.random.wrap_key_data(data, impl="threefry2x32")
        self.keys = keys
        self._before = num_draws
        # A number of Python, which counts also where a part of a model is traced by itself.
        self._num_own = 0

    @property
    def num_draws(self) -> int | Int[Array, ""]:
        """How often keys were drawn so far."""
        return self._before + self._num_own

    def skip(self, num_draws: int) -> None:
        """Counts draws that were made from other `ImageKeys` of these keys."""
        self._num_own += num_draws

    def __call__(self) -> Key[Array, " b"]:
        """The keys for the next layer, one per image."""
        self._num_own += 1
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(self.keys, self.num_draws)


def _key_data_shape() -> tuple[int, ...]:
    """Of a raw key, by JAX's present default."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


class Dropout(nnx.Dropout):
    """Flax's dropout, which also accepts `ImageKeys`.

    Attributes:
        keep_prob: replaces `1 - rate` where that is an array, known only when the program runs.
    """

    keep_prob: Float[Array, ""] | None = None

    def __call__(
        self, inputs: Float[Array, "b *c"], *, deterministic: bool | None = None, rngs: Any = None
    ) -> Float[Array, "b *c"]:
        if not isinstance(rngs, ImageKeys):
            return super().__call__(inputs, deterministic=deterministic, rngs=rngs)
        if rngs.keys.shape != inputs.shape[:1]:
            raise ValueError(
                f"`rngs` must have a key for each of the {inputs.shape[0]} images, got "
                f"{rngs.keys.shape[0]}. Give ImageKeys(jax.random.split(key, len(images)))."
            )
        drop = functools.partial(super().__call__, deterministic=deterministic)
        is_active = not (self.deterministic if deterministic is None else deterministic)
        if is_active and self.keep_prob is not None:
            drop = functools.partial(self._drop, self.keep_prob)
        return jax.vmap(lambda image, key: drop(image[None], rngs=key)[0])(inputs, rngs())

    def _drop(self, keep_prob: Array, inputs: Array, *, rngs: Array) -> Array:
        # The same as Flax's dropout, for a rate that need not be a Python number.
        shape = [
            1 if axis in self.broadcast_dims else size for axis, size in enumerate(inputs.shape)
        ]
        mask = jax.random.bernoulli(rngs, keep_prob, shape)
        return jnp.where(mask, inputs / keep_prob.astype(inputs.dtype), 0)


class DropPath(Dropout):
    """Stochastic depth: drops a residual branch for whole samples (https://arxiv.org/abs/1603.09382).

    Every instance forks its own stream of random keys; if a stream is passed with the call, every
    instance takes the next key of it. Either way no two branches of a model share a mask.
    """

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        super().__init__(rate, broadcast_dims=(1, 2, 3), rngs=rngs)


class Mlp(nnx.Module):
    """Two linear layers with a StarReLU between them, without biases."""

    def __init__(
        self, dim: int, *, expansion_ratio: float = 4, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        hidden_dim = hidden_channels(dim, expansion_ratio=expansion_ratio)
        self.fc1 = Linear(dim, hidden_dim, dtype=dtype, rngs=rngs)
        self.act = StarReLU(rngs=rngs)
        self.fc2 = Linear(hidden_dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return activate_and_apply(self.act, self.fc2, self.fc1(x))


class Downsampling(nnx.Module):
    """A strided convolution with a norm before it (stages 2 to 4) or after it (the stem)."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        kernel_size: int,
        stride: int,
        padding: int,
        pre_norm: bool = False,
        post_norm: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.pre_norm = nnx.data(layer_norm(dim, dtype=dtype, rngs=rngs) if pre_norm else None)
        self.conv = nnx.Conv(
            dim,
            out_dim,
            kernel_size=(kernel_size, kernel_size),
            strides=stride,
            padding=padding,
            kernel_init=kernel_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.post_norm = nnx.data(
            layer_norm(out_dim, dtype=dtype, rngs=rngs) if post_norm else None
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        x = self.conv(x)
        if self.post_norm is not None:
            x = self.post_norm(x)
        return x


class LinearHead(nnx.Module):
    """Dropout and one linear layer, in float32.

    Args:
        dim: features.
        num_classes: logits.
        dropout: rate, before the layer.
        rngs: with a stream `params`, and `dropout` where there is dropout.

    Raises:
        ValueError: `dropout` is not in [0, 1).
    """

    def __init__(self, dim: int, num_classes: int, *, dropout: float = 0.0, rngs: nnx.Rngs):
        dropout = check_rate("dropout", dropout)
        self.dropout = nnx.data(Dropout(dropout, rngs=rngs) if dropout else None)
        self.fc = nnx.Linear(dim, num_classes, kernel_init=kernel_init, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b c"], *, rngs: nnx.Rngs | ImageKeys | None = None
    ) -> Float[Array, "b classes"]:
        if self.dropout is not None:
            x = self.dropout(x, rngs=rngs)
        return self.fc(x)


class MlpHead(nnx.Module):
    """Linear, squared ReLU, layer norm, dropout and linear, in float32 (ConvFormer, CAFormer).

    Args:
        dim: features.
        num_classes: logits.
        expansion_ratio: hidden features, per feature.
        dropout: rate, before the last layer.
        rngs: with a stream `params`, and `dropout` where there is dropout.

    Raises:
        ValueError: `expansion_ratio` leaves no hidden feature, or `dropout` is not in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        expansion_ratio: float = 4,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        dropout = check_rate("dropout", dropout)
        hidden_dim = hidden_channels(dim, expansion_ratio=expansion_ratio)
        self.fc1 = nnx.Linear(dim, hidden_dim, kernel_init=kernel_init, rngs=rngs)
        self.norm = layer_norm(hidden_dim, use_bias=True, epsilon=1e-5, rngs=rngs)
        self.dropout = nnx.data(Dropout(dropout, rngs=rngs) if dropout else None)
        self.fc2 = nnx.Linear(hidden_dim, num_classes, kernel_init=kernel_init, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b c"], *, rngs: nnx.Rngs | ImageKeys | None = None
    ) -> Float[Array, "b classes"]:
        x = self.norm(squared_relu(self.fc1(x)))
        if self.dropout is not None:
            x = self.dropout(x, rngs=rngs)
        return self.fc2(x)
