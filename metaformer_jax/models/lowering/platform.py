"""The platform that a program is traced for, and whether it may have custom kernels."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

_platform = jax.make_user_context("")
_is_allowed = jax.make_user_context(True)


def compiled_for(platform: str) -> contextlib.AbstractContextManager[None]:
    """A context (`with`) in which models are traced in the form that is best for this platform.

    Needed only to compile for other devices than the default ones of this process.
    """
    return _platform(platform)


def is_for(platform: str) -> bool:
    """Whether the program being traced is meant for `tpu`, `gpu` or `cpu`, as far as is known."""
    return (_platform.value or jax.default_backend()) == platform


def without_kernels() -> contextlib.AbstractContextManager[None]:
    """A context (`with`) in which models use XLA's own operations, and no custom kernels.

    For programs that are exported, or that XLA partitions among several GPUs or TPUs by itself,
    which it can do for its own operations only. cuDNN's attention counts as a kernel here.
    """
    return _is_allowed(False)


def kernels_are_allowed() -> bool:
    """Whether what is being traced may have custom kernels."""
    return _is_allowed.value


def differentiated_as(plain: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, a function of arrays, with the gradients of `plain`, which computes the same."""
    function = jax.custom_vjp(kernel)
    function.defvjp(
        lambda *arrays: (kernel(*arrays), arrays),
        lambda arrays, cotangent: jax.vjp(plain, *arrays)[1](cotangent),
    )
    return function
