"""An output is there whole or not at all, and replaces nothing that is not an earlier output."""

import os
import subprocess
import sys
import textwrap

import pytest

from metaformer_jax.weights.outputs import (
    RECORD_NAME,
    check_can_be_written,
    check_output,
    whole_output,
)


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write(path, text, *, is_folder, force=False):
    with whole_output(path, force=force, is_folder=is_folder) as partial:
        target = partial / RECORD_NAME if is_folder else partial
        target.write_text(text)


def read(path, *, is_folder):
    return (path / RECORD_NAME if is_folder else path).read_text()


@pytest.mark.parametrize("is_folder", [True, False])
def test_an_output_appears_under_its_name_only_when_it_is_whole(tmp_path, is_folder):
    path = tmp_path / "new" / "out"
    with whole_output(path, force=False, is_folder=is_folder) as partial:
        (partial / RECORD_NAME if is_folder else partial).write_text("half")
        assert not path.exists()
    assert read(path, is_folder=is_folder) == "half"
    assert os.listdir(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path, is_folder):
    path = tmp_path / ("\N{GREEK SMALL LETTER ALPHA}" * 127)
    for text in ("first", "second"):
        write(path, text, is_folder=is_folder, force=True)
        assert read(path, is_folder=is_folder) == text


@pytest.mark.parametrize("is_folder", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_or_an_interrupt_nothing_is_left(tmp_path, is_folder, error):
    def fail():
        with whole_output(tmp_path / "out", force=False, is_folder=is_folder) as partial:
            (partial / "half" if is_folder else partial).write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert contents(tmp_path) == []


@pytest.mark.parametrize("is_folder", [True, False])
def test_after_an_error_the_earlier_output_is_as_it_was(tmp_path, is_folder):
    write(tmp_path / "out", "first", is_folder=is_folder)
    before = contents(tmp_path)
    with (
        pytest.raises(OSError, match="disk full"),
        whole_output(tmp_path / "out", force=True, is_folder=is_folder),
    ):
        raise OSError("disk full")
    assert contents(tmp_path) == before
    assert read(tmp_path / "out", is_folder=is_folder) == "first"


@pytest.mark.parametrize("is_folder", [True, False])
def test_an_earlier_output_is_replaced_with_force_only(tmp_path, is_folder):
    write(tmp_path / "out", "first", is_folder=is_folder)
    with pytest.raises(FileExistsError, match="--force"):
        write(tmp_path / "out", "second", is_folder=is_folder)
    assert read(tmp_path / "out", is_folder=is_folder) == "first"
    write(tmp_path / "out", "second", is_folder=is_folder, force=True)
    assert read(tmp_path / "out", is_folder=is_folder) == "second"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_of_anything_else_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for name in ("photos", "link"):
        for is_folder in (True, False):
            with pytest.raises(FileExistsError, match="something else"):
                check_output(tmp_path / name, force=True, is_folder=is_folder)
    (tmp_path / "file").write_text("text")
    with pytest.raises(FileExistsError, match="something else"):
        check_output(tmp_path / "file", force=True, is_folder=True)


def test_what_lies_in_an_earlier_output_is_not_lost(tmp_path):
    write(tmp_path / "out", "first", is_folder=True)
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out, which holds notes\.md as well"):
        check_output(tmp_path / "out", force=True, is_folder=True)
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["lr[0.1]", "a*", "a?", "back\\slash", os.fsdecode(b"caf\xe9")])
def test_a_folder_in_which_orbax_would_lose_what_it_writes_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"must have a path without .*Choose another name"):
        check_output(tmp_path / name / "out", force=False, is_folder=True)
    (tmp_path / name).mkdir()
    check_output(tmp_path / name / "out.safetensors", force=False, is_folder=False)


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    def write_slowly():
        with whole_output(tmp_path / "out", force=False, is_folder=False) as partial:
            partial.write_text("mine")
            (tmp_path / "out").write_text("theirs")

    with pytest.raises(FileExistsError):
        write_slowly()
    assert (tmp_path / "out").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("place", ["file/output", "file/new/output"])
def test_an_output_without_a_place_is_refused_at_once(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    for is_folder in (True, False):
        with pytest.raises(
            OSError, match=r"in a folder that can be written to, got \S+output, and"
        ):
            check_output(tmp_path / place, force=False, is_folder=is_folder)
    assert contents(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["nowhere/output", "file/output", "."])
def test_a_file_that_could_not_be_written_in_the_end_is_refused(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="`--output` must be a file that can be written, got"):
        check_can_be_written(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_to_ask_whether_a_file_can_be_written_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("mine")
    check_can_be_written(tmp_path / "file")
    check_can_be_written(tmp_path / "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_killed_process_leaves_nothing_that_looks_complete(tmp_path):
    program = f"""
        import os
        from metaformer_jax.weights.outputs import whole_output
        with whole_output({str(tmp_path / "out")!r}, force=False, is_folder=True) as partial:
            (partial / "variables").mkdir()
            os._exit(9)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert result.returncode == 9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".out.partial-")
    assert not (tmp_path / left / RECORD_NAME).exists()
    write(tmp_path / "out", "later", is_folder=True)
