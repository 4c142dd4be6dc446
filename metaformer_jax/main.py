"""Trains or evaluates what a config describes, or compiles it for devices that are not present.

    python -m metaformer_jax.main --config=configs/digits.py --workdir=runs/digits

Any field of the config can be overridden: --config.epochs=10 --config.optimizer.learning_rate=1e-3
"""

import contextlib
import gc
import itertools
import pathlib
import signal
import sys
import traceback
from typing import NoReturn

from metaformer_jax.exit_codes import (
    INTERRUPTED,
    PREEMPTED,
    TRAINING_FAILED,
    USAGE_ERROR,
    end_at_once,
    end_at_once_when_told,
)

if __name__ == "__main__":
    # Before and after the training there is nothing to save; during it `Preemption` takes over.
    # The imports below take seconds, and some do not survive the exception of a Ctrl-C.
    end_at_once_when_told()

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for checkpoints, metrics and pictures; a run in it is continued. Without it, "
    "--mode=eval evaluates config.model.pretrained.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "preview", "compile"],
    "Train; evaluate; draw the first training batch, mixed and erased, into --output; or compile "
    "the training step, without devices or data, and report what it takes.",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "The picture of --mode=preview (batch.png), or the JSON of --mode=compile."
)
_TOPOLOGY = flags.DEFINE_list(
    "topology",
    None,
    "With --mode=compile: a TPU slice, such as v5e:4x4, or GPUs, such as h100:8, or several of "
    "them for a table of how the step scales. By default the devices of this machine.",
)
_BATCH_PER_DEVICE = flags.DEFINE_integer(
    "batch_per_device", None, "With --mode=compile: replaces config.batch_size.", lower_bound=1
)
_LARGEST_BATCH = flags.DEFINE_bool(
    "largest_batch", True, "With --mode=compile: find it, by a few more compilations."
)
_COMPILATION_CACHE = flags.DEFINE_bool(
    "compilation_cache",
    True,
    "Keep compiled programs in $JAX_COMPILATION_CACHE_DIR, or in compiled/ of the folder that "
    "weights are cached in; runs of several processes, or with no write access there, use "
    "compiled/ of their workdir.",
)
_KERNELS = flags.DEFINE_bool(
    "kernels",
    True,
    "Use the custom kernels for GPUs and TPUs; --nokernels uses XLA's own operations in their "
    "place.",
)
_ACCEPT_CONFIG_CHANGES = flags.DEFINE_bool(
    "accept_config_changes",
    False,
    "Continue a run even if it was made with another config, other class names or other numbers of "
    "examples.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    None,
    "Run as one of several processes, as the environment describes them (TPU pod, SLURM, Open MPI, "
    "Kubernetes). By default this depends on the environment and on --coordinator_address.",
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "host:port of the first process, if the environment does not tell."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator_address.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "From 0, with --coordinator_address.")
flags.mark_flag_as_required("config")

# Modes in which a flag has an effect, where not in all. A workdir may stay where one looks at what
# its run would train.
_MODES_OF_FLAGS = {
    "output": ("preview", "compile"),
    "topology": ("compile",),
    "batch_per_device": ("compile",),
    "largest_batch": ("compile",),
    "accept_config_changes": ("train",),
    "distributed": ("train", "eval", "preview"),
    "coordinator_address": ("train", "eval", "preview"),
    "num_processes": ("train", "eval", "preview"),
    "process_id": ("train", "eval", "preview"),
}


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        arguments = flags.FLAGS(argv)
        # A config file that failed to load raises its error only when a field is read.
        _CONFIG.value.to_dict()
        return arguments
    except Exception as error:
        _exit_with(_explain(error, argv), USAGE_ERROR)


def _explain(error: Exception, argv: list[str]) -> Exception:
    # Libraries report a missing file or field in their own terms; these are the user's.
    from metaformer_jax.training import settings

    path = ""
    for flag, following in itertools.pairwise([*argv, ""]):
        name, equals, value = flag.lstrip("-").partition("=")
        if name == "config":
            path = (value if equals else following).partition(":")[0]
            if not pathlib.Path(path).is_file():
                return ValueError(
                    f"`--config` must be a Python file that defines get_config(), got {path!r}, "
                    "which is not there. configs/ holds the published ones."
                )
        elif name.startswith("config."):
            try:
                settings.check_known(name.removeprefix("config."))
            except ValueError as unknown_field:
                return unknown_field
    if not path:
        return ValueError(
            "`--config` must be given: a Python file that defines get_config(). configs/ holds the "
            "published ones."
        )
    if isinstance(error, flags.Error):
        if "Traceback" not in str(error):
            return error
        if "get_config() takes 0 positional arguments" in str(error):
            return ValueError(
                f"`--config` must be {path!r} alone, without a colon: its get_config() takes "
                "nothing."
            )
        # The error inside get_config is the last line, after its traceback.
        return ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: "))
    return ValueError(
        f"`--config` must be a Python file that defines get_config(), got {path!r}, which failed "
        f"to load. {type(error).__name__}: {error}"
    )


