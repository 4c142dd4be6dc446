"""What README and docs show in Python runs as it stands, on stand-ins for weights and data."""

import pathlib

import fake_imagenet
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documented import blocks
from flax import nnx

import metaformer_jax
from metaformer_jax.data import sources
from metaformer_jax.inference.artefacts import export_stablehlo
from metaformer_jax.models import (
    FAMILIES,
    Attention,
    IdentityMixing,
    MetaFormer,
    MetaFormerSpec,
)
from metaformer_jax.training import settings
from metaformer_jax.training.run import Run

IMAGES = np.zeros((2, 32, 32, 3), np.float32)
BLOCKS = [(page, text) for page, language, text in blocks() if language == "python"]
# Run with its own stand-ins by test_linear_probe.py.
ELSEWHERE = "LogisticRegression"
CASES = {}


def shows(page, part):
    """Registers what runs the block of a page that has this part in it."""

    def register(case):
        CASES[page, part] = case
        return case

    return register


def small_model():
    spec = MetaFormerSpec(
        depths=(1, 1, 1),
        dims=(8, 8, 16),
        token_mixers=(IdentityMixing, IdentityMixing, Attention),
        res_scale_init=(None, None, 1.0),
    )
    model = MetaFormer(spec, num_classes=10, image_size=32, rngs=nnx.Rngs(0))
    model.eval()
    return model


def without_download(patch):
    def create_model(name, *, pretrained, rngs):
        assert (name, pretrained) == ("caformer_s18", True)
        return small_model()

    patch.setattr(metaformer_jax, "create_model", create_model)


@shows("README.md", "info = ")
def a_published_model(run, patch):
    names = run()
    assert names["logits"].shape == (1, 1000)
    assert len(names["stages"]) == 4
    assert len(names["names"]) == 20


@shows("README.md", "class Shift")
def a_mixer_of_ones_own(run, patch):
    names = run()
    assert names["model"](jnp.asarray(IMAGES)).shape == (2, 10)


@shows("README.md", "pretrained=True")
def weights_in_short(run, patch):
    without_download(patch)
    assert run()["model"](IMAGES).shape == (2, 10)


@shows("docs/weights.md", "pretrained=True")
def weights_by_name(run, patch):
    without_download(patch)
    assert run(images=IMAGES)["logits"].shape == (2, 10)


@shows("docs/weights.md", "save_weights")
def weights_to_files(run, patch):
    model = nnx.eval_shape(lambda: metaformer_jax.create_model("caformer_s18", rngs=nnx.Rngs(0)))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), nnx.state(model))
    nnx.update(model, zeros)
    run(model=model, metaformer_jax=metaformer_jax)
    assert pathlib.Path("trained").is_dir()
    assert pathlib.Path("trained.pth").stat().st_size > 1e8
    assert pathlib.Path("timm.safetensors").stat().st_size > 1e8


@shows("docs/data.md", "open_source")
def a_slice_of_a_tfds_set(run, patch):
    fake_imagenet.write_dataset("tfds", "tfrecord")
    opened = sources.open_source

    def open_source(name, split, *, root):
        return opened(name, split, root=root.removeprefix("/data/"))

    patch.setattr(sources, "open_source", open_source)
    patch.setenv("METAFORMER_JAX_CACHE", "cache")
    names = run()
    assert names["record"]["image"].startswith(b"\xff\xd8")
    assert len(names["source"]) == 22
    assert "imagenet2012/5.1.0" in names["place"]


@shows("docs/using.md", "grad_cam")
def where_it_looks(run, patch):
    names = run(model=small_model(), images=jnp.asarray(IMAGES), classes=jnp.array([3, 4]))
    assert names["heat"].shape == (2, 2, 2)
    assert names["maps"].shape == (2, 1, 1, 4, 4)


@shows("docs/using.md", "jit_inference(model)")
def for_many_images(run, patch):
    names = run(model=small_model(), images=IMAGES)
    assert names["logits"].shape == (2, 10)
    assert len(names["stages_of"](IMAGES)) == 3


@shows("docs/using.md", "per_image=True")
def a_function_of_ones_own_for_many_images(run, patch):
    names = run(model=small_model(), metaformer_jax=metaformer_jax)
    np.testing.assert_allclose(names["probabilities_of"](IMAGES).sum(-1), 1, rtol=1e-5)


@shows("docs/using.md", "deserialize")
def a_program_without_this_package(run, patch):
    exported = export_stablehlo(small_model(), platforms=("cpu",))
    pathlib.Path("caformer_s18.stablehlo").write_bytes(exported)
    assert run(images=IMAGES)["logits"].shape == (2, 10)


@shows("docs/extending.md", "class Fourier")
def two_mixers(run, patch):
    names = run()
    for mixer in (names["Fourier"], names["FixedBias"]):
        built = mixer(3, resolution=(4, 4), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        x = jnp.ones((2, 4, 4, 3), jnp.bfloat16)
        assert (built(x).shape, built(x).dtype) == (x.shape, x.dtype)


@shows("docs/extending.md", "token_mixers=(SepConv, Fourier, Attention)")
def a_model_of_ones_own_mixer(run, patch):
    names = run(nnx=nnx, Fourier=_fourier())
    shape = jax.ShapeDtypeStruct((2, 32, 32, 1), jnp.float32)
    logits = nnx.eval_shape(lambda model, images: model(images), names["model"], shape)
    assert logits.shape == (2, 10)


@shows("docs/extending.md", "def get_config")
def a_family_of_ones_own(run, patch):
    names = run(Fourier=_fourier())
    try:
        config = names["get_config"]()
        settings.check_fields(config)
        state = Run(config).engine.abstract_state
        assert state.params
    finally:
        del FAMILIES["fourierformer"]


def _fourier():
    names = {}
    exec(_block_of("docs/extending.md", "class Fourier"), names)
    return names["Fourier"]


def _block_of(page, part):
    found = [text for where, text in BLOCKS if where == page and part in text]
    assert len(found) == 1, f"{len(found)} blocks of {page} have {part!r} in them"
    return found[0]


@pytest.mark.parametrize(("page", "part"), CASES, ids=lambda text: text.strip(" ="))
def test_a_block_runs(page, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(_block_of(page, part), page, "exec")

    def run(**names):
        exec(code, names)
        return names

    CASES[page, part](run, monkeypatch)


def test_every_block_is_run():
    covered = {_block_of(*case) for case in CASES}
    left_out = {text for _, text in BLOCKS} - covered
    assert all(ELSEWHERE in text for text in left_out), left_out
    assert len(left_out) == 1
    assert len(BLOCKS) == len(CASES) + 1
