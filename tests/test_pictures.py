"""Grids of images with captions."""

import numpy as np

from metaformer_jax.figures import to_array
from metaformer_jax.training import pictures

COLOURS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)


def _middle_of(pixels, colour):
    """Where the image of one colour lies: the middle of its pixels, row and column."""
    rows, columns = np.nonzero((pixels == np.uint8(255 * colour)).all(-1))
    # At least a square inch, at 100 dots.
    assert len(rows) > 100**2
    return rows.mean(), columns.mean()


def _drawn(images):
    names = [str(index) for index in range(len(images))]
    figure = pictures.batch_figure(images, np.eye(len(images)), names, title="these")
    return to_array(figure)


def test_images_stand_side_by_side_and_then_below():
    images = np.ones((9, 4, 4, 3), np.float32)
    images[:3] = COLOURS[:, None, None]
    pixels = _drawn(images)
    (row, *_), _, _ = middles = [_middle_of(pixels, colour) for colour in COLOURS]
    columns = pixels.shape[1] / 8 * (np.arange(3) + 0.5)
    np.testing.assert_allclose(middles, [(row, column) for column in columns], atol=1)
    images[[0, 8]] = images[[8, 0]]
    below, column = _middle_of(_drawn(images), COLOURS[0])
    assert below > row + 100
    assert abs(column - columns[0]) < 1


def test_captions_name_what_an_image_shows_and_no_more_than_fits():
    targets = np.array([[0.7, 0.3, 0.0], [0.9, 0.05, 0.05]])
    names = ["golden retriever of the king", "cat", "dog"]
    figure = pictures.batch_figure(
        np.zeros((2, 4, 4, 1)), targets, names, title="two", smallest=0.05
    )
    captions = [text.get_text() for text in figure.axes[0].texts]
    assert captions == ["golden retriever o… 70%\ncat 30%", "golden retriever o… 90%"]


def test_any_name_is_written_as_it_is():
    names = ["$a_b_c$", "$5 and $10 bills", "caf\udce9"]
    figure = pictures.batch_figure(np.zeros((3, 4, 4, 1)), np.eye(3), names, title="three")
    to_array(figure)
    captions = figure.axes[0].texts
    expected = ["$a_b_c$ 100%", "$5 and $10 bills 100%", "caf? 100%"]
    assert [text.get_text() for text in captions] == expected
    assert not any(text.get_parse_math() for text in captions)


def test_without_a_mistake_there_is_still_a_picture(tmp_path):
    pictures.draw_misclassified([], tmp_path / "none.png", title="0 of 5 misclassified")
    assert (tmp_path / "none.png").stat().st_size > 0


def test_captions_name_both_of_two_classes_where_they_are_mixed():
    targets = np.array([[0.59, 0.41], [0.05, 0.95], [0.5, 0.5]])
    images = np.zeros((3, 4, 4, 1))
    figure = pictures.batch_figure(images, targets, ["cat", "dog"], title="", smallest=0.05)
    captions = [text.get_text() for text in figure.axes[0].texts]
    assert captions[:2] == ["cat 59%\ndog 41%", "dog 95%"]
    assert set(captions[2].split("\n")) == {"cat 50%", "dog 50%"}
    alone = pictures.batch_figure(images[:1], np.ones((1, 1)), ["cat"], title="", smallest=0.1)
    assert [text.get_text() for text in alone.axes[0].texts] == ["cat 100%"]
