import jax
import jax.numpy as jnp
import pytest

from metaformer_jax.training.memory import Memory, largest_that_fits, memory_of


def _needed(limit=10**9, fixed=100, of_each=10):
    asked = []

    def needed(batch):
        asked.append(batch)
        total = fixed + of_each * batch
        return total if total <= limit else None

    return needed, asked


@pytest.mark.parametrize(
    ("batch", "limit", "expected"), [(64, 1000, 88), (64, 740, 64), (64, 739, 56), (8, 1000, 88)]
)
def test_the_largest_batch_is_on_the_line_through_two_and_was_tried(batch, limit, expected):
    needed, asked = _needed()
    assert largest_that_fits(needed, batch, unit=8, limit=limit, most=10**9) == expected
    assert expected in asked
    # None is compiled twice.
    assert len(set(asked)) == len(asked) <= 3


def test_what_is_refused_is_halved_until_it_fits():
    needed, asked = _needed(limit=400)
    assert largest_that_fits(needed, 96, unit=8, limit=400, most=10**9) == 24
    assert asked == [96, 48, 24, 8]


def test_where_the_line_is_off_less_is_tried_until_it_fits():
    def needed(batch):
        return 100 + 10 * batch + batch**2 // 50

    largest = largest_that_fits(needed, 64, unit=8, limit=10_000, most=10**9)
    assert needed(largest) <= 10_000
    # The best would be 496; the line alone would say 832.
    assert 448 <= largest <= 496


def test_without_two_batches_that_fit_nothing_is_said():
    needed, _ = _needed(limit=150)
    assert largest_that_fits(needed, 64, unit=8, limit=150, most=10**9) is None


def test_not_even_one_image_fits():
    needed, _ = _needed(fixed=2000)
    assert largest_that_fits(needed, 64, unit=8, limit=1000, most=10**9) == 0


def test_no_batch_is_tried_beyond_the_most():
    needed, asked = _needed()
    assert largest_that_fits(needed, 64, unit=8, limit=1000, most=83) == 80
    assert max(asked) == 80
    assert largest_that_fits(needed, 8, unit=8, limit=1000, most=15) is None


def test_memory_counts_what_is_donated_once():
    shape = jax.ShapeDtypeStruct((1000,), jnp.float32)
    step = jax.jit(lambda x, y: x + y, donate_argnums=0)
    memory = memory_of(step.lower(shape, shape).compile())
    assert (memory.arguments, memory.outputs, memory.aliased) == (8000, 4000, 4000)
    assert memory.total == 8000 + memory.temporaries + memory.code
    assert Memory(arguments=1, outputs=2, aliased=2, temporaries=4, code=8).total == 13


def test_where_memory_does_not_grow_from_one_batch_to_the_next_few_are_tried():
    asked = []

    def needed(batch):
        asked.append(batch)
        return max(10**9, 10**7 * batch)

    largest = largest_that_fits(needed, 64, unit=8, limit=16 * 10**9, most=1_281_167)
    assert 0.97 * 1600 <= largest <= 1600
    assert len(asked) <= 25


def test_a_single_unit_fits_though_its_double_is_refused():
    needed, asked = _needed(limit=2000)
    assert largest_that_fits(needed, 128, unit=128, limit=2000, most=10**9) == 128
    assert asked == [128, 256]
