"""Data sets as uint8 tensors on the training device; a batch is gathered, normalised, cropped and flipped there.

A data set is one tensor of images and one of labels: no worker processes, no image is decoded twice, and what is random comes
from a generator that the caller passes in. Reading, downloading and checking the archives is torchvision's work; a person's own
pictures are read by pictures.py.

    data = load("cifar10", "data", torch.device("cpu"))
    for images, labels in training_batches(data.train, 64, data.mean, data.std, augment=True, generator=generator): ...
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.datasets.utils import check_integrity

from machine import free_memory
from pictures import EXTENSIONS, SQUEEZED_SIZE, as_before, middle, read_pictures

IMAGE_SIZE = 32
MEAN_VALUES = 2**28  # so many values at a time are float32 while mean and std are computed: 1 GB


class Split(NamedTuple):
    images: Tensor  # (M, 3, S, S) uint8, S = 32 unless it is a folder's
    labels: Tensor  # (M,) int64

    def __len__(self):
        return self.labels.shape[0]

    def take(self, indices):
        return Split(self.images[indices], self.labels[indices])

    def to(self, device):
        return Split(self.images.to(device), self.labels.to(device))


class Dataset(NamedTuple):
    train: Split
    val: Split | None  # held-out training images
    test: Split
    mean: Tensor  # (3, 1, 1) float32, of pixels 0..255
    std: Tensor  # (3, 1, 1) float32
    classes: list[str]


# ------------------------------------------------------------------------------------------------------------- loading


def load(name, root, device, val=0, limit=None, image_size=IMAGE_SIZE, quiet=False):
    """The data set `name` from the folder `root`, on `device`; `val` training images are held out, `limit` kept.

    A folder's pictures become image_size x image_size; None reads them as runs did before there was a choice. Unless quiet, it
    is said how far they are read. Raises ValueError with a sentence for a person if the data is missing, damaged or too small.
    """
    options = {"image_size": image_size, "quiet": quiet} if name == "folder" else {}
    train, test, mean, std, classes = LOADERS[name](Path(root), **options)
    train, val = hold_out(train, val, limit)
    mean, std = (torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) for values in (mean, std))
    return Dataset(train.to(device), val and val.to(device), test.to(device), mean, std, list(classes))


def hold_out(split, val, limit):
    """The first `limit` training images of those that remain when `val` are held out; the latter do not depend on a seed."""
    if val + (limit or 1) > len(split):
        asked = f"--val {val}" + (f" and --limit {limit}" if limit else "")
        raise ValueError(f"{asked} is more than the {len(split)} training images: choose less")
    if not val and limit is None:
        return split, None  # no second copy of it
    order = fixed_order(len(split))
    held_out, kept = order[:val].sort().values, order[val:].sort().values[:limit]
    return split.take(kept), split.take(held_out) if val else None


def fixed_order(number):
    """The numbers below `number`, mixed, the same way every time."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(0))


def load_cifar10(root):
    # Mean and std of the training pixels, the figures of the official code.
    return load_cifar(torchvision.datasets.CIFAR10, root, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))


def load_cifar100(root):
    return load_cifar(torchvision.datasets.CIFAR100, root, (129.3, 124.1, 112.4), (68.2, 65.4, 70.4))


def load_cifar(dataset_class, root, mean, std):
    files = [(Path(dataset_class.base_folder, name), md5) for name, md5 in dataset_class.train_list + dataset_class.test_list]
    if root.resolve().name == dataset_class.base_folder and not (root / dataset_class.base_folder).exists():
        root = root.resolve().parent  # it is the folder of the batches that was named
    refuse_damaged(root, files)
    if not all((root / name).exists() for name, _ in files):  # then the archive is what they come from
        refuse_damaged(root, [(dataset_class.filename, dataset_class.tgz_md5)])
    train, test = (download(dataset_class, root, dataset_class.filename, train=train) for train in (True, False))
    splits = (Split(torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(d.targets)) for d in (train, test))
    return *splits, mean, std, train.classes


