"""Models compiled for the weights that they have."""

import functools
import gc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaformer_jax.models import (
    FAMILIES,
    MetaFormer,
    MetaFormerSpec,
    compiler_options,
    cores,
    jit_inference,
    normalization,
)
from metaformer_jax.models import jit as models_jit
from metaformer_jax.models.lowering import attention, depthwise_triton
from metaformer_jax.models.lowering.platform import kernels_are_allowed
from metaformer_jax.models.normalization import LayerNorm


@pytest.fixture
def model():
    spec = FAMILIES["caformer"].spec(depths=(1, 1, 1, 1), dims=(8, 16, 32, 32))
    return MetaFormer(spec, num_classes=10, image_size=32, drop_path_rate=0.5, rngs=nnx.Rngs(0))


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3)), jnp.float32)


def expected(model, images):
    model = nnx.clone(model)
    model.eval()
    return called(model, images)


@nnx.jit
def called(model, images):
    return model(images)


@pytest.fixture
def num_arguments(monkeypatch):
    """Of each call of what `jax.jit` gave in the module."""
    calls = []

    def jit(function, **options):
        jitted = jax.jit(function, **options)

        def called(*arguments):
            calls.append(len(jax.tree.leaves(arguments)))
            return jitted(*arguments)

        return called

    # Asks once, by a program of its own.
    compiler_options()

    monkeypatch.setattr(models_jit, "jax", types.SimpleNamespace(**vars(jax) | {"jit": jit}))
    monkeypatch.setattr(cores, "num_cores", lambda: 1)
    return calls


def test_it_answers_as_the_model_does_in_evaluation_mode(model, images):
    model.train()
    answer = jit_inference(model)
    np.testing.assert_allclose(answer(images), expected(model, images), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(answer(images[:1]), answer(images)[:1], rtol=1e-5, atol=1e-6)


def test_the_model_is_not_changed_and_may_be_changed_afterwards(model, images):
    model.train()
    before = expected(model, images)
    answer = jit_inference(model)
    model.head.fc2.bias[...] += 1
    np.testing.assert_allclose(answer(images), before, rtol=1e-5, atol=1e-6)
    # It still drops paths.
    assert np.abs(called(model, images) - expected(model, images)).max() > 0.01


def test_the_models_buffers_may_be_donated_afterwards(model, images):
    answer = jit_inference(model)
    before = answer(images)
    jax.jit(lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0)(nnx.state(model))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model)))
    np.testing.assert_array_equal(answer(images), before)


