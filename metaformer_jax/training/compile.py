"""Compiles a config's training step for devices that need not be present, and reports its cost."""

import dataclasses
import functools
import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
from rich.console import Console

from metaformer_jax.data.sources import Source
from metaformer_jax.models.lowering.platform import compiled_for
from metaformer_jax.models.stages import remat_here
from metaformer_jax.training import compile_tables, devices, gpus, hlo, sharding
from metaformer_jax.training.described import described_sources
from metaformer_jax.training.memory import Memory, largest_that_fits, memory_of
from metaformer_jax.training.progress import elapsing, say
from metaformer_jax.training.run import Run
from metaformer_jax.training.topology import topology_devices
from metaformer_jax.weights.outputs import check_can_be_written

# The largest batch is searched in steps of this many images per device, or of whole mixing groups.
_STEP = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The figures of one compilation; None for what is not known.

    Attributes:
        topology: "v5e:4x4", or "this machine".
        device_kind: as JAX names it.
        num_devices: of the mesh.
        mesh: number of devices along each axis.
        batch_size: images of a step, over all devices.
        remat: which part of each block the compiled backward pass recomputes; "auto" where each
            stage has its own.
        trace_seconds: time from Python to the compiler's input.
        compile_seconds: time of the compiler.
        compile_cpu_seconds: processor time of all its threads, which does not depend on other work
            on the machine.
        memory: bytes per device; None if the compiler refused, or does not report them.
        memory_limit: bytes per device that a program may use.
        refusal: the compiler's message if there was not enough memory.
        flops: per device and step, as the compiler counts them: each loop once.
        model_flops: per device and step, from the model's multiply-adds, without recomputation.
        collectives: the communication between devices in a step.
        cycles: the compiler's estimate for a step on one device.
        num_unknown_loops: loops of which only one iteration is in `cycles`.
        step_seconds: `cycles` over the clock rate, plus the bytes sent over the links' bandwidth.
        collective_seconds: the latter part of it.
        images_per_second: of all devices.
        utilization: `model_flops` in that time, as a fraction of the peak.
        total_steps: of the whole run.
        hours: of the whole run.
        largest_batch: the most images per device that fit, see `memory.largest_that_fits`.
        assumptions: on which the figures rest.
    """

    topology: str
    device_kind: str
    num_devices: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    trace_seconds: float
    compile_seconds: float
    compile_cpu_seconds: float
    memory: Memory | None
    memory_limit: int | None
    refusal: str | None
    flops: float | None
    model_flops: float
    collectives: tuple[hlo.Collective, ...]
    cycles: int | None
    num_unknown_loops: int
    step_seconds: float | None
    collective_seconds: float | None
    images_per_second: float | None
    utilization: float | None
    total_steps: int
    hours: float | None
    largest_batch: int | None
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether the step fits into the memory of a device."""
        if self.refusal is not None:
            return False
        if self.memory is None or self.memory_limit is None:
            return None
        return self.memory.total <= self.memory_limit

    @property
    def sent_bytes(self) -> float:
        """The bytes that a device sends in a step, at least."""
        return sum(collective.sent_bytes for collective in self.collectives)

    def as_json(self) -> dict[str, object]:
        """All fields and properties."""
        return dataclasses.asdict(self) | {
            "fits": self.fits,
            "memory_total": self.memory.total if self.memory else None,
            "sent_bytes": self.sent_bytes,
        }


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """One compilation: the program and its figures, or why there is none."""

    run: Run
    trace_seconds: float
    compile_seconds: float
    compile_cpu_seconds: float
    program: jax.stages.Compiled | None
    refusal: str | None

    @property
    def memory(self) -> Memory | None:
        return memory_of(self.program) if self.program is not None else None


