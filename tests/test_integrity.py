"""No change to a folder of files goes unnoticed."""

import pytest

from metaformer_jax.weights.errors import CheckpointError
from metaformer_jax.weights.integrity import CHECKSUMS_NAME, check_files, crc32c, write_checksums


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "a").write_bytes(b"123456789")
    (folder / "deep" / "er" / "b").write_bytes(bytes(range(256)) * 9)
    (folder / "deep" / "empty").touch()
    (folder / "changing").write_bytes(b"1")
    write_checksums(folder, without={"changing"})
    return folder


def test_a_checksum_is_the_one_of_the_standard(folder):
    # The check value that every description of CRC-32C gives.
    assert crc32c(folder / "a") == "e3069283"


def test_what_was_not_changed_passes(folder):
    (folder / "changing").write_bytes(b"2")
    (folder / "later").touch()
    check_files(folder)


def test_every_single_flipped_bit_is_found_and_its_file_named(folder):
    path = folder / "deep" / "er" / "b"
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 97):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"deep/er/b must have the CRC-32C"):
            check_files(folder)
    path.write_bytes(content)
    check_files(folder)


def test_every_flipped_bit_of_the_checksums_themselves_is_found(folder):
    path = folder / CHECKSUMS_NAME
    content = path.read_bytes()
    for byte in range(len(content)):
        changed = bytearray(content)
        changed[byte] ^= 1
        path.write_bytes(changed)
        # White space may stand for white space.
        if content[byte : byte + 1].strip():
            with pytest.raises(CheckpointError):
                check_files(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a").write_bytes(b"12345678"), "must have 9 bytes, got 8"),
        (lambda folder: (folder / "a").unlink(), "must hold a, got no such file"),
        (lambda folder: (folder / CHECKSUMS_NAME).unlink(), "must hold checksums.json, which"),
        (lambda folder: (folder / CHECKSUMS_NAME).write_text("[]"), "content that is damaged"),
        (lambda folder: (folder / CHECKSUMS_NAME).write_text("{"), "content that is damaged"),
        (lambda folder: (folder / CHECKSUMS_NAME).write_bytes(b"\xff"), "content that is damaged"),
    ],
)
def test_damage_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        check_files(folder)
