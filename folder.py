"""A folder of your own images as a data set: root/train/<class>/ and root/test/<class>/ with pictures in them.

`images, labels, classes = read_part(Path("pets"), "train", image_size=64)` are tensors and names.
"""

import hashlib
import unicodedata
from collections import Counter
from pathlib import Path

import torch

from endings import Refused, in_one_line, say
from machine import free_memory
from pictures import EXTENSIONS, read_pictures, refuse_unreadable

MANY_CLASSES, MANY_KINDS = 20, 5  # more are not listed one by one


def read_part(root, part, image_size, quiet=False, val=0):
    """(images (M, 3, S, S) uint8, labels (M,) int64, names of the classes) of the part "train" or "test" of a folder.

    Training images are in a fixed random order, so that --limit takes from all classes; test images come class by class.
    Refused, before any picture is read, if the folders are not a data set or need more memory than is free; holding out `val`
    images needs more.
    """
    classes = list_classes(root / part)
    if part == "train":
        test = list_classes(root / "test")
        check_classes(root, classes, test)
        check_memory(root, classes, test, image_size, val)
        if not quiet:
            say(*left_out(root, [root / "train", root / "test"]))
    files, labels = in_order(classes, part)
    title = None if quiet else f"reading {len(files):,} pictures in {root / part}"
    images, _, unreadable = read_pictures(files, image_size, title)
    refuse_unreadable(unreadable)
    return images, labels, list(classes)


def refuse_among_pictures(folder, root):
    """Refused if the folder is or lies in root/train or root/test, outside hidden folders: figures there would be read."""
    place = folder.resolve()
    for pictures in (Path(root, part).resolve() for part in ("train", "test")):
        if place.is_relative_to(pictures) and not any(name[0] == "." for name in place.relative_to(pictures).parts):
            raise Refused(f"{folder} is among the pictures of {root}, where figures would be read as pictures: choose another")


def in_order(classes, part):
    """(files, labels) of the classes' pictures in the order of read_part."""
    files = [file for files in classes.values() for file in files]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([*map(len, classes.values())]))
    order = fixed_permutation(len(files)) if part == "train" else torch.arange(len(files))
    return [files[i] for i in order.tolist()], labels[order]


def fixed_permutation(n):
    """A permutation of range(n), the same every time."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def check_classes(root, train, test):
    """Refused unless train and test, {class: its files}, have the same classes, two or more."""
    if list(train) != list(test):
        name = min(set(train) ^ set(test))
        lacking, its_classes = (root / "test", test) if name in train else (root / "train", train)
        twin = next((each for each in its_classes if spelling(each) == spelling(name)), None)
        if twin:  # in ASCII, since they may look alike
            raise Refused(f"{lacking} lacks the class {name!a}, and {twin!a} there differs in spelling only: rename one")
        raise Refused(f"{lacking} lacks the class {name!r}: give it a folder in both train and test")
    if len(train) < 2:
        raise Refused(f"{root / 'train'} has only one class ({next(iter(train))}): add a folder for each other class")


def check_memory(root, train, test, image_size, val):
    """Refused if the images of train and test do not fit the free memory; data.load copies the training images with --val."""
    for_training, for_test = (sum(map(len, part.values())) for part in (train, test))
    number, copied = for_training + for_test, for_training * (val > 0)
    needed, free = 3 * (number + copied) * image_size**2, free_memory()
    if needed > free:
        images = f"{number:,} pictures of {image_size} x {image_size} need {needed / 1e9:.1f} GB{' with --val' * (val > 0)}"
        raise Refused(f"{root}: {images}, {free / 1e9:.1f} GB are free: choose a smaller --image-size, or fewer pictures")


def spelling(name):
    """A name without its case, spaces, invisible characters and Unicode variants, such as those of an accent."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return "".join(letter for letter in plain if letter.isprintable() and letter != " ")


