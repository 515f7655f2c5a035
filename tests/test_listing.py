"""Which files of a folder are its pictures: names, links, order; hidden ones are none."""

import shutil

import pytest
import torch
from torchvision.datasets import ImageFolder

import data
import folder


def spoil_like_a_macintosh(root):
    for part in ("train", "test"):
        (root / part / ".DS_Store").write_bytes(b"\0")
        (root / part / "red" / "._0.png").write_bytes(b"\0\5\x16\7")


def spoil_like_a_notebook(root):
    for place in (root / "train", root / "train" / "red", root / "test" / "blue"):
        (place / ".ipynb_checkpoints").mkdir()
        shutil.copy(root / "train" / "red" / "1.png", place / ".ipynb_checkpoints" / "1-checkpoint.png")


def add_an_empty_hidden_class(root):
    (root / "train" / ".git").mkdir()


def add_other_files(root):
    (root / "train" / "red" / "Thumbs.db").write_bytes(b"1")
    (root / "test" / "notes.txt").write_text("of last summer")


@pytest.mark.parametrize("spoil", [spoil_like_a_macintosh, spoil_like_a_notebook, add_an_empty_hidden_class, add_other_files])
def test_hidden_and_other_files_are_no_data(pictures, spoil):
    expected = data.load("folder", pictures)
    spoil(pictures)
    dataset = data.load("folder", pictures)
    assert dataset.classes == expected.classes == ["blue", "red"]
    for one, other in [(dataset.train, expected.train), (dataset.test, expected.test)]:
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_a_data_set_may_lie_in_a_hidden_folder(pictures, tmp_path):
    shutil.copytree(pictures / "train", tmp_path / ".cache" / "set" / "train")
    shutil.copytree(pictures / "test", tmp_path / ".cache" / "set" / "test")
    assert len(data.load("folder", tmp_path / ".cache" / "set").train) == 12


def test_extensions_in_any_case_and_links_are_followed(pictures, tmp_path):
    red = pictures / "train" / "red"
    (red / "1.png").rename(red / "1.PNG")
    (red / "2.jpg").rename(red / "2.JpEg")
    (red / "more").mkdir()
    (red / "3.png").rename(red / "more" / "3.GIF")
    (tmp_path / "elsewhere").mkdir()
    (red / "4.jpg").rename(tmp_path / "elsewhere" / "4.jpg")
    (red / "far").symlink_to(tmp_path / "elsewhere")
    (red / "again.png").symlink_to(red / "1.PNG")
    assert data.load("folder", pictures).train.labels.bincount().tolist() == [6, 7]


def test_links_that_lead_back_end_and_a_link_to_another_class_is_read(pictures):
    """Neither a circle nor a link back to all classes gives a class more pictures."""
    red = pictures / "train" / "red"
    for name, target in [("itself", "."), ("all", ".."), ("above", "../..")]:
        (red / name).symlink_to(target)
    (red / "more").mkdir()
    (red / "more" / "back").symlink_to(red)
    blue = pictures / "train" / "blue"
    for place, other in [(red, blue), (blue, red)]:  # each is read once more as the other, and in it nothing twice
        (place / "other").symlink_to(other)
    classes = folder.list_classes(pictures / "train")
    assert {name: len(files) for name, files in classes.items()} == {"blue": 6 + 6, "red": 6 + 6}


def test_classes_and_pictures_have_the_order_of_torchvisions_image_folder(tmp_path):
    """A net that was trained on them there answers by the same numbers here."""
    in_class_a = [f"a/{name}.png" for name in ("10", "9", "Z", "m", "deep/1", "deep/z/0", "deep-er/3")]
    for name in ("b/1.png", "Z/1.png", "a-b/2.png", "10/1.png", "9/1.png", *in_class_a):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    theirs, classes = ImageFolder(tmp_path), folder.list_classes(tmp_path)
    assert list(classes) == theirs.classes
    assert [str(file) for files in classes.values() for file in files] == [path for path, _ in theirs.samples]
