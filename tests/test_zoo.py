"""The picture of all models: accuracy, as published, against what is counted here."""

import re

import pytest
from matplotlib.colors import same_color
from PIL import Image

from metaformer_jax import zoo
from metaformer_jax.models import Counts, list_models, model_info

# As if a model's place in the list were its size.
COUNTED = {
    name: Counts(params=1_000_000 * place, frozen_params=0, macs=2_000_000_000 * place)
    for place, name in enumerate(list_models(), start=1)
}


def test_sizes_of_a_family_are_one_line_of_counts_and_published_accuracies():
    by_macs, by_params = zoo.figure_of(COUNTED).axes
    # Five families, and three further trainings of two of them.
    assert len(by_macs.lines) == len(by_params.lines) == 5 + 3 * 2
    names = [f"caformer_{size}_384" for size in ("s18", "s36", "m36", "b36")]
    expected = {
        tuple(COUNTED[name].macs / 1e9 for name in names),
        tuple(COUNTED[name].params / 1e6 for name in names),
    }
    drawn = {
        tuple(line.get_xdata())
        for axes in (by_macs, by_params)
        for line in axes.lines
        if tuple(line.get_ydata()) == tuple(model_info(name).published_top1 for name in names)
    }
    assert drawn == expected


def test_every_plain_model_is_named_in_its_familys_colour():
    by_macs, _ = zoo.figure_of(COUNTED).axes
    assert len(by_macs.texts) == 23
    (line,) = [line for line in by_macs.lines if tuple(line.get_ydata()) == (83, 84.1, 84.5, 84.8)]
    named = [text for text in by_macs.texts if same_color(text.get_color(), line.get_color())]
    assert [text.get_text() for text in named] == ["s18", "s36", "m36", "b36"]
    places = [text.xy for text in named]  # type: ignore[attr-defined]
    assert places == list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_one_command_draws_it_below_the_home_folder_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "accuracy.png"
    assert zoo.main(["identityformer_s12", "--plot=~/accuracy.png"]) == 0
    assert f"{path}: " in capsys.readouterr().out
    with Image.open(path) as image:
        assert image.size == (1200, 640)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("accuracy.gif", "must end in .png, .svg or .pdf"),
        ("gone/accuracy.png", "that is there"),
        ("folder.png", "a file that can be written, got 'folder.png': Is a directory"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_counting(
    path, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(zoo, "_count", None)
    assert zoo.main(["--plot", path]) == 2
    assert message in capsys.readouterr().err


def test_without_an_accuracy_there_is_no_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "_count", None)
    assert zoo.main(["caformer_s18_in21k", "--plot", str(tmp_path / "none.png")]) == 2
    assert "with an ImageNet-1K accuracy to show" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_on_a_narrow_terminal_all_counts_can_be_read(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(zoo, "_count", lambda *_: Counts(26_341_656, 903_168, 4_107_000_000))
    assert zoo.main(["caformer_s18_384_in21ft1k"]) == 0
    output = capsys.readouterr().out
    assert all(len(re.sub(r"\x1b\[[\d;]*m", "", line)) <= 80 for line in output.splitlines())
    for shown in ("caformer_s18_384_in21ft1k", "26,341,656", "903,168", "4.107", "85.4"):
        assert shown in output
