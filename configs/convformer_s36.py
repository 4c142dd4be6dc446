"""ConvFormer-S36: trains as published; a stage after the file's name goes on from there.

convformer_s36.py                 ImageNet-1K at 224 pixels
convformer_s36.py:384             fine-tunes it at 384
convformer_s36.py:in21k           ImageNet-21K at 224
convformer_s36.py:in21ft1k        fine-tunes that on ImageNet-1K at 224
convformer_s36.py:384_in21ft1k    fine-tunes that on ImageNet-1K at 384
"""

from metaformer_jax.training import recipes


def get_config(stage=""):
    """The config, to be changed with --config.<field>=<value>."""
    return recipes.published("convformer_s36", stage)
