import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_the_benchmark_of_models_runs(tmp_path):
    """At a size that says nothing of speed, and without the side that needs timm."""
    output = tmp_path / "models.json"
    command = [
        *(sys.executable, "benchmarks/models.py", "--sides", "ours", "--json", str(output)),
        *("--models", "identityformer_s12", "--batch-sizes", "1", "--image-size", "32"),
        *("--rounds", "2", "--seconds", "0"),
    ]
    process = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [row["task"] for row in rows] == ["inference", "training"]
    for row in rows:
        assert len(row["images_per_second"]["ours"]) == 2
        assert row["medians"]["ours"] > 0
