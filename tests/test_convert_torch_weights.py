"""The program converts there and back, and answers every mistake with one message."""

import hashlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import reference
import torch
from flax import nnx

from metaformer_jax import create_model
from metaformer_jax.weights import read_record, timm_parity
from metaformer_jax.weights.convert import variables_of
from metaformer_jax.weights.files import read_tensors, write_tensors

PROGRAM = pathlib.Path(__file__).parents[1] / "tools" / "convert_torch_weights.py"
NAME = "poolformerv2_s12"


def load_program():
    spec = importlib.util.spec_from_file_location("convert_torch_weights", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def in_torch(tensors):
    return {key: torch.from_numpy(array) for key, array in tensors.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    sail = {k: torch.from_numpy(v) for k, v in reference.state_dict(NAME, "sail").items()}
    timm = {k: torch.from_numpy(v) for k, v in reference.state_dict(NAME, "timm").items()}
    torch.save(sail, folder / "sail.pth")
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in timm.items()}}, folder / "timm.pth"
    )
    write_tensors(folder / "timm.safetensors", reference.state_dict(NAME, "timm"), {})
    return folder


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            code = load_program().main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def assert_refused(result, *parts):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert all(part in err for part in parts), err


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_there_and_back_in_both_layouts_is_bit_identical(run, files, tmp_path):
    code, out, err = run(files / "sail.pth", "--model", NAME, "--output", "converted")
    assert (code, err) == (0, "")
    assert out == "converted: poolformerv2_s12, 11,891,712 parameters from sail layout\n"
    for layout, name in (
        ("sail", "back.pth"),
        ("timm", "back_timm.pth"),
        ("timm", "b.safetensors"),
    ):
        code, out, err = run(
            "converted", "--reverse", "--layout", layout, "--output", tmp_path / name
        )
        assert (code, err) == (0, "")
        tensors, _ = read_tensors(tmp_path / name)
        expected = reference.state_dict(NAME, layout)
        assert set(tensors) == set(expected)
        assert all(np.array_equal(tensors[key], expected[key]) for key in expected)


