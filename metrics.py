"""Predictions for a whole set of images, and their exact loss and error."""

import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import normalize

BATCH_PIXELS = 250 * 32 * 32  # of the images at a time; without gradients a net needs little memory


@torch.inference_mode()
def predict(net, images, mean, std, title=None):
    """Logits (M, num_classes), on the CPU in float64, of M uint8 images; with a title, a terminal shows a bar."""
    net.eval()
    batches = images.split(max(1, BATCH_PIXELS // (images.shape[2] * images.shape[3])))
    if title and sys.stderr.isatty():
        batches = tqdm(batches, desc=title, leave=False, dynamic_ncols=True)
    return torch.cat([net(normalize(batch, mean, std)) for batch in batches]).cpu().double()


def loss_and_error_sums(logits, labels):
    """(sum of the cross-entropies, number of wrong answers), float64, over all rows of logits."""
    wrong = (logits.argmax(dim=1) != labels).sum()
    return torch.stack([F.cross_entropy(logits, labels, reduction="sum"), wrong.double()])
