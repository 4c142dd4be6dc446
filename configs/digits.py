"""A small CAFormer on 8x8 handwritten digits: the whole engine in a minute on two CPU cores."""

from metaformer_jax.training import recipes


def get_config():
    """The config, to be changed with --config.<field>=<value>."""
    return recipes.digits()
