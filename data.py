"""Data sets as uint8 tensors on the training device; a batch is gathered, normalised, cropped and flipped there.

No worker processes; every image is decoded once. archives.py reads CIFAR and SVHN, folder.py your own pictures.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10, CIFAR100

import archives
import folder
from endings import Refused
from progress import progress

IMAGE_SIZE = 32


@dataclass(frozen=True)
class Split:
    images: torch.Tensor  # (M, 3, S, S) uint8; S = 32 except for --dataset folder
    labels: torch.Tensor  # (M,) int64

    def __len__(self):
        return len(self.labels)

    def take(self, indices):
        return Split(self.images[indices], self.labels[indices])

    def to(self, device):
        return Split(self.images.to(device), self.labels.to(device))

    def digest(self):
        content = hashlib.blake2b(repr(self.images.shape).encode(), digest_size=16)
        for tensor in (self.images, self.labels):
            content.update(tensor.cpu().contiguous().numpy())
        return content.hexdigest()


class Dataset(NamedTuple):
    train: Split
    val: Split  # held-out training images, or none
    test: Split
    mean: torch.Tensor  # (3, 1, 1) float32, of pixels 0..255
    std: torch.Tensor  # (3, 1, 1) float32
    classes: list[str]

    def to(self, device):
        return Dataset(*(each.to(device) for each in self[:-1]), self.classes)

    def digests(self):
        """{part: hash of its pixels and labels}, which --resume compares."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split.digest() for name, split in parts.items() if split}


def load(name, root, val=0, limit=None, image_size=IMAGE_SIZE, quiet=False):
    """The data set `name` from the folder `root`; `val` training images are held out, `limit` of the others kept.

    A folder's pictures become image_size x image_size. Refused if the data is missing or damaged.
    """
    parts = progress(("train", "test"), not quiet and name != "folder", desc=f"reading {name}", unit=" parts")
    (train, classes), (test, _) = (read_part(name, root, part, image_size, quiet, val) for part in parts)
    mean, std = torch.tensor(SOURCES[name][1] or mean_and_std(train.images), dtype=torch.float32).view(2, 3, 1, 1)
    indices, held_out = hold_out(train.labels, val, limit)
    kept = train if len(indices) == len(train) else train.take(indices)  # the whole set is not copied
    return Dataset(kept, train.take(held_out), test, mean, std, classes)


def read_part(name, root, part, image_size=IMAGE_SIZE, quiet=False, val=0):
    """(Split, class names) of the "train" or "test" part; that part's files suffice, except for a folder's "train"."""
    options = {"image_size": image_size, "quiet": quiet, "val": val} if name == "folder" else {}
    images, labels, classes = SOURCES[name][0](Path(root), part, **options)
    square = images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1:] == (3, images.shape[3], images.shape[3])
    one_each = labels.dtype == torch.int64 and labels.shape == images.shape[:1]
    if not (square and one_each and {*labels.unique().tolist()} <= {*range(len(classes))}):
        raise ValueError(f"the reader of {name} must give (images (M, 3, S, S) uint8, labels (M,) int64, names of the classes)")
    return Split(images, labels), [*map(str, classes)]


def hold_out(labels, val, limit=None):
    """(indices of the images to train on, at most `limit`; indices of the `val` held-out ones), sorted, whatever --seed is."""
    order = folder.fixed_permutation(len(labels))
    held_out, rest = order[:val].sort().values, order[val:].sort().values
    class_lost = val and len(labels[rest].unique()) < len(labels.unique())
    if class_lost or len(rest) < (limit or 1):
        asked = " and ".join(f"--{flag} {number}" for flag, number in [("val", val), ("limit", limit)] if number)
        raise Refused(f"{len(labels):,} training images are too few for {asked}, or a class would have none left: choose fewer")
    return rest[:limit], held_out


def read_digits(root, part):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 enlarged to 32 x 32 in three channels; 360 of them are the test set."""
    from sklearn import datasets, model_selection  # slow to import, and needed here only

    pixels, labels = datasets.load_digits(return_X_y=True)
    train, test = model_selection.train_test_split([*range(len(labels))], test_size=360, stratify=labels, random_state=0)
    indices = train if part == "train" else test
    images = torch.from_numpy(pixels[indices]).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, size=IMAGE_SIZE, mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    return images, torch.from_numpy(labels[indices]), range(10)


# {data set: (its reader, the mean and std to normalise by)}: CIFAR's are the official code's, SVHN's divide by 255 as in the
# paper (section 4.1); None: computed.
SOURCES = {
    "cifar10": (partial(archives.read_cifar, CIFAR10), ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))),
    "cifar100": (partial(archives.read_cifar, CIFAR100), ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4))),
    "svhn": (archives.read_svhn, ((0, 0, 0), (255, 255, 255))),
    "digits": (read_digits, None),
    "folder": (folder.read_part, None),
}


def mean_and_std(images):
    """(means, stds) of the channels, exactly, by counting the pixels of each value 0..255; a std is at least 1."""
    parts = images.split(max(1, 2**26 // images[0, 0].numel()))
    counts = torch.stack([sum(part[:, c].flatten().bincount(minlength=256) for part in parts) for c in range(3)])
    shares, values = counts / counts.sum(dim=1, keepdim=True, dtype=torch.float64), torch.arange(256.0, dtype=torch.float64)
    means, squares = shares @ values, shares @ values.square()
    return means.tolist(), (squares - means.square()).clamp(min=1).sqrt().tolist()


def normalize(images, mean, std):
    """(N, 3, H, W) uint8 -> float32, (pixel - mean) / std per channel."""
    return (images.float() - mean) / std


def crop_and_flip(images, top, left, flip):
    """For each image: zero-pad by H // 8, cut out the window of the old size at (top, left), mirror it where flip is true.

    images (N, C, H, W), normalised: the padding is the mean colour; top and left (N,) int64 in 0..2 * (H // 8), flip (N,) bool.
    """
    n, _, height, width = images.shape
    windows = F.pad(images, [height // 8] * 4).unfold(2, height, 1).unfold(3, width, 1)  # at 32 (N, C, 9, 9, H, W), a view
    crops = windows[torch.arange(n, device=images.device), :, top, left]  #                (N, C, H, W)
    return torch.where(flip.view(n, 1, 1, 1), crops.flip(3), crops)


def random_windows(n, size, generator, device):
    """Random (top, left, flip) of n images of this size for crop_and_flip."""
    top, left = torch.randint(0, 2 * (size // 8) + 1, (2, n), generator=generator, device=device)
    return top, left, torch.rand(n, generator=generator, device=device) < 0.5


def training_batches(dataset, batch_size, augment, generator, rank=0, world_size=1):
    """One epoch, every image once, shuffled by the generator: yields (images (N, 3, H, W) float32, labels (N,), share).

    Each rank gets a slice of every batch; share is its fraction of the batch. All ranks' generators have the same state.
    """
    split, device = dataset.train, dataset.train.labels.device
    order = torch.randperm(len(split), generator=generator, device=device)
    for indices in order.split(batch_size):
        windows = random_windows(len(indices), split.images.shape[-1], generator, device) if augment else ()
        mine, *windows = (part.tensor_split(world_size)[rank] for part in (indices, *windows))
        images = normalize(split.images[mine], dataset.mean, dataset.std)
        yield crop_and_flip(images, *windows) if augment else images, split.labels[mine], len(mine) / len(indices)
