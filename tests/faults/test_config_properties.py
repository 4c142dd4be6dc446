"""Any config builds a run or is refused by the name of a field, whatever values it has.

The examples are the same at every run; FUZZ_FACTOR=100 in the environment tries 100 times as many.
"""

import functools

import numpy as np
import pytest
from config_values import FIELDS, INVALID, STARTS, VALID, bounded, change, small
from hypothesis import given
from hypothesis import strategies as st

from metaformer_jax import models
from metaformer_jax.training import recipes, run
from metaformer_jax.training.settings import check_fields, flatten

# Where two fields contradict each other, the message may begin with the other one.
CONTRADICTS = {
    "accumulation_steps": "`config.batch_size`",
    "data.name": "`data.",
    "mesh.data": "`mesh.data`",
    "mesh.fsdp": "`mesh.fsdp`",
    "mixing.group_size": "`config.mixing.group_size`",
    "model.depths": "`config.model.dims` must have one entry for each of the",
}


@pytest.fixture(scope="module", autouse=True)
def digits_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "open_source", functools.cache(run.open_source))
        yield


def test_every_field_has_values_of_both_kinds():
    assert set(VALID) == set(INVALID) == set(FIELDS)


@bounded(40)
@given(
    changes=st.fixed_dictionaries(
        {}, optional={field: values for field, values in VALID.items() if field != "model.name"}
    ),
    data=st.data(),
)
def test_valid_values_build_a_run(changes, data):
    config = small()
    changes = made_consistent(changes, config)
    for field, value in changes.items():
        config = change(config, field, value)
    built = run.Run(config)
    size = config.data.image_size
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    image = built.train_source[int(rng.integers(1442))]["image"]
    assert built.train_transform(image, rng).shape == (size, size, 1)
    if size / config.eval_crop_fraction < 2000:
        assert built.eval_transform(image).shape == (size, size, 1)
    for step in {0, built.total_steps // 2, built.total_steps - 1}:
        assert np.isfinite(built.schedule(step))
    assert built.eval_batch_size > 0


def made_consistent(changes, config):
    """The same, with what depends on other fields."""
    changes = dict(changes)
    for field in ("model.fresh_head", "model.class_map"):
        if not changes.get("model.pretrained"):
            changes.pop(field, None)
    if changes.get("optimizer.head_only"):
        changes["optimizer.layer_decay"] = 1.0
    group_size = changes.get("mixing.group_size", config.mixing.group_size)
    parts = 8 * changes.get("accumulation_steps", 1) * group_size
    parts *= changes.get("batch_size", 1)
    changes["batch_size"] = parts if parts <= 1442 else 8 * 3 * 4
    epochs = changes.get("epochs", config.epochs)
    part = changes.get("optimizer.warmup_epochs", 0.0) * epochs
    changes["optimizer.warmup_epochs"] = part if part >= 1e-30 else 0.0
    return changes


@pytest.mark.parametrize("name", models.list_models("*_s12"))
def test_published_names_build_a_run(name):
    config = change(small(), "model.name", name)
    config.model.family = ""
    assert run.Run(config).total_steps


@pytest.mark.parametrize("field", FIELDS)
def test_invalid_values_are_refused_by_the_fields_name(field):
    @bounded(20)
    @given(value=INVALID[field], start=st.sampled_from(sorted(STARTS)))
    def refused(value, start):
        config = small(start)
        if field == "model.name":
            config.model.family = ""
        config = change(config, field, value)
        with pytest.raises(ValueError, match=r"\w") as caught:
            run.Run(config)
        message = str(caught.value)
        named = f"config.{field}" in message or CONTRADICTS.get(field, "\0") in message
        assert named, message
        assert type(caught.value) is ValueError

    refused()


@pytest.mark.parametrize(
    "value",
    [True, None, "1", (1,), {}, 10**5000, -(10**5000), *map(float, ("nan", "inf", "-inf"))],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_number_is_refused_by_every_field_of_numbers(value):
    for field, default in flatten(recipes.base_config()).items():
        if type(default) in (int, float):
            with pytest.raises(ValueError, match=rf"config\.{field}"):
                check_fields(change(small(), field, value))


@bounded(60)
@given(values=st.fixed_dictionaries({}, optional=INVALID))
def test_several_invalid_values_are_a_value_error(values):
    config = small()
    for field, value in values.items():
        config = change(config, field, value)
    if values:
        with pytest.raises(ValueError, match=r"config|mesh|mixing|data"):
            run.Run(config)


def test_a_training_of_more_steps_than_are_counted_is_refused(monkeypatch):
    monkeypatch.setattr(run, "_MAX_STEPS", 1000)
    config = change(small(), "epochs", 1000.0)
    with pytest.raises(ValueError, match=r"`config.epochs` must take at most 1,000 steps"):
        run.Run(config)