def compile_training(
    config: ml_collections.ConfigDict,
    *,
    topologies: Sequence[str] = (),
    batch_per_device: int | None = None,
    search_largest: bool = True,
    output: pathlib.Path | None = None,
    console: Console | None = None,
) -> list[Estimate]:
    """Compiles the training step and prints its memory, estimated time and communication.

    Neither the devices nor the data need to be present; for a data set that cannot be opened, the
    size of ImageNet is assumed.

    Args:
        config: of the training.
        topologies: TPU slices or GPUs, such as `"v5e:4x4"` or `"h100:8"`; empty for the devices of
            this machine. Several of them also give a table of how the step scales.
        batch_per_device: images per device, instead of the config's batch size.
        search_largest: compiles a few times more, to find the largest batch that fits. Not done for
            several topologies.
        output: a JSON file for all figures.
        console: where the tables are printed.

    Returns:
        The figures for each topology.

    Raises:
        ValueError: the config is wrong, there is no such topology, or the output cannot be written.
        ImportError: the compiler for TPUs or for GPUs is not installed.
    """
    console = console or Console()
    if output is not None:
        check_can_be_written(output)
    # Everything is checked before the first compilation, which takes minutes.
    places: list[tuple[str, list[jax.Device]]] = [
        (name, topology_devices(name)) for name in topologies
    ] or [("this machine", jax.devices())]
    sources, assumed = described_sources(config)
    builders = [_builder(config, there, sources) for _, there in places]
    runs = [
        build(batch_per_device or config.batch_size / len(there))
        for build, (_, there) in zip(builders, places, strict=True)
    ]
    estimates = []
    for (name, _), run in zip(places, runs, strict=True):
        compiled = _compile(run, name, console)
        estimate = _estimate(name, compiled, assumed, config)
        if search_largest and len(places) == 1 and estimate.memory_limit:
            largest = _largest(
                lambda batch: _compile(builders[0](batch), places[0][0], console),
                compiled,
                estimate.memory_limit,
            )
            estimate = dataclasses.replace(estimate, largest_batch=largest)
        estimates.append(estimate)
        console.print(compile_tables.one(estimate, config))
    if len(estimates) > 1:
        console.print(compile_tables.scaling(estimates))
    if output is not None:
        output.write_text(json.dumps([one.as_json() for one in estimates], indent=2) + "\n")
        say(console, f"figures: {output}")
    return estimates


def _builder(
    config: ml_collections.ConfigDict, there: Sequence[jax.Device], sources: tuple[Source, Source]
) -> Callable[[float], Run]:
    """A function from a number of images per device to the run that trains with it."""
    num_devices = len(there)

    def build(batch_per_device: float) -> Run:
        changed = config.copy_and_resolve_references()
        # `Run` refuses a batch that does not divide among the devices.
        changed.batch_size = round(batch_per_device * num_devices)
        if batch_per_device != config.batch_size / num_devices:
            group = math.gcd(config.mixing.group_size, round(batch_per_device))
            changed.mixing.group_size = group
        return Run(changed, devices=there, sources=sources)

    return build


def _compile(run: Run, name: str, console: Console) -> _Compiled:
    what = f"compiling {run.config.batch_size:,} images for {run.engine.mesh.size} devices, {name}"
    with elapsing(console, what):
        return _compile_quietly(run)


def _compile_quietly(run: Run) -> _Compiled:
    engine, config = run.engine, run.config
    size, channels = config.data.image_size, run.eval_source.channels
    place = sharding.over_batch(engine.mesh)
    batch = {
        "image": jax.ShapeDtypeStruct(
            (config.batch_size, size, size, channels), jnp.uint8, sharding=place
        ),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32, sharding=place),
    }
    started = time.monotonic()
    platform, options = engine.mesh.devices.flat[0].platform, None
    if _absent_gpu(engine.mesh.devices.flat[0]) is not None:
        # JAX asks a GPU that is there whether "gpu" means CUDA.
        platform, options = "cuda", gpus.OPTIONS_WITHOUT_GPU
    traced = engine.train_step.trace(engine.abstract_state, batch)
    lowered = traced.lower(lowering_platforms=(platform,))
    traced_at, cpu_before = time.monotonic(), time.process_time()
    program, refusal = None, None
    try:
        program = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = re.split(r"\.\s|\n", str(error).partition(": ")[2])[0]
    return _Compiled(
        run,
        traced_at - started,
        time.monotonic() - traced_at,
        time.process_time() - cpu_before,
        program,
        refusal,
    )


