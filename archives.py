"""CIFAR and SVHN: the archives of their authors, downloaded if missing, and read by torchvision.

Several processes may want the same archive, and each may be killed: one downloads, the others wait, and a file gets its name
only when it is complete.
"""

import contextlib
import os
import shutil
from http.client import HTTPException

import torch
from filelock import FileLock, Timeout
from torchvision.datasets import SVHN
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from endings import DISK_ERRORS, Refused, say

UNFINISHED = ".download"  # folder for incomplete files


def read_cifar(dataset_class, root, part):
    """(images (M, 3, 32, 32) uint8, labels (M,), class names) of the "train" or "test" part of CIFAR10 or CIFAR100."""
    files, meta = getattr(dataset_class, f"{part}_list"), [dataset_class.meta["filename"], dataset_class.meta["md5"]]
    lists = {"train_list": [meta], "test_list": [meta], f"{part}_list": files}  # the other part may be missing
    one_part = type(dataset_class.__name__, (dataset_class,), lists)
    if root.resolve().name == dataset_class.base_folder and not (root / dataset_class.base_folder).exists():
        root = root.resolve().parent  # --data named the folder of the batches itself
    paths = {root / dataset_class.base_folder / name: md5 for name, md5 in [*files, meta]}
    fetch(dataset_class.__name__, root, dataset_class.url, dataset_class.filename, dataset_class.tgz_md5, paths)
    data = one_part(root, train=part == "train")
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets), data.classes


def read_svhn(root, part):
    """As read_cifar; train and extra together are the training set (paper, section 4.1)."""
    splits = ["train", "extra"] if part == "train" else ["test"]
    for url, name, md5 in (SVHN.split_list[split] for split in splits):
        fetch("SVHN", root, url, name, md5, {root / name: md5})
    parts = [SVHN(root, split=split) for split in splits]
    images, labels = (torch.cat([torch.from_numpy(getattr(p, name)) for p in parts]) for name in ("data", "labels"))
    return images, labels.long(), range(10)


def refuse_damaged(files):
    """Refused if one of the files in {path: MD5} exists with another checksum."""
    for path, md5 in files.items():
        if path.exists() and not check_integrity(path, md5):
            raise Refused(f"{path} is damaged (wrong checksum): delete it to have it downloaded again")


def fetch(title, root, url, archive, md5, files):
    """Extracts the missing ones of the files {path: MD5} from the archive in root, which is downloaded if it is not there.

    Refused if a file that is there is damaged; torchvision checks all of them when it reads them.
    """
    refuse_damaged(files)
    if all(path.exists() for path in files):
        return
    if not (root / archive).exists() and all((root / part).is_dir() for part in ("train", "test")):
        raise Refused(f"{root} holds train and test, as a folder of pictures does: choose --dataset folder, or another --data")
    new = [path for path in (root, *root.parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(root):
            missing = [path for path in files if not path.exists()]  # another process may have extracted them
            if missing:
                refuse_damaged({root / archive: md5})
                download_whole(root, url, archive, md5, missing)
    except (OSError, RuntimeError, HTTPException) as error:
        with contextlib.suppress(OSError):
            for path in new:  # a mistyped name leaves no folder behind
                (path / f"{UNFINISHED}.lock").unlink(missing_ok=True)
                path.rmdir()
        if isinstance(error, BrokenPipeError):  # this program's output was closed
            raise
        raise refusal(error, title, root, url, archive) from error


def refusal(error, title, root, url, archive):
    """What fetch raises where the archive cannot be extracted or downloaded."""
    status = 1 if getattr(error, "errno", None) in DISK_ERRORS else 2
    reason = " ".join(str(error).split())  # some have several lines
    if (root / archive).exists():
        ways = "make room, or put it into a writable folder"
        return Refused(f"{root / archive} cannot be extracted there ({reason}): {ways}", status)
    lacks = f"the folder {root} lacks files of {title}, and downloading {url} failed ({reason})"
    return Refused(f"{lacks}: put {archive} there, or name another --data", status)


@contextlib.contextmanager
def one_at_a_time(root):
    """Waits until no other process downloads into root; where the file system has no locks, it goes on without one."""
    lock = FileLock(root / f"{UNFINISHED}.lock", fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say(f"another process is downloading into {root}: waiting for it")
        lock.acquire()
    except OSError:  # no locks
        pass
    try:
        yield
    finally:
        lock.release()


def download_whole(root, url, archive, md5, missing):
    """Downloads the archive unless it is there, and extracts the missing files; each gets its name when it is whole."""
    unfinished = root / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    try:
        if not (root / archive).exists():
            download_url(url, unfinished, archive, md5)
            os.replace(unfinished / archive, root / archive)
        if missing != [root / archive]:
            extract_archive(root / archive, unfinished)
            for path in missing:
                path.parent.mkdir(exist_ok=True)
                os.replace(unfinished / path.relative_to(root), path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
