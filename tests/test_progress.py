"""What a person and a log are told of a run's speed."""

import io
import json
import math
import sys
import threading
import types

import jax
import pytest
from rich.console import Console

from metaformer_jax.training import devices, progress
from metaformer_jax.training.metrics import MetricWriter, read_metrics
from metaformer_jax.training.progress import TrainingProgress, elapsing, evaluation_progress, say


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def _progress(output):
    return TrainingProgress(
        Console(file=output, width=200),
        total_steps=1000,
        batch_size=64,
        macs_per_image=10**9,
    )


def test_speed_counts_images_and_waiting_but_no_compiling_and_no_evaluation(clock, monkeypatch):
    # A device of 1e12 FLOP/s, 8 of them.
    monkeypatch.setattr(devices, "peak_flops", lambda kind: 1e12)
    with _progress(io.StringIO()) as shown:
        with shown.waiting_for_data():
            clock.now += 30
        clock.now += 60
        shown.update(1)
        assert shown.speed(1) == {}
        with shown.waiting_for_data():
            clock.now += 1
        clock.now += 3
        with shown.paused():
            clock.now += 500
        shown.update(11)
        speed = shown.speed(11)
    assert jax.device_count() == 8
    assert speed == pytest.approx(
        {
            "images_per_second": 160,
            "images_per_second_per_device": 20,
            "data_wait": 0.25,
            # Six operations for each of 1e9 multiply-adds.
            "mfu": 160 * 6e9 / 8e12,
        }
    )


def test_without_a_terminal_a_line_now_and_then_says_what_is_left(clock):
    output = io.StringIO()
    figures = {"loss": 1.25, "accuracy": 0.5}
    with _progress(output) as shown:
        shown.update(1)
        for step in range(2, 32):
            clock.now += 1.0
            shown.update(step)
            shown.show(step, figures | shown.speed(step), held_out="  held out 40.0%")
    lines = output.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0] == (
        "step 12/1000  16 min left  loss 1.250  accuracy 50.0%  held out 40.0%  64 images/s  "
        "8 per device  waiting for data 0%"
    )


def test_names_are_said_as_they_are():
    output = io.StringIO()
    name = "w[lr=1e-3]/q[/b]/:smile:/" + "long" * 40
    say(Console(file=output, width=40), name)
    say(Console(file=output), "caf\udce9")
    assert output.getvalue() == f"{name}\ncaf\\udce9\n"


def test_no_utilization_is_told_where_the_peak_is_not_known():
    assert devices.peak_flops("TPU v5 lite") == 197e12
    assert devices.peak_flops("TPU v5p") == 459e12
    assert devices.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert devices.peak_flops("NVIDIA H200 NVL") == 835e12
    assert devices.peak_flops("NVIDIA H200") == 989e12
    assert devices.peak_flops("cpu") is None
    assert devices.model_flops_utilization(100.0, 10**9) is None


def test_an_evaluation_shows_a_bar_on_a_terminal_and_nothing_elsewhere():
    for is_terminal in (True, False):
        output = io.StringIO()
        console = Console(file=output, force_terminal=is_terminal, width=100)
        with evaluation_progress(console, 2) as advance:
            advance()
            advance()
        assert ("evaluation" in output.getvalue()) == is_terminal


def test_a_process_that_is_not_the_writer_leaves_nothing(tmp_path):
    with MetricWriter(tmp_path, is_writer=False) as writer:
        writer.write(1, train={"loss": 1.0})
        writer.write_picture(1, "picture", None)
    assert not any(tmp_path.iterdir())


class FakeWandb(types.ModuleType):
    """Takes down what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **arguments):
        self.calls.append(("init", arguments))
        return self

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


def test_weights_and_biases_gets_the_rows_under_one_name_for_each_workdir(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        with MetricWriter(tmp_path, wandb_project="birds", config={"epochs": 2}) as writer:
            writer.write(3, train={"loss": 1.0})
    first, second = ({**call[1]} for call in wandb.calls if call[0] == "init")
    assert first == second
    assert (first["project"], first["config"], first["resume"]) == ("birds", {"epochs": 2}, "allow")
    assert wandb.calls[1:3] == [("log", 3, {"train/loss": 1.0}), ("finish", 0)]


def test_where_weights_and_biases_does_not_start_it_is_said_in_one_line(tmp_path, monkeypatch):
    wandb = FakeWandb()

    def init(**_):
        raise RuntimeError("No API key configured.\nUse wandb login.")

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ValueError, match=r"got 'birds': No API key configured\. Log in by"):
        MetricWriter(tmp_path, wandb_project="birds")


def test_what_is_not_finite_is_written_as_json_has_it(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, train={"loss": float("nan"), "grad_norm": float("inf"), "accuracy": 0.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert row == {"step": 1, "train/loss": None, "train/grad_norm": None, "train/accuracy": 0.5}
    with MetricWriter(tmp_path, start_step=1):
        pass
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["train/loss"])
    assert (tmp_path / "metrics.jsonl").read_text() == f"{line}\n"


def test_without_its_package_weights_and_biases_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="wandb is not installed: pip install wandb"):
        MetricWriter(tmp_path, wandb_project="birds")
    assert read_metrics(tmp_path) == []


def test_work_that_does_not_tell_how_far_it_is_gives_signs_of_life():
    told = threading.Event()

    class Output(io.StringIO):
        def write(self, text):
            if "so far" in text:
                told.set()
            return super().write(text)

    output = Output()
    with elapsing(Console(file=output, width=200), "compiling", seconds_per_line=0.001):
        assert told.wait(60)
    lines = output.getvalue().splitlines()
    assert lines[0] == "compiling ..."
    assert lines[1] == "compiling: 0 s so far"
    # Nobody is left to tell more.
    assert len(output.getvalue().splitlines()) == len(lines)
    assert "tell" not in [thread.name for thread in threading.enumerate()]


def test_on_a_terminal_a_clock_runs_and_goes():
    output = io.StringIO()
    with elapsing(Console(file=output, width=80, force_terminal=True), "compiling"):
        pass
    assert "compiling ..." in output.getvalue()
    assert "0:00:0" in output.getvalue()


def test_what_fails_within_is_not_hidden():
    with (
        pytest.raises(ValueError, match="no room"),
        elapsing(Console(file=io.StringIO()), "compiling"),
    ):
        raise ValueError("no room")