def load_svhn(root):
    """Train and extra together are the training set; pixels are divided by 255 and nothing else (paper, section 4.1)."""
    split_list = torchvision.datasets.SVHN.split_list
    refuse_damaged(root, [(name, md5) for _, name, md5 in split_list.values()])
    parts = [download(torchvision.datasets.SVHN, root, split_list[s][1], split=s) for s in ("train", "extra", "test")]
    train, extra, test = (Split(torch.from_numpy(p.data), torch.from_numpy(p.labels).long()) for p in parts)
    train = Split(torch.cat([train.images, extra.images]), torch.cat([train.labels, extra.labels]))
    return train, test, (0, 0, 0), (255, 255, 255), map(str, range(10))


def load_digits(root):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 enlarged to 32 x 32 in three channels; 360 of them are the test set."""
    from sklearn.datasets import load_digits  # here, for it takes a second to import and only this data set needs it
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, size=IMAGE_SIZE, mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    indices = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, test = (Split(images, torch.from_numpy(labels)).take(torch.from_numpy(i)) for i in indices)
    return train, test, *mean_and_std(train.images), map(str, range(10))


def load_folder(root, image_size, quiet):
    """A person's own images: root/train/<class>/*.png|jpg and root/test/<class>/*.png|jpg; see load for the rest."""
    train, test = (list_classes(root / part) for part in ("train", "test"))
    if list(train) != list(test):
        odd = sorted(set(train) ^ set(test))
        raise ValueError(f"{root}: the class {odd[0]} is in only one of train and test: give it a folder in both")
    if len(train) < 2:
        raise ValueError(f"{root / 'train'} holds one class only ({next(iter(train))}): add a folder for each further class")
    size = image_size or SQUEEZED_SIZE
    refuse_too_large(root, sum(map(len, [*train.values(), *test.values()])), size)
    read = partial(read_split, size=size, prepare=partial(middle, size=size) if image_size else as_before, quiet=quiet)
    train_split = read(root / "train", train, mixed=True)  # the first images shall be of all classes
    return train_split, read(root / "test", test, mixed=False), *mean_and_std(train_split.images), list(train)


LOADERS = {
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "svhn": load_svhn,
    "digits": load_digits,
    "folder": load_folder,
}


def refuse_damaged(root, files):
    """ValueError if one of `files`, pairs of a name below root and an MD5 checksum, is there and is not what it should be."""
    for name, md5 in files:
        if (root / name).exists() and not check_integrity(root / name, md5):
            raise ValueError(f"{root / name} is damaged (wrong checksum): delete it to have it downloaded again")


def download(dataset_class, root, archive, **kwargs):
    """torchvision's data set; what is not in root is downloaded, or taken from the archive if that lies there."""
    try:
        return dataset_class(root, download=True, **kwargs)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{dataset_class.__name__} is not complete in {root} and cannot be downloaded ({error}): "
            f"put {archive} into {root}, name the right folder with --data, or try --dataset digits, which needs none"
        ) from error


