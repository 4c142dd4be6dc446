"""Exported files give the model's answers, without the model's code."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small_run
from flax import nnx

from metaformer_jax import export
from metaformer_jax.inference import artefacts
from metaformer_jax.models import (
    FAMILIES,
    Attention,
    IdentityMixing,
    MetaFormer,
    MetaFormerSpec,
    Pooling,
    RandomMixing,
    SepConv,
    without_kernels,
)
from metaformer_jax.models.lowering.star_relu import squared_relu

NO_FLATBUFFERS = "flatbuffers, of the extra `export`, is not installed"
NO_ONNX = "jax2onnx, of the extra `onnx`, is not installed"

# What a program does that has JAX and the two files, and nothing of this package.
ELSEWHERE = """
import json, sys
sys.modules["metaformer_jax"] = None
import jax, numpy as np
from jax import export
program = export.deserialize(open("model.stablehlo", "rb").read())
about = json.load(open("model.json"))
assert about["input"]["shape"] == ["batch", 32, 32, 1]
pixels = np.load("pixels.npy") / 255
images = (pixels - np.array(about["input"]["mean"])) / np.array(about["input"]["std"])
logits = [np.asarray(program.call(images[:size].astype(np.float32))) for size in (3, 1)]
np.savez("logits.npz", *logits)
print(program.platforms, about["class_names"][np.argmax(logits[0][0])], "flax" in sys.modules)
"""


def call(*arguments):
    try:
        return export.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        return exit.code


def test_a_stablehlo_file_runs_elsewhere_for_any_number_of_images(tmp_path, capsys):
    pytest.importorskip("flatbuffers", reason=NO_FLATBUFFERS)
    model, config = small_run.make(tmp_path / "run", family="caformer")
    assert call("--weights", tmp_path / "run", "--output", tmp_path / "model.stablehlo") == 0
    assert "model.stablehlo: caformer, " in capsys.readouterr().out
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    images = (pixels / 255 - config.data.mean[0]) / config.data.std[0]
    expected = nnx.jit(lambda model, x: model(x))(model, images.astype(np.float32))
    with np.load(tmp_path / "logits.npz") as logits:
        assert reference.relative_error(logits["arr_0"], expected) < 1e-5
        assert reference.relative_error(logits["arr_1"], expected[:1]) < 1e-5
    label = int(np.argmax(expected[0]))
    assert result.stdout.strip() == f"('cpu', 'cuda', 'tpu') {label} False"


def small_model(family, depths=(1, 1, 1, 1), **settings):
    model = MetaFormer(
        FAMILIES[family].spec(depths=depths, dims=(8, 16, 32, 64)),
        num_classes=5,
        image_size=32,
        rngs=nnx.Rngs(0),
        **settings,
    )
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_value(variable[...] + 0.2 * rng.standard_normal(variable.shape, np.float32))
    model.eval()
    return model


def own_model(*token_mixers, dtype=jnp.float32):
    spec = MetaFormerSpec(
        depths=(1, 1), dims=(8, 16), token_mixers=token_mixers, res_scale_init=(None, 1.0)
    )
    model = MetaFormer(spec, num_classes=5, image_size=32, dtype=dtype, rngs=nnx.Rngs(0))
    model.eval()
    return model


def check_onnx(model, like=None):
    """The file of a model, in ONNX Runtime, gives the model's logits, or those of another one."""
    pytest.importorskip("jax2onnx", reason=NO_ONNX)
    runtime = pytest.importorskip("onnxruntime", reason=NO_ONNX)
    session = runtime.InferenceSession(artefacts.export_onnx(model))
    (given,), (answered,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", 32, 32, 3])
    assert (answered.name, answered.shape) == ("logits", ["batch", 5])
    images = reference.images(3, 32, 32)
    expected = nnx.jit(lambda model, x: model(x))(like or model, images)
    for size in (3, 1):
        (logits,) = session.run(["logits"], {"images": images[:size]})
        assert reference.relative_error(logits, expected[:size]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_an_onnx_file_gives_the_models_logits_for_any_number_of_images(family, caplog):
    check_onnx(small_model(family))
    assert caplog.records == []


# What the libraries that write ONNX files do not know.
NOT_PLAIN = ("scan[", "remat", "checkpoint", "cond[", "platform_index", "custom_vjp", "bf16")


def check_plain(model, like=None):
    """What is exported to ONNX are plain operations in float32, with the same values."""
    plain = artefacts._in_plain_operations(nnx.clone(model))
    images = reference.images(2, 32, 32)
    program = str(jax.make_jaxpr(lambda images: plain(images))(images))
    assert [name for name in NOT_PLAIN if name in program] == []
    expected = nnx.jit(lambda model, x: model(x))(like or model, images)
    assert reference.relative_error(jax.jit(lambda x: plain(x))(images), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_an_onnx_file_is_made_of_plain_operations(family):
    check_plain(small_model(family))


@pytest.mark.parametrize("check", [check_plain, check_onnx])
def test_loops_and_recomputation_are_no_part_of_an_onnx_file(check):
    check(small_model("convformer", depths=(1, 3, 1, 1), scan=1, remat="block"))


class Named(Attention):
    """Computes what attention computes."""


class Local(Pooling):
    """Computes what pooling computes."""


@pytest.mark.parametrize("check", [check_plain, check_onnx])
def test_subclasses_that_compute_the_same_are_exported_like_their_parents(check):
    model = own_model(functools.partial(Local, pool_size=5), Named)
    check(model)
    assert [type(blocks[0].token_mixer) for blocks in model.stages] == [Local, Named]


class Doubled(Attention):
    def __call__(self, x):
        return 2 * x


def test_subclasses_that_compute_something_else_are_left_as_they_are():
    check_plain(own_model(Doubled, IdentityMixing))


@pytest.mark.parametrize("check", [check_plain, check_onnx])
def test_a_model_in_bfloat16_is_exported_in_float32(check):
    narrow, wide = (
        own_model(SepConv, RandomMixing, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32)
    )
    check(narrow, like=wide)


class Fourier(nnx.Module):
    def __init__(self, dim, *, resolution, dtype, rngs):
        del dim, resolution, dtype, rngs

    def __call__(self, x):
        return jnp.fft.fft2(x, axes=(1, 2)).real


class Summed(nnx.Module):
    """Has a loop, which jax2onnx writes such that no runtime loads it."""

    def __init__(self, dim, *, resolution, dtype, rngs):
        self.kernels = nnx.Param(jnp.ones((3, dim)))

    def __call__(self, x):
        kernels = self.kernels[...]
        return jax.lax.scan(lambda x, kernel: (squared_relu(x) * kernel, None), x, kernels)[0]


@pytest.mark.parametrize("mixer", [Fourier, Summed])
def test_what_onnx_files_cannot_hold_is_refused_with_the_other_format(mixer):
    pytest.importorskip("jax2onnx", reason=NO_ONNX)
    with pytest.raises(ValueError, match=r"`model` must be made of operations .*export_stablehlo"):
        artefacts.export_onnx(own_model(mixer, IdentityMixing))


def test_a_model_in_training_mode_is_exported_as_it_evaluates():
    pytest.importorskip("flatbuffers", reason=NO_FLATBUFFERS)
    spec = FAMILIES["caformer"].spec(depths=(1,) * 4, dims=(8,) * 4)
    model = MetaFormer(spec, num_classes=3, image_size=32, drop_path_rate=0.5, rngs=nnx.Rngs(0))
    exported = artefacts.export_stablehlo(model, platforms=["cpu"])
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    logits = jax.export.deserialize(bytearray(exported)).call(images)
    assert not model.stages[1][0].drop_path1.deterministic
    model.eval()
    assert reference.relative_error(logits, model(images)) < 1e-5


def test_the_model_is_as_before_an_export():
    pytest.importorskip("jax2onnx", reason=NO_ONNX)
    model = small_model("convformer")
    artefacts.export_onnx(model)
    assert type(model.stages[0][0].token_mixer.dwconv).__name__ == "DepthwiseConv"
    assert nnx.Conv.__call__ is artefacts._Conv.__call__


def test_the_description_is_what_the_classifier_does(tmp_path):
    from metaformer_jax.inference import load_classifier

    small_run.make(tmp_path / "run")
    about = json.loads(json.dumps(artefacts.describe(load_classifier(weights=tmp_path / "run"))))
    assert about["output"]["shape"] == ["batch", 10]
    assert about["class_names"] == list("0123456789")
    assert (about["input"]["mean"], about["input"]["std"]) == ([0.305], [0.376])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "model.bin"], "--format must be given for model.bin"),
        (["--output", "m.json", "--format", "onnx"], "must not end in .json"),
        (["--output", "m.onnx"], "`name` (--model) must be given"),
        (["--output", "m.onnx", "--platforms", "cpu"], "--platforms is for stablehlo"),
        (["--output", "m.onnx", "--model", "caformer_s81"], "Did you mean caformer_s18"),
        (["--output", "there.stablehlo", "--model", "caformer_s18"], "must not exist yet"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").touch()
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert sum("error: " in line for line in error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]


@pytest.mark.parametrize("platforms", [["gpu"], ["cpu", ""], []])
def test_an_unknown_platform_is_refused(platforms):
    pytest.importorskip("flatbuffers", reason=NO_FLATBUFFERS)
    with pytest.raises(ValueError, match="`platforms` must be some of cpu, cuda, rocm and tpu"):
        artefacts.export_stablehlo(None, platforms=platforms)


@pytest.mark.parametrize(
    ("module", "extra", "suffix"),
    [("flatbuffers", "export", "stablehlo"), ("jax2onnx", "onnx", "onnx")],
)
def test_a_missing_library_names_the_extra(module, extra, suffix, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    small_run.make(tmp_path / "run")
    assert call("--weights", tmp_path / "run", "--output", tmp_path / f"model.{suffix}") == 2
    error = capsys.readouterr().err
    assert f'pip install "metaformer-jax[{extra}]"' in error
    assert not (tmp_path / "model.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_exported_for_any_number_of_images(family):
    spec = FAMILIES[family].spec(depths=(1,) * 4, dims=(8,) * 4)
    model = MetaFormer(spec, num_classes=3, image_size=32, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, images):
        return nnx.merge(graphdef, params, rest)(images).sum()

    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    leaves, structure = jax.tree.flatten(params)
    gradient = jax.jit(
        lambda leaves, x: jax.value_and_grad(loss)(jax.tree.unflatten(structure, leaves), x)
    )
    with without_kernels():
        exported = jax.export.export(
            jax.jit(lambda leaves, x: jax.tree.leaves(gradient(leaves, x))),
            platforms=["cpu", "cuda", "tpu"],
        )(leaves, images)
    some = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    expected = jax.tree.leaves(gradient(leaves, some))
    for actual, wanted in zip(exported.call(leaves, some), expected, strict=True):
        assert jnp.allclose(actual, wanted, rtol=1e-3, atol=1e-4)


def test_a_model_without_values_is_not_exported():
    pytest.importorskip("flatbuffers", reason=NO_FLATBUFFERS)
    with pytest.raises(ValueError, match="`model` must have values"):
        artefacts.export_stablehlo(nnx.eval_shape(lambda: small_model("caformer")))
