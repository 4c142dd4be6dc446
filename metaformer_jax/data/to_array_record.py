"""From a TFDS data set in TFRecord files to one in ArrayRecord files, without TensorFlow."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from array_record.python import array_record_module
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from metaformer_jax.data import storage, tfds_metadata
from metaformer_jax.data.records import Shard, check_count, check_present
from metaformer_jax.data.tfrecord import read_records
from metaformer_jax.messages import first_line
from metaformer_jax.paths import local_path, when_whole

_INFO = "dataset_info.json"
# One record to a chunk, as random access wants it. Encoded images do not get any smaller.
_WRITER_OPTIONS = "group_size:1,uncompressed"


def convert_dataset(
    source: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    *,
    force: bool = False,
    num_threads: int | None = None,
    console: Console | None = None,
) -> pathlib.Path:
    """Writes the same records, in the same order and shards, as ArrayRecord files.

    Args:
        source: the folder of a prepared version, with `dataset_info.json` and TFRecord files.
        data_dir: where TFDS is to find the result, which goes to `<name>/<version>` in it (or to
            `<name>/<config>/<version>`). It is there whole or not at all.
        force: whether to replace an earlier result.
        num_threads: files converted at a time, by default one for each processor.
        console: where the progress is shown, if it is a terminal.

    Returns:
        The folder that was written.

    Raises:
        ValueError: the source is no TFRecord data set, or its files are not whole.
        FileExistsError: the result is there already, or something else is.
    """
    source = local_path(source).absolute()
    info = tfds_metadata.load_info(str(source))
    shards = _tfrecord_shards(info, source)
    num_bytes = sum(state.size for state in check_present([shard.path for shard in shards]))
    inner = (info.name, info.config_name or "", str(info.version))
    target = local_path(data_dir).absolute().joinpath(*inner)
    _check_target(target, source, force=force)
    for left in sorted(target.parent.glob(f".{target.name}.partial-*")):
        note = (
            f"note: {left} is of a conversion that was killed, or is still running. Nothing reads "
            "it: remove it once none is."
        )
        (console or Console(stderr=True)).print(note, soft_wrap=True, markup=False, highlight=False)
    # TFDS sees no version in the name of the partial folder.
    with (
        when_whole(target, is_folder=True) as partial,
        _progress(console, num_bytes) as advance,
    ):
        storage.in_threads(
            functools.partial(_convert_file, folder=partial, advance=advance),
            shards,
            num_threads=num_threads or os.cpu_count() or 1,
        )
        _write_metadata(source, partial)
    return target


def _tfrecord_shards(info: Any, source: pathlib.Path) -> list[Shard]:
    stored = tfds_metadata.stored_format(info)
    if stored != "tfrecord":
        raise ValueError(f"`source` must hold TFRecord files, got {source} with {stored} already.")
    shards = [
        shard
        for split in info.splits
        if info.splits[split].num_examples
        for shard in tfds_metadata.split_shards(info, str(source), split)
    ]
    # What stands in place of the format in a name says where the format of the result goes.
    for shard in shards:
        if ".tfrecord-" not in os.path.basename(shard.path):
            raise ValueError(
                "The files of `source` must be named as TFDS does by default, "
                f"'<name>-<split>.tfrecord-<shard>-of-<shards>', got {shard.path}."
            )
    return shards


def _convert_file(shard: Shard, folder: pathlib.Path, advance: Callable[[int], None]) -> None:
    name = os.path.basename(shard.path).replace(".tfrecord-", ".array_record-")
    path = os.path.join(folder, name)
    try:
        writer = array_record_module.ArrayRecordWriter(path, _WRITER_OPTIONS)
        try:
            for record in read_records(shard.path, num_records=shard.num_records):
                writer.write(record)
                advance(len(record))
        finally:
            writer.close()
    except RuntimeError as error:
        raise OSError(
            f"{path} could not be written: {first_line(error)}. Nothing was kept."
        ) from error
    # A disk that fills up while the file is closed shows here.
    check_count(Shard(path, shard.num_records, 0, shard.num_records))


def _write_metadata(source: pathlib.Path, folder: pathlib.Path) -> None:
    for path in source.iterdir():
        if path.suffix in (".json", ".txt") or path.name == "LICENSE":
            shutil.copyfile(path, folder / path.name)
    info = json.loads((source / _INFO).read_text())
    info["fileFormat"] = "array_record"
    info.pop("alternativeFileFormats", None)
    (folder / _INFO).write_text(json.dumps(info, indent=2, sort_keys=True) + "\n")


def _check_target(target: pathlib.Path, source: pathlib.Path, *, force: bool) -> None:
    if target.resolve() == source.resolve():
        raise ValueError(
            f"`data_dir` must not be where the source lies, got {target} for both. Choose another."
        )
    if not os.path.lexists(target):
        return
    if not (target / _INFO).is_file():
        raise FileExistsError(
            f"`data_dir` must have room for {target}, got something else there. Choose another "
            "place."
        )
    if not force:
        raise FileExistsError(
            f"`data_dir` must not hold the result yet, got {target}. Choose another place, or "
            "replace it with force=True (--force)."
        )


@contextlib.contextmanager
def _progress(console: Console | None, num_bytes: int) -> Iterator[Callable[[int], None]]:
    console = console or Console(stderr=True)
    columns = (
        TextColumn("converting"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=num_bytes)
        yield functools.partial(bar.advance, task)
