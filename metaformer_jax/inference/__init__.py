"""From pictures to named probabilities, and to artefacts that run without this package."""

from metaformer_jax.inference.artefacts import export_onnx, export_stablehlo
from metaformer_jax.inference.classifier import Classifier, load_classifier
from metaformer_jax.inference.images import find_images, read_image

__all__ = [
    "Classifier",
    "export_onnx",
    "export_stablehlo",
    "find_images",
    "load_classifier",
    "read_image",
]
