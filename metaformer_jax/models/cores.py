"""Batches in parts, on which the cores of a CPU work at the same time."""

import functools
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def num_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class InParts:
    """A jitted function for CPUs that works on several parts of a batch at the same time.

    XLA for CPUs divides every operation among the cores and waits for the last of them. With a
    second part of the batch, a core has something to do until then. The parts are of equal size,
    and at most as many as there are cores.
    """

    def __init__(self, jitted: Any, *fixed: Any):
        """Of `jitted(*fixed, *inputs, **named)`.

        Args:
            jitted: made by `jax.jit`, with arrays as arguments. All it returns must have the images
                along the first axis and depend, for each image, on nothing else of the batch.
            fixed: arguments that are not divided.
        """
        self._jitted = jitted
        self._fixed = fixed
        # Of each trace, as long as JAX keeps it, by device: a program runs on that for which it was
        # compiled.
        self._programs: weakref.WeakKeyDictionary[Any, dict[frozenset[Any], Callable[..., Any]]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """What the function returns.

        The batch stays whole where an input has no axis of images or is spread over devices.

        Raises:
            ValueError: a result has no axis of images.
        """
        num_parts = _num_parts(jax.tree.leaves((inputs, named)))
        parts = _divided((inputs, named), num_parts) if num_parts > 1 else []
        program = self._program(*parts[0]) if parts else None
        if program is not None:
            results = _threads().map(functools.partial(self._run, program), parts)
            return _joined(list(results))
        return self._jitted(*self._fixed, *inputs, **named)

    def _run(self, program: Callable[..., Any], part: Any) -> Any:
        inputs, named = part
        return jax.block_until_ready(program(*self._fixed, *inputs, **named))

    def _program(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> Callable[..., Any] | None:
        """The compiled function; None where the function refuses its inputs."""
        # In this thread, because others do not have the settings of JAX's context managers. For
        # arrays of the same shapes, with the same settings, the trace is the same object again.
        try:
            traced = self._jitted.trace(*self._fixed, *inputs, **named)
        # Whatever it is: the call with the whole batch raises it with the shape that was given.
        except Exception:
            return None
        leaves = jax.tree.leaves((inputs, named))
        devices = frozenset(device for leaf in leaves for device in leaf.devices())
        programs = self._programs.setdefault(traced.jaxpr, {})
        if devices not in programs:
            size = leaves[0].shape[0]
            for result in jax.tree.leaves(traced.out_info):
                if result.shape[:1] != (size,):
                    raise ValueError(
                        "`function` must return arrays with the images along their first axis, "
                        f"got shape {result.shape} for {size} images. Give per_image=False."
                    )
            programs[devices] = traced.lower().compile()
        return programs[devices]


def _num_parts(leaves: list[Any]) -> int:
    """As many as divide the batch evenly, up to the number of cores."""
    are_arrays = all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
    shapes: list[tuple[int, ...]] = [leaf.shape for leaf in leaves] if are_arrays else []
    is_spread = any(isinstance(leaf, jax.Array) and len(leaf.devices()) > 1 for leaf in leaves)
    if is_spread or not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        return 1
    size = shapes[0][0]
    return max((n for n in range(1, num_cores() + 1) if size and size % n == 0), default=1)


@functools.partial(jax.jit, static_argnums=1)
def _divided(tree: Any, num_parts: int) -> list[Any]:
    leaves, structure = jax.tree.flatten(tree)
    parts_of_each = (jnp.split(leaf, num_parts) for leaf in leaves)
    return [jax.tree.unflatten(structure, part) for part in zip(*parts_of_each, strict=True)]


@jax.jit
def _joined(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *of_parts: jnp.concatenate(of_parts), *parts)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_cores(), thread_name_prefix="images")
