"""Images per second of inference and of a training step, side by side with timm.

    PYTHONPATH=. python benchmarks/models.py --models caformer_s18 --batch-sizes 1 8

Needs timm and torch (--sides ours does not). Each side is a process of its own, with the same
weights and images; they compile together, and then take turns: in each round every side runs for
--seconds. A training step is forward, backward and AdamW, with stochastic depth, on a batch that is
on the device. timm runs eagerly and through torch.compile, both with channels last; for inference
its logits are compared with ours first.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
import traceback

import numpy as np
from rich.console import Console
from rich.table import Table

SIDES = {
    "ours": "metaformer_jax",
    "eager": "timm, eager",
    "compiled": "timm, torch.compile",
}
TASKS = ("inference", "training")
DROP_PATH_RATE = 0.15
LEARNING_RATE = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    task: str
    batch_size: int
    image_size: int
    dtype: str

    def images(self):
        shape = (self.batch_size, self.image_size, self.image_size, 3)
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    def labels(self):
        return np.random.default_rng(1).integers(0, 1000, self.batch_size)


class Ours:
    """The JAX model, by `jit_inference` and by `jax.jit` with `compiler_options`."""

    def __init__(self, case, weights):
        import jax
        import jax.numpy as jnp
        import optax
        from flax import nnx

        import metaformer_jax
        from metaformer_jax.models import count
        from metaformer_jax.training.devices import peak_flops

        def build():
            return metaformer_jax.create_model(
                case.model,
                image_size=case.image_size,
                dtype=jnp.dtype(case.dtype),
                drop_path_rate=DROP_PATH_RATE,
                rngs=nnx.Rngs(0),
            )

        model = build()
        self._share(model, weights)
        self.macs = count(build).macs
        self.peak_flops = peak_flops(jax.devices()[0].device_kind)
        self.device = jax.devices()[0].device_kind
        images, labels = jnp.asarray(case.images()), jnp.asarray(case.labels())

        if case.task == "inference":
            answer = metaformer_jax.jit_inference(model)
            self.logits = np.asarray(answer(images))
            self._call = lambda: answer(images)
            self._finish = jax.block_until_ready
            return

        model.train()
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.05)

        def loss_fn(params, rest, key, images, labels):
            model = nnx.merge(graphdef, params, rest)
            logits = model(images, rngs=nnx.Rngs(dropout=key))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(state, rest, images, labels):
            params, moments, number = state
            key = jax.random.fold_in(jax.random.key(0), number)
            loss, gradients = jax.value_and_grad(loss_fn)(params, rest, key, images, labels)
            updates, moments = optimizer.update(gradients, moments, params)
            return (optax.apply_updates(params, updates), moments, number + 1), loss

        jitted = jax.jit(step, donate_argnums=0, compiler_options=metaformer_jax.compiler_options())
        self._state = (params, optimizer.init(params), jnp.zeros((), jnp.int32))

        def train():
            self._state, loss = jitted(self._state, rest, images, labels)
            return loss

        self._call, self._finish = train, jax.block_until_ready

    def _share(self, model, weights):
        from safetensors.numpy import save_file

        from metaformer_jax.weights.convert import to_tensors, variables_of

        values = {path: np.asarray(leaf[...]) for path, leaf in variables_of(model).items()}
        part = pathlib.Path(weights).with_name("part.safetensors")
        tensors = to_tensors(values, "timm")
        save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, part)
        part.replace(weights)

    def run(self, seconds):
        return _timed(self._call, self._finish, seconds)


class Timm:
    """The PyTorch model in timm."""

    def __init__(self, case, weights, *, is_compiled):
        import torch

        if "torchvision" not in sys.modules:
            _declare_torchvision_operators(torch)
        import safetensors.torch
        import timm

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("highest")
        model = timm.create_model(case.model, drop_path_rate=DROP_PATH_RATE)
        while not os.path.exists(weights):
            time.sleep(0.1)
        model.load_state_dict(safetensors.torch.load_file(weights))
        model = model.to(device, memory_format=torch.channels_last)
        images = torch.from_numpy(case.images().transpose(0, 3, 1, 2)).to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.from_numpy(case.labels()).to(device)
        dtype = getattr(torch, case.dtype)

        def mixed_precision():
            if dtype == torch.float32:
                return contextlib.nullcontext()
            return torch.autocast(device.type, dtype)

        run_model = torch.compile(model) if is_compiled else model
        self._finish = lambda _: torch.cuda.synchronize() if device.type == "cuda" else None
        if case.task == "inference":
            model.eval()
            with torch.inference_mode(), mixed_precision():
                self.logits = model(images).float().cpu().numpy()

            @torch.inference_mode()
            def infer():
                with mixed_precision():
                    return run_model(images)

            self._call = infer
            return

        model.train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=True
        )

        def train():
            optimizer.zero_grad(set_to_none=True)
            with mixed_precision():
                loss = torch.nn.functional.cross_entropy(run_model(images).float(), labels)
            loss.backward()
            optimizer.step()
            return loss

        self._call = train

    def run(self, seconds):
        return _timed(self._call, self._finish, seconds)


def _declare_torchvision_operators(torch):
    # A torchvision whose compiled part is missing fails at its import otherwise.
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declare_torchvision_operators.library = library  # type: ignore[attr-defined]
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]


def _timed(call, finish, seconds):
    """Calls per second, of as many as fit into about so many seconds."""
    start = time.perf_counter()
    finish(call())
    number = max(1, round(seconds / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(number):
        result = call()
    finish(result)
    return number / (time.perf_counter() - start)


def _serve(pipe, side, case, weights):
    """A side's process: builds, warms up, and runs a round whenever it is asked to."""
    try:
        if side == "ours":
            runner = Ours(case, weights)
        else:
            runner = Timm(case, weights, is_compiled=side == "compiled")
        for _ in range(2):
            runner.run(0)
        names = ("macs", "peak_flops", "device", "logits")
        pipe.send(("ready", {name: getattr(runner, name, None) for name in names}))
        while (seconds := pipe.recv()) is not None:
            pipe.send(("speed", case.batch_size * runner.run(seconds)))
    except Exception:
        pipe.send(("error", traceback.format_exc()))


