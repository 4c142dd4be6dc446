import os
import pathlib
import pickle

import fake_imagenet
import pytest
from PIL import Image

from metaformer_jax.data.folder import ImageFolder


@pytest.fixture
def root(tmp_path):
    return pathlib.Path(fake_imagenet.write_folder(tmp_path / "data"))


def _write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def _names(source):
    """The paths below the split's folder, in order."""
    return [
        pathlib.Path(source.describe(i)).relative_to(source._folder).as_posix()
        for i in range(len(source))
    ]


def test_order_is_class_by_class_then_by_folder_then_by_name(tmp_path):
    expected = [
        "Zebra/1.png",
        "ant/B.jpg",
        "ant/a.jpg",
        "ant/ä.jpg",
        "ant/sub/0.jpg",
        "ant/sub-1/0.jpg",
        "ant/sub/deep/9.jpg",
        "bee/10.jpg",
        "bee/9.jpg",
    ]
    for split in ("train", "val"):
        _write(tmp_path / split, *reversed(expected))
    # torchvision sorts what os.walk gives of each class.
    walked = [
        pathlib.Path(folder, name).relative_to(tmp_path / "train").as_posix()
        for of_class in ("Zebra", "ant", "bee")
        for folder, _, names in sorted(os.walk(tmp_path / "train" / of_class))
        for name in sorted(names)
    ]
    assert walked == expected
    source = ImageFolder(tmp_path, "train")
    assert _names(source) == expected
    assert source.class_names == ("Zebra", "ant", "bee")
    assert [source[index]["label"] for index in range(9)] == [0] + [1] * 6 + [2] * 2
    assert [source[index]["image"].decode() for index in range(9)] == expected


def test_every_extension_that_pillow_reads_counts_in_any_case(tmp_path):
    names = ["c/1.JPEG", "c/2.Png", "c/3.webp", "c/4.tif", "c/5.bmp"]
    for split in ("train", "val"):
        _write(tmp_path / split, *names)
    assert _names(ImageFolder(tmp_path, "train")) == names


def test_hidden_files_and_folders_are_left_out(root):
    _write(root / "train", ".cache/x.jpg", "n01440764/._x.jpg", "n01440764/.thumbs/x.jpg")
    assert len(ImageFolder(root, "train")) == 24
    assert ImageFolder(root, "train").class_names == fake_imagenet.CLASSES


def test_files_of_other_kinds_are_left_out_with_a_warning(root):
    _write(root / "train", "n01440764/labels.csv", "n01443537/sub/README")
    with pytest.warns(UserWarning, match=r"2 files below .*train are left out.*labels\.csv"):
        assert len(ImageFolder(root, "train")) == 24


def test_pipes_are_left_out_with_a_warning_and_links_are_files(root, tmp_path):
    folder = root / "train" / "n01440764"
    (tmp_path / "0.jpg").write_bytes(b"")
    (folder / "0.jpg").symlink_to(tmp_path / "0.jpg")
    (folder / "1.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(folder / "2.jpg")
    (folder / "3.jpg").symlink_to(folder / "2.jpg")
    with pytest.warns(UserWarning, match=r"2 files below .*pipes.*/2\.jpg.*/3\.jpg"):
        names = _names(ImageFolder(root, "train"))
    assert len(names) == 26
    assert names[:2] == ["n01440764/0.jpg", "n01440764/1.jpg"]


def test_links_to_classes_are_followed(root, tmp_path):
    moved = tmp_path / "elsewhere"
    (root / "train" / "n01440764").rename(moved)
    (root / "train" / "n01440764").symlink_to(moved)
    assert len(ImageFolder(root, "train")) == 24


def test_a_link_that_leads_upwards_is_refused(root):
    (root / "train" / "n01440764" / "again").symlink_to(root / "train" / "n01440764")
    with pytest.raises(ValueError, match="must not lead to a folder above itself"):
        ImageFolder(root, "train")


def test_test_serves_as_val_where_there_is_no_val(root):
    held_out = [ImageFolder(root, "val")[index] for index in range(9)]
    (root / "val").rename(root / "test")
    for split in ("val", "test"):
        source = ImageFolder(root, split)
        assert [source[index] for index in range(9)] == held_out
    assert "test" in source.describe(0)


def test_where_both_are_there_each_is_itself(root):
    _write(root / "test", "n01440764/x.jpg", "n01443537/x.jpg", "n02085620/x.jpg")
    assert len(ImageFolder(root, "val")) == 9
    assert len(ImageFolder(root, "test")) == 3


def test_many_names_take_little_memory_in_a_pickle(tmp_path):
    for split in ("train", "val"):
        _write(tmp_path / split, *(f"c/n01440764_{i}.JPEG" for i in range(1000)))
    assert len(pickle.dumps(ImageFolder(tmp_path, "train"))) < 30 * 1000


def _no_root(root):
    return root / "nowhere"


def _a_file(root):
    _write(root, "file")
    return root / "file"


def _the_split_itself(root):
    return root / "train"


def _no_val(root):
    (root / "val").rename(root / "validation")
    return root


def _flat_val(root):
    for path in list((root / "val").glob("*/*")):
        path.rename(root / "val" / path.name)
    for folder in (root / "val").iterdir():
        if folder.is_dir():
            folder.rmdir()
    return root


def _class_less(root):
    (root / "val" / "n01443537").rename(root / "n01443537")
    return root


def _class_more(root):
    _write(root / "val", "n09999999/x.jpg", "n09999998/x.jpg")
    return root


def _empty_class(root):
    for path in (root / "val" / "n01443537").iterdir():
        path.unlink()
    return root


def _empty_split(root):
    (root / "val").rename(root / "old")
    (root / "val").mkdir()
    return root


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (_no_root, "`root` must be a folder that holds 'train' and 'val', .* which is not there"),
        (_a_file, "`root` must be a folder .* which is no folder"),
        (_the_split_itself, "hold 'val' .* without 'val'. It holds 'n01440764', 'n01443537', "),
        (_no_val, "without 'val'. It holds 'train', 'validation'"),
        (_flat_val, "one folder for each class, got none. It holds 'n0.* and 4 more. Put each"),
        (_empty_split, "one folder for each class, got none. It holds nothing"),
        (_class_less, "the 3 class folders of .*train, got 2, without 'n01443537'"),
        (_class_more, "got 5, with also 'n09999998', 'n09999999'"),
        (_empty_class, "Each class of .*val must have an image .* got none in 'n01443537'"),
    ],
)
def test_a_wrong_layout_is_one_clear_error(root, arrange, message):
    root = arrange(root)
    with pytest.raises(ValueError, match=message):
        ImageFolder(root, "val")


def test_unknown_splits_are_refused(root):
    with pytest.raises(ValueError, match="`split` must be 'train', 'val' or 'test', got 'dev'"):
        ImageFolder(root, "dev")


def test_evaluating_takes_no_training_images(tmp_path):
    for name in ("b", "a"):
        path = tmp_path / "val" / name / "image.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(path)
    source = ImageFolder(tmp_path, "val")
    assert source.class_names == ("a", "b")
    assert [source[index]["label"] for index in range(2)] == [0, 1]
    with pytest.raises(ValueError, match=r"got .* without 'train'"):
        ImageFolder(tmp_path, "train")
