import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

import data
import folder
from data import Split
from endings import Refused
from folder import describe_classes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def as_dataset(split, mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1)):  # noqa: B008
    return data.Dataset(split, None, None, mean, std, [])


def test_names_of_classes_are_plain_text(monkeypatch):
    """Others, such as NumPy's, a checkpoint could not hold: of a data set that somebody adds."""
    images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    monkeypatch.setitem(data.SOURCES, "mine", (lambda root, part: (images, labels, np.array(["cat", "dog"])), None))
    classes = data.load("mine", ".").classes
    assert ([*map(type, classes)], classes) == ([str, str], ["cat", "dog"])


@pytest.mark.parametrize(
    ("shape", "dtype", "labels"),
    [
        ((2, 3, 32, 24), torch.uint8, [0, 1]),
        ((2, 1, 32, 32), torch.uint8, [0, 1]),
        ((3, 32, 32), torch.uint8, [0, 1, 1]),
        ((2, 3, 32, 32), torch.float32, [0, 1]),
        ((2, 3, 32, 32), torch.uint8, [0.0, 1.0]),
        ((2, 3, 32, 32), torch.uint8, [0, 1, 1]),
        ((2, 3, 32, 32), torch.uint8, [1, 2]),
        ((2, 3, 32, 32), torch.uint8, [-1, 0]),
    ],
)
def test_a_reader_that_gives_something_else_is_an_error(monkeypatch, shape, dtype, labels):
    given = torch.zeros(shape, dtype=dtype), torch.tensor(labels), ["cat", "dog"]
    monkeypatch.setitem(data.SOURCES, "mine", (lambda root, part: given, None))
    with pytest.raises(ValueError, match=r"^the reader of mine must give"):
        data.load("mine", ".")


@pytest.mark.parametrize(("size", "padding"), [(32, 4), (64, 8), (8, 1), (12, 1), (36, 4)])
def test_crop_and_flip_equals_a_loop_over_the_images(size, padding):
    images = torch.randn(200, 3, size, size)
    top, left, flip = data.random_windows(200, size, generator(), "cpu")
    assert {*top.tolist()} == {*left.tolist()} == set(range(2 * padding + 1))
    assert 70 < flip.sum() < 130
    result = data.crop_and_flip(images, top, left, flip)
    for image, t, o, f, out in zip(images, top, left, flip, result, strict=True):
        padded = torch.zeros(3, size + 2 * padding, size + 2 * padding)
        padded[:, padding : padding + size, padding : padding + size] = image
        crop = padded[:, t : t + size, o : o + size]
        assert torch.equal(out, crop.flip(2) if f else crop)


def test_batches_of_32_draw_what_they_always_drew():
    drawn = generator()
    top, left, flip = data.random_windows(50, 32, generator(), "cpu")
    assert torch.equal(torch.stack([top, left]), torch.randint(0, 9, (2, 50), generator=drawn))
    assert torch.equal(flip, torch.rand(50, generator=drawn) < 0.5)


def test_padding_is_zero_after_normalisation():
    split = Split(torch.randint(1, 256, (50, 3, 32, 32), dtype=torch.uint8), torch.arange(50))
    mean, std = torch.tensor([9.5, 90.5, 190.5]).view(3, 1, 1), torch.tensor([3.0, 4.0, 5.0]).view(3, 1, 1)  # no pixel is 0
    images, _, _ = next(data.training_batches(as_dataset(split, mean, std), 50, True, generator()))
    zeros = (images == 0).all(dim=1)
    assert zeros.any()
    assert torch.equal(zeros.flatten(1).any(1), (images == 0).flatten(1).any(1))  # all channels together


@pytest.mark.parametrize(("size", "batch_size"), [(100, 16), (64, 64), (5, 64)])
def test_each_image_is_seen_once_an_epoch(size, batch_size):
    images = torch.arange(size, dtype=torch.uint8).view(size, 1, 1, 1).expand(size, 3, 32, 32).contiguous()
    split = Split(images, torch.arange(size))
    batches = list(data.training_batches(as_dataset(split), batch_size, False, generator()))
    assert [len(labels) for _, labels, _ in batches] == [batch_size] * (size // batch_size) + [size % batch_size] * (
        size % batch_size > 0
    )
    images, labels = (torch.cat(part) for part in list(zip(*batches, strict=True))[:2])
    assert torch.equal(images[:, 0, 0, 0], labels.float())
    assert sorted(labels.tolist()) == list(range(size))
    assert labels.tolist() != list(range(size))