class Process:
    """A side that runs in a process of its own."""

    def __init__(self, side, case, weights):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, side, case, weights))
        self._process.start()
        theirs.close()

    def receive(self):
        """What it says next: first, when it is ready, its facts."""
        kind, value = self._pipe.recv()
        if kind == "error":
            raise RuntimeError(value)
        return value

    def run(self, seconds):
        self._pipe.send(seconds)
        return self.receive()

    def end(self):
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(None)
        # One that waits for weights that never come does not hear it.
        self._process.join(timeout=10)
        self._process.kill()
        self._process.join()


def measure(case, sides, *, rounds, seconds):
    """One row of the table: each side's images per second, round by round."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        weights = str(pathlib.Path(folder) / "weights.safetensors")
        # They compile together.
        processes = {}
        for side in sides:
            processes[side] = Process(side, case, weights)
            stack.callback(processes[side].end)
        all_facts = {side: process.receive() for side, process in processes.items()}
        speeds = {side: [] for side in sides}
        for _ in range(rounds):
            for side, process in processes.items():
                speeds[side].append(process.run(seconds))
    facts = all_facts["ours"]
    row = dataclasses.asdict(case) | {"images_per_second": speeds}
    row["device"], row["macs"] = facts["device"], facts["macs"]
    row["medians"] = {side: statistics.median(values) for side, values in speeds.items()}
    row["ratios"] = {
        side: statistics.median(
            ours / theirs for ours, theirs in zip(speeds["ours"], speeds[side], strict=True)
        )
        for side in sides
        if side != "ours"
    }
    if "eager" in sides and case.task == "inference":
        desired = all_facts["eager"]["logits"]
        difference = np.max(np.abs(facts["logits"] - desired)) / np.max(np.abs(desired))
        row["relative_difference_of_logits"] = float(difference)
    if facts["peak_flops"]:
        flops = facts["macs"] * (2 if case.task == "inference" else 6)
        row["mfu"] = row["medians"]["ours"] * flops / facts["peak_flops"]
    return row


def table(rows, sides):
    result = Table(title="images per second, medians; in brackets how much faster ours is")
    for title in ("model", "task", "dtype", "batch", *(SIDES[side] for side in sides)):
        result.add_column(title, justify="left" if title in ("model", "task") else "right")
    has_mfu = any("mfu" in row for row in rows)
    if has_mfu:
        result.add_column("MFU", justify="right")
    for row in rows:
        cells = [row["model"], row["task"], row["dtype"], str(row["batch_size"])]
        for side in sides:
            ratio = f" ({row['ratios'][side]:.2f}x)" if side in row["ratios"] else ""
            cells.append(f"{row['medians'][side]:,.1f}{ratio}")
        result.add_row(*cells, *([f"{row['mfu']:.1%}"] if has_mfu else []))
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["caformer_s18", "convformer_s18"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of each side in each round")
    parser.add_argument("--json", type=pathlib.Path, help="also write all figures to this file")
    args = parser.parse_args(argv)
    if "ours" not in args.sides:
        parser.error("--sides must have ours, which the others are compared with.")
    # The sides share a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # A file or a pipe has no width to fit into.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    # Ours makes the weights that the others read.
    sides = sorted(args.sides, key=list(SIDES).index)
    rows = []
    for model in args.models:
        for task in args.tasks:
            for batch_size in args.batch_sizes:
                case = Case(model, task, batch_size, args.image_size, args.dtype)
                row = measure(case, sides, rounds=args.rounds, seconds=args.seconds)
                rows.append(row)
                medians = ", ".join(f"{k} {v:.1f}" for k, v in row["medians"].items())
                error = row.get("relative_difference_of_logits")
                compared = "" if error is None else f"; logits differ by {error:.1e}"
                console.print(f"{model} {task} {batch_size}: {medians}{compared}", highlight=False)
                machine = f"{row['device']}, {platform.machine()}, {os.cpu_count()} cores"
                if args.json:
                    figures = {"machine": machine, "rows": rows}
                    args.json.write_text(json.dumps(figures, indent=2) + "\n")
    console.print(table(rows, sides))
    console.print(f"on {machine}", highlight=False)


if __name__ == "__main__":
    main()
