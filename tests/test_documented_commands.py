"""Every command that README and docs show is taken by its program, and runs where it can here."""

import argparse
import configparser
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import small_run
from absl import flags
from documented import REPOSITORY, blocks, commands

from metaformer_jax import __main__ as console
from metaformer_jax import main as training_program
from metaformer_jax.data.sources import Digits
from metaformer_jax.training import settings

COMMANDS = commands()
# Stand for a config file of the reader's own.
OWN_CONFIGS = re.compile(r"=(CONFIG|fourierformer\.py)$")
# Commands of others that no test runs.
NOT_RUN = {
    "python -m venv": "makes an environment; Python's own",
    "prepare/bin/python -c": "downloads MNIST, and takes TensorFlow",
    "gcloud compute": "takes a TPU pod; the training that it starts is looked at",
    "tensorboard --logdir": "serves a page; not declared here",
    "test $? -eq": "the shell's",
    "break": "the shell's",
    "done": "the shell's",
}
MODULES = {command.module: command for command in console.COMMANDS.values()}
TRAINING = "metaformer_jax.main"


class Parsed(Exception):  # noqa: N818
    """A program's arguments were taken; nothing further is run."""


@pytest.fixture
def parse_only(monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, arguments=None, namespace=None):
        raise Parsed(parse_args(parser, arguments, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.chdir(REPOSITORY)


def _program(words):
    """(module, arguments) of a command of this project; None where it is another's."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "srun":
        words = words[1:]
    if words[0] == "metaformer-jax":
        # The help of the command that names none is looked at by test_console_script.py.
        command = console.COMMANDS.get(words[1])
        return (command.module, [*command.before, *words[2:]]) if command else None
    if pathlib.Path(words[0]).name == "python" and words[1] == "-m" and words[2] in MODULES:
        return words[2], words[3:]
    if words[:2] == ["python", "tools/convert_torch_weights.py"]:
        return "metaformer_jax.convert", words[2:]
    return None


def _check_training(arguments):
    """Parses the flags as the program does, and checks the config that they make."""
    arguments = [OWN_CONFIGS.sub("=configs/digits.py", word) for word in arguments]
    known = set(flags.FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        # Flags for the fields of a config are made of what stands there.
        patch.setattr(sys, "argv", [TRAINING, *arguments])
        try:
            assert training_program._parse_flags(sys.argv) == [TRAINING]
            settings.check_fields(flags.FLAGS.config)
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
            for name in known:
                flags.FLAGS[name].unparse()
            flags.FLAGS.unparse_flags()


def _check(words):
    program = _program(words)
    if program is not None:
        module, arguments = program
        if module == TRAINING:
            _check_training(arguments)
        else:
            run = __import__(module, fromlist=["main"]).main
            with pytest.raises(Parsed):
                run(arguments)
    elif words[0] == "gcloud" and TRAINING in words[-1]:
        _check(words[-1].removeprefix("--command=").split("&&")[-1].split())
    elif words[0] == "make":
        _check_make(words[1:])
    elif "install" in words:
        _check_install(words)
    elif words[0] == "pytest" or words[:3] == ["python", "-m", "pytest"]:
        assert all(not word.startswith("tests/") or pathlib.Path(word).exists() for word in words)
    elif words[0] == "python" and words[1].endswith(".py"):
        assert pathlib.Path(words[1]).exists()
    elif words != ["metaformer-jax", "--help"]:
        line = " ".join(words)
        assert any(line.startswith(known) for known in NOT_RUN), f"nothing is known of: {line}"


def _check_make(targets):
    for target in targets:
        if "=" not in target:
            assert re.search(rf"^{target}:", pathlib.Path("Makefile").read_text(), re.MULTILINE)


def _check_install(words):
    declared = configparser.ConfigParser()
    declared.read("setup.cfg")
    extras = set(declared["options.extras_require"])
    for word in words:
        if asked := re.search(r"\[(.*)\]", word):
            assert set(asked[1].split(",")) <= extras, word


def test_every_block_says_what_it_is():
    assert {language for _, language, _ in blocks()} == {"bash", "python", "text"}
    # Each page that is to show commands does.
    assert len(COMMANDS) > 30


# Config files are loaded by ml_collections, in a way that Python is to give up.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    "words",
    [words for _, words in COMMANDS],
    ids=[f"{page}: {' '.join(words)}" for page, words in COMMANDS],
)
def test_a_command_is_taken_by_its_program(words, parse_only):
    _check(words)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    "line",
    [
        "metaformer-jax predict a.png --modle caformer_s18",
        "python -m metaformer_jax.main --config=configs/digits.py --config.lerning=3",
        "python -m metaformer_jax.main --config=configs/digits.py --wokdir=runs/a",
        "python -m metaformer_jax.main --config=configs/caformer_s19.py --workdir=runs/a",
        "python tools/convert_torch_weights.py a.pth --modle caformer_s18 --output a",
        'pip install -e ".[accelerator]"',
        "make tset",
        "frobnicate",
    ],
)
def test_a_mistake_in_one_would_show(line, parse_only, capsys):
    with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception)):
        _check(line.replace('"', "").split())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the documented commands find runs/digits and digits/*.png."""
    place = tmp_path_factory.mktemp("place")
    (place / "runs").mkdir()
    small_run.make(place / "runs" / "digits", family="caformer")
    (place / "digits").mkdir()
    source = Digits("test")
    for index in range(2):
        (place / "digits" / f"{index}.png").write_bytes(source[index]["image"])
    return place


RUNNABLE = [
    words
    for _, words in COMMANDS
    if words[:2] == ["metaformer-jax", "predict"] and "runs/digits" in words
]


@pytest.mark.parametrize("words", RUNNABLE, ids=" ".join)
def test_what_needs_no_more_than_a_small_run_runs(words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert console.main(words[1:]) == 0
    output = capsys.readouterr().out
    if "jsonl" in words:
        assert [len(json.loads(line)["predictions"]) for line in output.splitlines()] == [1, 1]
    if "--explain" in words:
        assert (place / "why.png").stat().st_size > 0


def test_some_are_run():
    assert len(RUNNABLE) == 2


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed: apt install make")
def test_make_train_is_the_command_that_the_readme_says():
    result = subprocess.run(
        ["make", "--dry-run", "train"], cwd=REPOSITORY, capture_output=True, text=True
    )
    trained = next(words for page, words in COMMANDS if page == "README.md" and TRAINING in words)
    assert " ".join(trained[1:]) in result.stdout
