"""Picture files as 8-bit RGB images of one size.

EXIF orientation, 16 bits and transparency are taken into account; a picture whose range of values is unknown is refused.
"""

import contextlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin
from torchvision.transforms.functional import pil_to_tensor

from endings import Refused, say
from machine import num_cpus
from progress import on_terminal, progress

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
MANY_UNREADABLE = 10  # pictures; no more are named
MAX_THREADS = 16  # each holds a picture of up to Pillow's limit

# Pillow's modes that it converts correctly to RGB, or to RGBA where something is transparent.
MODES = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBA", "RGBa"}
TRANSPARENT_GREY_STEP = {"L;2": 85, "L;4": 17}  # from a grey of 2 or 4 bits to one of 8
SIXTEEN_BITS = {"I;16", "I;16L", "I;16B", "I;16N"}

# Pillow's own reader garbles uncompressed TIFF files that are stored on their side, or in planes of other than 8 bits.
TiffImagePlugin.READ_LIBTIFF = True


def read_pictures(paths, size, title=None):
    """(images (M, 3, size, size) uint8, the M paths that could be read, {path: why not, an Unreadable} of the others).

    With a title, a bar is shown, or the title alone where there is no terminal.
    """
    images, readable, unreadable = torch.empty(len(paths), 3, size, size, dtype=torch.uint8), [], {}
    pool = ThreadPoolExecutor(min(num_cpus(), MAX_THREADS))  # Pillow releases the GIL while it decodes
    if title and not on_terminal():
        say(title)
    with warnings.catch_warnings(action="ignore"):  # Pillow's warnings are harmless, or an error follows
        try:
            read = pool.map(partial(read_picture, size=size), paths)
            for path, picture in zip(paths, progress(read, bool(title), desc=title, total=len(paths), unit=""), strict=True):
                if isinstance(picture, Unreadable):
                    unreadable[path] = picture
                else:
                    images[len(readable)] = picture
                    readable.append(path)
        finally:  # an error or Ctrl-C waits for the pictures that are being read, not for those that are queued
            pool.shutdown(cancel_futures=True)
    return images[: len(readable)], readable, unreadable


def refuse_unreadable(reasons):
    """Refused if there is a reason, {path: why it cannot be read}; some are named."""
    if reasons:
        named = ", ".join(f"{path} ({reason})" for path, reason in [*reasons.items()][:MANY_UNREADABLE])
        more = f" and {len(reasons) - MANY_UNREADABLE:,} more" if len(reasons) > MANY_UNREADABLE else ""
        raise Refused(f"cannot be read as pictures: {named}{more}: make them readable pictures in 8-bit RGB, or remove them")


class Unreadable(ValueError):
    """A picture that Pillow cannot read, or whose values cannot be converted to 8 bits with certainty."""


def read_picture(path, size):
    """One picture file as to_tensor gives it, or the reason why it cannot be read."""
    try:
        return to_tensor(open_picture(path, size), size)
    except Unreadable as error:
        return Unreadable(str(error))  # without its traceback, whose frames hold the picture


def to_tensor(picture, size):
    """A Pillow picture as a (3, size, size) uint8 tensor: upright, its shorter side resized to `size`, centre-cropped."""
    decode(picture)  # with torch.hub's preprocess it may not be loaded yet
    rgb = to_rgb(picture)
    with contextlib.suppress(Exception):  # unreadable EXIF data is ignored
        rgb.getexif()[ExifTags.Base.Orientation] = picture.getexif().get(ExifTags.Base.Orientation, 1)
        ImageOps.exif_transpose(rgb, in_place=True)
    return pil_to_tensor(ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR))


def open_picture(path, size):
    """The picture, decoded. Unreadable if Pillow cannot do that."""
    if not os.path.isfile(path):  # opening a pipe would block
        raise Unreadable("it is not a file" if os.path.exists(path) else "there is no such file")
    try:
        with Image.open(path) as picture:
            # A JPEG is decoded at 1/2, 1/4 or 1/8 where its sides stay at least 2 * size: the antialiased resize still halves
            # them, and a photograph is read several times as fast.
            picture.draft(None, (2 * size, 2 * size))
            decode(picture)
            return picture
    except Exception as error:  # Pillow raises nearly anything for a broken file
        reason = getattr(error, "strerror", None) or str(error).replace(f" {str(path)!r}", "") or type(error).__name__
        raise Unreadable(reason.splitlines()[0]) from error


def decode(picture):
    """Loads the pixels; scales a PNG's transparent grey as Pillow scales them. Unreadable if Pillow would get them wrong."""
    if picture.mode in ("LA", "PA") and getattr(picture, "tag_v2", {}).get(ExifTags.Base.PlanarConfiguration) == 2:
        raise Unreadable("its transparency is in a separate plane")
    key = picture.info.get("transparency")
    layout = picture.tile[0].args if getattr(picture, "tile", None) else None  # of what is not loaded yet
    if key is not None and layout == "RGB;16B":
        raise Unreadable("its transparent colour has 16 bits")
    if key is not None and layout in TRANSPARENT_GREY_STEP:
        picture.info["transparency"] = key * TRANSPARENT_GREY_STEP[layout]
    if picture.format == "BMP" and layout and layout[0] == "1" and layout[1] != (picture.width + 31) // 32 * 4:
        raise Unreadable("its two colours have more than one bit")  # Pillow would read one
    picture.load()


def to_rgb(picture):
    """The first frame in RGB, on white where it is transparent. Unreadable if the range of its values is unknown."""
    if picture.mode in SIXTEEN_BITS or (picture.mode, picture.format) == ("I", "PPM"):
        picture = to_8_bits(picture)
    if picture.mode not in MODES or signed(picture):
        raise Unreadable(f"its pixels are of type {picture.mode}, whose range of values is unknown")
    try:
        transparent = picture.has_transparency_data
        picture = picture.convert("RGBA" if transparent else "RGB")
    except (AssertionError, TypeError, ValueError) as error:  # a missing palette, text in place of the colour
        raise Unreadable("its palette or its transparent colour is invalid") from error
    if not transparent:
        return picture
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture)  # before resizing, which would mix in the colour of transparent pixels
    return white


def to_8_bits(picture):
    """A 16-bit grey picture as an 8-bit one: the largest possible value is white, and nothing is clipped."""
    tags = getattr(picture, "tag_v2", {})  # a TIFF may have 12 bits, or black as its largest value
    largest = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
    values = np.asarray(picture)
    grey = np.rint(values * np.float32(255 / largest)).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        grey = 255 - grey
    if "transparency" not in picture.info:
        return Image.fromarray(grey)
    alpha = np.where(values == picture.info["transparency"], 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([grey, alpha], axis=-1))


def signed(picture):
    """Whether the file says that its values are signed: a TIFF of 8 bits can."""
    return 2 in getattr(picture, "tag_v2", {}).get(ExifTags.Base.SampleFormat, ())
