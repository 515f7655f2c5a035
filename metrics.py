"""Predictions for a whole set of images, and their exact loss and error."""

import torch
import torch.nn.functional as F

from data import normalize
from progress import progress

CPU_PIXELS = 250 * 32 * 32  # in a batch on a CPU; without gradients a net needs little memory
GPU_ELEMENTS = 2**28  # in the input of the widest layer, on a GPU under 64 GiB: a batch takes 1 to 3 GiB with any net


@torch.inference_mode()
def predict(net, images, mean, std, title=None):
    """Logits (M, num_classes), on the CPU in float64, of M uint8 images, in evaluation mode; with a title, a bar is shown."""
    net.eval()
    batches = progress(images.split(batch_size(net, images)), shown=bool(title), desc=title, unit=" batches")
    return torch.cat([net(normalize(batch, mean, std)) for batch in batches]).cpu().double()


def batch_size(net, images):
    """How many of the images (M, 3, H, W) to run at a time; independent of free memory, so that runs are repeatable.

    On a GPU a batch takes about 12 bytes per element of the widest layer's input: at most a tenth of 64 GiB or more.
    """
    pixels = images.shape[2] * images.shape[3]
    if images.device.type != "cuda":
        return max(1, CPU_PIXELS // pixels)
    widest = max(p.shape[1] for p in net.parameters() if p.dim() == 4)
    memory = torch.cuda.get_device_properties(images.device).total_memory
    share = 2 ** ((memory // 128).bit_length() - 1)  # a power of 2: GPUs of one model differ a little in memory
    elements = min(max(GPU_ELEMENTS, share), 2**30)  # a large GPU would wait for the host; kernels.py counts in 32 bits
    return max(1, elements // (pixels * widest))


def loss_and_error_sums(logits, labels):
    """(sum of the cross-entropies, number of wrong answers), float64, over all rows of logits."""
    wrong = (logits.argmax(dim=1) != labels).sum()
    return torch.stack([F.cross_entropy(logits, labels, reduction="sum"), wrong.double()])
