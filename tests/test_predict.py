"""The program that says what pictures show."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import struct
import zlib

import jax
import numpy as np
import pytest
import small_run
from flax import nnx
from PIL import Image, ImageFile, TiffImagePlugin

import metaformer_jax
from metaformer_jax import predict
from metaformer_jax.data.augment import EvalTransform
from metaformer_jax.data.sources import Digits
from metaformer_jax.data.transforms import BadImageError
from metaformer_jax.figures import to_array
from metaformer_jax.inference import Classifier, find_images, load_classifier, read_image
from metaformer_jax.inference.drawing import Explanation, explanations_figure
from metaformer_jax.models import FAMILIES
from metaformer_jax.weights import CheckpointError
from metaformer_jax.weights.convert import variables_of
from metaformer_jax.weights.pretrained import build_abstract
from metaformer_jax.weights.write import write_variables

NAME = "identityformer_s12"
COLOUR = EvalTransform(image_size=32)
GREY = EvalTransform(image_size=32, channels=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    model, config = small_run.make(folder / "run")
    source = Digits("test")
    (folder / "digits" / "deeper").mkdir(parents=True)
    for index in range(5):
        place = "digits/deeper" if index > 2 else "digits"
        (folder / place / f"{index}.png").write_bytes(source[index]["image"])
    (folder / "digits" / ".hidden.png").write_bytes(source[9]["image"])
    (folder / "digits" / "notes.txt").write_text("no picture")
    return folder, model, config


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A published model with a thousand classes, of which one shows more with more red."""
    path = tmp_path_factory.mktemp("converted") / "weights.safetensors"
    model = build_abstract(NAME)
    rng = np.random.default_rng(0)
    variables = {
        path: 0.05 * rng.standard_normal(variable.shape, np.float32)
        for path, variable in variables_of(model).items()
    }
    write_variables(variables, path, name=NAME, model=model)
    return path


@pytest.fixture
def call(run, monkeypatch, capsys):
    monkeypatch.chdir(run[0])

    def call(*arguments):
        try:
            code = predict.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def expected_probabilities(run, paths):
    _, model, config = run
    pixels = [
        np.asarray(Image.open(path).convert("L").resize((32, 32), Image.Resampling.BICUBIC))
        for path in paths
    ]
    scaled = (np.stack(pixels)[..., None] / 255 - config.data.mean[0]) / config.data.std[0]
    return np.asarray(jax.nn.softmax(nnx.jit(lambda m, x: m(x))(model, scaled.astype(np.float32))))


def test_json_lines_hold_the_models_own_answers(run, call):
    code, out, err = call("digits", "--weights", "run", "--format", "jsonl", "--top", "3")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    paths = ["digits/0.png", "digits/1.png", "digits/2.png", "digits/deeper/3.png"]
    paths.append("digits/deeper/4.png")
    assert [line["image"] for line in lines] == paths
    for line, row in zip(lines, expected_probabilities(run, paths), strict=True):
        order = np.argsort(-row)[:3]
        assert [guess["index"] for guess in line["predictions"]] == order.tolist()
        assert [guess["name"] for guess in line["predictions"]] == [str(i) for i in order]
        found = [guess["probability"] for guess in line["predictions"]]
        np.testing.assert_allclose(found, row[order], rtol=1e-3)


def test_batches_do_not_show_in_the_results(call):
    outputs = {
        call("digits", "--weights", "run", "--format", "csv", "--batch-size", size)[1]
        for size in (2, 5, 100)
    }
    assert len({tuple(tuple(row[:4]) for row in csv.reader(o.splitlines())) for o in outputs}) == 1


def test_csv_and_table_go_to_files_by_their_suffix(run, call, tmp_path):
    for name in ("results.csv", "results.txt"):
        arguments = ("digits/*.png", "--weights", "run", "--top", "2")
        assert call(*arguments, "--output", tmp_path / "new" / name) == (0, "", "")
    with open(tmp_path / "new" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["rank"]) for row in rows[:3]] == [
        ("digits/0.png", "1"), ("digits/0.png", "2"), ("digits/1.png", "1")
    ]  # fmt: skip
    assert len(rows) == 6
    assert all(row["index"] == row["name"] for row in rows)
    lines = (tmp_path / "new" / "results.txt").read_text().splitlines()
    assert lines[0].split() == ["picture", "class"]
    probability = float(rows[0]["probability"])
    assert lines[1].split() == ["digits/0.png", f"{probability:.1%}", rows[0]["name"]]


