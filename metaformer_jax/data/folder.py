"""Images in class folders: `root/train/<class>/*`, `root/val/<class>/*`."""

import concurrent.futures
import functools
import os
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

from metaformer_jax.data.sources import Record, checked_index
from metaformer_jax.data.transforms import readable_formats
from metaformer_jax.messages import listing
from metaformer_jax.paths import local_path

# Directories read at a time. Each waits for the file system most of the time.
_SCAN_THREADS = 16


class ImageFolder:
    """Every image below the class folders of a split, class by class.

    Classes are the folder names of `root/train`, sorted, or those of `root/val` where only that is
    there and asked for. Within a class the order is that of
    torchvision's ImageFolder: folders by path, then files by name. Hidden files and folders are
    left out. It does not depend on the file system, so that every host sees the same order.

    Args:
        root: the folder that holds `train` and `val`. A `test` folder serves as `val` where there
            is no `val`.
        split: "train", "val", or "test", which is `val` where there is no `test`.

    Raises:
        ValueError: `root` is not laid out like that; a class folder is missing, additional or
            empty; the split is empty.
    """

    channels = 3

    def __init__(self, root: str | os.PathLike[str], split: str):
        if split not in ("train", "val", "test"):
            raise ValueError(f"`split` must be 'train', 'val' or 'test', got {split!r}.")
        folders = _split_folders(local_path(root), split)
        self._folder = os.fspath(folders["train" if split == "train" else "val"])
        self.class_names = tuple(_class_folders(folders.get("train", folders["val"])))
        if split != "train" and "train" in folders:
            _check_same_classes(self.class_names, folders)
        files = _scan(self._folder, self.class_names)
        empty = [name for name, found in zip(self.class_names, files, strict=True) if not found]
        if empty:
            raise ValueError(
                f"Each class of {self._folder} must have an image that Pillow reads, got none in "
                f"{listing(empty)}. Remove the folder from every split, or fill it."
            )
        # One block of bytes and two arrays: the 1.28 million names of ImageNet take 30 MB in each
        # worker process, against 200 as a list.
        self._first_of_class = np.cumsum([0, *map(len, files)])
        names = [name for found in files for name in found]
        self._name_ends = np.cumsum(np.fromiter(map(len, names), np.int64, len(names)))
        self._names = b"".join(names)

    def __len__(self) -> int:
        return len(self._name_ends)

    def __getitem__(self, index: int) -> Record:
        path, label = self._locate(index)
        with open(path, "rb", buffering=0) as file:
            return {"image": file.readall(), "label": label}

    def describe(self, index: int) -> str:
        """The path of an image."""
        return self._locate(index)[0]

    def _locate(self, index: int) -> tuple[str, int]:
        index = checked_index(index, len(self))
        start = int(self._name_ends[index - 1]) if index else 0
        name = os.fsdecode(self._names[start : int(self._name_ends[index])])
        label = int(np.searchsorted(self._first_of_class, index, side="right")) - 1
        return os.path.join(self._folder, self.class_names[label], name), label


def _split_folders(root: pathlib.Path, split: str) -> dict[str, pathlib.Path]:
    if not root.is_dir():
        raise ValueError(
            f"`root` must be a folder that holds 'train' and 'val', got {str(root)!r}, which is "
            f"{'no folder' if root.exists() else 'not there'}."
        )
    first, second = ("test", "val") if split == "test" else ("val", "test")
    held_out = second if (root / second).is_dir() and not (root / first).is_dir() else first
    folders = {"train": root / "train", "val": root / held_out}
    # To evaluate takes no training images.
    needed = ["train", "val"] if split == "train" else ["val"]
    if missing := [name for name in needed if not folders[name].is_dir()]:
        raise ValueError(
            f"`root` must hold {' and '.join(map(repr, needed))} (or 'test'), a folder with one "
            f"folder for each class, got {str(root)!r} without {' and '.join(map(repr, missing))}. "
            f"It holds {listing(sorted(os.listdir(root)))}."
        )
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def _class_folders(folder: pathlib.Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
    if not names:
        raise ValueError(
            f"{folder} must hold one folder for each class, got none. It holds "
            f"{listing(sorted(os.listdir(folder)))}. Put each image into a folder with the name "
            "of its class."
        )
    return names


def _check_same_classes(class_names: tuple[str, ...], folders: dict[str, pathlib.Path]) -> None:
    train, held_out = set(class_names), set(_class_folders(folders["val"]))
    if train == held_out:
        return
    differences = [
        f"{what} {listing(sorted(names))}"
        for what, names in (("without", train - held_out), ("with also", held_out - train))
        if names
    ]
    raise ValueError(
        f"{folders['val']} must hold the {len(train)} class folders of {folders['train']}, got "
        f"{len(held_out)}, {' and '.join(differences)}."
    )


def _scan(folder: str, class_names: tuple[str, ...]) -> list[list[bytes]]:
    """The image files of every class, relative to its folder, in order."""
    ignored: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(_SCAN_THREADS) as pool:
        scan = functools.partial(_scan_class, ignored=ignored)
        files = list(pool.map(scan, [os.path.join(folder, name) for name in class_names]))
    if ignored:
        warnings.warn(
            f"{len(ignored)} files below {folder} are left out, as Pillow reads nothing with "
            "their extension, or they are pipes, sockets or devices: "
            f"{listing(sorted(ignored))}.",
            stacklevel=4,
        )
    return files


def _scan_class(folder: str, ignored: list[str]) -> list[bytes]:
    readable = readable_extensions()
    found = []
    # Sorted as whole paths, "a-b" stands before "a/b".
    for inner, names in sorted(_walk(folder, ignored)):
        prefix = os.path.relpath(inner, folder) + os.sep if inner != folder else ""
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in readable:
                found.append(os.fsencode(prefix + name))
            else:
                ignored.append(os.path.join(inner, name))
    return found


def _walk(folder: str, ignored: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each folder from this one on, with the names of its files; no file is looked at."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                # A pipe would be waited for for ever. A link that leads nowhere is a bad image.
                if entry.is_file() or not os.path.exists(entry.path):
                    names.append(entry.name)
                else:
                    ignored.append(entry.path)
                continue
            if entry.is_symlink() and _contains(entry.path, folder):
                raise ValueError(
                    f"{entry.path} must not lead to a folder above itself, got a link to "
                    f"{os.path.realpath(entry.path)}. Remove the link."
                )
            yield from _walk(entry.path, ignored)
    yield folder, names


def _contains(outer: str, inner: str) -> bool:
    outer, inner = os.path.realpath(outer), os.path.realpath(inner)
    return os.path.commonpath([outer, inner]) == outer


@functools.cache
def readable_extensions() -> frozenset[str]:
    """The extensions of the files that Pillow reads, lower case, with their dot."""
    return frozenset(
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind in readable_formats()
    )