def test_it_takes_any_function_of_the_model(model, images):
    stages = jit_inference(model, MetaFormer.features)(images)
    model.eval()
    for ours, theirs in zip(stages, model.features(images), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_weights_are_constants_on_one_cpu_and_arguments_on_several_devices(
    model, images, num_arguments
):
    jit_inference(model)(images)
    replicated = NamedSharding(Mesh(jax.devices()[:2], "data"), PartitionSpec())
    graphdef, state = nnx.split(model)
    spread = nnx.merge(graphdef, jax.device_put(state, replicated))
    answer = jit_inference(spread)
    np.testing.assert_allclose(answer(images), expected(model, images), rtol=1e-5, atol=1e-6)
    assert num_arguments == [1, 1 + len(jax.tree.leaves(state))]


def test_on_several_devices_there_are_no_kernels(model, images):
    seen = []

    def noted(model, images):
        seen.append(kernels_are_allowed())
        return model(images)

    mesh = Mesh(jax.devices()[:2], "data")
    graphdef, state = nnx.split(model)
    for number, devices in ((1, mesh.devices[0]), (2, NamedSharding(mesh, PartitionSpec()))):
        placed = nnx.merge(graphdef, jax.device_put(state, devices))
        answer = jit_inference(placed, noted)
        for within in (answer, jax.jit(lambda images, answer=answer: answer(images))):
            within(images)
            assert set(seen) == {number == 1}
            seen.clear()


def test_on_several_devices_there_are_no_kernels_in_gradients_either(images, monkeypatch):
    seen = []

    def has_kernels(*_):
        seen.append(kernels_are_allowed())
        return False

    for module in (depthwise_triton, normalization, attention):
        monkeypatch.setattr(module, "has_kernels", has_kernels)
    spec = FAMILIES["convformer"].spec(depths=(1, 1, 1, 1), dims=(8, 16, 32, 32))
    model = MetaFormer(spec, num_classes=10, image_size=32, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    replicated = NamedSharding(Mesh(jax.devices()[:2], "data"), PartitionSpec())
    answer = jit_inference(nnx.merge(graphdef, jax.device_put(state, replicated)))
    jax.eval_shape(jax.grad(lambda images: answer(images).sum()), images)
    assert seen
    assert not any(seen)


def test_numbers_are_sent_to_weights_that_are_divided_among_one_device(model, images):
    def scaled(model, images, factor):
        return factor * model(images)

    mesh = Mesh(jax.devices()[:1], "data")
    graphdef, state = nnx.split(model)
    state = jax.tree.map(
        lambda leaf: jax.device_put(
            leaf, NamedSharding(mesh, PartitionSpec(*["data"][: leaf.ndim]))
        ),
        state,
    )
    answer = jit_inference(nnx.merge(graphdef, state), scaled)
    np.testing.assert_allclose(
        answer(images, 2.0), 2 * expected(model, images), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("num_images", [2, 3])
def test_it_answers_on_the_device_of_the_images(model, monkeypatch, num_images):
    monkeypatch.setattr(cores, "num_cores", lambda: 2)
    images = np.random.default_rng(0).standard_normal((num_images, 32, 32, 3), np.float32)
    answer = jit_inference(model)
    for device in jax.devices()[:2]:
        answered = answer(jax.device_put(images, device))
        assert answered.devices() == {device}
        np.testing.assert_allclose(answered, expected(model, images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_images", [2, 3])
def test_it_answers_on_the_device_that_weights_are_bound_to(model, monkeypatch, num_images):
    monkeypatch.setattr(cores, "num_cores", lambda: 2)
    images = np.random.default_rng(0).standard_normal((num_images, 32, 32, 3), np.float32)
    device = jax.devices()[1]
    graphdef, state = nnx.split(model)
    answer = jit_inference(nnx.merge(graphdef, jax.device_put(state, device)))
    for given in (images, jnp.asarray(images)):
        answered = answer(given)
        assert answered.devices() == {device}
        np.testing.assert_allclose(answered, expected(model, images), rtol=1e-5, atol=1e-6)


def test_it_may_be_a_part_of_a_larger_program(model, images):
    answer = jit_inference(model)
    loss, gradient = jax.jit(jax.value_and_grad(lambda images: answer(images).sum()))(images)
    np.testing.assert_allclose(loss, answer(images).sum(), rtol=1e-5)
    assert gradient.shape == images.shape
    assert np.abs(gradient).max() > 0


def test_images_known_to_the_larger_program_are_no_program_of_their_own(model, images):
    answer = jit_inference(model)
    known = jax.jit(lambda factor: factor * answer(images))(2.0)
    np.testing.assert_allclose(known, 2 * answer(images), rtol=1e-5, atol=1e-6)
    alone = jax.jit(lambda: answer(np.asarray(images)))()
    np.testing.assert_allclose(alone, answer(images), rtol=1e-5, atol=1e-6)


def test_nothing_but_the_images_is_sent_to_the_device(model, images):
    answer = jit_inference(model)
    expected = answer(images)
    with jax.transfer_guard("disallow"):
        actual = answer(images)
    np.testing.assert_array_equal(actual, expected)


def test_weights_may_belong_to_the_larger_program_too(model, images):
    answered = nnx.jit(lambda model, images: jit_inference(model)(images))(model, images)
    np.testing.assert_allclose(answered, expected(model, images), rtol=1e-5, atol=1e-6)


def test_an_abstract_model_is_refused(model):
    with pytest.raises(ValueError, match=r"`model` must have values, got .*eval_shape"):
        jit_inference(nnx.eval_shape(lambda: nnx.clone(model)))


def test_what_is_no_model_is_refused_with_the_way_to_name_a_method(model):
    for given in (model.features, 3):
        with pytest.raises(ValueError, match=r"`model` must be .*MetaFormer\.features"):
            jit_inference(given)


def test_a_function_in_the_place_of_a_module_is_refused_with_what_flax_needs(model):
    model.stages[2][0].mlp.act = jax.nn.gelu
    with pytest.raises(ValueError, match=r"`model\.stages\.2\.0\.mlp\.act` .*nnx\.static"):
        jit_inference(model)


def test_keywords_are_the_functions(model, images):
    def scaled(model, images, *, factor):
        return factor * model(images)

    answer = jit_inference(model, scaled)
    expected = 3 * jit_inference(model)(images)
    np.testing.assert_allclose(answer(images, factor=3.0), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(answer(factor=3.0, images=images), expected, rtol=1e-5, atol=1e-6)
    within = jax.jit(lambda factor: answer(images, factor=factor))(3.0)
    np.testing.assert_allclose(within, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def divided(monkeypatch):
    """The sizes of the batches that programs for three cores got, and the sizes compiled for."""
    seen = types.SimpleNamespace(sizes=[], compiled=[], made=[])

    def size_of(inputs, named):
        return len(jax.tree.leaves((inputs, named))[-1])

    class Jitted:
        def __init__(self, jitted):
            self._jitted = jitted

        def __call__(self, *inputs, **named):
            seen.sizes.append(size_of(inputs, named))
            return self._jitted(*inputs, **named)

        def trace(self, *inputs, **named):
            traced = self._jitted.trace(*inputs, **named)

            def compiled():
                seen.compiled.append(size_of(inputs, named))
                program = traced.lower().compile()

                def run(*inputs, **named):
                    seen.sizes.append(size_of(inputs, named))
                    return program(*inputs, **named)

                return run

            lowered = types.SimpleNamespace(compile=compiled)
            return types.SimpleNamespace(
                jaxpr=traced.jaxpr, out_info=traced.out_info, lower=lambda: lowered
            )

    def in_parts(jitted):
        seen.made.append(cores.InParts(Jitted(jitted)))
        return seen.made[-1]

    monkeypatch.setattr(models_jit, "InParts", in_parts)
    monkeypatch.setattr(cores, "num_cores", lambda: 3)
    return seen


@pytest.mark.parametrize(
    ("batch_size", "parts"), [(1, [1]), (2, [1, 1]), (4, [2, 2]), (6, [2, 2, 2]), (5, [5])]
)
def test_a_batch_is_divided_evenly_among_the_cores(model, divided, batch_size, parts):
    images = jax.random.normal(jax.random.key(0), (batch_size, 32, 32, 3))
    answered = jit_inference(model)(images)
    assert divided.sizes == parts
    np.testing.assert_allclose(answered, expected(model, images), rtol=1e-5, atol=1e-6)


def test_each_array_of_a_result_is_put_together_in_order(model, divided):
    images = np.random.default_rng(0).standard_normal((4, 32, 32, 3), np.float32)
    stages = jit_inference(model, MetaFormer.features)(images)
    assert divided.sizes == [2, 2]
    model.eval()
    for ours, theirs in zip(stages, model.features(images), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_other_functions_are_divided_on_request_only(model, images, divided):
    def weighed(model, images, weights):
        return model(images) * weights[:, None]

    weights = jnp.arange(1.0, 3)
    for per_image in (None, True, False):
        jit_inference(model, weighed, per_image=per_image)(images, weights)
    assert divided.sizes == [1, 1]
    # What is shared by all images cannot be divided.
    del divided.sizes[:]
    jit_inference(model, weighed, per_image=True)(images, jnp.ones(1))
    assert divided.sizes == [1]


def test_a_batch_that_is_spread_over_devices_is_not_divided(model, images, divided):
    mesh = Mesh(jax.devices()[:2], "data")
    spread = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    answered = jit_inference(model)(spread)
    assert divided.sizes == [2]
    np.testing.assert_allclose(answered, expected(model, images), rtol=1e-5, atol=1e-6)


def test_a_model_of_another_class_is_not_divided(model, images, divided):
    class Centred(MetaFormer):
        def __call__(self, images):
            logits = super().__call__(images)
            return logits - logits.mean(0)

    centred = Centred(model.spec, num_classes=10, image_size=32, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(jit_inference(centred)(images).mean(0), 0, atol=1e-6)
    assert divided.sizes == []


def test_a_model_with_a_layer_from_elsewhere_is_divided_on_request_only(images, divided):
    class Centre(nnx.Module):
        def __init__(self, dim, **_):
            pass

        def __call__(self, x):
            return x - x.mean(0)

    def build(mixer):
        spec = MetaFormerSpec(depths=(1,), dims=(8,), token_mixers=(mixer,), res_scale_init=(None,))
        return MetaFormer(spec, num_classes=10, image_size=32, rngs=nnx.Rngs(0))

    for mixer in (Centre, lambda *_, **__: lambda x: x - x.mean(0)):
        model = build(mixer)
        answer = jit_inference(model)
        np.testing.assert_allclose(answer(images), expected(model, images), rtol=1e-5, atol=1e-6)
        assert divided.sizes == []
    jit_inference(model, per_image=True)(images)
    assert divided.sizes == [1, 1]


def centred(x):
    return x - x.mean(0)


@pytest.mark.parametrize(
    "function",
    [
        centred,
        functools.partial(centred),
        jax.jit(centred),
        functools.partial(jax.nn.softmax, axis=0),
        LayerNorm(128, use_bias=False, reduction_axes=(0, 1), rngs=nnx.Rngs(0)),
    ],
)
def test_a_model_that_calls_a_function_from_elsewhere_is_not_divided(
    model, images, divided, function
):
    is_module = isinstance(function, nnx.Module)
    model.stages[2][0].mlp.act = function if is_module else nnx.static(function)
    answer = jit_inference(model)
    np.testing.assert_allclose(answer(images), expected(model, images), rtol=1e-5, atol=1e-6)
    assert divided.sizes == []


@pytest.mark.parametrize(
    "layer",
    [nnx.static(jax.nn.gelu), nnx.GroupNorm(128, num_groups=4, rngs=nnx.Rngs(0))],
)
def test_layers_of_jax_and_flax_look_at_one_image(model, images, divided, layer):
    model.stages[2][0].mlp.act = layer
    answer = jit_inference(model)
    np.testing.assert_allclose(answer(images), expected(model, images), rtol=1e-5, atol=1e-6)
    assert divided.sizes == [1, 1]


def test_programs_are_kept_as_long_as_jax_keeps_their_traces(model, images, divided):
    def brightness(model, images):
        return images.mean((1, 2, 3))

    answer = jit_inference(model, brightness, per_image=True)
    for _ in range(2):
        answer(images)
    assert divided.compiled == [1]
    (in_parts,) = divided.made
    assert len(in_parts._programs) == 1
    jax.clear_caches()
    gc.collect()
    assert len(in_parts._programs) == 0
    np.testing.assert_allclose(answer(images), images.mean((1, 2, 3)), rtol=1e-5)
    assert divided.compiled == [1, 1]


def test_a_result_that_is_not_by_image_is_refused_where_it_should_be(model, images, divided):
    def mean(model, images):
        return model(images).mean()

    with pytest.raises(ValueError, match=r"first axis, got shape \(\) .*per_image=False"):
        jit_inference(model, mean, per_image=True)(images)
    assert jit_inference(model, mean)(images).shape == ()


def test_an_error_tells_the_shape_that_was_given(model):
    with pytest.raises(ValueError, match=r"got shape \(6, 3, 32, 32\)"):
        jit_inference(model)(jnp.zeros((6, 3, 32, 32)))


def test_settings_of_the_calling_thread_hold_for_all_parts(model, divided):
    def product(model, images):
        return images @ jnp.ones((3, 3))

    answer = jit_inference(model, product, per_image=True)
    images = np.ones((6, 3), np.float64)
    assert answer(images).dtype == jnp.float32
    with jax.enable_x64(True):
        assert answer(images).dtype == jnp.float64
    assert answer(images).dtype == jnp.float32
    assert divided.sizes == [2, 2, 2] * 3
    assert divided.compiled == [2, 2]


@pytest.fixture
def asked_anew():
    """What JAX knows."""
    models_jit._knows_options_for_cpus.cache_clear()
    yield
    models_jit._knows_options_for_cpus.cache_clear()


def test_options_are_for_cpus():
    assert compiler_options("gpu") == compiler_options("tpu") == {}
    known = compiler_options("cpu")
    assert compiler_options() == known == models_jit._FOR_CPUS
    product = jax.jit(lambda x, y: x @ y, compiler_options=known)
    program = product.lower(jnp.zeros((64, 64)), jnp.zeros((64, 64))).compile().as_text()
    assert "ynn" not in program


@pytest.mark.usefixtures("asked_anew")
def test_options_that_are_not_known_are_left_out(monkeypatch):
    monkeypatch.setattr(models_jit, "_FOR_CPUS", {"xla_cpu_no_such_option": "1"})
    assert compiler_options("cpu") == {}