def list_classes(folder):
    """{class: its picture files} of a folder that holds a folder for each class; names that begin with a dot are no data.

    The order is that of torchvision's ImageFolder. ValueError where a class or the folder holds nothing.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: --dataset folder reads DIR/train/<class>/ and DIR/test/<class>/ of --data DIR"
        )
    folders = sorted(path for path in visible(folder) if path.is_dir())
    if not folders:
        raise ValueError(f"{folder} holds no folder: make one for each class and put its pictures there")
    classes = {path.name: sorted(list_pictures(path), key=lambda file: (str(file.parent), file.name)) for path in folders}
    empty = next((name for name, files in classes.items() if not files), None)
    if empty:
        raise ValueError(
            f"{folder}: the class {empty} holds no picture ({', '.join(EXTENSIONS)}): put pictures into its folder or remove it"
        )
    return classes


def list_pictures(folder, above=()):
    """The picture files in the folder and below it; a link that leads back to a folder above it is not followed."""
    here = folder.resolve()
    for path in visible(folder) if here not in above else []:
        if path.is_dir():
            yield from list_pictures(path, (*above, here))
        elif path.suffix.lower() in EXTENSIONS:
            yield path


def visible(folder):
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def refuse_too_large(root, number, size):
    """ValueError unless the memory holds so many images."""
    needed, free = 3 * number * size**2, free_memory()
    if needed > free:
        raise ValueError(
            f"{root} holds {number:,} pictures, which are {needed / 1e9:.1f} GB at {size} x {size}, and {free / 1e9:.1f} GB of "
            "memory are free: choose a smaller --image-size, or put fewer pictures there"
        )


def read_split(folder, classes, mixed, size, prepare, quiet):
    """The pictures of {class: files}, read in that order, as one tensor; mixed, it has them in another order."""
    files = [file for files in classes.values() for file in files]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([*map(len, classes.values())]))
    order = fixed_order(len(files)) if mixed else torch.arange(len(files))
    title = None if quiet else f"reading {len(files):,} pictures in {folder}"
    return Split(read_pictures(files, size, prepare, places=order.argsort().tolist(), title=title), labels[order])


def mean_and_std(images):
    """Per channel, of pixels 0..255; a channel that is constant gets std 1."""
    parts = images.split(max(1, MEAN_VALUES // images[0].numel()))
    moments = [torch.stack(torch.std_mean(part.float(), dim=(0, 2, 3), correction=0)) for part in parts]
    stds, means = torch.stack(moments, dim=1).double()  # (parts, 3) each; of one part, they are the result
    share = torch.tensor([len(part) / len(images) for part in parts], dtype=torch.float64).view(-1, 1)
    mean = (share * means).sum(dim=0)
    std = (share * (stds.square() + (means - mean).square())).sum(dim=0).sqrt()
    return mean.tolist(), std.clamp(min=1).tolist()


def describe_classes(dataset):
    """Lines for a person: how many images each class has, and which has more than ten times those of another."""
    names, width = dataset.classes, max(map(len, dataset.classes))
    train, test = (split.labels.bincount(minlength=len(names)).tolist() for split in (dataset.train, dataset.test))
    if len(names) <= 20:
        lines = [f"  {name:{width}}  {a:7,} training {b:7,} test images" for name, a, b in zip(names, train, test, strict=True)]
    else:
        ranges = [f"{min(counts):,} to {max(counts):,}" for counts in (train, test)]
        lines = [f"  {len(names)} classes, each of {ranges[0]} training and {ranges[1]} test images"]
    few, many = min(train), max(train)
    if many > 10 * few:
        most, fewest = names[train.index(many)], names[train.index(few)]
        lines.append(
            f"  unbalanced: {most} has {many:,} training images, more than ten times the {few:,} of {fewest}: "
            "look at the error of each class, which evaluate.py prints"
        )
    return lines


# ------------------------------------------------------------------------------------------------------------- batches


def normalize(images, mean, std):
    """(N, 3, H, W) uint8 -> float32, (pixel - mean) / std per channel."""
    return (images.float() - mean) / std


def crop_and_flip(images, top, left, flip):
    """For each image: zero-pad by H / 8, cut out the window of the old size at (top, left), mirror it where flip is true.

    images (N, C, H, W), normalised, so that the padding is the mean colour; top and left (N,) int64 in 0..H/4, flip (N,) bool.
    """
    n, _, height, width = images.shape
    windows = F.pad(images, [height // 8] * 4).unfold(2, height, 1).unfold(3, width, 1)  # at 32 (N, C, 9, 9, H, W), a view
    crops = windows[torch.arange(n, device=images.device), :, top, left]  #                (N, C, H, W)
    return torch.where(flip.view(n, 1, 1, 1), crops.flip(3), crops)


def random_windows(n, generator, device, size=IMAGE_SIZE):
    """Arguments for crop_and_flip: n corners (top, left) and n coin tosses, drawn from the generator on its device."""
    top, left = torch.randint(0, 2 * (size // 8) + 1, (2, n), generator=generator, device=device)
    return top, left, torch.rand(n, generator=generator, device=device) < 0.5


def training_batches(split, batch_size, mean, std, augment, generator, rank=0, world_size=1):
    """One epoch, every image once, in an order from the generator: yields (images (N, 3, H, W) float32, labels (N,), share).

    The last batch is smaller where batch_size does not divide the number of images. Of several ranks, whose generators are in
    the same state, each gets its slice of every batch; share is the slice's part of the batch, 1 for a single process.
    The generator lives on the split's device.
    """
    device = split.labels.device
    order = torch.randperm(len(split), generator=generator, device=device)
    for indices in order.split(batch_size):
        windows = random_windows(len(indices), generator, device, split.images.shape[-1]) if augment else ()
        mine, *windows = (part.tensor_split(world_size)[rank] for part in (indices, *windows))
        images = normalize(split.images[mine], mean, std)
        if augment:
            images = crop_and_flip(images, *windows)
        yield images, split.labels[mine], len(mine) / len(indices)
