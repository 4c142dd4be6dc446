"""Weights: reading, converting and writing checkpoints. Of the other folders it needs the models
alone.
"""

from metaformer_jax.weights.converted import Record, read_record
from metaformer_jax.weights.errors import CheckpointError, DownloadError
from metaformer_jax.weights.pretrained import create_model, load_weights
from metaformer_jax.weights.recognition import CheckpointInfo, recognise
from metaformer_jax.weights.surgery import (
    change_in_channels,
    map_head_to_imagenet_1k,
    replace_head,
    set_image_size,
)
from metaformer_jax.weights.write import save_weights

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "DownloadError",
    "Record",
    "change_in_channels",
    "create_model",
    "load_weights",
    "map_head_to_imagenet_1k",
    "read_record",
    "recognise",
    "replace_head",
    "save_weights",
    "set_image_size",
]
