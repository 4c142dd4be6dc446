"""Published weights by name: downloaded, checked, converted, and kept converted."""

import dataclasses
import os
import pathlib
import re
from typing import Any

from metaformer_jax.models import model_info
from metaformer_jax.paths import cache_folder, check_has_place
from metaformer_jax.weights.errors import DownloadError
from metaformer_jax.weights.files import import_torch, sha256
from metaformer_jax.weights.recognition import TIMM_FAMILIES

# What timm calls the published tags.
_TIMM_TAGS = {
    "": "sail_in1k",
    "384": "sail_in1k_384",
    "in21ft1k": "sail_in22k_ft_in1k",
    "384_in21ft1k": "sail_in22k_ft_in1k_384",
    "in21k": "sail_in22k",
}


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file on the Hugging Face hub."""

    repo_id: str
    filename: str

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"https://huggingface.co/{self.repo_id}/resolve/main/{self.filename}"


def timm_source(name: str) -> HubFile | None:
    """The safetensors file of a model, read without torch; None where timm has no such model.

    >>> timm_source("caformer_s18_384").repo_id
    'timm/caformer_s18.sail_in1k_384'
    """
    info = model_info(name)
    if info.family not in TIMM_FAMILIES:
        return None
    return HubFile(f"timm/{info.architecture}.{_TIMM_TAGS[info.tag]}", "model.safetensors")


def sail_source(name: str) -> HubFile:
    """The original file of a model, which every published name has; reading it takes torch.

    >>> sail_source("randformer_s12").filename
    'randformer/randformer_s12.pth'
    """
    return HubFile("sail/dl", model_info(name).url.partition("/resolve/main/")[2])


def converted_file(name: str) -> pathlib.Path:
    """The converted published weights of a model, fetched and converted if they are not cached.

    They are kept as a portable file, which each process of a pod can write for itself. Once they
    are there, neither the network nor torch is needed, and the download may be deleted.

    Raises:
        DownloadError: they are not cached and cannot be fetched, or arrived damaged.
        OSError: the cache folder cannot be written to.
        ImportError: they are not cached, only the `.pth` file exists, and torch is not installed.
        ValueError: no published model has this name.
    """
    from metaformer_jax.weights import pretrained, write

    name = model_info(name).name
    cached = cache_folder() / f"{name}.safetensors"
    if cached.is_file():
        return cached
    check_has_place(cached.absolute(), what="The cache of weights ($METAFORMER_JAX_CACHE)")
    source = timm_source(name)
    if source is None:
        import_torch()
        source = sail_source(name)
    file, digest = download(source, name=name)
    model, variables, checkpoint = pretrained.read_and_build(file, name)
    fields = checkpoint.source | {"source_sha256": digest}
    fields["source_file"] = f"{source.repo_id}/{source.filename}"
    try:
        write.write_variables(variables, cached, name=name, model=model, **fields)
    except FileExistsError:
        # Another process was faster.
        if not cached.is_file():
            raise
    return cached


def download(source: HubFile, *, name: str) -> tuple[pathlib.Path, str]:
    """Fetches a file through the hub's own cache, and checks its content.

    Returns:
        The file and its SHA-256.

    Raises:
        DownloadError: it cannot be fetched, or its content is not what the hub announced.
    """
    import huggingface_hub

    # Read at each call: the library itself reads it once, when it is imported.
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        path = huggingface_hub.hf_hub_download(
            source.repo_id, source.filename, endpoint=endpoint, library_name="metaformer_jax"
        )
    # Each layer below has errors of its own: the hub, HTTP, sockets, the disk.
    except Exception as error:
        raise DownloadError(
            f"The weights of {name} must be fetched once, and {source.url} could not be: "
            f"{_reason(error)}{f', from {endpoint}' if endpoint else ''}.\n"
            f"{_manual_way(source, name)}"
        ) from error
    digest = sha256(path)
    announced = _announced_sha256(path, source, endpoint)
    if announced not in (None, digest):
        pathlib.Path(path).resolve().unlink()
        pathlib.Path(path).unlink(missing_ok=True)
        raise DownloadError(
            f"{source.url} must have the SHA-256 {announced} that the hub announced, got {digest}. "
            "The damaged file was deleted: try again."
        )
    return pathlib.Path(path), digest


def _announced_sha256(path: str, source: HubFile, endpoint: str | None) -> str | None:
    # The hub's cache names a file by what the server announced: for large files their SHA-256.
    if os.path.islink(path):
        etag: Any = pathlib.Path(os.readlink(path)).name
    else:
        import huggingface_hub

        try:
            etag = huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(source.repo_id, source.filename, endpoint=endpoint)
            ).etag
        # A system without links, and by now without a network: the size was checked.
        except Exception:
            return None
    return etag if re.fullmatch(r"[0-9a-f]{64}", etag or "") else None


def _reason(error: BaseException) -> str:
    # The hub's library answers many errors by the advice to look for the file in its cache.
    if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _manual_way(source: HubFile, name: str) -> str:
    return (
        f"Without a network, fetch that file elsewhere and convert it:\n"
        f"  python -m metaformer_jax.convert {pathlib.PurePath(source.filename).name} "
        f"--model {name} --output {name}\n"
        f"and load it by path: create_model({name!r}, pretrained={name!r}, ...)."
    )
