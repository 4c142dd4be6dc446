"""MetaFormer: the specification, and the model built from it (section 2 of the publication)."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from metaformer_jax.models.arguments import (
    as_pair,
    at_least,
    check_rate,
    check_rngs,
    hidden_channels,
    is_finite,
    is_floating,
    whole,
)
from metaformer_jax.models.block import MetaFormerBlock
from metaformer_jax.models.layers import (
    Downsampling,
    HeadFn,
    ImageKeys,
    LinearHead,
    NormFn,
    layer_norm,
)
from metaformer_jax.models.lowering.promotion import wide_dtype
from metaformer_jax.models.mixers import TokenMixerFn
from metaformer_jax.models.stages import drops, remat_here, remat_name, run_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvGeometry:
    """Kernel size, stride and padding of a downsampling convolution, in pixels.

    Raises:
        ValueError: one of them is not a whole number, or out of range.
    """

    kernel_size: int
    stride: int
    padding: int

    def __post_init__(self):
        for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0)):
            value = at_least(least, **{name: getattr(self, name)})
            object.__setattr__(self, name, value)

    def out_size(self, size: int) -> int:
        """Height (or width) of the output for that of the input; below 1 for too small an input."""
        return (size + 2 * self.padding - self.kernel_size) // self.stride + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaFormerSpec:
    """The architecture of a MetaFormer, stage by stage.

    Attributes:
        depths: number of blocks per stage.
        dims: number of channels per stage.
        token_mixers: one mixer factory per stage, see `TokenMixerFn`.
        norm: the norm inside the blocks.
        head: the classifier: `LinearHead`, `MlpHead` or your own (`HeadFn`).
        mlp_ratio: hidden channels of a block's MLP, as a multiple of the block's channels.
        res_scale_init: initial value of ResScale per stage; None for no ResScale.
        stem: the first downsampling convolution.
        downsampling: all later downsampling convolutions.

    Example:
        A small network with pooling first and attention last::

            spec = MetaFormerSpec(
                depths=(2, 2),
                dims=(64, 128),
                token_mixers=(Pooling, Attention),
                res_scale_init=(None, 1.0),
            )
            model = MetaFormer(spec, num_classes=10, image_size=64, rngs=nnx.Rngs(0))

    Raises:
        ValueError: the fields have different numbers of stages, or a number is out of range.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    token_mixers: tuple[TokenMixerFn, ...]
    norm: NormFn = layer_norm
    head: HeadFn = LinearHead
    mlp_ratio: float = 4
    res_scale_init: tuple[float | None, ...] = (None, None, 1.0, 1.0)
    stem: ConvGeometry = ConvGeometry(kernel_size=7, stride=4, padding=2)
    downsampling: ConvGeometry = ConvGeometry(kernel_size=3, stride=2, padding=1)

    def __post_init__(self):
        for name in ("depths", "dims", "token_mixers", "res_scale_init"):
            try:
                object.__setattr__(self, name, tuple(getattr(self, name)))
            except TypeError as error:
                raise ValueError(
                    f"`{name}` must have one entry for each stage, got {getattr(self, name)!r}. "
                    "Give a tuple, also for a single stage."
                ) from error
        if not self.depths:
            raise ValueError("`depths` must name at least one stage, got ().")
        for name in ("dims", "token_mixers", "res_scale_init"):
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(
                    f"`{name}` must have one entry for each of the {len(self.depths)} stages in "
                    f"`depths`, got {len(getattr(self, name))}."
                )
        for name in ("depths", "dims"):
            numbers = tuple(map(whole, getattr(self, name)))
            if any(number is None or number < 1 for number in numbers):
                raise ValueError(
                    f"`{name}` must be positive whole numbers, got {getattr(self, name)}."
                )
            object.__setattr__(self, name, numbers)
        if not all(value is None or is_finite(value) for value in self.res_scale_init):
            raise ValueError(
                "`res_scale_init` must be None or a finite number for each stage, got "
                f"{self.res_scale_init}."
            )
        hidden_channels(min(self.dims), mlp_ratio=self.mlp_ratio)
        for name in ("stem", "downsampling"):
            if not isinstance(getattr(self, name), ConvGeometry):
                raise ValueError(
                    f"`{name}` must be a ConvGeometry, got {getattr(self, name)!r}. Give "
                    "ConvGeometry(kernel_size=..., stride=..., padding=...)."
                )
        for mixer in self.token_mixers:
            if isinstance(mixer, nnx.Module):
                raise ValueError(
                    "`token_mixers` must be classes or functions that build a mixer, got a "
                    f"{type(mixer).__name__} that is built already. Each block has its own."
                )

    def stage_resolutions(self, image_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """The (height, width) of each stage's output, in tokens, for images of this size.

        Raises:
            ValueError: nothing is left of the image at some stage.
        """
        size = as_pair(image_size)
        resolutions = []
        for stage in range(len(self.depths)):
            geometry = self.stem if stage == 0 else self.downsampling
            size = (geometry.out_size(size[0]), geometry.out_size(size[1]))
            if min(size) < 1:
                height, width = as_pair(image_size)
                raise ValueError(
                    f"Images must be large enough for every stage, got {height}x{width} pixels: "
                    f"stage {stage + 1}, a convolution of {geometry}, would have no output. "
                    "Use larger images or a spec with smaller strides."
                )
            resolutions.append(size)
        return resolutions


class MetaFormer(nnx.Module):
    """A hierarchical MetaFormer: stages of a downsampling convolution and blocks, a norm, a head.

    Call it on normalised images `[b, h, w, in_channels]` to get logits `[b, num_classes]`. With
    `num_classes=0` it returns the normalised pooled feature `[b, c]` instead.

    Stochastic depth and head dropout are active in training mode (`model.train()`, which is the
    state after building, as in all of NNX) and inactive after `model.eval()`. They draw from the
    `rngs` passed with the call (`nnx.Rngs`, or `ImageKeys` for masks that depend on the image
    alone); without these, from streams forked from the `rngs` given here.

    Reverse-mode differentiation works to any order (with `scan`, to the first order only).
    Forward mode (`jax.jvp`) is not supported.

    Args:
        spec: the architecture.
        num_classes: classes of the head; 0 for no head.
        in_channels: channels of the images.
        image_size: pixels per side, or (height, width). Mixers that depend on the number of tokens
            (`RandomMixing`) are built for this size; a model without such mixers accepts any size.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0 at the
            first block. As in the published code, the block of a model with a single one is the
            first, and never dropped.
        head_dropout: dropout rate in the head.
        dtype: compute dtype of stem and stages. Parameters, the statistics of norms, softmax and
            the head are always float32.
        remat: which part of each block the backward pass recomputes instead of keeping it, one of
            `stages.REMAT`. Less memory, usually more time, the same results, except that masks not
            drawn from `ImageKeys` are different ones. True means "block"; "auto" means "none", and
            when compiled for TPUs "mlp" in stages without kernels for it.
        scan: runs the blocks of a stage as a loop with this many blocks per iteration, for a
            shorter compilation and a slower step with the same parameters; 0 uses no loop. Must be
            0 for second derivatives: in a loop, JAX (0.10.2) mixes up the residuals of custom
            gradient rules.
        rngs: random keys for the initial values (`params`) and, if a rate is positive, for the
            masks (`dropout`).

    Raises:
        ValueError: a number is out of range, or `image_size` is too small for the stages.
    """

    def __init__(
        self,
        spec: MetaFormerSpec,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 224,
        drop_path_rate: float = 0.0,
        head_dropout: float = 0.0,
        dtype: Any = jnp.float32,
        remat: str | bool = "none",
        scan: int = 0,
        rngs: nnx.Rngs,
    ):
        if not isinstance(spec, MetaFormerSpec):
            raise ValueError(
                f"`spec` must be a MetaFormerSpec, got {spec!r}. Published models are built by "
                "create_model(name)."
            )
        scan = at_least(0, scan=scan)
        num_classes = at_least(0, num_classes=num_classes)
        in_channels = at_least(1, in_channels=in_channels)
        drop_path_rate = check_rate("drop_path_rate", drop_path_rate)
        head_dropout = check_rate("head_dropout", head_dropout)
        if not is_floating(dtype):
            raise ValueError(
                f"`dtype` must be a floating-point type, got {dtype!r}. Use jnp.float32 or "
                "jnp.bfloat16."
            )
        resolutions = spec.stage_resolutions(image_size)
        check_rngs(rngs, has_dropout=drop_path_rate > 0 or head_dropout > 0)
        rngs = _with_fast_param_keys(rngs)

        self.spec = spec
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.image_size = as_pair(image_size)
        self.dtype = dtype
        self.remat = remat_name(remat)
        self.scan = scan
        self.downsample_layers: nnx.List[Downsampling] = nnx.List([])
        self.stages: nnx.List[nnx.List[MetaFormerBlock]] = nnx.List([])
        drop_path_rates = iter(np.linspace(0, drop_path_rate, sum(spec.depths)).tolist())
        in_dims = (in_channels, *spec.dims)
        for stage, (in_dim, dim) in enumerate(itertools.pairwise(in_dims)):
            geometry = spec.stem if stage == 0 else spec.downsampling
            self.downsample_layers.append(
                Downsampling(
                    in_dim,
                    dim,
                    **dataclasses.asdict(geometry),
                    pre_norm=stage > 0,
                    post_norm=stage == 0,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            blocks = [
                MetaFormerBlock(
                    dim,
                    token_mixer=spec.token_mixers[stage],
                    norm=spec.norm,
                    resolution=resolutions[stage],
                    mlp_ratio=spec.mlp_ratio,
                    drop_path_rate=next(drop_path_rates),
                    res_scale_init=spec.res_scale_init[stage],
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(spec.depths[stage])
            ]
            self.stages.append(nnx.List(blocks))
        self.norm = layer_norm(spec.dims[-1], use_bias=True, rngs=rngs)
        self.head = nnx.data(
            spec.head(spec.dims[-1], num_classes, dropout=head_dropout, rngs=rngs)
            if num_classes
            else None
        )

    def features(
        self, images: Float[Array, "b h w c"], *, rngs: nnx.Rngs | ImageKeys | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """The output of each stage, `[b, h, w, c]` in the compute dtype, for dense tasks.

        Raises:
            ValueError: rank, channels, size or dtype of the images do not fit the model.
        """
        self.check_images(images)
        if not isinstance(rngs, nnx.Rngs | ImageKeys | None):
            raise ValueError(
                f"`rngs` must be nnx.Rngs or ImageKeys, got {type(rngs).__name__}. With a single "
                "key all layers would drop alike: give nnx.Rngs(dropout=key)."
            )
        x = jnp.asarray(images, self.dtype)
        remat = remat_here(self.remat)
        if not any(map(drops, itertools.chain(*self.stages))):
            rngs = None
        elif (remat != "none" or self.scan) and isinstance(rngs, nnx.Rngs):
            # Flax's streams count in a variable, which cannot change inside a loop or `remat`.
            rngs = ImageKeys(jax.random.split(rngs.dropout(), len(images)))
        outputs = []
        for downsample, blocks in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x)
            x = run_blocks(blocks, x, rngs=rngs, remat=remat, scan=self.scan)
            outputs.append(x)
        return tuple(outputs)

    def pool(self, x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
        """Averages the last stage's output over all tokens and normalises it, in float32."""
        wide = wide_dtype(x.dtype)
        return self.norm(jnp.mean(x, axis=(1, 2), dtype=wide))

    def __call__(
        self, images: Float[Array, "b h w c"], *, rngs: nnx.Rngs | ImageKeys | None = None
    ) -> Float[Array, "b classes"]:
        """The logits in float32; with `num_classes=0` the normalised pooled feature.

        Raises:
            ValueError: rank, channels, size or dtype of the images do not fit the model.
        """
        x = self.pool(self.features(images, rngs=rngs)[-1])
        return x if self.head is None else self.head(x, rngs=rngs)

    def check_images(self, images: Array) -> None:
        """Refuses what the model does not take, by type and shape alone.

        Raises:
            ValueError: the images are no array of floating-point numbers, or have another rank,
                channel count or size.
        """
        if not is_floating(getattr(images, "dtype", None)):
            # Other libraries' arrays have types of their own, whose names would look right.
            is_array = isinstance(images, np.ndarray | jax.Array)
            kind = images.dtype if is_array else type(images).__name__
            raise ValueError(
                "`images` must be NumPy's or JAX's array of floating-point numbers, normalised, "
                f"got {kind}. Of pixels from 0 to 255 that is (images / 255 - mean) / std."
            )
        if images.ndim != 4:
            raise ValueError(
                "`images` must have 4 axes [batch, height, width, channels], got shape "
                f"{images.shape}. A single image needs a leading axis: images[None]."
            )
        if images.shape[-1] != self.in_channels:
            hint = "Build the model with in_channels to match."
            if images.shape[1] == self.in_channels:
                hint = "These look like channels-first images: use images.transpose(0, 2, 3, 1)."
            raise ValueError(
                f"`images` must have {self.in_channels} channels in the last axis, got shape "
                f"{images.shape}. {hint}"
            )
        size = (images.shape[1], images.shape[2])
        resolutions = self.spec.stage_resolutions(size)
        for resolution, blocks in zip(resolutions, self.stages, strict=True):
            # Surgery may leave a stage without blocks.
            mixer = blocks[0].token_mixer if blocks else None
            if tuple(getattr(mixer, "resolution", resolution)) != resolution:
                built_for = "x".join(map(str, self.image_size))
                raise ValueError(
                    f"`images` must be {built_for} pixels, the size that this model's "
                    f"{type(mixer).__name__} was built for, got "
                    f"{size[0]}x{size[1]}. Build the model with "
                    f"image_size={size[0] if size[0] == size[1] else size}, or resize the images."
                )


class _ParamKeys(nnx.RngStream):
    """Keys for initial values, counted by a Python int.

    NNX counts in an array. Under `jit` and `eval_shape` each increment of it takes time in
    proportion to everything traced before: 4.0 s instead of 0.6 s for CAFormer-B36.
    """

    def __init__(self, key: Array, *, tag: str = "params"):
        super().__init__(key, tag=tag)
        self.num_keys = 0

    def __call__(self) -> Array:
        self.num_keys += 1
        return jax.random.fold_in(self.key[...], self.num_keys)


def _with_fast_param_keys(rngs: nnx.Rngs) -> nnx.Rngs:
    fast = nnx.Rngs()
    for name, stream in (*rngs.items(), ("params", _ParamKeys(rngs.params()))):
        setattr(fast, name, stream)
    return fast
