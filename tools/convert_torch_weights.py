"""Converts PyTorch checkpoints to Flax weights, and back: see `metaformer_jax/convert.py`."""

import sys
from collections.abc import Sequence

from metaformer_jax import convert


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program: 0 if all was written, 2 and one message if not."""
    return convert.main(argv, prog="python tools/convert_torch_weights.py")


if __name__ == "__main__":
    sys.exit(main())
