"""The program for those who come from the original code."""

import re
import shutil

import jax
import numpy as np
import pytest
import small_run
from flax import nnx
from PIL import Image

from metaformer_jax import validate
from metaformer_jax.data.device import normalize
from metaformer_jax.inference import load_classifier
from metaformer_jax.training import evaluation
from metaformer_jax.weights.convert import variables_of
from metaformer_jax.weights.pretrained import build_abstract, fill
from metaformer_jax.weights.write import write_variables

NAME = "identityformer_s12"
NUM_CLASSES = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny image for each class, and a converted model."""
    folder = tmp_path_factory.mktemp("validate")
    rng = np.random.default_rng(0)
    for index in range(NUM_CLASSES):
        path = folder / "imagenet" / "val" / f"n{index:08}" / "image.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    model = build_abstract(NAME, image_size=32)
    variables = {
        path: 0.05 * rng.standard_normal(variable.shape, np.float32)
        for path, variable in variables_of(model).items()
    }
    write_variables(variables, folder / "converted", name=NAME, model=model)
    fill(model, variables)
    return folder, model


def test_it_prints_the_accuracy_of_the_models_own_answers(folder, capsys):
    root, model = folder
    # The batch divides neither the images nor by the devices.
    arguments = ["--model", NAME, "-b", "300", "--img-size", "32", "-j", "0"]
    arguments += ["--checkpoint", str(root / "converted")]
    assert validate.main([str(root / "imagenet"), *arguments]) == 0
    output = capsys.readouterr().out
    paths = sorted((root / "imagenet" / "val").glob("*/*"))
    images = normalize(
        np.stack([np.asarray(Image.open(path)) for path in paths]),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    model.eval()
    logits = np.asarray(nnx.jit(lambda model, images: model(images))(model, images))
    of_label = np.diagonal(logits)[:, None]
    ranks = (logits > of_label).sum(1)
    found = re.search(
        r"accuracy .* \((\d+) of 1000\)  top-5 .* \((\d+) of 1000\)  loss (.*)", output
    )
    assert int(found[1]) == (ranks == 0).sum()
    assert int(found[2]) == (ranks < 5).sum()
    losses = np.log(np.exp(logits - of_label).sum(1))
    assert float(found[3]) == pytest.approx(losses.mean(), abs=1e-3)


def test_a_run_is_evaluated_on_images_as_it_trained_on_them(folder, tmp_path, capsys):
    trained = {"image_size": 48, "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    small_run.make(tmp_path / "run", family="identityformer", size="s12", **trained)
    for index in range(10):
        image = folder[0] / "imagenet" / "val" / f"n{index:08}" / "image.png"
        shutil.copytree(image.parent, tmp_path / "data" / "val" / str(index))
    arguments = ["--model", NAME, "--checkpoint", str(tmp_path / "run"), "-j", "0"]
    assert validate.main([str(tmp_path / "data"), *arguments]) == 0
    found = re.search(r"loss (\S+)", capsys.readouterr().out)
    classifier = load_classifier(weights=tmp_path / "run")
    files = sorted((tmp_path / "data" / "val").glob("*/*"))
    pixels = np.stack([classifier.transform(file.read_bytes()) for file in files])
    probabilities = np.asarray(classifier.probabilities(pixels))
    expected = -np.log(probabilities[np.arange(10), np.arange(10)]).mean()
    assert float(found[1]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--model", NAME], "got 'nowhere', which is not there"),
        (["imagenet", "--model", "caformer_s81"], "Did you mean caformer_s18"),
        (
            ["imagenet", "--model", NAME, "--checkpoint", "gone.pth"],
            "existing checkpoint, got gone",
        ),
        (["imagenet", "--model", NAME, "--checkpoint", "x" * 300], "File name too long"),
        (["imagenet", "--model", NAME, "-b", "0"], "`--batch-size` must be positive"),
        (["imagenet", "--model", NAME, "--img-size", "0"], "`--img-size` must be positive, got 0"),
        (["imagenet", "--model", NAME, "--crop-pct", "2"], "`--crop-pct` must be in"),
    ],
)
def test_a_mistake_is_one_line(folder, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(folder[0])
    assert validate.main(arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_a_batch_that_is_too_large_for_the_device_is_one_line(monkeypatch, capsys):
    def evaluate(config, console):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nAt ...")

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    assert validate.main(["imagenet", "--model", NAME]) == 2
    assert capsys.readouterr().err == (
        "error: the device failed: RESOURCE_EXHAUSTED: Out of memory. A smaller --batch-size takes "
        "less memory.\n"
    )
