"""Every command that README and docs show runs as it stands, on a machine of stand-ins.

`shell_programs.py` says what is added to a command so that it ends soon, and what runs in place of
others' programs; `shell_standins.py` what stands for packages, and for models of published size.
"""

import pathlib
import re
import shutil
import subprocess

import pytest
import shell_place
from documented import REPOSITORY, blocks, commands
from shell_server import RUN_BY_CI

BLOCKS = {}
for _page, _language, _text in blocks():
    if _language == "bash":
        BLOCKS.setdefault(_page, []).append(_text)
# The shell's own; what they do is looked at by itself.
OF_THE_SHELL = ("test", "break", "case", "done")
# A page's commands go on where those of another, of this number, ended.
FOLLOWS = {"docs/training.md": ("docs/tpu.md", 1), "docs/using.md": ("README.md", 1)}
# Some of what is there afterwards.
LEFT = {
    "CONTRIBUTING.md": "site/index.html",
    "README.md": "runs/digits/curves.png runs/b36/metrics.jsonl why.png caformer_s18.onnx back.pth",
    "docs/compile.md": "",
    "docs/data.md": "runs/s18/metrics.jsonl ../data/tfds/mnist/3.0.1/dataset_info.json "
    "../data/array_record/imagenet2012/5.1.0/dataset_info.json batch.png",
    "docs/extending.md": "runs/fourier/metrics.jsonl",
    "docs/models.md": "docs/accuracy.png",
    "docs/tpu.md": "../mnt/shared/b36/metrics.jsonl caformer_b36.pth",
    "docs/training.md": "../shared/b36/metrics.jsonl",
    "docs/using.md": "all.csv why.png caformer_s18.stablehlo digits.onnx",
    "docs/weights.md": "s18.pth model.safetensors runs/tuned/metrics.jsonl",
    "examples/fine_tune.ipynb": "runs/mine/metrics.jsonl",
}
# And of what is said, by regular expressions.
_TRAINED = r"accuracy \S+% \(\d+ of \d+\)  top-5 "
SAID = {
    "CONTRIBUTING.md": ["test_mixers.py: [1-9]"],
    "README.md": [_TRAINED, "likeliest: ", "caformer_s18.onnx: caformer_s18, "],
    "docs/compile.md": ["caformer_b36 on ", "taken as ImageNet-1K"],
    "docs/models.md": ["55 published models", "caformer_b36_in21k"],
    "docs/tpu.md": [_TRAINED, "train/loss"],
    "docs/training.md": [_TRAINED, "2 x cpu in 2 processes"],
    # One class of each picture, for two pictures, as JSON.
    "docs/using.md": [
        r'({"image": "digits/\d.png", "predictions": \[{[^{}]*}\]}\n){2}',
        "likeliest: ",
    ],
    "docs/weights.md": [_TRAINED, "relative error to timm: "],
}


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    with shell_place.opened(tmp_path_factory.mktemp("shell")) as shell:
        yield shell


def run(shell, text, place):
    """Runs a text, holds that each of its commands ran and ended well; gives what they print."""
    code, output, log = shell.run(text, place=place)
    assert code == 0, f"{text}\n{output}"
    failed = [entry for entry in log if entry["code"] != 0]
    assert not failed, f"{text}\n{output}"
    started = [entry["words"][0] for entry in log if entry["depth"] == 0]
    shown = [pathlib.Path(words[0]).name for words in commands(text)]
    assert started == [name for name in shown if name not in OF_THE_SHELL], text
    return output


def test_every_block_says_what_it_is():
    assert {language for _, language, _ in blocks()} == {"bash", "python", "text"}
    # Each page that is to show commands does.
    assert BLOCKS.keys() == LEFT.keys()
    # No command hides in what is not run.
    shown = [text for _, language, text in blocks() if language == "text"]
    assert not [text for text in shown if "python" in text or "metaformer-jax" in text]


@pytest.mark.parametrize("page", BLOCKS)
def test_the_commands_of_a_page_run_from_top_to_bottom(page, shell):
    place = shell.place(page)
    if page in FOLLOWS:
        other, number = FOLLOWS[page]
        run(shell, BLOCKS[other][number], place)
    output = "".join(run(shell, text, place) for text in BLOCKS[page])
    for said in SAID.get(page, []):
        assert re.search(said, output), f"{said} is not in: {output}"
    for left in LEFT[page].split():
        assert (place / "checkout" / left).stat().st_size > 0, left


@pytest.mark.parametrize(
    "text",
    [
        "metaformer-jax predict photo.jpg --modle caformer_s18",
        "metaformer-jax predict foto.jpg --model caformer_s18",
        "metaformer-jax foretell photo.jpg --model caformer_s18",
        "metaformer-jax export --model caformer_s19 --output a.stablehlo",
        "python -m metaformer_jax.main --config=configs/digits.py --config.lerning=3",
        "python -m metaformer_jax.main --config=configs/digits.py --wokdir=runs/a",
        "python -m metaformer_jax.main --config=configs/caformer_s19.py --workdir=runs/a",
        "python -m metaformer_jax.main --config=configs/caformer_s18.py --mode=compile"
        " --topology=v5e:3x3",
        "python -m metaformer_jax.trian --config=configs/digits.py --workdir=runs/a",
        "python -m metaformer_jax.data.prepare imagenet --tars ~/Download --output /data/own",
        "python tools/convert_torch_weights.py caformer_s18.pth --modle caformer_s18 --output a",
        "python tools/convert.py caformer_s18.pth --model caformer_s18 --output a",
        "python -m pytest tests/test_mixer.py",
        'pip install -e ".[accelerator]"',
        "make tset",
        "tensorboard --logdir /mnt/elsewhere",
        "gcloud compute tpus tpu-vm create my-pod --zone=us-west4-a --accelerator=v5litepod-16",
        "srun python -m metaformer_jax.main --config=configs/caformer_b63.py --workdir=runs/a",
        "frobnicate",
        # It ends well by itself.
        "until python -m metaformer_jax.main --config=gone.py\ndo test $? -eq 2 && break\ndone",
    ],
)
def test_a_mistake_in_one_would_show(text, shell):
    with pytest.raises(AssertionError):
        run(shell, text, shell.place("README.md"))


@pytest.mark.parametrize(
    ("codes", "starts"),
    [("75 137 1 0 0", 4), ("75 2 0", 2), ("130 0", 1), ("1 134 1 1 1 75 1 1 1 1 1 1 0", 11)],
)
def test_the_loop_of_starts_ends_when_the_training_or_the_command_does(codes, starts, shell):
    (loop,) = (text for text in BLOCKS["docs/tpu.md"] if text.startswith("until"))
    ends = f"codes=({codes}); starts=0; python() {{ return ${{codes[starts++]}}; }}"
    code, output, _ = shell.run(f"{ends}\n{loop}\necho $starts", place=shell.place("docs/tpu.md"))
    assert (code, output) == (0, f"{starts}\n")


def test_what_is_left_to_ci_is_what_it_runs():
    lines = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    assert all(" ".join(words) in lines for words in RUN_BY_CI)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed: apt install make")
def test_make_train_is_the_command_that_the_readme_says():
    result = subprocess.run(
        ["make", "--dry-run", "train"], cwd=REPOSITORY, capture_output=True, text=True
    )
    shown = [words for text in BLOCKS["README.md"] for words in commands(text)]
    trained = next(words for words in shown if "metaformer_jax.main" in words)
    assert " ".join(trained[1:]) in result.stdout
