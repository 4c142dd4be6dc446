"""Runs the blocks of a stage: one by one or as a loop, keeping or computing anew what is inside."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from metaformer_jax.models.lanes import is_for_tpus
from metaformer_jax.models.layers import PRODUCT, Dropout, ImageKeys
from metaformer_jax.models.normalization import STATISTICS

# What the backward pass computes anew of a block, in place of keeping it. What norms divide by and
# subtract, two numbers a token, is kept by all.
REMAT = (
    # Nothing.
    "none",
    # The second half, MLP and norm, from its input.
    "mlp",
    # All but the results of linear layers, depthwise convolutions and attention.
    "products",
    # All of it.
    "block",
)
# In place of one of these: the fastest, by the estimate of the compiler for TPUs.
AUTO = "auto"


def remat_name(remat: str | bool) -> str:
    """The name in `REMAT`, or `AUTO`; True means "block", False "none".

    Raises:
        ValueError: there is no such name.
    """
    name = {True: "block", False: "none"}.get(remat, remat) if isinstance(remat, bool) else remat
    if name not in (AUTO, *REMAT):
        allowed = ", ".join(map(repr, (AUTO, *REMAT)))
        raise ValueError(f"`remat` must be one of {allowed}, got {remat!r}.")
    return name


def remat_here(remat: str | bool) -> str:
    """The name in `REMAT` for what is traced now: `AUTO` is "mlp" for TPUs, and elsewhere "none".

    Raises:
        ValueError: there is no such name.
    """
    name = remat_name(remat)
    return ("mlp" if is_for_tpus() else "none") if name == AUTO else name


def run_blocks(
    blocks: Sequence[Any],
    x: Float[Array, "b h w c"],
    *,
    rngs: nnx.Rngs | ImageKeys | None,
    remat: str = "none",
    scan: int = 0,
) -> Float[Array, "b h w c"]:
    """One block after the other.

    Args:
        blocks: of one stage.
        x: the first one's input.
        rngs: as of the model; `nnx.Rngs` count in a variable, which neither a loop nor `remat` lets
            change: with these it must be `ImageKeys` where it is not None.
        remat: one of `REMAT`.
        scan: blocks in each round of a loop; 0 writes all blocks out. The parameters of a loop's
            blocks are stacked when it starts and are outside it as they ever were. Blocks whose
            masks would come from streams of their own, and neighbours that are not built alike,
            are written out.
    """
    for _, group in itertools.groupby(blocks, key=_description):
        alike = list(group)
        # As they stay from block to block, kept or not.
        rows, width = alike[0].fold(x), x.shape[2]
        if scan and len(alike) > scan and _may_loop(alike, rngs):
            keys = rngs if isinstance(rngs, ImageKeys) else None
            rows = _looped(alike, rows, width, keys, remat, scan)
        else:
            for block in alike:
                own = _own_keys(block, x.shape[0]) if rngs is None and remat != "none" else None
                rows = _rematted(block, width, own or rngs, remat)(rows)
        x = rows.reshape(x.shape)
    return x


def _rematted(
    block: Any,
    width: int,
    rngs: nnx.Rngs | ImageKeys | None,
    remat: str,
    *,
    in_loop: bool = False,
) -> Callable[..., Any]:
    # A compiler would see through what is computed twice, but for loops, which it leaves alone.
    kept = (STATISTICS, PRODUCT) if remat == "products" else (STATISTICS,)
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    checkpoint = functools.partial(jax.checkpoint, prevent_cse=not in_loop, policy=policy)
    if remat == "mlp":
        second = checkpoint(functools.partial(block.transform_channels, rngs=rngs))
        return lambda x: second(block.mix_tokens(x, rngs=rngs, width=width))
    run = functools.partial(block, rngs=rngs, width=width)
    return run if remat == "none" else checkpoint(run)


def _description(block: Any) -> Any:
    """All that a loop's blocks must have in common: everything but values and rates."""
    parts = []
    for path, part in nnx.iter_modules(block):
        static = {
            name: value
            for name, value in vars(part).items()
            if not isinstance(value, nnx.Pytree | nnx.Variable | jax.Array)
            and not name.startswith("_pytree")
            and not (isinstance(part, Dropout) and name == "rate")
        }
        parts.append((path, type(part), static))
    flat, structure = jax.tree.flatten(nnx.state(block))
    return parts, structure, [(leaf.shape, leaf.dtype) for leaf in flat]


def _dropouts(block: Any) -> list[Dropout]:
    return [part for _, part in nnx.iter_modules(block) if isinstance(part, Dropout)]


def drops(module: nnx.Module) -> bool:
    """Whether anything in a block or model drops what it is given, which takes keys."""
    return any(
        isinstance(part, nnx.Dropout) and not part.deterministic
        for _, part in nnx.iter_modules(module)
    )


def _may_loop(blocks: Sequence[Any], rngs: nnx.Rngs | ImageKeys | None) -> bool:
    return isinstance(rngs, ImageKeys) or not drops(blocks[0])


def _own_keys(block: Any, num_images: Any) -> ImageKeys | None:
    """Keys from a block's own streams, which cannot count inside what is computed anew."""
    streams = (part.rngs for part in _dropouts(block) if not part.deterministic)
    stream = next((stream for stream in streams if stream is not None), None)
    return None if stream is None else ImageKeys(jax.random.split(stream(), num_images))


def _looped(
    blocks: Sequence[Any],
    x: Array,
    width: int,
    rngs: ImageKeys | None,
    remat: str,
    scan: int,
) -> Array:
    # Masks come from the keys given: the blocks' own streams of keys are not used, nor stacked.
    split: Any = nnx.split(blocks[0], nnx.Not(nnx.RngState), ...)
    graphdef, _, streams = split
    states = [nnx.state(block, nnx.Not(nnx.RngState)) for block in blocks]
    # What the blocks differ in beside their values: rates, and places in the order of the keys.
    rates = np.array([[part.rate for part in _dropouts(block)] for block in blocks], np.float64)
    keep_probs = jnp.asarray(1 - rates, jnp.float32)
    num_draws: Any = 0
    first: Any = 0
    if rngs is not None:
        first, counted = rngs.num_draws, ImageKeys(rngs.keys)
        jax.eval_shape(functools.partial(blocks[0], rngs=counted, width=width), x)
        num_draws = counted.num_draws
    draws = first + num_draws * jnp.arange(len(blocks))

    def run(x: Array, block: tuple[Any, Array, Array]) -> Array:
        state, keep_probs, drawn = block
        built = nnx.merge(graphdef, state, streams)
        for part, keep_prob in zip(_dropouts(built), keep_probs, strict=True):
            part.keep_prob = keep_prob
        keys = None if rngs is None else ImageKeys(rngs.keys, num_draws=drawn)
        return _rematted(built, width, keys, remat, in_loop=True)(x)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    x, _ = jax.lax.scan(
        lambda x, block: (run(x, block), None), x, (stacked, keep_probs, draws), unroll=scan
    )
    if rngs is not None:
        rngs.num_draws = first + num_draws * len(blocks)
    return x
