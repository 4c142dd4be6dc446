"""Tables of the figures of a compilation."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import ml_collections
from rich import box
from rich.table import Table

from metaformer_jax.training import devices, gpus, hlo

if TYPE_CHECKING:
    from metaformer_jax.training.compile import Estimate

_UNKNOWN = "-"


def assumptions(
    chip: devices.Chip | None, program: hlo.Program | None, absent_gpu: gpus.Gpu | None
) -> tuple[str, ...]:
    """The assumptions behind the time and the memory of an estimate."""
    if program is None:
        return ()
    if chip is None or program.cycles is None:
        no_time = ("no estimate of time: this compiler gives none, only those for TPUs do",)
        return no_time + _assumptions_of_memory(absent_gpu) if absent_gpu else no_time
    links = chip.ici_bytes_per_second / 1e9
    told: tuple[str, ...] = (
        f"step: the compiler's estimated cycles of all fusions at {chip.clock_hz / 1e9:g} GHz, "
        f"then the bytes sent at {links:g} GB/s over all links after it; no clock measured it",
        "the whole run: its training steps alone, without evaluations or waiting for data",
    )
    if program.kernel_cycles:
        kernels = f"{program.kernel_cycles / 1e6:,.1f} M of the cycles are of kernels"
        told = (*told, f"{kernels}, for which v5e's schedules are assumed")
    if program.num_unknown_loops:
        loops = f"{program.num_unknown_loops} loops whose rounds depend on the data count as one"
        return (*told, loops)
    return told


def _assumptions_of_memory(gpu: gpus.Gpu) -> tuple[str, ...]:
    return (
        f"memory: {gpus.MEMORY_FRACTION:.0%} of a GPU's {_gib(gpu.memory_bytes)}, which JAX takes "
        "unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise",
        "no GPU tried out which algorithms of products and convolutions are the fastest: those "
        "that a training takes may need other temporaries",
    )


def changes(
    compiled: ml_collections.ConfigDict, given: ml_collections.ConfigDict
) -> tuple[str, ...]:
    """The changes to a config that were made to compile another batch."""
    group, before = compiled.mixing.group_size, given.mixing.group_size
    return (f"mixing.group_size {group} in place of {before}",) if group != before else ()


def one(estimate: Estimate, config: ml_collections.ConfigDict) -> Table:
    """All figures of one compilation."""
    name = config.model.name or config.model.family
    table = Table(
        title=f"{name} on {estimate.num_devices} x {estimate.device_kind} ({estimate.topology})",
        caption="\n".join(estimate.assumptions),
        title_justify="left",
        caption_justify="left",
        show_header=False,
        box=box.SIMPLE,
    )
    for row in _rows(estimate, config):
        table.add_row(*row)
    return table


def scaling(estimates: Sequence[Estimate]) -> Table:
    """A row for each topology; efficiency is images/s of a chip against the first that fits."""
    # It must fit into 80 columns, the width when the output is not a terminal.
    table = Table(
        title="scaling",
        caption="efficiency: images/s of a chip over those of the first row that fits",
        title_justify="left",
        caption_justify="left",
        box=None,
        pad_edge=False,
        collapse_padding=True,
    )
    names = ("topology", "chips", "batch", "memory", "step", "sent", "images/s", "hours")
    for column in (*names, "efficiency"):
        table.add_column(column, justify="left" if column == "topology" else "right", no_wrap=True)
    base = None
    for estimate in estimates:
        speed, efficiency = estimate.images_per_second, _UNKNOWN
        if speed is not None and estimate.fits:
            base = base or speed / estimate.num_devices
            efficiency = f"{speed / estimate.num_devices / base:.1%}"
        table.add_row(
            estimate.topology,
            f"{estimate.num_devices}",
            f"{estimate.batch_size:,}",
            _gib(estimate.memory.total) if estimate.memory else "too large",
            _milliseconds(estimate.step_seconds),
            _megabytes(estimate.sent_bytes),
            f"{speed:,.0f}" if speed else _UNKNOWN,
            f"{estimate.hours:,.1f}" if estimate.hours else _UNKNOWN,
            efficiency,
        )
    return table


def _rows(estimate: Estimate, config: ml_collections.ConfigDict) -> Iterator[tuple[str, str]]:
    per_device = estimate.batch_size / estimate.num_devices
    parts = f" in {config.accumulation_steps} parts" if config.accumulation_steps > 1 else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in estimate.mesh.items())
    yield "batch", f"{estimate.batch_size:,}, {per_device:g} on each device{parts} ({mesh})"
    remat = "" if estimate.remat == "none" else f", remat {estimate.remat}"
    scan = f", {config.model.scan} blocks a round" if config.model.scan else ""
    yield "step", f"{config.optimizer.name}, {config.model.dtype}{remat}{scan}"
    yield (
        "compiled",
        f"{estimate.compile_seconds:.1f} s ({estimate.compile_cpu_seconds:.1f} s of all cores "
        f"together), after {estimate.trace_seconds:.1f} s of tracing",
    )
    yield "memory of a device", _memory(estimate)
    if estimate.memory is not None:
        memory = estimate.memory
        yield (
            "of which",
            f"arguments {_gib(memory.arguments)}, temporaries {_gib(memory.temporaries)}, "
            f"program {_gib(memory.code)}",
        )
    if estimate.largest_batch is not None:
        found = f"{estimate.largest_batch:,} on each device, which was compiled"
        yield "largest batch", found if estimate.largest_batch else "none fits"
    yield "multiply-adds", f"{estimate.model_flops / 1e12:,.3f} TFLOP of the model, a device"
    if estimate.flops:
        once = ", each loop once" if config.model.scan or config.accumulation_steps > 1 else ""
        yield "operations", f"{estimate.flops / 1e12:,.3f} TFLOP as compiled, a device{once}"
    yield "crosses devices", _crossing(estimate)
    if estimate.step_seconds is not None:
        yield "estimated cycles", f"{(estimate.cycles or 0) / 1e6:,.1f} M"
        yield (
            "estimated step",
            f"{_milliseconds(estimate.step_seconds)}, of which "
            f"{_milliseconds(estimate.collective_seconds)} between devices",
        )
        share = f", {estimate.utilization:.0%} of the peak" if estimate.utilization else ""
        yield "estimated speed", f"{estimate.images_per_second:,.0f} images/s{share}"
        yield "estimated run", f"{estimate.total_steps:,} steps in {estimate.hours:,.1f} hours"


def _memory(estimate: Estimate) -> str:
    limit = f" of {_gib(estimate.memory_limit)}" if estimate.memory_limit else ""
    if estimate.refusal is not None:
        return f"does not fit{limit}: {estimate.refusal}"
    if estimate.memory is None:
        return _UNKNOWN
    fits = {True: ": fits", False: ": does not fit", None: ""}[estimate.fits]
    return f"{_gib(estimate.memory.total)}{limit}{fits}"


def _crossing(estimate: Estimate) -> str:
    if not estimate.collectives:
        return "nothing" if estimate.memory else _UNKNOWN
    totals: collections.Counter[tuple[str, int]] = collections.Counter()
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    for collective in estimate.collectives:
        key = (collective.kind, collective.group_size)
        totals[key] += collective.num_bytes * collective.times
        counts[key] += collective.times
    return "; ".join(
        f"{counts[kind, size]} {kind} among {size}, {_megabytes(num_bytes)}"
        for (kind, size), num_bytes in totals.items()
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:,.1f} kB"


def _milliseconds(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else f"{1e3 * seconds:,.1f} ms"
