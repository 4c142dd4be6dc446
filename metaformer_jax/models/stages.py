"""Runs the blocks of a stage, one by one or as a loop, with or without recomputation."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from metaformer_jax.models import mlp_kernels
from metaformer_jax.models.layers import Dropout, Frozen, ImageKeys
from metaformer_jax.models.lowering.platform import is_for
from metaformer_jax.models.lowering.recomputation import PRODUCT, STATISTICS

# What the backward pass recomputes of a block instead of keeping it. The means and variances of
# norms, two numbers per token, are always kept.
REMAT = (
    # Nothing.
    "none",
    # The second half, norm and MLP, from its input.
    "mlp",
    # Everything but the results of linear layers, depthwise convolutions and attention.
    "products",
    # The whole block.
    "block",
)
# On TPUs chooses for each stage the fastest of them, by the compiler's estimate; nothing elsewhere.
AUTO = "auto"


def remat_name(remat: str | bool) -> str:
    """The name in `REMAT`, or `AUTO`, for the argument `remat`: True means "block", False "none".

    Raises:
        ValueError: there is no such name.
    """
    name = {True: "block", False: "none"}[remat] if isinstance(remat, bool) else remat
    if name not in (AUTO, *REMAT):
        allowed = ", ".join(map(repr, (AUTO, *REMAT)))
        raise ValueError(f"`remat` must be one of {allowed}, got {remat!r}.")
    return name


def remat_here(remat: str | bool) -> str:
    """The name in `REMAT` for the current platform, or `AUTO` on TPUs, where stages differ.

    Raises:
        ValueError: there is no such name.
    """
    name = remat_name(remat)
    return "none" if name == AUTO and not is_for("tpu") else name


def _remat_of(remat: str, block: Any, x: Array) -> str:
    if remat != AUTO:
        return remat
    # The kernels of the second half keep its input alone, whatever else is recomputed.
    return "mlp" if mlp_kernels.form_for(block, x) is None else "none"


def run_blocks(
    blocks: Sequence[Any],
    x: Float[Array, "b h w c"],
    *,
    rngs: nnx.Rngs | ImageKeys | None,
    remat: str = "none",
    scan: int = 0,
) -> Float[Array, "b h w c"]:
    """Applies one block after the other.

    Args:
        blocks: of one stage.
        x: the input of the first block.
        rngs: as for the model. With a loop or `remat` this must be `ImageKeys` or None, because
            `nnx.Rngs` count in a variable, which neither of them allows to change.
        remat: one of `REMAT`, or `AUTO` on TPUs.
        scan: blocks in each iteration of a loop; 0 for no loop. The parameters of the blocks are
            stacked when the loop starts; outside the loop they keep their form. Blocks that draw
            masks from their own streams or may change other variables of their own, and
            neighbours that are not built alike, are not looped.
    """
    for _, group in itertools.groupby(blocks, key=_description):
        alike = list(group)
        # Folded once: the form stays the same from block to block.
        rows, width = alike[0].fold(x), x.shape[2]
        own_remat = _remat_of(remat, alike[0], rows)
        if scan and len(alike) > scan and _may_loop(alike, rngs):
            keys = rngs if isinstance(rngs, ImageKeys) else None
            rows = _looped(alike, rows, width, keys, own_remat, scan)
        else:
            for block in alike:
                own = None
                if rngs is None and own_remat != "none":
                    own = _own_keys(block, x.shape[0])
                rows = _rematted(block, width, own or rngs, own_remat)(rows)
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
    # Outside loops the compiler would otherwise merge the recomputation with the first computation.
    kept = (STATISTICS, PRODUCT) if remat == "products" else (STATISTICS,)
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    checkpoint = functools.partial(jax.checkpoint, prevent_cse=not in_loop, policy=policy)
    if remat == "mlp":
        second = checkpoint(functools.partial(block.transform_channels, rngs=rngs))
        return lambda x: second(block.mix_tokens(x, rngs=rngs, width=width))
    run = functools.partial(block, rngs=rngs, width=width)
    return run if remat == "none" else checkpoint(run)


def _description(block: Any) -> Any:
    """What the blocks of a loop must have in common: everything but parameter values and rates."""
    parts = []
    for path, part in nnx.iter_modules(block):
        static = {
            name: value
            for name, value in vars(part).items()
            # Arrays, also those in a dict, are in the state.
            if not any(map(nnx.is_data, jax.tree.leaves(value, is_leaf=nnx.is_data)))
            and not name.startswith("_pytree")
            and not (isinstance(part, Dropout) and name == "rate")
        }
        parts.append((path, type(part), static))
    flat, structure = jax.tree.flatten(nnx.state(block))
    return parts, structure, [_type(leaf) for leaf in flat]


def _type(leaf: Any) -> Any:
    # A function in the place of a module counts as data.
    return jax.typeof(leaf) if hasattr(leaf, "dtype") else leaf


def _dropouts(block: Any) -> list[Dropout]:
    return [part for _, part in nnx.iter_modules(block) if isinstance(part, Dropout)]


def drops(module: nnx.Module) -> bool:
    """Whether a block or model has active dropout or stochastic depth, and so needs random keys."""
    return any(
        isinstance(part, nnx.Dropout) and not part.deterministic
        for _, part in nnx.iter_modules(module)
    )


def other_state(module: nnx.Module) -> dict[str, Any]:
    """Variables that are neither parameters nor frozen, as running means are, and bare arrays."""
    others = nnx.state(module, nnx.Not(nnx.Any(nnx.Param, Frozen, nnx.RngState)))
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(others)}


def _may_loop(blocks: Sequence[Any], rngs: nnx.Rngs | ImageKeys | None) -> bool:
    if any(isinstance(leaf, nnx.Variable) for leaf in other_state(blocks[0]).values()):
        return False
    return isinstance(rngs, ImageKeys) or not drops(blocks[0])


def _own_keys(block: Any, num_images: Any) -> ImageKeys | None:
    """Keys from a block's own streams, drawn here because these cannot count inside `remat`."""
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
    # Masks come from the given keys: the blocks' own random streams are neither used nor stacked.
    split: Any = nnx.split(blocks[0], nnx.Not(nnx.RngState), ...)
    graphdef, _, streams = split
    states = [nnx.state(block, nnx.Not(nnx.RngState)) for block in blocks]
    # Besides parameters, the blocks differ in their rates and in their place in the order of keys.
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
        rngs.skip(num_draws * len(blocks))
    return x
