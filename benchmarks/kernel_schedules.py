"""What the kernels for TPUs take for an image by the compiler's schedule, without a TPU.

    PYTHONPATH=. python benchmarks/kernel_schedules.py attention --tokens 196 --heads 10 16
    PYTHONPATH=. python benchmarks/kernel_schedules.py mlp --sizes 28x112x128 14x14x512
    PYTHONPATH=. python benchmarks/kernel_schedules.py mlp --batch-size 128 --sizes 56x56x64

The compiler writes the instructions of a kernel to a file, with those in which the chip waits for a
result; their number is the time of one step in cycles, unless reading and writing it takes longer.
"""

import argparse
import math
import os
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaformer_jax.models.lowering import attention_mosaic, mlp_mosaic
from metaformer_jax.models.lowering.mlp_forms import ChannelsAlongLanes, ImagesAlongLanes, Norm
from metaformer_jax.training.topology import topology_devices

_BUNDLES = re.compile(r"total scheduled bundles: *(\d+)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=("attention", "mlp"))
    parser.add_argument("--heads", type=int, nargs="+", default=[10, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[196])
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=lambda text: tuple(map(int, text.split("x"))),
        default=[(28, 112, 128), (7, 112, 256), (14, 14, 512)],
        help="of the images of a stage in the form in which the MLP gets them",
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--form",
        choices=("turned", "rows"),
        help="of the arrays, see mlp_forms.py; by default that of the stages without attention",
    )
    parser.add_argument("--norm", choices=("channels", "image"), default="channels")
    parser.add_argument("--topology", default="v5e:1x1")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Read when the compiler is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            f"{os.environ.get('LIBTPU_INIT_ARGS', '')}"
        )
        device = topology_devices(arguments.topology)[0]
        print(f"{'':24}  forward: scheduled, assumed  backward: scheduled, assumed", flush=True)
        for name, *kernels in _kernels(arguments):
            figures = (
                _figures(
                    *kernel,
                    images=arguments.batch_size,
                    device=device,
                    folder=pathlib.Path(folder),
                )
                for kernel in kernels
            )
            print(f"{name:24}{''.join(figures)}", flush=True)


def _kernels(arguments):
    """Names, and the forward and backward kernels with the shapes and dtypes of their arguments."""
    if arguments.kernel == "attention":
        for tokens in arguments.tokens:
            for heads in arguments.heads:
                yield _attention(arguments.batch_size, tokens, heads, arguments.head_dim)
    else:
        norm = Norm(1e-6, is_over_images=arguments.norm == "image")
        for sizes in arguments.sizes:
            yield _mlp(arguments.batch_size, *sizes, form_name=arguments.form, norm=norm)


def _attention(images, tokens, heads, head_dim):
    def attend(packed):
        return attention_mosaic.attend(packed, heads)

    def gradients(packed, mixed, cotangent):
        return attention_mosaic.gradients(packed, mixed, cotangent, heads)

    channels = heads * head_dim
    packed, mixed = (((images, tokens, size), jnp.bfloat16) for size in (3 * channels, channels))
    return f"{heads} heads, {tokens} tokens", (attend, packed), (gradients, packed, mixed, mixed)


def _mlp(images, height, width, channels, *, form_name, norm):
    shape, hidden = (images, height, width, channels), 4 * channels
    forms = {
        "turned": ImagesAlongLanes.of(shape, hidden),
        "rows": ChannelsAlongLanes.of(shape, hidden),
    }
    allowed = [forms[form_name]] if form_name else forms.values()
    form = next((form for form in allowed if form is not None), None)
    if form is None:
        raise SystemExit(
            f"error: `--sizes` must be some that have kernels in the form asked for, got "
            f"{height}x{width}x{channels} with {images} images."
        )

    def transform(*arrays):
        return mlp_mosaic.transform(form, *arrays, norm=norm)

    def gradients(*arrays):
        return mlp_mosaic.gradients(form, *arrays, norm=norm)

    x = form.shape, jnp.bfloat16
    shapes = (images,), (channels,), (channels, hidden), (hidden, channels)
    keep, row, up, down = ((shape, jnp.float32) for shape in shapes)
    arrays = x, keep, row, up, down, row
    name = f"{height}x{width}, {channels} channels"
    return name, (transform, *arrays), (gradients, *arrays, x)


def _figures(function, *arrays, images, device, folder):
    for old in folder.iterdir():
        old.unlink()
    place = NamedSharding(Mesh(np.array([device]), "x"), PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(*array, sharding=place) for array in arrays]
    with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
        traced = jax.jit(function).trace(*arrays)
        traced.lower(lowering_platforms=("tpu",)).compile()
    (kernel,) = (eqn.params for eqn in traced.jaxpr.eqns if eqn.primitive.name == "pallas_call")
    schedules = folder.glob(f"*-{kernel['name']}*-schedule-analysis_packed-bundles-post-ra.txt")
    # What comes before and after the kernel is scheduled by itself.
    scheduled = max(int(_BUNDLES.search(path.read_text())[1]) for path in schedules)
    num_steps = math.prod(kernel["grid_mapping"].grid)
    assumed = int(dict(kernel["metadata"])["kernel_cycles"])
    return f"{scheduled * num_steps / images:18,.0f} {assumed / images:10,.0f}"


if __name__ == "__main__":
    main()
