"""What the README shows, runs."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_code_to_run():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("block", BLOCKS)
def test_a_code_block_runs(block):
    names = {}
    exec(block, names)
    if "logits" in names:
        assert names["logits"].shape == (1, 1000)
        assert len(names["stages"]) == 4
    else:
        assert names["model"](names["jnp"].zeros((2, 32, 32, 3))).shape == (2, 10)
