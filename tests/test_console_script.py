"""One command for all programs."""

import configparser
import importlib
import pathlib
import subprocess
import sys

import pytest

import metaformer_jax
from metaformer_jax import __main__ as console

REPOSITORY = pathlib.Path(__file__).parent.parent


def test_help_of_every_command_comes_without_waiting_for_jax():
    code = """
import contextlib, io, sys
from metaformer_jax.__main__ import COMMANDS, main

for arguments in (["--help"], *([name, "--help"] for name in COMMANDS)):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            code = main(arguments)
        except SystemExit as exit:
            code = exit.code
    assert code == 0, arguments
    text = output.getvalue()
    program = COMMANDS.get(arguments[0])
    if program is None:
        assert all(f" {name} " in text for name in COMMANDS), text
    elif not program.flags_are_absl:
        assert text.startswith(f"usage: metaformer-jax {arguments[0]} "), text
        assert "python -m" not in text
    else:
        assert "--workdir" in text
assert "jax" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pedict"], "'pedict' is not a command. Did you mean predict?"),
        (["frobnicate"], "--help lists them"),
        ([], "a COMMAND must be given"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["zoo", "resnet*"], "no published model matches"),
        (["predict", "nowhere.jpg", "--model", "caformer_s18"], "nowhere.jpg: no such file"),
        (["convert", "gone.pth", "--model", "caformer_s18", "--output", "x"], "existing checkp"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    try:
        code = console.main(arguments)
    except SystemExit as exit:
        code = exit.code
    output = capsys.readouterr()
    assert (code, output.out) == (2, "")
    assert message in output.err
    assert sum("error: " in line for line in output.err.splitlines()) == 1


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as exit:
        console.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"metaformer-jax {metaformer_jax.__version__}\n"


def test_training_is_its_program_as_python_runs_it():
    result = subprocess.run(
        [sys.executable, "-m", "metaformer_jax", "train", "--config=gone.py"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: `--config` must be a Python file")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("command", "before"), [("train", []), ("eval", ["--mode=eval"])])
def test_flags_of_training_and_evaluation_pass_through(command, before, monkeypatch):
    seen = []

    def run_module(module, *, run_name, alter_sys):
        seen.append((module, run_name, sys.argv[1:]))
        raise SystemExit(75)

    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(console.runpy, "run_module", run_module)
    with pytest.raises(SystemExit) as exit:
        console.main([command, "--config=a.py", "--config.epochs=3"])
    assert exit.value.code == 75
    arguments = [*before, "--config=a.py", "--config.epochs=3"]
    assert seen == [("metaformer_jax.main", "__main__", arguments)]


def test_the_installed_script_is_this_one():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    name, _, place = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = place.partition(":")
    assert name == "metaformer-jax"
    assert getattr(importlib.import_module(module), function) is console.main
