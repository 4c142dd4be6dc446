"""The local page: what it answers, and that a browser shows it."""

import contextlib
import functools
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import small_run
from flax import nnx
from PIL import Image

from metaformer_jax import demo
from metaformer_jax.data.sources import Digits

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1200,1500"
)
# Runs the program, and notes every address beyond this machine that it asks for.
WATCHED = """
import socket, sys

HERE = (None, "", "127.0.0.1", "::1", "localhost")

def watched(function, host_of):
    def call(*arguments, **options):
        if (host := host_of(*arguments)) not in HERE:
            print("beyond:", host, file=sys.stderr, flush=True)
        return function(*arguments, **options)
    return call

socket.getaddrinfo = watched(socket.getaddrinfo, lambda host, *_: host)
socket.socket.connect = watched(
    socket.socket.connect, lambda _, address: address[0] if isinstance(address, tuple) else None
)
from metaformer_jax import demo
sys.exit(demo.main(sys.argv[1:]))
"""

# Opens pictures as the page does.
OPENED = """
import sys
import gradio as gr
from metaformer_jax import demo

page = demo.build_page(None, sys.argv[1])
(picture,) = (block for block in page.blocks.values() if getattr(block, "label", "") == "picture")
for path in sys.argv[2:]:
    try:
        picture.preprocess(gr.data_classes.ImageData(path=path))
        print("read")
    except gr.Error as error:
        print(error.message)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(pathlib.Path(demo.__file__).parents[1])}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    model, config = small_run.make(folder / "run")
    (folder / "digit.png").write_bytes(Digits("test")[0]["image"])
    return folder, model, config


def test_the_answer_is_the_models_with_its_maps(run):
    folder, model, config = run
    image = Image.open(folder / "digit.png")
    guesses, picture = demo.answer(image, demo.BY_WEIGHTS, str(folder / "run"), "2")
    pixels = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BICUBIC))
    scaled = (pixels[None, ..., None] / 255 - config.data.mean[0]) / config.data.std[0]
    logits = np.asarray(nnx.jit(lambda model, x: model(x))(model, scaled.astype(np.float32)))[0]
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert list(guesses) == [str(index) for index in np.argsort(-expected)[:5]]
    np.testing.assert_allclose(list(guesses.values()), np.sort(expected)[:-6:-1], rtol=1e-3)
    assert picture.shape[2] == 3
    assert picture.std() > 10


def test_of_16_bits_the_upper_8_are_shown_to_the_model(run):
    folder, _, _ = run
    image = Image.open(folder / "digit.png").convert("L")
    deep = Image.fromarray(np.asarray(image, np.uint16) * 256)
    assert deep.mode == "I;16"
    question = (demo.BY_WEIGHTS, str(folder / "run"), "2")
    assert demo.answer(deep, *question)[0] == demo.answer(image, *question)[0]


def test_weights_that_have_changed_are_read_again(run, tmp_path):
    folder, _, _ = run
    image = Image.open(folder / "digit.png")
    weights = shutil.copytree(folder / "run", tmp_path / "run")
    question = (image, demo.BY_WEIGHTS, str(weights), "2")
    first = demo.answer(*question)[0]
    shutil.rmtree(weights)
    small_run.make(weights, family="poolformerv2")
    second = demo.answer(*question)[0]
    assert first == demo.answer(image, demo.BY_WEIGHTS, str(folder / "run"), "2")[0]
    assert second != first


def test_a_picture_that_cannot_be_read_is_refused_with_the_reason(run, tmp_path):
    pytest.importorskip("gradio", reason="gradio, of the extra `demo`, is not installed")
    whole = (run[0] / "digit.png").read_bytes()
    paths = []
    for index, content in enumerate((b"", b"text", whole[: len(whole) // 2], whole)):
        paths.append(tmp_path / f"{index}.png")
        paths[-1].write_bytes(content)
    result = subprocess.run(
        [sys.executable, "-c", OPENED, run[0] / "run", *paths],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    empty, text, half, good = result.stdout.splitlines()
    assert empty == text == "The picture cannot be read: not an image that Pillow reads."
    assert re.fullmatch("The picture cannot be read: .*truncated.*", half)
    assert good == "read"


def test_without_a_picture_there_is_no_answer():
    assert demo.answer(None, "caformer_s18", "", demo.LAST_STAGE) == ({}, None)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_port_in_use_says_so(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert demo.main(["--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"`--port` must be free on 127.0.0.1, got {port}" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--port", "0"], "must be in [1, 65535]"), (["--model", "caformer_s81"], "caformer_s18")],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    if "--model" in arguments:
        pytest.importorskip("gradio", reason="gradio, of the extra `demo`, is not installed")
    assert (
        demo.main([*arguments, *([] if "--port" in arguments else ["--port", str(free_port())])])
        == 2
    )
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo.main(["--port", str(free_port())]) == 2
    assert 'pip install "metaformer-jax[demo]"' in capsys.readouterr().err


@pytest.fixture
def browser(tmp_path):
    selenium = pytest.importorskip("selenium", reason="selenium is not installed")
    del selenium
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("chromium and chromedriver, Debian's chromium-driver, are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


@contextlib.contextmanager
def served(weights, temporary):
    """The address of a page, which is told to end afterwards."""
    pytest.importorskip("gradio", reason="gradio, of the extra `demo`, is not installed")
    address = f"http://127.0.0.1:{(port := free_port())}"
    with subprocess.Popen(
        [sys.executable, "-c", WATCHED, "--weights", str(weights), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT | {"TMPDIR": str(temporary)},
        text=True,
    ) as program:
        said = program.stdout.readline()
        assert address in said, program.stderr.read()
        yield address
        program.terminate()
        assert "beyond:" not in program.stderr.read()


@pytest.fixture
def page(run, tmp_path):
    with served(run[0] / "run", tmp_path) as address:
        yield address


def test_nothing_stays_of_a_page_that_is_told_to_end(run, tmp_path):
    with served(run[0] / "run", tmp_path):
        assert len(list(tmp_path.glob("metaformer-jax-demo-*"))) == 1
    assert not list(tmp_path.glob("metaformer-jax-demo-*"))


def test_a_browser_shows_bars_and_heat_for_a_dropped_picture_and_compares(run, page, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    folder, _, _ = run
    wait = functools.partial(WebDriverWait(browser, 120).until)
    browser.get(page)
    upload = wait(lambda b: b.find_element(By.CSS_SELECTOR, "input[type=file]"))
    upload.send_keys(str(folder / "digit.png"))
    label = wait(lambda b: b.find_element(By.CSS_SELECTOR, "#first-label"))
    wait(lambda b: "%" in label.text)
    image = Image.open(folder / "digit.png")
    guesses, _ = demo.answer(image, demo.BY_WEIGHTS, str(folder / "run"), demo.LAST_STAGE)
    assert label.text.split()[-10::2] == list(guesses)
    heat = wait(lambda b: b.find_element(By.CSS_SELECTOR, "#first-heat img"))
    wait(lambda b: int(heat.get_property("naturalWidth")) > 300)
    assert not browser.find_elements(By.CSS_SELECTOR, "#second-label")
    browser.find_element(By.CSS_SELECTOR, "#compares input").click()
    second = wait(lambda b: b.find_element(By.CSS_SELECTOR, "#second-label"))
    wait(lambda b: "%" in second.text)
    assert second.text == label.text
    if folder_for_screenshot := os.environ.get("SCREENSHOTS"):
        browser.save_screenshot(str(pathlib.Path(folder_for_screenshot) / "demo.png"))
    weights = browser.find_element(
        By.CSS_SELECTOR, "#second-weights textarea, #second-weights input"
    )
    weights.send_keys("-gone")
    browser.find_element(By.CSS_SELECTOR, "#classify").click()
    toast = wait(lambda b: b.find_element(By.CSS_SELECTOR, ".toast-body"))
    assert "must be an existing checkpoint" in toast.text
    hosts = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => new URL(e.name).host)"
    )
    assert set(hosts) == {page.removeprefix("http://")}
