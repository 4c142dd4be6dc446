"""A folder in which a page's commands find what it names: data, pictures, weights, a checkout.

Small stand-ins all of them, made once.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import zipfile

import fake_imagenet
import hub_server
import shell_server
import tensorflow_datasets as tfds
from documented import REPOSITORY, blocks
from PIL import Image

from metaformer_jax.data.sources import Digits

CHECKOUT = (
    *("benchmarks", "configs", "docs", "examples", "metaformer_jax", "tests", "tools"),
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"),
    *("constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.cfg"),
)
_MAX_SECONDS = 600
# What begins so lies in the page's own folder.
ROOTS = ("/data/", "/mnt/", "/path/", "/shared/")
PROGRAMS = (
    *("gcloud", "make", "metaformer-jax", "pip", "python", "python3", "python3.11", "srun"),
    "tensorboard",
)
# The compiler takes a fifth of the time for programs that run a little slower.
COMPILER = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
}
# By their places what all pages find there, and some.
GIVEN = {
    "checkout/caformer_s18.pth": "caformer_s18.pth",
    "checkout/digits": "digits",
    "checkout/fourierformer.py": "fourierformer.py",
    "checkout/more": "more",
    "checkout/photo.jpg": "photo.jpg",
    "checkout/photographs": "photographs",
    "checkout/photos": "photos",
    "buckets/my-bucket/tfds": "tfds",
    "data/imagenet": "photographs",
    "data/tfrecord": "tfds",
    "home/Downloads": "tars",
    "path/to/imagenet": "imagenet",
}
GIVEN_TO = {
    "README.md": {"data/tfds": "tfds"},
    "docs/training.md": {"data/tfds": "tfds", "shared/tfds": "tfds"},
    # TFDS's own place.
    "docs/weights.md": {"home/tensorflow_datasets": "tfds"},
}
# What the page prepares lies prepared for the others. These are read in one place, one after the
# other, so that a training that several of them show is gone through once.
APART = ("docs/data.md",)
PUBLISHED = "/timm/caformer_s18.sail_in1k/resolve/main/model.safetensors"
# Random, and saved as they are published.
WEIGHTS = """
import jax, numpy as np
from flax import nnx
import metaformer_jax

model = nnx.eval_shape(lambda: metaformer_jax.create_model("caformer_s18", rngs=nnx.Rngs(0)))
draw = np.random.default_rng(0).standard_normal
random = jax.tree.map(lambda leaf: draw(leaf.shape, np.float32) / 8, nnx.state(model))
nnx.update(model, random)
for file, layout in (("caformer_s18.pth", "sail"), ("model.safetensors", "timm")):
    metaformer_jax.save_weights(model, file, name="caformer_s18", layout=layout)
"""


class Shell:
    """Runs commands on this machine.

    Attributes:
        folder: for everything.
        environment: of all commands.
    """

    def __init__(self, folder, client):
        self.folder = folder
        self.log = folder / "log"
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in PROGRAMS:
            (self.bin / name).symlink_to(client)
        self.environment = os.environ | {
            "PATH": f"{self.bin}:{os.defpath}",
            "STAND_IN_BIN": str(self.bin),
            "STAND_IN_LOG": str(self.log),
            "STAND_IN_WHEELS": str(folder / "wheels"),
            "METAFORMER_JAX_CACHE": str(folder / "cache"),
        }
        # Make hands on what is set on its own command line.
        make = ("MAKEFLAGS", "ARGS", "PYTHON", "WORKDIR")
        for name in ("PYTHONPATH", "TFDS_DATA_DIR", "HF_HUB_OFFLINE", *make):
            self.environment.pop(name, None)
        (folder / "given").mkdir()
        (folder / "wheels").mkdir()
        self._give()

    def _give(self):
        """Makes what pages take for granted."""
        given = self.folder / "given"
        code, output, _ = self.run(f"python -c {shlex.quote(WEIGHTS)}")
        assert code == 0, output
        for index, (name, image, _) in enumerate(fake_imagenet.photographs("val")):
            path = given / ("photos", "photos/inside", "more/deeper")[index % 3] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".png" if index % 3 == 2 else ".jpg").write_bytes(image)
        Image.effect_noise((80, 60), 64).convert("RGB").save(given / "photo.jpg")
        (given / "digits").mkdir()
        for index in range(2):
            (given / "digits" / f"{index}.png").write_bytes(Digits("test")[index]["image"])
        fake_imagenet.write_folder(given / "photographs")
        for number in range(1000):
            path = given / "imagenet" / "val" / f"n{number:08}" / "image.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(fake_imagenet.photographs("val")[0][1])
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        # TFRecord, to be rewritten, and for a bucket: the other format's reader asks Google's
        # servers by itself.
        fake_imagenet.write_dataset(given / "tfds", "tfrecord", features=features)
        fake_imagenet.write_tars(given / "tars")
        own = [text for _, language, text in blocks() if language == "python"]
        parts = [text for text in own if "class Fourier" in text or "def get_config" in text]
        (given / "fourierformer.py").write_text("\n\n".join(parts))
        with zipfile.ZipFile(self.folder / "wheels" / "gcsfs-1-py3-none-any.whl", "w") as wheel:
            for name, text in {
                "METADATA": "Metadata-Version: 2.1\nName: gcsfs\nVersion: 1\n",
                "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\nRoot-Is-Purelib: true\n",
                "RECORD": "",
            }.items():
                wheel.writestr(f"gcsfs-1.dist-info/{name}", text)

    def place(self, page):
        """Where the page is read: a checkout in which commands run, and what is given."""
        place = self.folder / ("data" if page in APART else "place")
        checkout = place / "checkout"
        # What runs left stays; a page's other files are not in the way of the next.
        for path in checkout.iterdir() if checkout.exists() else ():
            if path.name != "runs":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in CHECKOUT:
            _copy(REPOSITORY / name, checkout / name)
        for name, given in GIVEN.items():
            if not (place / name).exists():
                _copy(self.folder / "given" / given, place / name)
        for name, given in GIVEN_TO.get(page, {}).items():
            if not (place / name).exists():
                _copy(self.folder / "given" / given, place / name)
        return place

    def run(self, text, *, place=None):
        """Runs a text in a shell; gives its exit code and output, and the log of its programs."""
        self.log.unlink(missing_ok=True)
        for root in ROOTS if place else ():
            text = re.sub(rf"(?<![\w.~]){root}", f"{place}{root}", text)
        home = place / "home" if place else self.folder
        # To a file: a pipe would wait for whoever holds it.
        with open(self.folder / "output", "w+") as output:
            result = subprocess.run(
                ["bash", "-e", "-o", "pipefail", "-c", text],
                cwd=place / "checkout" if place else self.folder / "given",
                env=self.environment | {"HOME": str(home), "STAND_IN_BUCKETS": f"{place}/buckets"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=_MAX_SECONDS,
            )
            output.seek(0)
            said = output.read()
        log = self.log.read_text().splitlines() if self.log.exists() else []
        return result.returncode, said, [json.loads(line) for line in log]


def _copy(origin, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if origin.is_dir():
        shutil.copytree(origin, path, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(origin, path)


@contextlib.contextmanager
def opened(folder):
    """The shell, with the server that it needs, and the weights on a hub of this machine."""
    with hub_server.serve() as hub:
        environment = {"HF_HOME": str(folder / "hub"), "HF_ENDPOINT": hub.url, **COMPILER}
        with shell_server.running(folder, **environment) as client:
            shell = Shell(folder, client)
            shell.environment |= environment
            hub.files[PUBLISHED] = (folder / "given" / "model.safetensors").read_bytes()
            yield shell
