"""The programs that the pages name, as this machine runs them: ours as they are, others' for real
where they can be, and otherwise by what they would start here.

The server of `shell_server.py` loads this file, with all that the programs import. The tests'
own process does not run anything of it.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import runpy
import shutil
import socket
import struct
import subprocess
import sys

import shell_standins
from tensorboardX.proto.event_pb2 import Event

from metaformer_jax import __main__ as console
from metaformer_jax import inference, weights  # noqa: F401
from metaformer_jax.data.tfrecord import masked_crc32c
from metaformer_jax.training import compile, distributed, evaluation, train  # noqa: F401

REPOSITORY = pathlib.Path(__file__).parent.parent
# What is added to a command so that it ends soon. All else runs as it is shown.
TRAINING = "metaformer_jax.main"
LESS_OF_IMAGENET = [
    # The stand-in has 24 photographs for training and 9 for evaluation.
    "--config.batch_size=8",
    "--config.mixing.group_size=4",
    "--config.eval_batch_size=8",
    "--config.epochs=1",
    "--config.cooldown_epochs=0",
    "--config.optimizer.warmup_epochs=0",
    # No photograph is larger.
    "--config.data.image_size=64",
    # Each would start a Python of its own.
    "--config.data.num_workers=0",
]
# Drawing how images are mixed and erased is half of what the compiler works at: CAFormer-B36 alone,
# in one process, is trained by the whole recipe.
UNMIXED = [
    "--config.mixing.mixup_alpha=0",
    "--config.mixing.cutmix_alpha=0",
    "--config.erasing_probability=0",
]
LESS_OF_DIGITS = ["--config.epochs=0.2", "--config.optimizer.warmup_epochs=0"]
# As the published models are small here, and a family on the page that has four stages.
SMALL_ON_DIGITS = {
    "digits": ["--config.model.depths=(1,1)", "--config.model.dims=(8,32)"],
    "fourier": ["--config.model.depths=(1,1,1,1)", "--config.model.dims=(8,8,8,32)"],
}
# The archives hold 33 photographs.
LESS_PREPARED = ["--any-size"]
# pip looks and plans, without a network and without a change.
PLANNED = ["--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
# The tests that are named run in the whole anyway: here they have to be found.
COLLECTED = ["--collect-only", "-qq", "-n", "0", "-p", "no:cacheprovider"]
# What it would rewrite is imported here already.
COLLECTED += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]


def less(module, arguments):
    """What is added to one of our programs."""
    if module == TRAINING and "--mode=compile" not in arguments:
        for name, small in SMALL_ON_DIGITS.items():
            if any(word.startswith("--config=") and name in word for word in arguments):
                return LESS_OF_DIGITS + small
        is_mixed = any("b36" in word for word in arguments) and "SLURM_NTASKS" not in os.environ
        return LESS_OF_IMAGENET + ([] if is_mixed else UNMIXED)
    if module == "metaformer_jax.data.prepare" and arguments[:1] == ["imagenet"]:
        return LESS_PREPARED
    if module == "metaformer_jax.validate":
        return ["--workers", "0"]
    if module == "metaformer_jax.demo":
        # 7860 may be taken on the machine of the tests.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return ["--port", str(probe.getsockname()[1])]
    return []


def run(path, arguments):
    """Runs a program; gives its exit code."""
    name = path.name
    if name.startswith("python"):
        return python(arguments)
    return {
        "metaformer-jax": metaformer_jax,
        "make": make,
        "pip": pip,
        "mkdocs": mkdocs,
        "gcloud": gcloud,
        "srun": srun,
        "tensorboard": tensorboard,
    }[name](arguments)


def python(arguments):
    first, *rest = arguments
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
        return 0
    if first != "-m":
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")
        return 0
    module, *rest = rest
    if module == "venv":
        return venv(*rest)
    if module == "pip":
        return pip(rest)
    if module == "pytest":
        os.chdir(REPOSITORY)
        rest += COLLECTED
    sys.argv = [module, *rest, *less(module, rest)]
    # As Python does it: what lies in the folder can be imported.
    sys.path.insert(0, os.getcwd())
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def metaformer_jax(arguments):
    if arguments[0] in console.COMMANDS:
        arguments += less(console.COMMANDS[arguments[0]].module, arguments[1:])
    return console.main(arguments)


def venv(folder):
    """Python's own; what then is to be installed into it is what the tests have."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    client = pathlib.Path(os.environ["STAND_IN_BIN"], "python").resolve()
    for name in ("python", "pip", "mkdocs"):
        link = pathlib.Path(folder, "bin", name)
        link.unlink(missing_ok=True)
        link.symlink_to(client)
    return 0