def test_a_published_model_names_imagenets_classes(run, call, converted):
    arguments = ("digits/0.png", "--image-size", "32", "--format", "jsonl")
    code, out, _ = call(*arguments, "--weights", converted)
    assert code == 0
    guesses = json.loads(out)["predictions"]
    assert len(guesses) == 5
    names = metaformer_jax.imagenet_class_names()
    assert all(guess["name"] == names[guess["index"]] for guess in guesses)


def test_what_is_left_out_is_named_and_told_by_the_exit_code(run, call):
    arguments = ("nowhere.png", "digits/notes.txt", "digits/0.png", "*.tiff", "run/config.json")
    code, out, err = call(*arguments, "--weights", "run", "--format", "csv", "--top", "1")
    assert code == 1
    (row,) = list(csv.DictReader(out.splitlines()))
    expected = expected_probabilities(run, ["digits/0.png"]).max()
    assert float(row["probability"]) == pytest.approx(expected, rel=1e-3)
    assert sorted(err.splitlines()) == [
        "left out: *.tiff: no file matches.",
        "left out: digits/notes.txt: not an image that Pillow reads.",
        "left out: nowhere.png: no such file.",
        "left out: run/config.json: not an image that Pillow reads.",
    ]


def test_an_answer_that_is_not_finite_is_left_out(run, call, monkeypatch):
    probabilities = Classifier.probabilities

    def overflowing(self, images):
        answers = np.array(probabilities(self, images))
        answers[1] = np.nan
        return answers

    monkeypatch.setattr(Classifier, "probabilities", overflowing)
    code, out, err = call("digits/[012].png", "--weights", "run", "--format", "jsonl")
    assert code == 1
    assert [json.loads(line)["image"] for line in out.splitlines()] == [
        "digits/0.png",
        "digits/2.png",
    ]
    assert err == "left out: digits/1.png: the model's answer is not finite.\n"


def test_the_name_that_is_given_tells_the_size(tmp_path):
    path = tmp_path / "weights.safetensors"
    model = build_abstract("convformer_s18")
    variables = {
        path: np.zeros(variable.shape, np.float32) for path, variable in variables_of(model).items()
    }
    write_variables(variables, path, name="convformer_s18", model=model)
    assert load_classifier(weights=path).transform.image_size == 224
    named = load_classifier("convformer_s18_384", weights=path)
    assert (named.name, named.transform.image_size) == ("convformer_s18_384", 384)


def test_class_names_that_are_no_text_are_written_as_far_as_they_are(tmp_path, call):
    small_run.make(tmp_path / "run")
    names = [*"012345678", os.fsdecode(b"caf\xe9")]
    (tmp_path / "run" / "class_names.json").write_text(json.dumps(names))
    arguments = ("digits/0.png", "--weights", tmp_path / "run", "--top", "10")
    assert call(*arguments, "--output", tmp_path / "out.csv")[0] == 0
    assert "caf\\udce9" in (tmp_path / "out.csv").read_text()


