"""Damaged weights are refused, wherever the file has a checksum of what was damaged.

It has in converted folders, in the checkpoints of a run, in the portable files and in what
torch.save writes. The data of a safetensors file of another origin have none: a flipped bit there
gives the value that stands in the file, under the same name and in the same shape. Nor has its
header, or a file of torch before 1.6: what they give still has to fit a model's every tensor.
"""

import json
import os
import subprocess
import sys

from damaged_weights import FILES, FOLDERS
from mutations import FACTOR


def test_damaged_weights_are_refused_or_give_the_same(tmp_path):
    kinds = [*FILES, *FOLDERS]
    for seed in range(FACTOR):
        program = os.path.join(os.path.dirname(__file__), "damaged_weights.py")
        ended = subprocess.run(
            [sys.executable, program, str(tmp_path), str(seed), "300", *kinds],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "FUZZ_FACTOR": "1"},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        counts = json.loads(ended.stdout.splitlines()[-1])
        assert counts.keys() == set(kinds)
        assert all(endings.get("refused", 0) > 50 for endings in counts.values()), counts
        # What has no checksum shows that it is not the reader that refuses everything.
        assert counts["data.safetensors"]["read"] > 50
