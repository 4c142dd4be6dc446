"""The linear probe of docs/using.md, on digits."""

import pathlib
import re

import numpy as np
from threadpoolctl import threadpool_limits

import metaformer_jax
from metaformer_jax.data.augment import EvalTransform
from metaformer_jax.data.sources import Digits
from metaformer_jax.models import FAMILIES, MetaFormer

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "using.md"


def digits(split, count):
    transform = EvalTransform(image_size=32)
    source = Digits(split)
    records = [source[index] for index in range(count)]
    pixels = np.stack([transform(record["image"]) for record in records])
    return pixels.astype(np.float32) / 255, np.array([record["label"] for record in records])


def test_a_frozen_trunk_tells_digits_apart(monkeypatch, capsys):
    def create_model(name, *, num_classes, pretrained, rngs):
        assert (name, num_classes, pretrained) == ("caformer_s18", 0, True)
        spec = FAMILIES["identityformer"].spec(depths=(1, 1, 1, 1), dims=(16, 32, 64, 256))
        return MetaFormer(spec, num_classes=0, image_size=32, rngs=rngs)

    monkeypatch.setattr(metaformer_jax, "create_model", create_model)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    (block,) = (block for block in blocks if "LogisticRegression" in block)
    names = dict(zip(("train_images", "train_labels"), digits("train", 300), strict=True))
    names |= dict(zip(("test_images", "test_labels"), digits("test", 100), strict=True))
    # Its threads wait for each other longer than so small a fit takes.
    with threadpool_limits(1):
        exec(block, names)
    said = float(re.fullmatch(r"(.*)% right\n", capsys.readouterr().out)[1])
    # Random features are enough for most of them; by chance it would be a tenth.
    assert said > 70
    assert names["train"].shape == (300, 256)
