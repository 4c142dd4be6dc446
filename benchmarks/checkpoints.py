"""How long a checkpoint holds up a training on several devices, and until it is written and read.

    PYTHONPATH=. python benchmarks/checkpoints.py [--model caformer_s18] [--num-devices 8]

Parameters, both moments and a moving average are saved as a training saves them and, in turns,
as Orbax does by default: there every device that holds a copy of an array writes a part of it.
The devices are virtual ones of this machine's CPU.
"""

import argparse
import contextlib
import os
import pathlib
import tempfile
import time


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="caformer_s18")
    parser.add_argument("--num-devices", type=int, default=8)
    parser.add_argument("--fsdp", type=int, default=1, help="devices that share one copy")
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    # Before JAX starts.
    devices = f" --xla_force_host_platform_device_count={args.num_devices}"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + devices
    os.environ["JAX_PLATFORMS"] = "cpu"
    measure(args.model, args.fsdp, args.repeats)


def measure(model, fsdp, repeats):
    import dataclasses

    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp
    from absl import logging

    from metaformer_jax.data.device import DeviceTransform
    from metaformer_jax.models import create_model
    from metaformer_jax.training import optim, recipes, sharding
    from metaformer_jax.training.checkpoint import Checkpoints
    from metaformer_jax.training.step import Average, Engine

    logging.set_verbosity(logging.ERROR)
    engine = Engine(
        lambda rngs: create_model(model, rngs=rngs),
        optim.make_optimizer("adamw", lambda _: 1e-3),
        mesh=sharding.create_mesh(fsdp=fsdp),
        transform=DeviceTransform(num_classes=1000, mean=(0.5,) * 3, std=(0.5,) * 3),
        average=Average(decay=0.999),
    )
    state = jax.block_until_ready(engine.initial_state())
    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    print(f"{model}: {len(jax.tree.leaves(state))} arrays, {megabytes:.0f} MB", flush=True)
    config = recipes.digits()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as managers:
        folder = pathlib.Path(name)
        ours = managers.enter_context(Checkpoints(folder / "ours", keep=1))
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        default = managers.enter_context(ocp.CheckpointManager(folder / "default", options=options))
        sides = {
            "ours": (lambda at: ours.save(at, [], config), ours.wait),
            "Orbax's default": (
                lambda at: default.save(int(at.step), args=ocp.args.StandardSave(vars(at))),
                default.wait_until_finished,
            ),
        }
        for step in range(1, repeats + 1):
            # Arrays of JAX keep what was copied from their device: each save gets new ones.
            for side, (save, wait) in sides.items():
                new = jax.tree.map(jnp.copy, dataclasses.replace(state, step=jnp.int32(step)))
                new = jax.block_until_ready(jax.device_put(new, engine.state_shardings))
                start = time.perf_counter()
                save(new)
                held_up = time.perf_counter() - start
                wait()
                written = time.perf_counter() - start
                print(
                    f"{step} {side:<16} {held_up:5.2f} s, written after {written:5.2f} s",
                    flush=True,
                )
        start = time.perf_counter()
        jax.block_until_ready(ours.restore(engine.abstract_state, config))
        print(f"read again in {time.perf_counter() - start:.2f} s", flush=True)


if __name__ == "__main__":
    main()