def test_a_tiff_that_is_cut_behind_its_first_page_is_read_as_evaluation_does(tmp_path):
    pages = [Image.new("L", (20, 20), 40 * index) for index in range(5)]
    pages[0].save(tmp_path / "whole.tiff", save_all=True, append_images=pages[1:])
    content = (tmp_path / "whole.tiff").read_bytes()
    (tmp_path / "cut.tiff").write_bytes(content[: len(content) * 7 // 10])
    transform = EvalTransform(image_size=20, channels=1, crop_fraction=1.0)
    pixels, _ = read_image(tmp_path / "cut.tiff", transform)
    np.testing.assert_array_equal(pixels, transform((tmp_path / "whole.tiff").read_bytes()))


def huge_png(width, height):
    """The header of a picture that large, and no more: decoding it would fail otherwise."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def encoded(mode, size, kind="PNG"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


UNUSABLE = {
    "text.jpg": (b"hello", "not an image that Pillow reads"),
    "empty.png": (b"", "not an image that Pillow reads"),
    "huge.png": (huge_png(20_000, 20_000), "more than 179 million pixels"),
    "thread.png": (huge_png(1, 500_000), "1x500000 pixels are too long and thin to resize to 32"),
    "cut.png": (Digits("test")[0]["image"][:-40], "truncated"),
    "cut.jpg": (encoded("RGB", (64, 64), "JPEG")[:-200], "runcated"),
    "float.tiff": (encoded("F", (8, 8), "TIFF"), "32 bits per pixel"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_picture_that_cannot_be_used_says_why(tmp_path, name):
    data, message = UNUSABLE[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadImageError, match=re.escape(message)) as caught:
        read_image(tmp_path / name, COLOUR)
    assert len(str(caught.value).splitlines()) == 1


def test_whether_it_is_too_thin_depends_on_the_crop_of_the_resized_picture(tmp_path):
    (tmp_path / "thread.png").write_bytes(huge_png(1, 80_000))
    cropped = dataclasses.replace(COLOUR, crop_fraction=0.5)
    with pytest.raises(BadImageError, match="to resize to 64 on the short side"):
        read_image(tmp_path / "thread.png", cropped)


def test_nothing_is_left_where_no_picture_can_be_used(call, tmp_path):
    (tmp_path / "text.jpg").write_bytes(b"hello")
    output = tmp_path / "out.csv"
    code, _, err = call(tmp_path, "--weights", "run", "--output", output)
    assert code == 2
    assert err.splitlines()[-1] == "error: none of the 1 files could be predicted."
    assert [path.name for path in tmp_path.iterdir()] == ["text.jpg"]


def picture(name, mode="RGB", size=(40, 30)):
    rng = np.random.default_rng(len(name))
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode)


def assert_read_as(path, expected, note, **options):
    for transform in (COLOUR, GREY):
        pixels, notes = read_image(path, transform, **options)
        np.testing.assert_array_equal(pixels, read_image(expected, transform)[0])
        assert "; ".join(notes) == note
    return pixels


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [picture(name).quantize(64) for name in ("a", "ab", "abc")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    note = "3 frames, of which the first is taken"
    assert_read_as(tmp_path / "moving.gif", tmp_path / "still.gif", note)


def test_unusual_pixels_are_taken_for_what_they_show(tmp_path):
    grey = picture("grey", "L")
    grey.save(tmp_path / "8.png")
    assert read_image(tmp_path / "8.png", COLOUR)[1] == []
    for name in ("16.png", "16.pgm"):
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 77).save(tmp_path / name)
        note = "16 bits per pixel, of which the upper 8 are taken"
        assert_read_as(tmp_path / name, tmp_path / "8.png", note)
    transparent = grey.convert("RGBA")
    transparent.putalpha(0)
    transparent.save(tmp_path / "transparent.png")
    note = "transparent: as in evaluation, the colours behind are taken"
    assert_read_as(tmp_path / "transparent.png", tmp_path / "8.png", note)
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(tmp_path / "cmyk.tiff")
    pixels, notes = read_image(tmp_path / "cmyk.tiff", COLOUR)
    assert (pixels[0, 0].tolist(), notes) == ([255, 0, 0], [])
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    pixels, notes = read_image(tmp_path / "one.png", COLOUR)
    assert (pixels[31, 31].tolist(), notes) == ([255, 0, 0], [])


def test_an_orientation_is_applied_when_asked_for(tmp_path):
    image = picture("turned", "L")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "plain.png")
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    note = "as in evaluation, its EXIF orientation is not applied; --upright applies it"
    plain = assert_read_as(tmp_path / "turned.png", tmp_path / "plain.png", note)
    turned = assert_read_as(tmp_path / "turned.png", tmp_path / "upright.png", "", upright=True)
    assert (plain != turned).any()


def test_tiff_pictures_are_turned_once_as_evaluation_turns_them(tmp_path):
    image, exif = picture("turned"), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.tiff", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    for upright in (False, True):
        assert_read_as(tmp_path / "turned.tiff", tmp_path / "upright.png", "", upright=upright)


@pytest.mark.parametrize(("tag", "value"), [(296, "no number"), (282, "no number"), (256, "x")])
def test_a_picture_with_odd_tags_is_turned_too(tag, value, tmp_path):
    image, exif = picture("turned"), Image.Exif()
    exif[0x0112] = 6
    exif[tag] = value
    image.save(tmp_path / "odd.png", exif=_as_text(exif, tag))
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    assert_read_as(tmp_path / "odd.png", tmp_path / "upright.png", "", upright=True)


def _as_text(exif, tag):
    """The EXIF with a tag as text, whatever its type should be."""
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    ifd.tagtype[tag] = 2
    ifd[tag] = exif[tag]
    ifd[0x0112] = exif[0x0112]
    return b"Exif\0\0" + b"II*\0\x08\0\0\0" + ifd.tobytes(8)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_a_picture_with_damaged_exif_is_read_as_evaluation_does(suffix, tmp_path):
    picture("plain").save(tmp_path / f"plain{suffix}", lossless=True)
    junk = b"Exif\0\0" + bytes(range(64))
    picture("plain").save(tmp_path / f"damaged{suffix}", exif=junk, lossless=True)
    for upright in (False, True):
        assert_read_as(
            tmp_path / f"damaged{suffix}", tmp_path / f"plain{suffix}", "", upright=upright
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.mean", 3),
        ("data.std", None),
        ("data.image_size", "32"),
        ("eval_crop_fraction", "x"),
        ("eval_interpolation", 1),
    ],
)
def test_weights_whose_config_has_no_settings_are_refused(call, run, field, value, tmp_path):
    copy = shutil.copytree(run[0] / "run", tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {field: value}))
    code, _, err = call("digits/0.png", "--weights", copy)
    assert code == 2
    assert f"must be the config that the run wrote, got TypeError: {value!r} as {field}." in err


def test_a_picture_that_is_damaged_behind_its_pixels_says_why(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture("turned").save(tmp_path / "turned.png", exif=exif)
    content, end = (tmp_path / "turned.png").read_bytes(), 12
    profile = struct.pack(">I4sI", 0, b"iCCP", zlib.crc32(b"iCCP"))
    (tmp_path / "turned.png").write_bytes(content[:-end] + profile + content[-end:])
    for upright in (False, True):
        with pytest.raises(BadImageError, match="IndexError: "):
            read_image(tmp_path / "turned.png", COLOUR, upright=upright)


def test_a_picture_is_decoded_once(tmp_path, monkeypatch):
    picture("plain").save(tmp_path / "plain.png")
    loads = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda i: loads.append(i) or load(i))
    read_image(tmp_path / "plain.png", COLOUR)
    assert len(set(map(id, loads))) == 1


def test_a_name_that_is_no_text_is_shown_as_far_as_it_is(run, call, tmp_path):
    path = os.fsencode(tmp_path / "$x_{$") + b"\xff.png"
    with open(path, "wb") as file:
        file.write(Digits("test")[0]["image"])
    arguments = ("--format", "jsonl", "--explain", tmp_path / "drawn" / "why.png")
    code, out, err = call(tmp_path, "--weights", "run", *arguments)
    assert (code, err) == (0, "")
    assert json.loads(out)["image"] == f"{tmp_path}/$x_{{$\ufffd.png"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits/0.png"], "`name` (--model) must be given where no weights"),
        (["digits/0.png", "--model", "caformer_s81"], "Did you mean caformer_s18"),
        (["nowhere.png", "--model", NAME], "nowhere.png: no such file"),
        (["empty", "--model", NAME], "empty: the folder has no picture"),
        (["*.gone", "--model", NAME], "*.gone: no file matches"),
        (["digits/0.png", "--weights", "gone.pth"], "gone.pth"),
        (["digits/0.png", "--weights", "digits"], "must be converted weights, got digits"),
        (["digits/0.png", "--weights", "run", "--model", NAME], "The checkpoint must"),
        (["digits/0.png", "--weights", "run", "--class-names", "gone"], "gone: No such file"),
        (["digits/0.png", "--weights", "run", "--class-names", "digits/notes.txt"], "the 10 cl"),
        (["digits/0.png", "--weights", "run", "--class-names", "digits/0.png"], "got digits/0.p"),
        (["digits/0.png", "--weights", "run", "--output", "empty"], "something else"),
        (["digits/0.png", "--weights", "run", "--output", "digits/0.png/x"], "digits/0.png: "),
        (["digits/0.png", "--weights", "run", "--explain", "digits/0.png"], "be replaced"),
        (["digits/0.png", "--weights", "run", "--explain", "x.jpg"], "writes a .png file"),
        (["digits/0.png", "--weights", "run", "--explain", "x.png", "--output", "./x.png"],
         "must be two files, got x.png"),
        (["digits/0.png", "--weights", "run", "--stage", "2"], "--stage is that of --explain"),
        (["digits/0.png", "--weights", "run", "--explain", "x.png", "--stage", "5"], "in [1, 4]"),
        (["digits/0.png", "--weights", "run", "--top", "0"], "must be at least 1, got 0"),
        (["digits/0.png", "--weights", "run", "--top", "all"], "a whole number, got 'all'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(run, call, arguments, message):
    (run[0] / "empty").mkdir(exist_ok=True)
    before = sorted(run[0].rglob("*"))
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert message in err
    assert "Traceback" not in err
    assert sorted(run[0].rglob("*")) == before


def test_an_explanation_is_drawn_for_each_picture(call, tmp_path):
    sizes = []
    for images in (["digits/0.png"], ["digits"]):
        path = tmp_path / "why.png"
        assert call(*images, "--weights", "run", "--explain", path)[0] == 0
        with Image.open(path) as image:
            sizes.append(image.size)
            assert len(image.convert("RGB").getcolors(10**6)) > 100
    # One of two panels; five in rows of three.
    assert sizes[1] == (3 * sizes[0][0], 2 * sizes[0][1])


def test_a_map_lies_over_its_picture_where_it_is_high():
    values = np.zeros((2, 2))
    values[1, 0] = 1
    image = np.full((64, 64, 3), 128, np.uint8)
    image[:32, :32] = 255
    figure = explanations_figure([Explanation(image, "title", {"a": values, "b": values.T})])
    axes = [axes for place in figure.subfigs for axes in place.axes]
    assert [a.get_title() for a in axes] == ["", "a", "b"]
    pixels = to_array(figure).astype(int)
    for panel, row, column in ((1, 0.75, 0.25), (2, 0.25, 0.75), (0, 0, 0)):
        box = axes[panel].get_window_extent()
        top = pixels.shape[0] - box.y1

        def colour(row, column, box=box, top=top):
            return pixels[int(top + row * box.height), int(box.x0 + column * box.width)]

        if panel:
            red, _, blue = colour(row, column)
            assert red > blue
            red, _, blue = colour(0.75, 0.75)
            assert red < blue
        # The picture beneath stands upright.
        assert colour(0.25, 0.25).sum() > colour(0.75, 0.75).sum() + 100


def test_class_names_come_from_a_file_or_from_the_data(run, call, tmp_path):
    (tmp_path / "names").write_text("".join(f"digit {i}\n" for i in range(10)))
    arguments = ("digits/0.png", "--weights", "run", "--format", "jsonl")
    code, out, _ = call(*arguments, "--class-names", tmp_path / "names")
    guesses = json.loads(out)["predictions"]
    assert code == 0
    assert all(guess["name"] == f"digit {guess['index']}" for guess in guesses)
    # As an editor under Windows writes it, and with what is no end of a line in a name.
    names = [f"digit {i}" for i in range(9)] + ["two\u2028lines"]
    (tmp_path / "names").write_text("\r\n".join(names), encoding="utf-8-sig", newline="")
    code, out, _ = call(*arguments, "--class-names", tmp_path / "names")
    assert code == 0
    guesses = json.loads(out)["predictions"]
    assert all(guess["name"] == names[guess["index"]] for guess in guesses)
    folder = tmp_path / "birds"
    synsets = ["n01514668", "n01514859", *(f"bird{i}" for i in range(8))]
    for synset in synsets:
        (folder / "val" / synset).mkdir(parents=True)
        picture(synset).save(folder / "val" / synset / "a.png")
    data = {"name": "folder", "root": str(folder), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    small_run.make(tmp_path / "run", **data)
    classifier = load_classifier(weights=tmp_path / "run")
    assert classifier.class_names[:3] == ("bird0", "bird1", "bird2")
    assert classifier.class_names[8:] == ("cock", "hen")
    assert classifier.mean == (0.5,) * 3
    assert classifier.notes == ()
    (folder / "val").rename(folder / "elsewhere")
    classifier = load_classifier(weights=tmp_path / "run")
    assert classifier.class_names[7] == "class 7"
    assert "names are not known" in classifier.notes[0]


def test_a_classifier_refuses_what_are_no_pixels_and_no_size(run):
    with pytest.raises(ValueError, match=r"`image_size` .* at least 1, got \(32, 48\)"):
        load_classifier(weights=run[0] / "run", image_size=(32, 48))
    classifier = load_classifier(weights=run[0] / "run")
    with pytest.raises(ValueError, match="from 0 to 255 in uint8, got float32"):
        classifier.probabilities(np.zeros((1, 32, 32, 1), np.float32))


def test_files_are_found_once_and_in_order(run, monkeypatch):
    monkeypatch.chdir(run[0])
    paths, problems = find_images(["digits/deeper/4.png", "digits", "digits/**/*.png"])
    assert [str(path) for path in paths] == [
        "digits/deeper/4.png",
        "digits/0.png",
        "digits/1.png",
        "digits/2.png",
        "digits/deeper/3.png",
    ]
    assert problems == []


def test_a_tilde_that_is_no_home_begins_a_name(run, tmp_path, monkeypatch):
    shutil.copy(run[0] / "digits" / "0.png", tmp_path / "~$a.png")
    monkeypatch.chdir(tmp_path)
    paths, problems = find_images(["~$a.png"])
    assert ([path.name for path in paths], problems) == (["~$a.png"], [])


def test_linked_folders_are_looked_into_once_and_closed_ones_named(run, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "back").symlink_to(tmp_path / "pictures")
    (tmp_path / "pictures" / "digits").symlink_to(run[0] / "digits")
    (tmp_path / "pictures" / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    paths, problems = find_images([str(tmp_path / "pictures")])
    assert [path.name for path in paths] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert problems == [f"{tmp_path}/pictures/closed: Permission denied"]


def test_the_thousand_classes_stand_in_the_published_order():
    synsets = metaformer_jax.models.imagenet_synsets()
    names = metaformer_jax.imagenet_class_names()
    assert len(names) == len(synsets) == len(set(synsets)) == 1000
    assert list(synsets) == sorted(synsets)
    assert (synsets[207], names[207]) == ("n02099601", "golden retriever")
    assert (names[0], names[999]) == (
        "tench, Tinca tinca",
        "toilet tissue, toilet paper, bathroom tissue",
    )
    assert [index for index, name in enumerate(names) if names.count(name) > 1] == [134, 517]


def test_a_run_of_a_family_that_is_not_known_here_says_where_to_add_it(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(FAMILIES, "fourierformer", FAMILIES["identityformer"])
        small_run.make(tmp_path / "run", family="fourierformer")
        assert load_classifier(weights=tmp_path / "run").name == "fourierformer"
    with pytest.raises(CheckpointError, match=r"got 'fourierformer'. Add it .*docs/extending\.md"):
        load_classifier(weights=tmp_path / "run")
