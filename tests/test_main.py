"""The programs as a person calls them."""

import pathlib
import subprocess
import sys

import pytest
from PIL import Image

from metaformer_jax import zoo
from metaformer_jax.exit_codes import TRAINING_FAILED

REPOSITORY = pathlib.Path(__file__).parent.parent
DIGITS = "--config=configs/digits.py"


def _main(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "metaformer_jax.main", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/nope.py"], "got 'configs/nope.py', which is not there"),
        (["--config=README.md"], "'README.md', which failed to load"),
        (
            ["--config=configs/caformer_s18.py:512"],
            "stage of caformer_s18 must be one of '', '384'",
        ),
        ([DIGITS, "--config.lerning=3"], "Did you mean optimizer.learning_rate?"),
        ([DIGITS, "--config.epochs=many"], "could not convert string to float: 'many'"),
        (
            [DIGITS, "--config.model.drop_path_rate=-1"],
            "`config.model.drop_path_rate` must be in [0, 1)",
        ),
        ([DIGITS, "--mode=trian"], "<train|eval|preview|compile>"),
        ([DIGITS, "again"], "Arguments must be --flags, got again"),
        ([DIGITS, "--config.optimizer.lr=1"], "Did you mean optimizer.learning_rate?"),
        ([f"{DIGITS}:384"], "must be 'configs/digits.py' alone, without a colon"),
        ([], "`--config` must be given: a Python file that defines get_config()"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    workdir = tmp_path / "run"
    result = _main(*arguments, f"--workdir={workdir}")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("flag", "mode"),
    [
        ("--output=x.json", "eval"),
        ("--topology=v5e:4x4", "train"),
        ("--batch_per_device=3", "train"),
        ("--nolargest_batch", "preview"),
        ("--accept_config_changes", "eval"),
        ("--nodistributed", "compile"),
        ("--coordinator_address=127.0.0.1:1", "compile"),
        ("--num_processes=2", "compile"),
        ("--process_id=0", "compile"),
    ],
)
def test_a_flag_is_refused_in_a_mode_where_it_has_no_effect(flag, mode, tmp_path):
    # Without the refusal this field would end all modes with another error.
    wrong = "--config.mesh.data=3"
    result = _main(DIGITS, wrong, f"--workdir={tmp_path / 'run'}", f"--mode={mode}", flag)
    assert result.returncode == 2
    name = flag.removeprefix("--").removeprefix("no").partition("=")[0]
    assert result.stderr.startswith(f"error: `--{name}` must be given with --mode=")
    assert f"got --mode={mode}, where it has no effect." in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_kernels_are_turned_off_by_a_flag():
    program = """
from absl import app
from metaformer_jax import main
from metaformer_jax.models.lowering.platform import kernels_are_allowed
from metaformer_jax.training import compile

compile.compile_training = lambda *arguments, **named: print(kernels_are_allowed())
app.run(main.main, flags_parser=main._parse_flags)
"""
    for flags, expected in (([], "True\n"), (["--nokernels"], "False\n")):
        run = subprocess.run(
            [sys.executable, "-c", program, DIGITS, "--mode=compile", *flags],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert (run.stdout, run.returncode) == (expected, 0)


def test_a_training_that_fails_is_told_from_a_wrong_command(tmp_path):
    program = """
from absl import app
from metaformer_jax import main
from metaformer_jax.training import failure, train

def fails(*arguments, **named):
    raise failure.TrainingError("in step 7") from ValueError("of unknown origin")

train.train = fails
app.run(main.main, flags_parser=main._parse_flags)
"""
    run = subprocess.run(
        [sys.executable, "-c", program, DIGITS, f"--workdir={tmp_path}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert run.returncode == TRAINING_FAILED
    *origin, error = run.stderr.splitlines()
    assert (origin[-1], error) == ("ValueError: of unknown origin", "error: in step 7")


def test_a_bucket_is_no_workdir():
    result = _main(DIGITS, "--workdir=gs://bucket/run")
    assert result.returncode == 2
    assert result.stderr.startswith("error: `--workdir` must be a folder, got 'gs://bucket/run'.")
    assert not (REPOSITORY / "gs:").exists()


def test_compiled_programs_that_cannot_be_kept_are_one_warning(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("METAFORMER_JAX_CACHE", str(tmp_path / "file"))
    warning, error = _main(DIGITS, "--mode=eval").stderr.splitlines()
    assert warning.startswith("warning: compiled programs are not kept: ")
    assert error.startswith("error: Either `workdir` must be given")
    # A training has a folder of its own for them.
    wrong = _main(DIGITS, "--config.batch_size=0", f"--workdir={tmp_path / 'run'}")
    assert len(wrong.stderr.splitlines()) == 1


def test_a_tilde_that_no_shell_has_seen_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"got '{tmp_path}/run'" in _main(DIGITS, "--mode=eval", "--workdir=~/run").stderr
    result = _main(DIGITS, "--mode=preview", "--output=~/nowhere/batch.png")
    assert f"got '{tmp_path}/nowhere/batch.png'" in result.stderr


def test_training_from_the_command_line_with_overrides(tmp_path):
    arguments = [DIGITS, f"--workdir={tmp_path}", "--config.model.family=identityformer"]
    arguments += ["--config.epochs=0.2", "--config.optimizer.warmup_epochs=0"]
    arguments += ["--config.model.dims=(8,8,8,8)", "--config.log_every_steps=1"]
    result = _main(*arguments)
    assert result.returncode == 0, result.stderr
    assert "model    identityformer" in result.stdout
    assert "accuracy " in result.stdout
    assert result.stderr == ""
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints",
        "class_names.json",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "misclassified.png",
        "num_examples.json",
        "run.lock",
        "tensorboard",
    }


def test_a_preview_draws_the_first_batch(tmp_path):
    output = tmp_path / "batch.png"
    mixing = ["--config.mixing.cutmix_alpha=1.0", "--config.mixing.group_size=8"]
    result = _main(DIGITS, "--mode=preview", f"--output={output}", *mixing)
    assert result.returncode == 0, result.stderr
    assert "the first training batch: " in result.stdout
    with Image.open(output) as image:
        assert image.width > 1000


@pytest.mark.parametrize("mode", ["compile", "preview"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(mode, tmp_path):
    # Whatever looks at more than the output would refuse this mesh.
    wrong = "--config.mesh.data=3"
    result = _main(
        DIGITS, wrong, f"--mode={mode}", f"--output={tmp_path / 'nowhere' / 'output.png'}"
    )
    assert result.returncode == 2
    assert "`--output` must be a file that can be written, got" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_zoo_prints_counted_beside_published_figures(capsys):
    assert zoo.main(["randformer_s12"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "randformer_s12" in line]
    cells = [cell.strip() for cell in row.split("│")]
    expected = ["randformer_s12", "224", "1000", "11,891,712", "11.9 M", "235,298", "0.2 M"]
    assert cells[1:-1] == [*expected, "1.888", "1.9 G", "76.6 %"]


def test_the_zoo_refuses_a_pattern_without_a_match(capsys):
    assert zoo.main(["resnet*"]) == 2
    assert "no published model matches" in capsys.readouterr().err
