import importlib.util
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metaformer_jax.data import resampling
from metaformer_jax.data.augment import TrainTransform
from metaformer_jax.data.transforms import BICUBIC, BILINEAR

BICUBIC_AND_BILINEAR = [BICUBIC, BILINEAR]


def _pixels(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _by_pillow(pixels, box, size, interpolation):
    return np.asarray(Image.fromarray(pixels).crop(box).resize((size, size), interpolation))


@st.composite
def _images_and_boxes(draw):
    width, height = (draw(st.integers(1, 300)) for _ in range(2))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
    return _pixels(width, height, draw(st.integers(0, 2**32 - 1))), (left, top, right, bottom)


@pytest.fixture
def fresh():
    cached = (resampling._checked, resampling._takes_tall_images_from_above)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def _can_resize_in_the_end(interpolation):
    resampling.can_resize(interpolation)
    resampling._check().result()
    return resampling.can_resize(interpolation)


@pytest.mark.parametrize("interpolation", BICUBIC_AND_BILINEAR)
@given(image_and_box=_images_and_boxes(), size=st.integers(1, 240))
@settings(max_examples=200, deadline=None)
def test_every_part_of_every_image_is_resized_as_pillow_does(interpolation, image_and_box, size):
    pixels, box = image_and_box
    actual = resampling.resize(pixels, box, size, interpolation)
    np.testing.assert_array_equal(actual, _by_pillow(pixels, box, size, interpolation))


@pytest.mark.parametrize("interpolation", BICUBIC_AND_BILINEAR)
@pytest.mark.parametrize("width", [32, 44, 60])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_tall_images_are_worked_off_in_pillows_order(interpolation, width, beyond):
    # It turns where the height is to shrink by more than twice as much as the width.
    pixels = _pixels(width, max(33, 32 + 2 * (width - 32) + beyond))
    box = (0, 0, *pixels.shape[1::-1])
    actual = resampling.resize(pixels, box, 32, interpolation)
    np.testing.assert_array_equal(actual, _by_pillow(pixels, box, 32, interpolation))


@pytest.mark.parametrize("value", [0, 255])
def test_flat_images_stay_flat(value):
    pixels = np.full((301, 203, 3), value, np.uint8)
    for interpolation in BICUBIC_AND_BILINEAR:
        assert (resampling.resize(pixels, (0, 0, 203, 301), 224, interpolation) == value).all()


def test_other_filters_are_left_to_pillow():
    assert all(_can_resize_in_the_end(filter) for filter in BICUBIC_AND_BILINEAR)
    assert not _can_resize_in_the_end(Image.Resampling.LANCZOS)


def test_training_images_are_the_same_with_and_without_numba(fresh, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(_pixels(90, 120)).save(file, "JPEG")
    transform = TrainTransform(image_size=32)

    def images():
        rngs = (np.random.default_rng(seed) for seed in range(20))
        return [transform(file.getvalue(), rng) for rng in rngs]

    assert _can_resize_in_the_end(BICUBIC)
    fast = images()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "numba" else find_spec(name)
    )
    resampling._checked.cache_clear()
    assert not _can_resize_in_the_end(BICUBIC)
    np.testing.assert_array_equal(images(), fast)


def test_a_pillow_that_gives_other_pixels_is_noticed_and_kept_to(fresh, monkeypatch):
    order = resampling._takes_tall_images_from_above()
    monkeypatch.setattr(resampling, "_takes_tall_images_from_above", lambda: not order)
    with pytest.warns(UserWarning, match="resizes otherwise than is known here"):
        assert not _can_resize_in_the_end(BICUBIC)


def test_a_numba_that_cannot_be_used_is_said_and_done_without(fresh, monkeypatch):
    def kernels():
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(resampling, "_kernels", kernels)
    with pytest.warns(UserWarning, match="numba cannot be used: RuntimeError: cannot cache func"):
        assert not _can_resize_in_the_end(BICUBIC)


def test_numbas_files_that_cannot_be_written_or_read_are_said_and_done_without(fresh, monkeypatch):
    """As on a full disk, or when one was emptied by a power cut."""
    for error, said in (
        (OSError(28, "No space left"), r"OSError: .*No space"),
        (EOFError(), "EOF"),
    ):

        def resize(*_, error=error):
            raise error

        monkeypatch.setattr(resampling, "resize", resize)
        resampling._checked.cache_clear()
        with pytest.warns(UserWarning, match=f"numba cannot be used: {said}"):
            assert not _can_resize_in_the_end(BICUBIC)


def test_no_image_waits_for_what_is_compiled(fresh, monkeypatch):
    may_go_on = threading.Event()
    load = resampling._kernels

    def kernels():
        assert may_go_on.wait(60)
        return load()

    monkeypatch.setattr(resampling, "_kernels", kernels)
    file = io.BytesIO()
    Image.fromarray(_pixels(90, 120)).save(file, "JPEG")
    transform = TrainTransform(image_size=32)
    by_pillow = transform(file.getvalue(), np.random.default_rng(0))
    assert not resampling.can_resize(BICUBIC)
    may_go_on.set()
    assert _can_resize_in_the_end(BICUBIC)
    by_numba = transform(file.getvalue(), np.random.default_rng(0))
    np.testing.assert_array_equal(by_numba, by_pillow)


def test_threads_that_begin_together_check_once(fresh, monkeypatch):
    calls = []
    monkeypatch.setattr(resampling, "_is_exact", lambda: calls.append(None))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(resampling.can_resize, [BICUBIC] * 64))
    resampling._check().result()
    assert len(calls) == 1
