"""PoolFormerV2-S12: trains on ImageNet-1K at 224 pixels as published."""

from metaformer_jax.training import recipes


def get_config(stage=""):
    """The config, to be changed with --config.<field>=<value>."""
    return recipes.published("poolformerv2_s12", stage)