def pip(arguments):
    """The real one, up to the change; extras that are not declared it would only warn of."""
    report = pathlib.Path(os.environ["STAND_IN_LOG"]).with_name("pip.json")
    find = ["--find-links", os.environ["STAND_IN_WHEELS"], "--report", report]
    command = [sys.executable, "-m", "pip", *arguments, *PLANNED, *find]
    code = subprocess.call(command)
    if code == 0:
        # Reports tell what was asked for from pip 23.1 on; older ones what there is.
        asked = {extra for word in arguments for extra in _extras(word)}
        declared = {
            extra
            for package in json.loads(report.read_text())["install"]
            for extra in package["metadata"].get("provides_extra", ())
        }
        if unknown := asked - declared:
            sys.exit(f"no package that is installed provides {', '.join(unknown)}")
    return code


def _extras(word):
    found = re.search(r"\[(.+)\]$", word)
    return found[1].split(",") if found else []


def make(arguments):
    return subprocess.call([shutil.which("make", path=os.defpath), *arguments])


def mkdocs(arguments):
    """Our hooks, called as mkdocs calls them; the site is made of what they give."""
    # The stand-in has no file.
    if importlib.util.find_spec("mkdocs").origin is not None:
        site = pathlib.Path("site").absolute()
        command = [sys.executable, "-m", "mkdocs", *arguments, "--site-dir", site]
        return subprocess.call(command, cwd=REPOSITORY)
    assert arguments == ["build", "--strict", "--quiet"]
    return shell_standins.build_site()


def gcloud(arguments):
    """Keeps pods of one host as folders, and runs there what it is told to."""
    parser = argparse.ArgumentParser(prog="gcloud", allow_abbrev=False)
    deep = parser
    for name in ("compute", "tpus", "tpu-vm"):
        deep = deep.add_subparsers(required=True).add_parser(name, allow_abbrev=False)
    actions = deep.add_subparsers(dest="action", required=True)
    of = {name: actions.add_parser(name) for name in ("create", "scp", "ssh", "delete")}
    for name, action in of.items():
        action.add_argument("--zone", required=True, choices=["us-west4-a"])
        if name == "scp":
            action.add_argument("--recurse", action="store_true", required=True)
            action.add_argument("source")
        action.add_argument("pod")
        if name == "create":
            action.add_argument("--accelerator-type", required=True, choices=["v5litepod-16"])
            action.add_argument("--version", required=True, choices=["v2-alpha-tpuv5-lite"])
        elif name != "delete":
            action.add_argument("--worker", required=True, choices=["all"])
        if name == "ssh":
            action.add_argument("--command", required=True)
    args = parser.parse_args(arguments)
    pod, _, inside = args.pod.partition(":")
    host = pathlib.Path(os.environ["HOME"], "pods", pod)
    if args.action == "create":
        host.mkdir(parents=True)
    elif args.action == "delete":
        shutil.rmtree(host)
    elif args.action == "scp":
        shutil.copytree(args.source, host / inside)
    else:
        return subprocess.call(["bash", "-c", args.command], cwd=host)
    return 0


def srun(arguments):
    """Two tasks on this machine, with the environment that SLURM gives them."""
    # JAX takes the port by the job's number.
    job = os.getpid()
    while not _is_free(job % 2**12 + 2**16 - 2**12):
        job += 1
    tasks = [
        subprocess.Popen(
            arguments,
            env=os.environ
            | {
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(number),
                "SLURM_LOCALID": str(number),
            },
        )
        for number in range(2)
    ]
    return max(task.wait() for task in tasks)


def _is_free(port):
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def tensorboard(arguments):
    """Reads the events as TensorBoard does, and names the figures."""
    parser = argparse.ArgumentParser(prog="tensorboard", allow_abbrev=False)
    parser.add_argument("--logdir", type=pathlib.Path, required=True)
    folder = parser.parse_args(arguments).logdir
    tags = set()
    for path in folder.rglob("*tfevents*"):
        content = path.read_bytes()
        while content:
            # The length and its checksum; the event and its own.
            end = 12 + struct.unpack_from("<Q", content)[0]
            event, checksum = content[12:end], struct.unpack_from("<I", content, end)[0]
            assert checksum == masked_crc32c(event), path
            tags |= {value.tag for value in Event.FromString(event).summary.value}
            content = content[end + 4 :]
    print(*sorted(tags))
    return 0 if any("loss" in tag for tag in tags) else 1