def test_cifar_has_782_batches_and_the_last_has_16_images():
    split = Split(torch.zeros(50_000, 3, 1, 1, dtype=torch.uint8), torch.zeros(50_000, dtype=torch.int64))
    sizes = [len(labels) for _, labels, _ in data.training_batches(as_dataset(split), 64, False, generator())]
    assert sizes == [64] * 781 + [16]


def test_the_same_generator_state_gives_the_same_epoch():
    dataset = data.load("digits", ".")
    epochs = [torch.cat([b[0] for b in data.training_batches(dataset, 64, True, generator(s))]) for s in (3, 3, 4)]
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


def test_digits_are_the_real_ones_stratified_and_fixed(monkeypatch):
    monkeypatch.setitem(data.SOURCES, "digits", (data.read_digits, None))  # each time anew
    first, second = data.load("digits", "."), data.load("digits", ".")
    assert first.train.images.shape == (1437, 3, 32, 32)
    assert first.test.images.shape == (360, 3, 32, 32)
    assert first.train.images.dtype == torch.uint8
    assert torch.equal(first.test.images, second.test.images)
    assert first.test.labels.bincount().min() >= 34
    normalized = data.normalize(first.train.images, first.mean, first.std)
    torch.testing.assert_close(normalized.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized.std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert (first.mean.unique().item(), first.std.unique().item()) == (77.86529541015625, 82.53422546386719)


def test_val_and_limit_are_disjoint_and_val_is_the_same_for_every_limit():
    whole, part = data.load("digits", ".", val=300), data.load("digits", ".", val=300, limit=100)
    assert (len(whole.train), len(whole.val), len(part.train)) == (1137, 300, 100)
    assert torch.equal(whole.val.images, part.val.images)
    assert torch.equal(whole.train.images[:100], part.train.images)
    rows = {image.numpy().tobytes() for image in torch.cat([whole.train.images, whole.val.images])}
    assert rows == {image.numpy().tobytes() for image in data.load("digits", ".").train.images}
    with pytest.raises(
        Refused, match="1,437 training images are too few for --val 1437, or a class would have none left: choose fewer"
    ):
        data.load("digits", ".", val=1437)
    with pytest.raises(Refused, match="too few for --val 1000 and --limit 438, or a class would have none left: choose fewer"):
        data.load("digits", ".", val=1000, limit=438)


def test_cifar10_is_the_official_one(cifar):
    dataset = data.load("cifar10", cifar)
    assert dataset.train.images.shape == (50_000, 3, 32, 32)
    assert dataset.test.labels.bincount().tolist() == [1000] * 10
    assert dataset.classes[3] == "cat"
    theirs = torchvision.datasets.CIFAR10(cifar, train=True)
    assert np.array_equal(dataset.train.images[7].permute(1, 2, 0).numpy(), np.asarray(theirs[7][0]))
    assert dataset.train.labels[7] == theirs[7][1]
    std, mean = torch.std_mean(dataset.train.images.float(), dim=(0, 2, 3))
    torch.testing.assert_close(dataset.mean.flatten(), mean, atol=0.06, rtol=0)
    torch.testing.assert_close(dataset.std.flatten(), std, atol=0.06, rtol=0)


def test_damaged_cifar_file_is_refused_and_kept(cifar, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for path in (cifar / folder.name).iterdir():
        shutil.copyfile(path, folder / path.name)  # and not its mode: the data may be read-only
    damaged = folder / "data_batch_3"
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(Refused, match="data_batch_3 is damaged"):
        data.load("cifar10", tmp_path)
    assert damaged.read_bytes() == content


@pytest.mark.parametrize(("name", "archive"), [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")])
def test_an_archive_that_was_cut_off_is_named_as_damaged_and_kept(name, archive, tmp_path):
    (tmp_path / archive).write_bytes(b"\x1f\x8b half of an archive")
    with pytest.raises(Refused, match=rf"{tmp_path / archive} is damaged \(wrong checksum\): delete it"):
        data.load(name, tmp_path)
    assert (tmp_path / archive).exists()


def test_a_damaged_archive_beside_whole_files_does_not_matter(cifar, tmp_path):
    (tmp_path / "cifar-10-batches-py").symlink_to(cifar / "cifar-10-batches-py")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half")
    assert len(data.read_part("cifar10", tmp_path, "test")[0]) == 10_000


def test_the_archive_is_read_where_only_the_names_of_the_classes_are_missing(cifar, tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    for path in (cifar / "cifar-10-batches-py").glob("*_batch*"):
        (tmp_path / "cifar-10-batches-py" / path.name).symlink_to(path)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    with pytest.raises(Refused, match="gz is damaged"):
        data.load("cifar10", tmp_path)


def test_the_test_part_needs_no_training_file(cifar, tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in ("test_batch", "batches.meta"):
        (tmp_path / "cifar-10-batches-py" / name).symlink_to(cifar / "cifar-10-batches-py" / name)
    split, classes = data.read_part("cifar10", tmp_path, "test")
    theirs = torchvision.datasets.CIFAR10(cifar, train=False)
    assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), theirs.data)
    assert (split.labels.tolist(), classes) == (theirs.targets, theirs.classes)
    with pytest.raises(Refused, match=f"{tmp_path} lacks files of CIFAR10, and downloading https://"):
        data.read_part("cifar10", tmp_path, "train")


def test_what_is_there_is_not_asked_for(cifar, monkeypatch):
    """Each file's checksum is computed twice: by us, to name what is damaged, and by torchvision, before it reads."""
    checked, check = [], torchvision.datasets.utils.calculate_md5

    def noted(path, *arguments):
        checked.append(Path(path).name)
        return check(path, *arguments)

    monkeypatch.setattr(torchvision.datasets.utils, "calculate_md5", noted)
    data.read_part("cifar10", cifar, "test")
    assert checked.count("test_batch") == 2


def test_the_folder_of_the_batches_may_be_named_itself(cifar, monkeypatch):
    assert len(data.read_part("cifar10", cifar / "cifar-10-batches-py", "test")[0]) == 10_000
    monkeypatch.chdir(cifar / "cifar-10-batches-py")
    assert len(data.read_part("cifar10", ".", "test")[0]) == 10_000


@pytest.mark.parametrize(
    ("name", "archive"),
    [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz"), ("svhn", "train_32x32.mat")],
)
def test_missing_data_without_network_says_where_the_archive_goes(name, archive, tmp_path):
    with pytest.raises(Refused, match=rf"{tmp_path} lacks files of .*: put {archive} there, or name another --data"):
        data.load(name, tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_a_folder_of_pictures_is_no_place_for_a_download(name, pictures):
    before = sorted(pictures.rglob("*"))
    with pytest.raises(Refused, match=f"^{pictures} holds train and test, .*: choose --dataset folder, or another --data$"):
        data.load(name, pictures)
    assert sorted(pictures.rglob("*")) == before


def test_an_archive_beside_folders_of_pictures_is_read(cifar, pictures, monkeypatch):
    with tarfile.open(pictures / "cifar-10-python.tar.gz", "w:gz", compresslevel=0) as archive:
        for name in ("test_batch", "batches.meta"):
            archive.add(cifar / "cifar-10-batches-py" / name, f"cifar-10-batches-py/{name}")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", None)
    assert len(data.read_part("cifar10", pictures, "test")[0]) == 10_000


def test_a_download_that_fails_leaves_the_folders_that_there_were(tmp_path):
    (tmp_path / "mine" / "train").mkdir(parents=True)  # alone it makes no folder of pictures
    for root in (tmp_path / "new" / "data", tmp_path / "mine"):
        with pytest.raises(Refused, match="lacks files of CIFAR10, and downloading https://"):
            data.load("cifar10", root)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_svhn_is_train_and_extra_divided_by_255(tmp_path, monkeypatch):
    svhn = torchvision.datasets.SVHN
    split_list = {}
    for i, (split, size) in enumerate([("train", 20), ("extra", 30), ("test", 10)]):
        digits = np.arange(i, size + i) % 10 + 1  # 10 is the digit 0
        pixels = np.broadcast_to(100 + 20 * i + digits, (32, 32, 3, size)).astype(np.uint8)
        scipy.io.savemat(tmp_path / f"{split}.mat", {"X": pixels, "y": digits[:, None]})
        md5 = torchvision.datasets.utils.calculate_md5(tmp_path / f"{split}.mat")
        split_list[split] = ["http://127.0.0.1:9/", f"{split}.mat", md5]
    monkeypatch.setattr(svhn, "split_list", split_list)
    dataset = data.load("svhn", tmp_path)
    shades = dataset.train.images[:, 0, 0, 0] - 100 - torch.tensor([0] * 20 + [20] * 30)
    assert shades.tolist() == [label or 10 for label in dataset.train.labels.tolist()]
    assert sorted({*dataset.train.labels.tolist()}) == list(range(10))
    assert dataset.classes == [str(digit) for digit in range(10)]
    assert len(dataset.test) == 10
    torch.testing.assert_close(
        data.normalize(dataset.test.images, dataset.mean, dataset.std)[0, 0, 0, 0], torch.tensor(143 / 255)
    )


def test_folder_is_read_and_resized(pictures):
    dataset = data.load("folder", pictures)
    assert dataset.classes == ["blue", "red"]
    assert dataset.train.images.shape == (12, 3, 32, 32)
    assert dataset.train.labels.bincount().tolist() == [6, 6]
    assert len(set(data.load("folder", pictures, limit=6).train.labels.tolist())) == 2
    brightest = dataset.train.images.amax(dim=(2, 3)).argmax(dim=1)  # the channel of the class
    assert torch.equal(dataset.train.labels, torch.where(brightest == 2, 0, 1))
    assert dataset.test.labels.tolist() == sorted(dataset.test.labels.tolist())
    torch.testing.assert_close(dataset.mean.flatten(), torch.tensor([127.0, 0.0, 127.0]), atol=1.5, rtol=0)


def test_a_folder_at_another_size(pictures):
    dataset = data.load("folder", pictures, image_size=64)
    assert dataset.train.images.shape == (12, 3, 64, 64)
    images, _, _ = next(data.training_batches(dataset, 5, True, generator()))
    assert images.shape == (5, 3, 64, 64)


@pytest.mark.parametrize("size", [8, 1200])
def test_mean_and_std_are_exact(size):
    """Also those of 72 million pixels, which are counted in parts."""
    images = torch.randint(0, 256, (50, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    std, mean = torch.std_mean(images.double(), dim=(0, 2, 3), correction=0)
    larger = torch.nn.functional.interpolate(images, size=size)  # the same pixels, each as often
    for result, expected in zip(data.mean_and_std(larger), (mean, std), strict=True):
        torch.testing.assert_close(torch.tensor(result, dtype=torch.float64), expected, rtol=1e-12, atol=0)


def test_the_permutation_is_the_one_that_it_always_was():
    """Another one would hold out images that the nets of earlier versions were trained on."""
    assert folder.fixed_permutation(10).tolist() == [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]


def test_the_first_images_are_kept_and_all_stay_in_their_order():
    """Of ten, by the permutation above, 4, 1 and 7 are held out."""
    kept, held_out = data.hold_out(torch.zeros(10), 3, 4)
    assert (kept.tolist(), held_out.tolist()) == ([0, 2, 3, 5], [1, 4, 7])


def test_a_class_that_would_be_held_out_whole_is_refused(pictures):
    for path in sorted((pictures / "train" / "red").iterdir())[1:]:
        path.unlink()
    red = data.load("folder", pictures).train.labels.tolist().index(1)
    last = folder.fixed_permutation(7).tolist().index(red)  # as many may be held out
    assert len(data.load("folder", pictures, last).train) == 7 - last
    with pytest.raises(
        Refused, match=f"^7 training images are too few for --val {last + 1}, or a class would have none left: choose fewer$"
    ):
        data.load("folder", pictures, last + 1)


def test_a_set_without_limit_and_held_out_images_is_not_copied(monkeypatch):
    split = Split(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), torch.arange(9))
    monkeypatch.setattr(data, "read_part", lambda *arguments: (split, ["cat"]))
    assert data.load("cifar10", ".").train.images.data_ptr() == split.images.data_ptr()


def test_what_the_classes_hold(pictures):
    for i in range(65):
        shutil.copy(pictures / "train" / "red" / "1.png", pictures / "train" / "red" / f"more{i}.png")
    dataset = data.load("folder", pictures)
    lines = folder.describe_classes(dataset.classes, dataset.train.labels, dataset.test.labels)
    assert lines[:2] == ["  blue        6 training       1 test images", "  red        71 training       1 test images"]
    assert "unbalanced (training images of red 71 and of blue 6): evaluate.py" in lines[2]
    assert len(lines) == 3


@pytest.mark.parametrize(("many", "told"), [(60, False), (61, True)])
def test_over_ten_times_as_many_is_unbalanced(many, told):
    uneven, even = torch.tensor([0] * many + [1] * 6), torch.tensor([0, 1] * 9)
    for part, labels in [("training", (uneven, even)), ("test", (even, uneven))]:
        lines = folder.describe_classes(["a", "b"], *labels)
        assert (f"unbalanced ({part} images of a 61 and of b 6)" in lines[-1], len(lines)) == (told, 2 + told)


def test_of_many_classes_one_line():
    names = [f"class {i}" for i in range(22)]
    lines = folder.describe_classes(names, torch.arange(230) % 22, torch.arange(44) % 22)
    assert lines == ["  22 classes, each of 10 to 11 training and 2 to 2 test images"]


def test_images_that_are_in_two_parts_are_counted():
    train = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 3, 8, 8)
    test, held_out = train[6:].clone(), train[:4] + 20
    test[2, 2, 7, 7] = 99  # one value of an image is another
    assert [*folder.leaks(train, {"held-out": held_out, "test": test})] == [
        "  2 of 3 test images are training images, too: new ones may have a higher error"
    ]
    (told,) = folder.leaks(train, {"held-out": train[:1], "test": train[:0]})
    assert told.startswith("  1 of 1 held-out images are")


def break_picture(root):
    (root / "train" / "red" / "3.png").write_bytes(b"no picture")


def cut_picture(root):
    path = root / "train" / "blue" / "2.jpg"
    path.write_bytes(path.read_bytes()[:300])


def empty_class(root):
    for path in (root / "train" / "red").iterdir():
        path.unlink()


def one_class(root):
    for part in ("train", "test"):
        shutil.rmtree(root / part / "red")


def class_with_hidden_files_only(root):
    for path in (root / "train" / "red").iterdir():
        path.rename(path.with_name("." + path.name))


def only_hidden_folders(root):
    for path in (root / "test").iterdir():
        path.rename(path.with_name("." + path.name))


def class_that_is_hidden_in_test(root):
    (root / "test" / "red").rename(root / "test" / ".red")


def vanished_picture(root):
    (root / "train" / "red" / "lost.png").symlink_to(root / "gone.png")


def picture_of_floats(root):
    Image.new("F", (40, 40), 0.5).save(root / "test" / "red" / "depth.tif")


def class_without_test(root):
    (root / "test" / "red").rename(root / "test" / "green")


def class_spelt_in_two_ways(root):
    """As two machines write it."""
    (root / "train" / "red").rename(root / "train" / "cafe\u0301")
    (root / "test" / "red").rename(root / "test" / "caf\u00e9")


def class_with_a_space(root):
    (root / "test" / "red").rename(root / "test" / "Red ")


def no_test(root):
    shutil.rmtree(root / "test")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_picture, "cannot be read as pictures: .*red/3.png .cannot identify"),
        (cut_picture, "cannot be read as pictures: .*blue/2.jpg ."),
        (empty_class, "train/red holds no picture"),
        (one_class, r"has only one class \(blue\)"),
        (class_without_test, "train lacks the class 'green': give it a folder in both"),
        (
            class_spelt_in_two_ways,
            r"test lacks the class 'cafe\\u0301', and 'caf\\xe9' there differs in spelling only: rename one",
        ),
        (class_with_a_space, "train lacks the class 'Red ', and 'red' there differs in spelling only: rename one"),
        (no_test, "test is not a folder"),
        (class_with_hidden_files_only, r"train/red holds no picture \(.jpg, .*: put some there, or remove it"),
        (only_hidden_folders, "test holds no folder: make one for each class"),
        (class_that_is_hidden_in_test, "test lacks the class 'red': give it a folder in both train and test"),
        (vanished_picture, "cannot be read as pictures: .*red/lost.png .there is no such file"),
        (picture_of_floats, "cannot be read as pictures: .*red/depth.tif .*: make them readable pictures in 8-bit RGB"),
    ],
)
def test_folder_that_is_wrong_is_named(pictures, spoil, message):
    spoil(pictures)
    with pytest.raises(Refused, match=message):
        data.load("folder", pictures)


def test_a_set_that_does_not_fit_the_memory_is_refused_before_it_is_read(pictures):
    break_picture(pictures)  # nothing is read
    for val, needed in [(0, r"420\.0 GB"), (1, r"780\.0 GB with --val")]:
        with pytest.raises(Refused, match=rf"14 pictures of 100000 x 100000 need {needed}, [\d.]+ GB are free: choose"):
            data.load("folder", pictures, val, image_size=100_000)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_slices_of_all_ranks_are_the_batch_of_one_process(world_size):
    dataset = data.load("digits", ".", limit=100)
    arguments = dataset, 64, True
    whole = list(data.training_batches(*arguments, generator(5)))
    ranks = [list(data.training_batches(*arguments, generator(5), rank, world_size)) for rank in range(world_size)]
    for (images, labels, share), *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(images, torch.cat([part[0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[1] for part in parts]))
        assert share == 1
        assert [part[2] for part in parts] == [len(part[1]) / len(labels) for part in parts]


def test_classes_that_differ_by_a_control_character_are_told_of():
    """As made by a script with the line ends of Windows."""
    lines = describe_classes(["dog", "dog\r"], torch.arange(2), torch.arange(2))
    assert [line.split()[0] for line in lines] == ["dog", "dog\\r", "'dog'"]
    assert lines[2] == r"  'dog' and 'dog\r' differ in spelling only"


def test_classes_that_look_alike_are_told_of():
    names = ["caf\u00e9", "cafe\u0301", "cat", "cat ", "dog"]
    lines = describe_classes(names, torch.arange(5), torch.arange(5))
    assert lines[5:] == [r"  'caf\xe9' and 'cafe\u0301' differ in spelling only", "  'cat' and 'cat ' differ in spelling only"]


def test_mean_and_std_are_those_of_the_official_code():
    """Of fb.resnet.torch's datasets/cifar10.lua and cifar100.lua, red, green, blue; SVHN's are divisions by 255."""
    moments = {name: source[1] for name, source in data.SOURCES.items()}
    assert moments["cifar10"] == ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    assert moments["cifar100"] == ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4))
    assert moments["svhn"] == ((0, 0, 0), (255, 255, 255))


def test_mean_and_std_of_a_folder_are_those_of_its_training_part(pictures):
    Image.new("RGB", (40, 50), "white").save(pictures / "test" / "red" / "0.jpg")
    dataset = data.load("folder", pictures, val=2)
    expected = torch.tensor(data.mean_and_std(data.read_part("folder", pictures, "train")[0].images))
    assert torch.equal(torch.stack([dataset.mean, dataset.std]).flatten(1), expected)


def test_a_rank_that_says_nothing_reads_the_same(pictures):
    loud, quiet = (data.read_part("folder", pictures, "train", 8, quiet=quiet)[0] for quiet in (False, True))
    assert torch.equal(loud.images, quiet.images)
    assert torch.equal(loud.labels, quiet.labels)


def test_a_constant_channel_has_a_std_of_1():
    images = torch.tensor([0, 9, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(5, 3, 8, 8)
    assert data.mean_and_std(images) == ([0, 9, 255], [1, 1, 1])
