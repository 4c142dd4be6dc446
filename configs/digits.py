"""A small CAFormer on 8x8 handwritten digits: minutes on a CPU, and the whole engine at work."""

from metaformer_jax.training import recipes


def get_config():
    """The config, to be changed with --config.<field>=<value>."""
    return recipes.digits()
