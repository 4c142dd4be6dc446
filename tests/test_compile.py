"""Compiling for devices that are not there: the program, its table and its figures."""

import dataclasses
import importlib.util
import io
import json
import pathlib
import subprocess
import sys

import jax
import pytest
from rich.console import Console

from metaformer_jax.training import compile, compile_tables, devices, gpus, hlo, recipes, topology
from metaformer_jax.training.compile import compile_training
from metaformer_jax.training.described import described_sources
from metaformer_jax.training.topology import topology_devices

REPOSITORY = pathlib.Path(__file__).parent.parent
TINY = {
    "batch_size": 64,
    "model.depths": (1, 1, 1, 1),
    "model.dims": (8, 8, 8, 8),
    "model.family": "poolformerv2",
}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs TPUs\' compiler: pip install -e ".[tpu]"',
)


needs_cuda = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, topology.CUDA_PACKAGES)),
    reason='needs GPUs\' compiler: pip install -e ".[gpu]"',
)


def _config(**changes):
    config = recipes.digits()
    config.update_from_flattened_dict({**TINY, **changes})
    return config


def _main(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "metaformer_jax.main", "--config=configs/digits.py", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


def test_the_program_compiles_for_this_machine_without_a_workdir(tmp_path):
    output = tmp_path / "figures.json"
    fields = [f"--config.{name}={value}".replace(" ", "") for name, value in TINY.items()]
    result = _main("--mode=compile", f"--output={output}", *fields)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for text in ("poolformerv2 on 8 x cpu", "1,442 examples of 10 classes", "all-reduce among 8"):
        assert text in result.stdout
    (figures,) = json.loads(output.read_text())
    assert figures["batch_size"] == 64
    assert figures["num_devices"] == 8
    assert figures["remat"] == "none"
    assert figures["memory_total"] > 64 * 32 * 32 / 8
    assert figures["flops"] > 0
    # 1,442 images in batches of 64, over 15 epochs.
    assert figures["total_steps"] == round(15 * 1442 / 64)
    # The gradients of every parameter, and a few sums.
    assert figures["sent_bytes"] > 0
    # No compiler but that for TPUs says how long a step takes.
    assert figures["step_seconds"] is None
    assert "no estimate of time" in result.stdout


def test_a_topology_that_is_none_is_one_line_with_good_ones():
    result = _main("--mode=compile", "--topology=v5e:3x3")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "got 'v5e:3x3'" in line
    assert "v5e:4x4" in line


@pytest.mark.parametrize(
    "name",
    [
        *("v5e", "v9:2x2", "v5e:2x2x2", "v4:4x4", "v5e:0x2", "v5e:32x32"),
        *("h100", "h1000:8", "h100:0", "h100:2x2x8", "h100:999x8", "a100-:8"),
    ],
)
def test_only_names_of_slices_and_gpus_are_taken(name):
    with pytest.raises(ValueError, match="There are, for example: "):
        topology_devices(name)


def test_without_a_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, extra in (("v5e:4x4", "tpu"), ("h100:8", "gpu")):
        with pytest.raises(ImportError, match=rf'pip install -e "\.\[{extra}\]"'):
            topology_devices(name)


def test_a_batch_that_does_not_divide_is_refused_as_in_training():
    with pytest.raises(ValueError, match="must divide by the 8 devices"):
        compile_training(_config(batch_size=60), console=Console(file=io.StringIO()))


def test_all_slices_are_checked_before_the_first_is_compiled(monkeypatch):
    devices = {"v5e:2x2": jax.devices()[:4], "v5e:4x2": jax.devices()}
    monkeypatch.setattr(compile, "topology_devices", devices.get)
    monkeypatch.setattr(compile, "_compile", lambda *_: pytest.fail("compiled too early"))
    config = _config(batch_size=64, **{"mixing.mixup_alpha": 0.8, "mixing.group_size": 16})
    with pytest.raises(ValueError, match=r"mixing\.group_size.*"):
        compile_training(config, topologies=[*devices], console=Console(file=io.StringIO()))


def test_another_batch_changes_the_mixing_group_and_says_so():
    text = io.StringIO()
    changes = {"mixing.mixup_alpha": 0.8, "mixing.group_size": 16}
    (estimate,) = compile_training(
        _config(**changes), batch_per_device=4, console=Console(file=text, width=100)
    )
    assert estimate.batch_size == 32
    assert "mixing.group_size 4 in place of 16" in text.getvalue()


@pytest.mark.parametrize(
    ("config", "examples", "classes"),
    [
        ("caformer_s18", 1_281_167, 1000),
        ("caformer_s18:in21k", 14_197_122, 21841),
        ("caformer_s18:in21ft1k", 1_281_167, 1000),
    ],
)
def test_data_that_is_not_there_is_assumed_and_named(config, examples, classes, tmp_path):
    described = recipes.published(*config.split(":"))
    described.data.root = str(tmp_path)
    (train, evaluation), text = described_sources(described)
    assert (len(train), len(train.class_names)) == (examples, classes)
    assert evaluation.channels == 3
    assert "cannot be opened here: taken as ImageNet" in text


def test_data_that_is_there_is_used():
    (train, _), text = described_sources(_config())
    assert len(train) == 1442
    assert text == "digits: 1,442 examples of 10 classes"


def test_each_gpu_has_a_name_that_tells_its_peak():
    for gpu in gpus.GPUS.values():
        assert gpus.gpu_of_kind(gpu.device_kind) is gpu
        # Multiply-adds of the tensor cores of a multiprocessor in a cycle, for bfloat16.
        macs = {8: 1024, 9: 2048, 10: 4096}[gpu.capability[0]]
        boost = gpu.clock_ghz * 1e9 * gpu.num_cores * macs * 2
        assert devices.peak_flops(gpu.device_kind) == pytest.approx(boost, rel=0.1)


def test_clocks_agree_with_the_peaks_of_the_data_sheets():
    # Multiply-adds of all matrix units in a cycle.
    for kind, macs in {
        "TPU v4": 8 * 128**2,
        "TPU v5 lite": 4 * 128**2,
        "TPU v5": 8 * 128**2,
        "TPU v6 lite": 4 * 256**2,
    }.items():
        peak = devices.chip(kind).clock_hz * macs * 2
        assert peak == pytest.approx(devices.peak_flops(kind), rel=0.003)


@pytest.fixture
def settings_are_kept():
    changed = {
        name: jax.config.values[name] for name in ("jax_platforms", "jax_enable_compilation_cache")
    }
    yield
    for name, value in changed.items():
        jax.config.update(name, value)


@needs_cuda
@pytest.mark.slow
@pytest.mark.usefixtures("settings_are_kept")
def test_a_step_is_compiled_for_gpus_with_their_kernels(monkeypatch):
    programs = []
    read_program = hlo.read_program
    monkeypatch.setattr(
        hlo, "read_program", lambda text, **kw: programs.append(text) or read_program(text, **kw)
    )
    text = io.StringIO()
    changes = {"model.family": "caformer", "model.dims": (32,) * 4, "model.dtype": "bfloat16"}
    (estimate,) = compile_training(
        _config(**changes, **{"mesh.fsdp": 2}),
        topologies=("a100-40gb:2x2",),
        batch_per_device=8,
        search_largest=False,
        console=Console(file=text, width=80),
    )
    assert (estimate.num_devices, estimate.device_kind) == (4, "NVIDIA A100-SXM4-40GB")
    assert estimate.mesh == {"data": 2, "fsdp": 2}
    assert estimate.fits
    # Three quarters of its memory.
    assert estimate.memory_limit == pytest.approx(0.75 * 39.4 * 2**30, rel=1e-3)
    assert {"all-gather", "reduce-scatter", "all-reduce"} == {
        collective.kind for collective in estimate.collectives
    }
    assert {collective.group_size for collective in estimate.collectives} == {2, 4}
    assert estimate.step_seconds is None
    (program,) = programs
    # Depthwise convolutions and norms by Triton, attention by cuDNN, forward and backward.
    for kernel in ("convolve_kernel", "kernel_gradient_kernel", "normalization_gradient_kernel"):
        assert kernel in program
    assert "__cudnn$fmhaSoftmax" in program
    assert "__cudnn$fmhaSoftmaxBackward" in program
    for told in ("75% of a GPU's 39.42 GiB", "no estimate of time", "no GPU tried out"):
        assert told in text.getvalue()


@needs_libtpu
@pytest.mark.slow
@pytest.mark.usefixtures("settings_are_kept")
def test_a_step_is_compiled_for_tpus_and_scales():
    text = io.StringIO()
    estimates = compile_training(
        _config(**{"model.family": "convformer", "model.scan": 1}),
        topologies=("v5e:1x1", "v5e:2x2"),
        batch_per_device=64,
        console=Console(file=text, width=80),
    )
    one, four = estimates
    assert (one.num_devices, four.num_devices) == (1, 4)
    assert one.device_kind == "TPU v5 lite"
    # What the config leaves to the platform.
    assert one.remat == "auto"
    assert "remat auto" in text.getvalue()
    assert one.fits
    # The same work on each; what four add is small, and so is this model.
    assert one.cycles == pytest.approx(four.cycles, rel=0.3)
    assert one.step_seconds == pytest.approx(one.cycles / 1.5e9)
    assert four.sent_bytes > 0 == one.sent_bytes
    assert four.hours == pytest.approx(four.step_seconds * four.total_steps / 3600)
    assert "efficiency" in text.getvalue()
    assert "no clock measured it" in text.getvalue()


def test_the_table_of_scaling_fits_eighty_columns():
    (estimate,) = compile_training(_config(), console=Console(file=io.StringIO()))
    chips = dataclasses.replace(
        estimate, num_devices=256, batch_size=32_768, step_seconds=0.1404, hours=100.0
    )
    rows = [
        dataclasses.replace(
            chips, topology="v5e:8x16", images_per_second=7_000_000.0, refusal="no"
        ),
        dataclasses.replace(
            chips, topology="v5e:16x16", images_per_second=1_000_000.0, memory_limit=2**34
        ),
        dataclasses.replace(
            chips, topology="v6e:16x16", images_per_second=1_500_000.0, memory_limit=2**34
        ),
    ]
    text = io.StringIO()
    Console(file=text, width=80).print(compile_tables.scaling(rows))
    lines = text.getvalue().splitlines()
    assert "…" not in text.getvalue()
    # What does not fit is no base to compare with.
    (refused, base, faster) = (line.split() for line in lines if line[:2] in ("v5", "v6"))
    assert (refused[-1], base[-1], faster[-1]) == ("-", "100.0%", "150.0%")
    assert base[:3] == ["v5e:16x16", "256", "32,768"]
