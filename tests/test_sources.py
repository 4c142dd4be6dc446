import numpy as np
import pytest
from sklearn.datasets import load_digits

from metaformer_jax.data.sources import Digits, open_source


def _labels(source):
    return np.array([source[index]["label"] for index in range(len(source))])


def test_the_embedded_digits_are_scikit_learns():
    published = load_digits()
    expected = sorted(
        (int(label), image.tobytes())
        for image, label in zip(
            np.rint(published.images * (255 / 16)).astype(np.uint8), published.target, strict=True
        )
    )
    examples = [
        source[index]
        for source in (Digits("train"), Digits("test"))
        for index in range(len(source))
    ]
    actual = sorted((example["label"], example["image"].tobytes()) for example in examples)
    assert actual == expected
    assert len(actual) == 1797


def test_a_fifth_of_every_class_is_held_out():
    train, test = np.bincount(_labels(Digits("train"))), np.bincount(_labels(Digits("test")))
    np.testing.assert_array_equal(test, (train + test) // 5)


def test_digits_are_enlarged_on_request():
    example = Digits("test", image_size=32)[3]
    assert example["image"].shape == (32, 32, 1)
    assert example["image"].dtype == np.uint8


def test_unknown_names_and_splits_are_refused():
    with pytest.raises(ValueError, match=r"`data.name` must be 'digits', got 'mnist'"):
        open_source("mnist", "train", image_size=32)
    with pytest.raises(ValueError, match="`split` must be 'train' or 'test', got 'dev'"):
        Digits("dev")
