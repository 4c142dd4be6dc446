"""Laws of the way from a process's batches to the devices."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from metaformer_jax.training import sharding
from metaformer_jax.training.feeding import PlacedBatches

MESH = Mesh(np.array(jax.devices()).reshape(4, 2), sharding.AXES)
SIZE = 16


def batch(number, bad=()):
    images = np.random.default_rng(number).integers(0, 256, (SIZE, 2, 3, 1), np.uint8)
    places = np.full(SIZE, -1, np.int32)
    places[: len(bad)] = bad
    label = np.arange(SIZE) + SIZE * number
    return {"image": images, "label": label, "bad": places, "index": label + 1}


def placed(batches, fields=("image", "label")):
    return PlacedBatches(batches, MESH, fields=fields)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_batches_arrive_in_order_whole_and_once(count):
    given = [batch(number) for number in range(count)]
    fed = placed(given)
    for expected, actual in zip(given, fed, strict=True):
        assert actual.keys() == {"image", "label"}
        for field, array in actual.items():
            np.testing.assert_array_equal(array, expected[field])
    assert next(fed, None) is None


def test_the_number_replaced_is_that_of_the_batch_just_given():
    # The first example of a source can be bad as any other.
    bad = [(), (0,), (7, 3, 0), (), range(SIZE), (5,)]
    fed = placed(batch(number, places) for number, places in enumerate(bad))
    assert fed.num_replaced == 0
    assert [fed.num_replaced for _ in fed] == [0, 1, 3, 0, SIZE, 1]


def test_the_indices_are_those_of_the_batch_just_given():
    fed = placed(batch(number) for number in range(4))
    for expected in range(4):
        next(fed)
        np.testing.assert_array_equal(fed.indices, np.arange(SIZE) + SIZE * expected + 1)


def test_one_batch_is_read_ahead_and_no_more():
    # A batch on the devices takes their memory; one more is what hides the copy.
    read = []

    def batches():
        for number in range(8):
            read.append(number)
            yield batch(number)

    fed = placed(batches())
    for given in range(1, 6):
        next(fed)
        assert len(read) == given + 1


def test_each_device_holds_its_part_alone():
    given = batch(0)
    (fed,) = placed([given])
    share = SIZE // MESH.size
    for field, array in fed.items():
        parts = {shard.device: shard.data for shard in array.addressable_shards}
        assert len(parts) == 8
        for place, device in enumerate(MESH.devices.flat):
            own = given[field][place * share : (place + 1) * share]
            np.testing.assert_array_equal(parts[device], own)


def test_only_the_fields_that_the_step_takes_are_placed():
    (fed,) = placed([batch(0)], fields=("label",))
    assert fed.keys() == {"label"}
