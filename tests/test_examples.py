"""The notebooks of examples/ run from top to bottom, and lie there without outputs."""

import json
import pathlib
import re
import tempfile

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def _code_cells(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The names that a notebook's code leaves behind; each runs once, in this very process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("examples")))

        def execute(name):
            path = EXAMPLES / f"{name}.ipynb"
            names = {}
            for index, cell in enumerate(_code_cells(path)):
                # What speaks to the notebook is no Python.
                source = "".join(line for line in cell["source"] if not line.startswith("%"))
                exec(compile(source, f"{path.name}, code cell {index}", "exec"), names)
            return names

        yield execute


def test_the_notebooks_are_those_that_are_run_here():
    assert [path.stem for path in NOTEBOOKS] == ["features", "fine_tune", "token_mixers"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_its_budget_stands_on_top(path):
    assert path.stat().st_size < 20_000
    first, *_ = cells = _code_cells(path)
    assert re.match(r"STEPS = \d+", "".join(first["source"]))
    for cell in cells:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def test_fine_tuning_on_a_folder_tells_held_out_crops_apart(run, capsys):
    names = run("fine_tune")
    assert names["evaluation"].accuracy > 0.8
    assert names["classifier"].class_names == ("china", "flower")
    # What is held out and what is trained on lie side by side in the photograph.
    widths = [part.shape[1] for part, _ in names["parts"].values()]
    assert sum(widths) == names["photograph"].shape[1]
    assert len(list((names["data"] / "val").glob("*/*.png"))) == 64
    assert "flower: " in capsys.readouterr().out


def test_a_head_on_the_features_of_all_stages_learns_to_segment(run):
    names = run("features")
    assert names["losses"][-1] < names["losses"][0] / 1.5
    assert names["predictions"].shape == names["masks"].shape == (64, 32, 32)
    # All ten digits and the background are in the masks.
    assert len(set(names["masks"].ravel())) == 11


def test_all_five_mixers_are_trained_and_drawn(run):
    names = run("token_mixers")
    assert len(names["accuracies"]) == 5
    assert all(0 <= accuracy <= 1 for accuracy in names["accuracies"].values())
    # Those that learn from the first updates on; the others only stop being a guess later.
    assert names["accuracies"]["identity"] > 0.2
    widths = [100 * accuracy for accuracy in names["accuracies"].values()]
    assert [bar.get_width() for bar in names["bars"]] == widths