def test_a_tilde_in_a_flag_is_the_home_folder(run, files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sail.pth").symlink_to(files / "sail.pth")
    code, _, errors = run("~/sail.pth", "--model", NAME, "--output=~/there.safetensors")
    assert code == 0, errors
    assert everything_in(tmp_path) == ["sail.pth", "there.safetensors"]


def test_the_record_says_where_the_weights_come_from(run, files, tmp_path):
    code, out, _ = run(files / "timm.pth", "--model", NAME, "--output", "converted")
    assert code == 0
    assert "from timm layout, state_dict" in out
    record = json.loads((tmp_path / "converted" / "metaformer.json").read_text())
    digest = hashlib.sha256((files / "timm.pth").read_bytes()).hexdigest()
    del record["date"]
    assert record == {
        "model": NAME,
        "num_classes": 1000,
        "in_channels": 3,
        "image_size": [224, 224],
        "params": 11891712,
        "frozen_params": 0,
        "source_file": "timm.pth",
        "source_sha256": digest,
        "source_layout": "timm",
        "source_entry": "state_dict",
        "format": 2,
    }


def test_several_outputs_hold_the_same(run, files, tmp_path):
    outputs = ["--output", "converted", "--output", "portable.safetensors"]
    assert run(files / "sail.pth", "--model", NAME, *outputs)[0] == 0
    models = [
        create_model(NAME, pretrained=tmp_path / output, rngs=nnx.Rngs(0))
        for output in outputs[1::2]
    ]
    first, second = (variables_of(model) for model in models)
    assert all(np.array_equal(first[path][...], second[path][...]) for path in first)
    assert run("portable.safetensors", "--reverse", "--output", "back.pth")[0] == 0
    back, _ = read_tensors(tmp_path / "back.pth")
    assert set(back) == set(reference.state_dict(NAME))


def test_what_a_record_says_is_not_changed_by_flags(run, files, tmp_path):
    flags = ["--model", NAME, "--image-size", "64"]
    for output in ("folder", "portable.safetensors"):
        assert run(files / "sail.pth", *flags, "--output", output)[0] == 0
        before = everything_in(tmp_path)
        for flag, value, found in (
            ("--num-classes", "7", "1000"),
            ("--in-channels", "5", "3"),
            ("--image-size", "224", "(64, 64)"),
        ):
            result = run(output, "--reverse", flag, value, "--output", "back.pth")
            assert_refused(result, f"{flag} must be what the checkpoint has, {found}, got {value}")
        assert everything_in(tmp_path) == before
        back = ["--reverse", *flags, "--num-classes", "1000", "--output", "b.pth", "--force"]
        assert run(output, *back)[0] == 0
    # With its name given or not.
    assert run(output, "--model", NAME, "--output", "again")[0] == 0
    assert read_record(tmp_path / "again").image_size == (64, 64)


def test_what_does_not_fit_is_refused_and_leaves_nothing(run, files, tmp_path):
    good = torch.load(files / "sail.pth", weights_only=True)
    broken = tmp_path / "broken.pth"
    cases = {
        "missing: norm.bias [512]": {k: v for k, v in good.items() if k != "norm.bias"},
        "unexpected: extra [2]": {**good, "extra": torch.zeros(2)},
        "mis-shaped: norm.bias must be [512], got [3]": {**good, "norm.bias": torch.zeros(3)},
        "NaN or infinite: norm.bias: 512 of 512": {**good, "norm.bias": torch.full((512,), np.nan)},
        "this looks like convformer_s18": in_torch(reference.state_dict("convformer_s18")),
        "must hold a state dict": {"epoch": 3},
    }
    for message, content in cases.items():
        torch.save(content, broken)
        for output in ("out", "out.safetensors"):
            result = run(broken, "--model", NAME, "--output", output)
            assert_refused(result, message)
            assert everything_in(tmp_path) == ["broken.pth"]
    broken.write_bytes((files / "sail.pth").read_bytes()[:-1000])
    assert_refused(run(broken, "--model", NAME, "--output", "out"), "truncated")
    broken.write_text("<html>")
    assert_refused(run(broken, "--model", NAME, "--output", "out"), "no checkpoint")
    assert everything_in(tmp_path) == ["broken.pth"]


def test_an_earlier_output_is_replaced_with_force_only(run, files, tmp_path):
    command = (files / "sail.pth", "--model", NAME, "--output", "converted")
    assert run(*command)[0] == 0
    before = (tmp_path / "converted" / "metaformer.json").read_bytes()
    assert_refused(run(*command), "--force")
    assert (tmp_path / "converted" / "metaformer.json").read_bytes() == before
    assert run(*command, "--force")[0] == 0
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("text")
    result = run(*command[:-1], "precious", "--force")
    assert_refused(result, "something else")
    assert everything_in(tmp_path / "precious") == ["thesis.tex"]


def test_a_malicious_file_ends_with_one_message_and_without_running(tmp_path):
    class RunsShell:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'it_ran'}",))

    torch.save({"state_dict": {}, "args": RunsShell()}, tmp_path / "malicious.pth")
    result = subprocess.run(
        [sys.executable, PROGRAM, "malicious.pth", "--model", NAME, "--output", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    (message,) = result.stderr.splitlines()
    assert message.startswith("error: `path` must hold tensors and plain values")
    assert "wants to run posix.system. It was not run." in message
    assert everything_in(tmp_path) == ["malicious.pth"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.pth", "--model", NAME, "--output", "out"], "existing checkpoint"),
        (["{sail}", "--output", "out"], "--model must be given"),
        (["{timm}", "--output", "out"], "--model must be given"),
        (["nothing.safetensors", "--output", "out"], "existing checkpoint"),
        (["nothing", "--output", "out"], "existing checkpoint"),
        (["{sail}", "--model", "caformer_s81", "--output", "out"], "Did you mean caformer_s18"),
        (["{sail}", "--model", NAME], "--output"),
        (["{sail}", "--model", NAME, "--output", "out.pth"], "takes --reverse"),
        (["{sail}", "--model", NAME, "--output", "{sail}", "--reverse"], "must differ"),
        (["{sail}", "--model", NAME, "--output", "out", "--reverse"], "writes a file"),
        (["{sail}", "--model", NAME, "--output", "out", "--layout", "timm"], "give --reverse"),
        (["{sail}", "--model", NAME, "--output", "out", "--output", "./out"], "a place of its own"),
        (["{sail}", "--model", NAME, "--output", "n/a.safetensors", "--output", "n"], "of its own"),
        (["in/x.pth", "--model", NAME, "--output", "in"], "INPUT and --output must differ"),
        (["{sail}", "--model", NAME, "--output", "{sail}/out"], "that can be written to"),
        (["{sail}", "--model", NAME, "--output", "out", "--num-classes", "5"], "has, 1000"),
        (["{sail}", "--model", NAME, "--output", "out", "--in-channels", "4"], "has, 3"),
        (["{sail}", "--model", NAME, "--output", "out", "--entry", "ema"], "got 'ema'"),
        (["{sail}", "--model", "identityformer_s12", "--reverse", "--layout", "timm",
          "--output", "out.pth"], "timm has no model"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_ends_with_a_message(
    run, files, tmp_path, arguments, message
):
    filled = [
        argument.format(sail=files / "sail.pth", timm=files / "timm.safetensors")
        for argument in arguments
    ]
    assert_refused(run(*filled), message)
    assert everything_in(tmp_path) == []


def test_an_interrupt_leaves_nothing(run, files, tmp_path, monkeypatch):
    import orbax.checkpoint

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(orbax.checkpoint.Checkpointer, "save", interrupt)
    code, _, err = run(files / "sail.pth", "--model", NAME, "--output", "out")
    assert code == 130
    assert "interrupted" in err
    assert everything_in(tmp_path) == []


def test_verify_says_what_it_needs(run, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    command = (files / "sail.pth", "--model", NAME, "--output", "out", "--verify")
    assert_refused(run(*command), "pip install timm")
    assert everything_in(tmp_path) == []
    run(files / "sail.pth", "--model", NAME, "--output", "a", "--output", "a.safetensors")
    for own in ("a", "a.safetensors"):
        refused = run(own, "--output", "out", "--verify")
        assert_refused(refused, "--verify must be given with the PyTorch file", own)


def test_verify_refuses_what_timm_answers_differently(run, files, tmp_path, monkeypatch):
    """A stand-in for timm that gives the model's own answers, or others."""

    class StandIn(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def load_state_dict(self, state_dict):
            assert set(state_dict) == set(reference.state_dict(NAME, "timm"))

        def forward(self, images):
            assert images.shape == (2, 3, 224, 224)
            model = create_model(NAME, pretrained=files / "sail.pth", rngs=nnx.Rngs(0))
            model.eval()
            logits = np.array(model(images.numpy().transpose(0, 2, 3, 1)))
            return torch.from_numpy(logits * self.factor)

    for factor, code in ((1.0, 0), (1.001, 2)):
        fake = types.SimpleNamespace(
            create_model=lambda *args, factor=factor, **kwargs: StandIn(factor)
        )
        monkeypatch.setattr(timm_parity, "_import_timm", lambda fake=fake: (fake, None))
        result = run(files / "timm.pth", "--model", NAME, "--output", "out", "--verify")
        assert result[0] == code
        assert "relative error to timm: " in result[1]
        assert (tmp_path / "out").exists() == (code == 0)
        if code == 0:
            assert run(files / "timm.pth", "--model", NAME, "--output", "out")[0] == 2
            (tmp_path / "out").rename(tmp_path / "first")


def test_verify_names_the_families_that_timm_has(run, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(
        {k: torch.from_numpy(v) for k, v in reference.state_dict("identityformer_s12").items()},
        path,
    )
    result = run(path, "--model", "identityformer_s12", "--output", "out", "--verify")
    assert_refused(result, "poolformerv2, convformer, caformer")


@pytest.mark.parametrize("arguments", [("loop", "--output", "out"), ("{sail}", "--output", "loop")])
def test_a_link_to_itself_is_refused_in_one_line(arguments, run, files, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    given = [argument.format(sail=files / "sail.pth") for argument in arguments]
    code, out, err = run(*given, "--model", NAME)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_verify_refuses_what_timm_cannot_read(run, files, tmp_path, monkeypatch):
    run(files / "sail.pth", "--model", NAME, "--output", "own.safetensors")
    tensors, _ = read_tensors(tmp_path / "own.safetensors")
    write_tensors(tmp_path / "foreign.safetensors", tensors, {})
    fake = types.SimpleNamespace(create_model=lambda *args, **kwargs: torch.nn.Module())
    monkeypatch.setattr(timm_parity, "_import_timm", lambda: (fake, None))
    result = run("foreign.safetensors", "--model", NAME, "--output", "out", "--verify")
    assert_refused(result, "must be in the sail or timm layout")
