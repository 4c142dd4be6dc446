"""What stands for packages and machines that the tests do not have, so that all of ours runs.

Where a package is installed, it is used and nothing stands for it.
"""

import configparser
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import runpy
import sys
import tarfile
import types

import fake_imagenet
import fsspec
import jax
import numpy as np
import tensorflow_datasets as tfds
import torch
import yaml
from flax import nnx
from fsspec.implementations.dirfs import DirFileSystem
from jax.experimental import topologies
from PIL import Image

from metaformer_jax import create_model
from metaformer_jax.data import prepare_imagenet
from metaformer_jax.data.sources import Digits
from metaformer_jax.models import MetaFormerSpec, variants

# Where `gs://my-bucket` lies.
BUCKETS = "STAND_IN_BUCKETS"


def install():
    _make_published_models_small()
    tfds.core.DatasetBuilder.download_and_prepare = _download_and_prepare
    prepare_imagenet._check_importable = _check_declared
    for package, modules in _PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            for name, contents in {package: {}, **modules}.items():
                _add(name, contents)
            if package in ("libtpu", "jax_cuda13_plugin"):
                topologies.get_topology_desc = _topology


def _add(name, contents):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    vars(module).update(contents)
    sys.modules[name] = module


class _SmallFamily(variants.Family):
    def spec(self, *, depths, dims):
        spec = {"norm": self.norm, "head": self.head, "res_scale_init": (None, 1.0)}
        return MetaFormerSpec(depths=depths, dims=dims, token_mixers=self.token_mixers, **spec)


def _make_published_models_small():
    """The second and the third stage of each, with one block and an eighth of its channels."""
    for name, family in variants.FAMILIES.items():
        sizes = {}
        for size_name, size in family.sizes.items():
            # A head of attention has 32 channels.
            dims = (size.dims[1] // 8, -(-size.dims[2] // 256) * 32)
            sizes[size_name] = variants.Size((1, 1), dims)
        variants.FAMILIES[name] = _SmallFamily(
            token_mixers=family.token_mixers[1:3], norm=family.norm, head=family.head, sizes=sizes
        )


def _check_declared(*modules):
    """What would be importable where the extra `prepare` is installed."""
    setup = configparser.ConfigParser()
    setup.read("setup.cfg")
    declared = setup["options.extras_require"]["prepare"]
    assert all(re.search(rf"^{module}\b", declared, re.MULTILINE) for module in modules)


def _download_and_prepare(builder, *, download_config=None):
    """In place of TFDS's own, which needs TensorFlow: writes a few examples where it would."""
    file_format = builder.info.file_format.value
    data_dir = builder.data_path.parents[1]
    if builder.name == "imagenet2012":
        for archive in prepare_imagenet.ARCHIVES:
            with tarfile.open(pathlib.Path(download_config.manual_dir, archive.name)) as tar:
                assert tar.getnames()
        fake_imagenet.write_dataset(data_dir, file_format, version=str(builder.version))
        return
    digits = Digits("test")
    records = [fake_imagenet.example(digits[index]["image"], index % 10) for index in range(10)]
    fake_imagenet.write_dataset(
        data_dir,
        file_format,
        name=builder.name,
        version=str(builder.version),
        features=dict(builder.info.features),
        records=dict.fromkeys(("train", "test"), records),
    )


class _Bucket(DirFileSystem):
    """A folder as Google's store: what fsspec takes for `gs://`."""

    protocol = ("gs", "gcs")

    def __init__(self, **options):
        super().__init__(os.environ[BUCKETS], fsspec.filesystem("file"), **options)

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("gs://")


def _topology(*, platform, topology_name, **options):
    """This machine in place of devices that only their compilers know."""
    assert platform in ("tpu", "cuda")
    return types.SimpleNamespace(devices=jax.devices())


def _to_onnx(function, shapes, *, input_names, output_names):
    """Traces what would be converted."""
    ((batch, *shape),) = shapes
    assert (batch, len(input_names), len(output_names)) == ("batch", 1, 1)
    traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((1, *shape), jax.numpy.float32))
    return types.SimpleNamespace(SerializeToString=lambda: str(traced).encode())


