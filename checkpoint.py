"""A net on disk: checkpoints, read safely; exported weights; the net rebuilt from either."""

import hashlib
import io
import zipfile
from inspect import signature
from pathlib import Path

import torch

from data import IMAGE_SIZE
from densenet import ArgumentError, DenseNet
from endings import MAX_VALUE, Refused
from files import as_json, read_json, refuse_existing, replace_file

CARD = {"model": dict, "args": dict, "epoch": int, "mean": list, "std": list, "classes": list}  # what --export writes, too
ARGS = {"dataset": str, "data": str, "val": int, "image_size": int | None, "digests": dict | None}  # what evaluate.py reads
MODEL = {"depth": int, "growth_rate": int, "reduction": int | float | None, "num_classes": int, "bottleneck": bool}
MODEL |= {"drop_rate": int | float, "init_channels": int | None, "efficient": bool}  # older ones lack arguments added later


def make_card(model, args, dataset):
    """What describes a net: its own arguments, those of its run, and what an evaluation needs to know of the data set."""
    return {
        "model": {**model, "num_classes": len(dataset.classes)},
        "args": args,
        "mean": dataset.mean.flatten().tolist(),
        "std": dataset.std.flatten().tolist(),
        "classes": dataset.classes,
        "image_size": dataset.train.images.shape[-1],
    }


def make_checkpoint(net, optimizer, scaler, epochs_done, card):
    """Everything that --resume and evaluate.py need; no random state, since each epoch seeds its own."""
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    return {**state, "epoch": epochs_done, **card}


def restore(checkpoint, net, optimizer, scaler):
    """Loads the checkpoint's state and returns its number of finished epochs; 0 for None."""
    if checkpoint is None:
        return 0
    net.load_state_dict(checkpoint["net"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["epoch"]


def fits(state, net):
    """Whether a state dict has the names and shapes of the net's."""
    own = net.state_dict()
    return own.keys() == state.keys() and all(own[name].shape == state[name].shape for name in own)


def digest(state):
    """A hash of the names and values of a state dict; as long as a commit, so that tables shorten it the same way."""
    content = hashlib.blake2b(digest_size=20)
    for name, value in state.items():
        content.update(name.encode())
        content.update(value.contiguous().numpy())
    return content.hexdigest()


def same_groups(state, optimizer):
    """Whether an optimiser's state dict has the groups of the optimiser, with as many parameters in each."""
    old, new = ([len(group["params"]) for group in each["param_groups"]] for each in (state, optimizer.state_dict()))
    return old == new


def build_net(checkpoint):
    """The trained DenseNet of a checkpoint, of plain modules, in evaluation mode. Refused if the weights are of another net."""
    model = checkpoint["model"]
    if not of_kinds(model, MODEL):
        raise Refused("the checkpoint does not describe a DenseNet: name the latest.pth of train.py")
    if unknown := ", ".join(sorted(model.keys() - signature(DenseNet).parameters.keys())):
        raise Refused(f"the checkpoint's net has {unknown}, which this densenet.py does not know: use that of its run")
    try:
        net = DenseNet(**model | {"efficient": False})
    except ArgumentError as error:
        raise Refused(f"the checkpoint describes an impossible DenseNet ({error}): it is damaged") from error
    if not fits(checkpoint["net"], net):
        raise Refused("the weights are not those of the DenseNet that the checkpoint names: use the densenet.py of its run")
    net.load_state_dict(checkpoint["net"])
    return net.eval()


def normalization(checkpoint, device):
    """(mean, std) of the training images, each (3, 1, 1)."""
    return [torch.tensor(checkpoint[name], device=device).view(3, 1, 1) for name in ("mean", "std")]


def checkpoint_in(path):
    """The file itself; of a folder its latest.pth, or the net.pth of a run that ships. Refused if there is neither."""
    if not path.is_dir():
        return path
    for name in ("latest.pth", "net.pth"):
        if (path / name).exists():
            return path / name
    raise Refused(f"{path} holds no checkpoint, neither latest.pth nor net.pth: name a run that has one")


def load_checkpoint(path, remedy="name a run, or its latest.pth"):
    """A checkpoint, or exported weights with their card, on the CPU. Refused, with a remedy, if the file is neither."""
    path = Path(path)
    if not path.is_file():
        raise Refused(f"{path} {'is not a file' if path.exists() else 'does not exist'}: {remedy}")
    path.open("rb").close()  # PermissionError: such a file is not damaged
    if path.suffix == ".json":
        raise Refused(f"{path} is JSON and holds no weights: name the .pth file beside it")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load ignores checksums
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code that is in the file
    except Exception as error:  # torch.load raises nearly anything for a file that is not its own
        raise Refused(f"{path} is damaged or no checkpoint of train.py: {remedy}") from error
    if is_state_dict(checkpoint):
        return {"net": checkpoint, **read_card(path.with_suffix(".json"))}
    if not is_card(checkpoint) or not is_state_dict(checkpoint.get("net")):
        raise Refused(f"{path} is not a checkpoint of train.py: {remedy}")
    return checkpoint


def is_card(values):
    """Whether values is a dictionary with the entries of CARD, which describe a net."""
    return (
        isinstance(values, dict)
        and of_kinds(values, CARD | {"image_size": int | None})  # older ones lack it
        and of_kinds(values["args"], ARGS)
        and 4 <= image_size_of(values) <= MAX_VALUE[int]
        and all([type(value) for value in values[name]] == [float] * 3 for name in ("mean", "std"))
        and all(isinstance(name, str) for name in values["classes"])
        and len(values["classes"]) == values["model"].get("num_classes")
    )


def of_kinds(values, kinds):
    """Whether the dictionary has a value of the right kind for each name; a missing one counts as None."""
    return all(isinstance(values.get(name), kind) for name, kind in kinds.items())


def is_state_dict(values):
    return isinstance(values, dict) and len(values) > 0 and all(torch.is_tensor(value) for value in values.values())


def read_card(path):
    """The card that --export wrote beside the weights. Refused if it is missing or something else."""
    remedy = "put it there, or name the latest.pth of the run"
    if not path.exists():
        raise Refused(f"bare weights need {path}, which evaluate.py --export writes beside them: {remedy}")
    card = read_json(path, remedy)
    if not is_card(card):
        raise Refused(f"{path} is not what evaluate.py --export writes: {remedy}")
    return card


def image_size_of(checkpoint):
    """The side of the net's images; older checkpoints have it in their arguments, and only for a folder."""
    return checkpoint.get("image_size") or checkpoint["args"].get("image_size") or IMAGE_SIZE


def encoded(values):
    """The bytes of torch.save, which does not report a full disk when given a path."""
    content = io.BytesIO()
    torch.save(values, content)
    return content.getvalue()


def export(checkpoint, path):
    """Writes the weights as a state dict, contiguous for other programs, and the card as JSON; returns the JSON's path."""
    card = path.with_suffix(".json")
    if card == path:
        raise Refused(f"{path} is where the description goes: name a .pth file")
    refuse_existing(path, card)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, encoded({name: value.contiguous() for name, value in checkpoint["net"].items()}))
    images = {"image_size": image_size_of(checkpoint), "pixels": "0..255"}  # mean and std are of such pixels
    replace_file(card, as_json({**{name: checkpoint[name] for name in CARD}, **images}))
    return card
