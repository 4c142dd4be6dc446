"""The platform that a program is traced for."""

import contextlib

import jax

_platform = jax.make_user_context("")


def compiled_for(platform: str) -> contextlib.AbstractContextManager[None]:
    """A context (`with`) in which models are traced in the form that is best for this platform.

    Needed only to compile for other devices than the default ones of this process.
    """
    return _platform(platform)


def is_for_tpus() -> bool:
    """Whether the program being traced is meant for TPUs, as far as is known."""
    return (_platform.value or jax.default_backend()) == "tpu"
