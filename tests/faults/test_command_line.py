"""Whatever stands on the command line is taken, or ends the program with one line."""

import pathlib
import subprocess
import sys

import pytest
from absl import flags
from config_values import FIELDS, bounded
from hypothesis import given
from hypothesis import strategies as st

from metaformer_jax import main as program
from metaformer_jax.training import settings

REPOSITORY = pathlib.Path(__file__).parents[2]
# What people and programs write behind an equals sign, in one line.
TEXTS = (
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=12)
    | st.from_regex(r"[-+]?[0-9]{0,3}(\.[0-9]{0,2})?(e[-+]?[0-9]{1,3})?", fullmatch=True)
    | st.from_regex(r"[(\[{]?[-0-9a'\" ]{0,3}(,[-0-9.]{1,3}){0,4}[)\]}]?", fullmatch=True)
    | st.sampled_from(["nan", "inf", "None", "True", "()", "[", "(1,", "{}", "1" * 5000, "'", "\\"])
    | st.sampled_from(["(" * 300, "--config", "a=b", "1_0", "0x10", "1j", "\udcff", "{[]: 1}"])
)


@pytest.fixture
def parsed_once():
    """The program's flags as they were, whatever is parsed meanwhile."""
    was_parsed = flags.FLAGS.is_parsed()
    yield
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    if was_parsed:
        flags.FLAGS.mark_as_parsed()


@pytest.mark.usefixtures("parsed_once")
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_value_on_the_command_line_is_taken():
    assert parse(["--config.epochs=3", "--config.model.dims=(1,2,3,4)"]).epochs == 3.0


def parse(arguments):
    """What the program makes of a command line: a config, or the one line it ends with."""
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    argv = ["main", f"--config={REPOSITORY / 'configs' / 'digits.py'}", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        program._parse_flags(argv)
    return program._CONFIG.value


@pytest.mark.usefixtures("parsed_once")
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@bounded(400)
@given(field=st.sampled_from(FIELDS), text=TEXTS)
def test_any_text_on_the_command_line_is_taken_or_is_one_line(field, text):
    check_command_line([f"--config.{field}={text}"])


@pytest.mark.usefixtures("parsed_once")
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@bounded(100)
@given(field=st.sampled_from([*FIELDS, "model", "optimizer"]) | TEXTS, text=TEXTS | st.none())
def test_any_field_on_the_command_line_is_known_or_is_one_line(field, text):
    check_command_line([f"--config.{field}" + ("" if text is None else f"={text}")])


@pytest.mark.usefixtures("parsed_once")
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_field_that_would_break_the_line_is_one_line():
    check_command_line(["--config.epochs\x1e=3"])


def check_command_line(arguments):
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        config, code = None, 0
        try:
            config = parse(arguments)
        except SystemExit as ended:
            code = ended.code
    if code:
        (line,) = printed
        assert code == 2
        assert line.startswith("error: ")
        assert len(line.splitlines()) == 1, line
    else:
        refusal = None
        try:
            settings.check_fields(config)
        except ValueError as error:
            refusal = error
        assert refusal is None or (type(refusal) is ValueError and "`config." in str(refusal))


@pytest.mark.parametrize(
    "argument",
    [
        "--config.model.dims=(8,",
        "--config.optimizer.learning_rate=nan",
        "--config.data.name=\udcff",
    ],
)
def test_the_program_ends_with_one_line(argument, tmp_path):
    config = f"--config={REPOSITORY / 'configs' / 'digits.py'}"
    command = [sys.executable, "-m", "metaformer_jax.main", config, argument]
    ended = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"], capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()