class _Component:
    """A part of a page, and of what it is made of."""

    def __init__(self, *values, value=None, **options):
        self.value = values[0] if values and value is None else value
        self.click = (self, "click")

    def change(self, function, inputs, outputs):
        assert callable(function)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class _Page(_Component):
    handlers: list = []  # noqa: RUF012

    def queue(self, *, api_open):
        return self

    def launch(self, *, server_name, server_port, share, **options):
        assert server_name == "127.0.0.1"
        assert not share

    def block_thread(self):
        """A reader drops a picture, sees what it shows, and goes."""
        for triggers, function, inputs, outputs in self.handlers:
            assert any(trigger[1:] == ("click",) for trigger in triggers if type(trigger) is tuple)
            values = [component.value for component in inputs]
            place = [type(component) is _Picture for component in inputs].index(True)
            with inputs[place].preprocess("photo.jpg") as picture:
                values[place] = picture
                answers = function(*values)
            assert len(answers) == len(outputs)
            print("likeliest:", *answers[0])
        raise KeyboardInterrupt


class _Picture(_Component):
    @staticmethod
    def preprocess(file):
        return Image.open(file)


def _error(message, **options):
    return RuntimeError(message)


def build_site():
    """Builds no pages, but calls our hooks as mkdocs does and follows every link."""
    config = yaml.safe_load(pathlib.Path("mkdocs.yml").read_text())
    (hook,) = (runpy.run_path(path) for path in config["hooks"])
    docs = pathlib.Path(config["docs_dir"])
    files = hook["on_files"](
        _SiteFiles(_SiteFile(path.name, path) for path in sorted(docs.iterdir())), config=config
    )
    names = {file.src_uri for file in files}
    for file in files.documentation_pages():
        page = types.SimpleNamespace(file=file)
        text = hook["on_page_markdown"](file.content_string, page=page, config=config, files=files)
        for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
            assert link in names, f"{file.src_uri} leads to {link}, which is not on the site"
        site = pathlib.Path(config["site_dir"], file.src_uri).with_suffix(".html")
        site.parent.mkdir(exist_ok=True)
        site.write_text(text)
    return 0


class _SiteFile:
    def __init__(self, src_uri, path):
        self.src_uri = src_uri
        self.path = pathlib.Path(path)

    @classmethod
    def generated(cls, config, src_uri, *, abs_src_path):
        return cls(src_uri, abs_src_path)

    @property
    def content_string(self):
        return self.path.read_text()


class _SiteFiles(list):
    def documentation_pages(self):
        return [file for file in self if file.src_uri.endswith(".md")]


class _TimmModel(torch.nn.Module):
    """Gives this project's own answers: a comparison is made, and finds no difference."""

    def load_state_dict(self, state_dict):
        assert all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values())

    def forward(self, images):
        model = create_model("caformer_s18", pretrained="caformer_s18.pth", rngs=nnx.Rngs(0))
        model.eval()
        return torch.from_numpy(np.array(model(images.numpy().transpose(0, 2, 3, 1))))


# What stands for a package, by its modules.
_PACKAGES = {
    "gcsfs": {"gcsfs": {"GCSFileSystem": _Bucket}},
    "gradio": {
        "gradio": {
            **dict.fromkeys(
                ("Button", "Checkbox", "Column", "Dropdown", "Label", "Markdown", "Radio", "Row"),
                _Component,
            ),
            "Blocks": _Page,
            "Textbox": _Component,
            "Image": _Picture,
            "Error": _error,
            "on": lambda *handler: _Page.handlers.append(handler),
            "themes": types.SimpleNamespace(Default=dict),
        },
    },
    "jax2onnx": {
        "jax2onnx": {"to_onnx": _to_onnx},
        "onnx": {"checker": types.SimpleNamespace(check_model=lambda file, full_check: None)},
    },
    "jax_cuda13_plugin": {},
    "libtpu": {},
    "mkdocs": {"mkdocs.structure.files": {"File": _SiteFile}},
    "starlette": {
        "starlette.middleware": {"Middleware": lambda *of, **options: None},
        "starlette.middleware.base": {"BaseHTTPMiddleware": object},
    },
    "timm": {
        "timm": {"create_model": lambda name, **options: _TimmModel()},
        "timm.models.metaformer": {"checkpoint_filter_fn": lambda state, model: state},
    },
}
