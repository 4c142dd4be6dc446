"""Damage as disks, networks and copies do it, from fixed seeds."""

import os

import numpy as np

# How many times as many inputs as in CI: FUZZ_FACTOR=20 python -m pytest -m faults ...
FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))


def mutations(content, number, *, seed=0, within=None):
    """So many damaged copies, times `FACTOR`; all differ from the content.

    Args:
        content: bytes.
        number: of copies.
        seed: of the randomness.
        within: places that damage begins at; anywhere by default.
    """
    for index in range(number * FACTOR):
        rng = np.random.default_rng([seed, index])
        damaged = mutate(content, rng, within)
        if damaged != content:
            yield damaged


def mutate(content, rng, within=None):
    """The content after one to three damages."""
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = int(rng.choice(within)) if within is not None else int(rng.integers(len(content) + 1))
        KINDS[rng.integers(len(KINDS))](damaged, min(at, len(damaged)), rng)
    return bytes(damaged)


def _length(rng):
    return int(2 ** rng.uniform(0, 10))


def _flip_bit(data, at, rng):
    if at < len(data):
        data[at] ^= 1 << int(rng.integers(8))


def _set_byte(data, at, rng):
    if at < len(data):
        data[at] = rng.choice([0, 1, 127, 128, 255])


def _cut(data, at, rng):
    del data[at:]


def _leave_out(data, at, rng):
    del data[at : at + _length(rng)]


def _insert(data, at, rng):
    data[at:at] = rng.bytes(_length(rng))


def _overwrite(data, at, rng):
    stretch = slice(at, at + _length(rng))
    data[stretch] = rng.bytes(len(data[stretch]))


def _zero(data, at, rng):
    stretch = slice(at, at + _length(rng))
    data[stretch] = bytes(len(data[stretch]))


def _repeat(data, at, rng):
    data[at:at] = data[at : at + _length(rng)]


def _swap(data, at, rng):
    size = _length(rng)
    data[at : at + 2 * size] = data[at + size : at + 2 * size] + data[at : at + size]


def _append(data, at, rng):
    data += rng.bytes(_length(rng))


def _write_number(data, at, rng):
    stretch = slice(at, at + 8)
    number = int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**63 - 1]))
    data[stretch] = number.to_bytes(8, "little")[: len(data[stretch])]


# A flipped bit is the commonest.
KINDS = (
    *[_flip_bit] * 4,
    _set_byte,
    _cut,
    _leave_out,
    _insert,
    _overwrite,
    _zero,
    _repeat,
    _swap,
    _append,
    _write_number,
)


def attempt(function, *errors):
    """What a function gives, and None; or None, and the error of these kinds that it raised."""
    try:
        return function(), None
    except errors as error:
        return None, error