def _estimate(
    name: str, compiled: _Compiled, assumed: str, config: ml_collections.ConfigDict
) -> Estimate:
    run, mesh = compiled.run, compiled.run.engine.mesh
    device = mesh.devices.flat[0]
    chip = devices.chip(device.device_kind)
    batch_per_device = run.config.batch_size / mesh.size
    model_flops = run.counts.macs * devices.TRAINING_FLOPS_PER_MAC * batch_per_device
    program, flops = None, None
    if compiled.program is not None:
        program = hlo.read_program(compiled.program.as_text() or "", num_devices=mesh.size)
        flops = (compiled.program.cost_analysis() or {}).get("flops")
    collectives = program.collectives if program else ()
    step_seconds = sending = images_per_second = utilization = hours = None
    if program and program.cycles and chip:
        sending = sum(one.sent_bytes for one in collectives) / chip.ici_bytes_per_second
        step_seconds = program.cycles / chip.clock_hz + sending
        images_per_second = run.config.batch_size / step_seconds
        hours = run.total_steps * step_seconds / 3600
        if peak := devices.peak_flops(device.device_kind):
            utilization = model_flops / step_seconds / peak
    with compiled_for(device.platform):
        remat = remat_here(run.config.model.remat)
    return Estimate(
        topology=name,
        device_kind=device.device_kind,
        num_devices=mesh.size,
        mesh=dict(mesh.shape),
        batch_size=run.config.batch_size,
        remat=remat,
        trace_seconds=compiled.trace_seconds,
        compile_seconds=compiled.compile_seconds,
        compile_cpu_seconds=compiled.compile_cpu_seconds,
        memory=compiled.memory,
        memory_limit=_memory_limit(device, chip),
        refusal=compiled.refusal,
        flops=flops,
        model_flops=model_flops,
        collectives=collectives,
        cycles=program.cycles if program else None,
        num_unknown_loops=program.num_unknown_loops if program else 0,
        step_seconds=step_seconds,
        collective_seconds=sending,
        images_per_second=images_per_second,
        utilization=utilization,
        total_steps=run.total_steps,
        hours=hours,
        largest_batch=None,
        assumptions=(
            assumed,
            *compile_tables.changes(run.config, config),
            *compile_tables.assumptions(chip, program, _absent_gpu(device)),
        ),
    )


def _memory_limit(device: jax.Device, chip: devices.Chip | None) -> int | None:
    if chip is not None:
        return chip.hbm_bytes
    if (gpu := _absent_gpu(device)) is not None:
        return gpu.memory_limit
    return (device.memory_stats() or {}).get("bytes_limit")


def _absent_gpu(device: jax.Device) -> gpus.Gpu | None:
    """The GPU, if there is only a description of it; None for devices that are here, and TPUs."""
    return gpus.gpu_of_kind(device.device_kind) if jax.default_backend() == "cpu" else None


def _largest(
    compile_batch: Callable[[float], _Compiled], compiled: _Compiled, limit: int
) -> int | None:
    """The most images per device that fit, by a few compilations; `compiled` counts as one."""
    config = compiled.run.config
    unit = math.lcm(_STEP * config.accumulation_steps, compiled.run.group_size)
    own = config.batch_size // compiled.run.engine.mesh.size

    @functools.cache
    def needed(batch: int) -> int | None:
        memory = compiled.memory if batch == own else compile_batch(batch).memory
        return memory.total if memory else None

    # A training takes no batch that is larger than its data.
    most = len(compiled.run.train_source) // compiled.run.engine.mesh.size
    return largest_that_fits(needed, own, unit=unit, limit=limit, most=most)
