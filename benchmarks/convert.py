"""Time and memory of converting and loading a model, each in a process of its own.

    PYTHONPATH=. python benchmarks/convert.py [--model caformer_b36] [--repeats 3]

Memory is the highest resident size of the whole process, imports included.
"""

import argparse
import json
import multiprocessing
import pathlib
import subprocess
import sys
import tempfile

PROGRAM = pathlib.Path(__file__).parents[1] / "tools" / "convert_torch_weights.py"


def write_checkpoints(folder, name):
    """Random weights in both layouts, as the published files have them."""
    import numpy as np

    from metaformer_jax.weights.convert import to_tensors, variables_of
    from metaformer_jax.weights.files import write_tensors
    from metaformer_jax.weights.pretrained import build_abstract

    noise = np.random.default_rng(0)
    variables = {
        path: noise.standard_normal(variable.shape, np.float32)
        for path, variable in variables_of(build_abstract(name)).items()
    }
    write_tensors(folder / "sail.pth", to_tensors(variables, "sail"), {})
    write_tensors(folder / "timm.safetensors", to_tensors(variables, "timm"), {})


def measure(program):
    """Runs a program that times itself: seconds, seconds of computing, megabytes."""
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def convert(source, output, name):
    imports = "import torch" if source.suffix == ".pth" else ""
    return f"""
import importlib.util, json, resource, sys, time
spec = importlib.util.spec_from_file_location("convert_torch_weights", {str(PROGRAM)!r})
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
import orbax.checkpoint
{imports}
import jax; jax.devices()
start, start_cpu = time.perf_counter(), time.process_time()
assert program.main([{str(source)!r}, "--model", {name!r}, "--output", {str(output)!r}]) == 0
seconds = [time.perf_counter() - start, time.process_time() - start_cpu]
print(json.dumps([*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6]))
"""


def load(folder, name):
    return f"""
import json, resource, time
import jax, metaformer_jax, orbax.checkpoint
from flax import nnx
jax.devices()
rngs = nnx.Rngs(0)
start, start_cpu = time.perf_counter(), time.process_time()
model = metaformer_jax.create_model({name!r}, pretrained={str(folder)!r}, rngs=rngs)
jax.block_until_ready(nnx.state(model))
seconds = [time.perf_counter() - start, time.process_time() - start_cpu]
print(json.dumps([*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6]))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="caformer_b36")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        # In a process of its own too: a child starts from its parent's highest memory.
        writing = multiprocessing.get_context("spawn").Process(
            target=write_checkpoints, args=(folder, args.model)
        )
        writing.start()
        writing.join()
        megabytes = (folder / "sail.pth").stat().st_size / 1e6
        print(f"{args.model}: a file of {megabytes:.0f} MB")
        for source in (folder / "sail.pth", folder / "timm.safetensors"):
            for repeat in range(args.repeats):
                output = folder / f"{source.stem}{repeat}"
                report(source.name, measure(convert(source, output, args.model)), megabytes)
        for _ in range(args.repeats):
            report("load the folder", measure(load(folder / "sail0", args.model)), megabytes)
        measure(convert(folder / "sail.pth", folder / "cached.safetensors", args.model))
        for _ in range(args.repeats):
            cached = folder / "cached.safetensors"
            report("load the cached file", measure(load(cached, args.model)), megabytes)


def report(what, figures, megabytes):
    seconds, cpu_seconds, peak = figures
    print(
        f"{what:<20} {seconds:.2f} s ({cpu_seconds:.2f} s of computing), "
        f"peak {peak:.0f} MB = {peak / megabytes:.2f} x the file",
        flush=True,
    )


if __name__ == "__main__":
    main()