def list_classes(folder):
    """{class: its picture files}, in the order of torchvision's ImageFolder, of a folder with a folder for each class."""
    if not folder.is_dir():
        raise Refused(f"{folder} is not a folder: set --data to a folder with train/<class>/ and test/<class>/")
    paths = visible(folder)
    lost = next((path for path in paths if not path.exists()), None)
    if lost:  # it may stand for a class
        raise Refused(f"{lost} is a link to nothing: put back what it names, or remove it")
    folders = sorted(path for path in paths if path.is_dir())
    if not folders:
        raise Refused(f"{folder} holds no folder: make one for each class and put its pictures there")
    return {path.name: pictures_in(path) for path in folders}


def pictures_in(folder):
    """The picture files in the folder and below it, sorted. Refused if there is none."""
    pictures = (file for file in list_files(folder) if file.suffix.lower() in EXTENSIONS)
    files = sorted(pictures, key=lambda file: (str(file.parent), file.name))
    if not files:
        raise Refused(f"{folder} holds no picture ({', '.join(EXTENSIONS)}): put some there, or remove it")
    return files


def list_files(folder, above=()):
    """The files in the folder and below it; a link that leads back to a folder above it is not followed."""
    here = folder.resolve()
    for path in visible(folder) if here not in above else []:
        if path.is_dir():
            yield from list_files(path, {*above, here, *here.parents})
        else:
            yield path


def visible(folder):
    """What is in the folder, without hidden files and folders."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def left_out(root, parts=()):
    """A line that counts, by extension, the files below root that are not read; none if there are only hidden ones.

    Given the parts of a data set, it looks below those alone, and also counts pictures that lie beside the classes.
    """
    files = (file for folder in parts or [root] for file in list_files(folder))
    others = (file for file in files if file.suffix.lower() not in EXTENSIONS or file.parent in parts)
    kinds = Counter(sorted(kind_of(file) for file in others))
    counts = [f"{n:,} {kind}{' beside the classes' * (kind in EXTENSIONS)}" for kind, n in kinds.most_common(MANY_KINDS)]
    if kinds:
        yield f"{root}: files that are not read: {', '.join(counts)}{', …' * (len(kinds) > MANY_KINDS)}"


def kind_of(file):
    """The extension of a file, or what else it is counted by."""
    if not file.exists():
        return "linked to nothing"
    return file.suffix.lower() or "without extension"


def describe_classes(names, train_labels, test_labels):
    """Image counts of each class, or their range; warnings of similar names and of counts that differ more than tenfold."""
    shown = [*map(in_one_line, names)]
    width = max(map(len, shown))
    train, test = (labels.bincount(minlength=len(names)).tolist() for labels in (train_labels, test_labels))
    if len(names) <= MANY_CLASSES:
        lines = [f"  {name:{width}}  {a:7,} training {b:7,} test images" for name, a, b in zip(shown, train, test, strict=True)]
    else:
        ranges = [f"{min(counts):,} to {max(counts):,}" for counts in (train, test)]
        lines = [f"  {len(names)} classes, each of {ranges[0]} training and {ranges[1]} test images"]
    spelt = {}
    for name in names:
        spelt.setdefault(spelling(name), []).append(ascii(name))
    lines += [f"  {' and '.join(alike)} differ in spelling only" for alike in spelt.values() if len(alike) > 1]
    for part, counts in [("training", train), ("test", test)]:
        few, many = min(counts), max(counts)
        if many > 10 * few:
            both = " and of ".join(f"{names[counts.index(n)]} {n:,}" for n in (many, few))
            lines.append(f"  unbalanced ({part} images of {both}): evaluate.py prints the error of each class")
    return lines


def leaks(train, others):
    """Lines that count the images of each other part, {name: (M, 3, S, S) uint8}, that are training images as well."""
    known = {*map(fingerprint, train.cpu())}
    for part, images in others.items():
        count = sum(fingerprint(image) in known for image in images.cpu())
        if count:
            yield f"  {count:,} of {len(images):,} {part} images are training images, too: new ones may have a higher error"


def fingerprint(image):
    return hashlib.blake2b(image.contiguous().numpy(), digest_size=16).digest()