def main(argv: list[str]) -> None:
    """Runs the mode that the flags ask for."""
    if argv[1:]:
        _exit_with(f"Arguments must be --flags, got {' '.join(argv[1:])}.", USAGE_ERROR)
    for name, modes in _MODES_OF_FLAGS.items():
        if flags.FLAGS[name].present and _MODE.value not in modes:
            _exit_with(
                f"`--{name}` must be given with --mode={' or '.join(modes)} only, got "
                f"--mode={_MODE.value}, where it has no effect. Leave one of them out.",
                USAGE_ERROR,
            )
    if "://" in (_WORKDIR.value or ""):
        _exit_with(
            f"`--workdir` must be a folder, got {_WORKDIR.value!r}. Mount the bucket, with gcsfuse "
            "or the like, and name a folder in it.",
            USAGE_ERROR,
        )
    # Orbax, JAX and matplotlib log every step; --verbosity=0 shows these logs.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    # Imported here, so that wrong flags are reported at once and not after seconds of imports.
    import jax

    from metaformer_jax.data.loader import DataError
    from metaformer_jax.models import without_kernels
    from metaformer_jax.paths import cache_folder, local_path
    from metaformer_jax.training import distributed
    from metaformer_jax.training.agreement import DisagreementError
    from metaformer_jax.training.checkpoint import SaveError
    from metaformer_jax.training.compilation_cache import keep_compiled_programs
    from metaformer_jax.training.failure import TrainingError
    from metaformer_jax.training.preemption import PreemptedError
    from metaformer_jax.weights import DownloadError

    workdir = local_path(_WORKDIR.value) if _WORKDIR.value else None
    output = local_path(_OUTPUT.value) if _OUTPUT.value else None
    keeps_programs = _COMPILATION_CACHE.value and not _TOPOLOGY.value
    folder = keep_compiled_programs(enabled=keeps_programs)
    has_another = workdir is not None and _MODE.value in ("train", "eval")
    if keeps_programs and folder is None and not has_another:
        print(
            f"warning: compiled programs are not kept: {cache_folder()} cannot be written to. Name "
            "another folder by $METAFORMER_JAX_CACHE.",
            file=sys.stderr,
        )
    try:
        with contextlib.nullcontext() if _KERNELS.value else without_kernels():
            _run(workdir, output)
    except DisagreementError as error:
        # Raised in all processes: JAX's own exit waits until each of them has ended.
        sys.exit(_tell(error, USAGE_ERROR))
    except (ValueError, FileNotFoundError, ImportError, DownloadError) as error:
        code = _tell(error, USAGE_ERROR)
    except (FloatingPointError, DataError, SaveError, distributed.ClusterError) as error:
        code = _tell(error, TRAINING_FAILED)
    except TrainingError as error:
        # Nobody foresaw it, and it may take days to come again.
        traceback.print_exception(error.__cause__)
        code = _tell(error, TRAINING_FAILED)
    except OSError as error:
        # Files that were opened long before do not tell their name.
        file = error.filename or f"a file{f' in {workdir}' if workdir else ''}, or the output"
        code = _tell(f"{file}: {error.strerror or error}", TRAINING_FAILED)
    except jax.errors.JaxRuntimeError as error:
        code = _tell(distributed.explain(error), TRAINING_FAILED)
    except PreemptedError as error:
        if distributed.is_first_process():
            print(error, flush=True)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        continues = " The same command continues from the last checkpoint."
        code = _tell(f"stopped.{continues if _MODE.value == 'train' else ''}", INTERRUPTED)
    except Exception:
        # Nobody foresaw it. Python's own exit would wait for the other processes, and they for
        # this one.
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = TRAINING_FAILED
    else:
        return
    distributed.leave(code)


def _run(workdir: pathlib.Path | None, output: pathlib.Path | None) -> None:
    import jax

    from metaformer_jax.training import compile, distributed, evaluation, preview, train

    # The imported modules stay. Tracing makes objects by the million, and each search for garbage
    # among them would go through the modules as well.
    gc.freeze()
    if _MODE.value == "compile":
        compile.compile_training(
            _CONFIG.value,
            topologies=_TOPOLOGY.value or (),
            batch_per_device=_BATCH_PER_DEVICE.value,
            search_largest=_LARGEST_BATCH.value,
            output=output,
        )
        return
    distributed.initialize(
        _COORDINATOR_ADDRESS.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        distributed=_DISTRIBUTED.value,
    )
    # With several processes JAX handles SIGTERM itself, but only a training of several asks it.
    asks_jax = _MODE.value == "train" and jax.process_count() > 1
    if not asks_jax and signal.getsignal(signal.SIGTERM) is end_at_once:
        signal.signal(signal.SIGTERM, end_at_once)
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if _MODE.value == "eval":
        evaluation.evaluate(_CONFIG.value, workdir)
    elif _MODE.value == "preview":
        preview.preview(_CONFIG.value, output or pathlib.Path("batch.png"))
    elif workdir is None:
        _exit_with("`--workdir` must be given to train.", USAGE_ERROR)
    else:
        train.train(_CONFIG.value, workdir, accept_config_changes=_ACCEPT_CONFIG_CHANGES.value)


def _tell(error: Exception | str, code: int) -> int:
    # The log may be on the disk that is full.
    with contextlib.suppress(OSError):
        print(f"error: {error}", file=sys.stderr)
    return code


def _exit_with(error: Exception | str, code: int) -> NoReturn:
    sys.exit(_tell(error, code))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
