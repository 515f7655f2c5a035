"""Picture files as telephones, scanners, microscopes and drawing programs make them: the right pixels, or one sentence."""

import errno
import io
import os
import shutil
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import folder
import pictures
from endings import Refused

RAMP = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) % 256  # as 8 bits; times 257 it is the same picture in 16
UNDO = {  # an upright picture is stored like this where its EXIF orientation is ...
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def read(path, size=32):
    images, _, unreadable = pictures.read_pictures([path], size)
    pictures.refuse_unreadable(unreadable)
    return images[0]


def colours(path):
    """The set of all colours of the picture, as it is read."""
    return {tuple(pixel) for pixel in read(path).flatten(1).t().tolist()}


def row(path):
    """The red values of the first row of the picture, not resized."""
    return np.asarray(pictures.to_rgb(pictures.open_picture(path, 32)))[0, :, 0].tolist()


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(path, depth, colour, samples, transparent):
    """A PNG of one row of pixels that Pillow cannot write: any depth, with one colour that is transparent."""
    width = len(samples) * 8 // depth // (3 if colour == 2 else 1)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)), (b"tRNS", struct.pack(">H", transparent))]
    if colour == 2:
        parts[1] = (b"tRNS", struct.pack(">HHH", *[transparent] * 3))
    parts += [(b"IDAT", zlib.compress(b"\0" + samples)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def png_with_text(path, key, text):
    texts = PngImagePlugin.PngInfo()
    texts.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, "PNG", pnginfo=texts)


def bmp(path, bits, entries):
    """A BMP of 64 x 8 white pixels, whose palette goes from black to white."""
    rows = bytes([255 if bits == 1 else (entries - 1) * (17 if bits == 4 else 1)]) * (64 * bits // 8 * 8)
    palette = b"".join(bytes([255 * i // (entries - 1)] * 3 + [0]) for i in range(entries))
    start, size = 54 + len(palette), len(rows)
    header = struct.pack("<IiiHHIIiiII", 40, 64, 8, 1, bits, 0, size, 0, 0, entries, 0)
    path.write_bytes(b"BM" + struct.pack("<IHHI", start + size, 0, 0, start) + header + palette + rows)


def tiff(path, bits, samples, width, photometric=1, sample_format=1):
    """A grey TIFF of one row of pixels."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(samples)}
    entries = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in (tags | {339: sample_format}).items()]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(samples)) + samples + directory)


def planes(path, pixels, order, tags):
    """An uncompressed TIFF of (C, H, W) pixels, each channel in a plane of its own."""
    (channels, height, width), size = pixels.shape, pixels[0].nbytes
    tags |= {256: [width], 257: [height], 259: [1], 277: [channels], 278: [height], 279: [size] * channels, 284: [2]}
    tags[273] = [8 + i * size for i in range(channels)]
    entries, more, beyond = b"", b"", 8 + pixels.nbytes + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        content = struct.pack(f"{order}{len(values)}H", *values)
        if len(content) > 4:
            content, more = struct.pack(f"{order}I", beyond + len(more)), more + content
        entries += struct.pack(f"{order}HHI", tag, 3, len(values)) + content.ljust(4, b"\0")
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + pixels.nbytes)
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + more
    path.write_bytes(start + pixels.astype(pixels.dtype.newbyteorder(order)).tobytes() + directory)


# ------------------------------------------------------------------------------------------------------------- bit depths


@pytest.mark.parametrize("kind", ["little.png", "little.tif", "big.tif", "binary.pgm"])
def test_16_bits_are_the_same_picture_as_8(tmp_path, kind):
    path, deep = tmp_path / kind, RAMP * 257
    if kind == "binary.pgm":
        path.write_bytes(b"P5 32 32 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep.astype(">u2" if kind == "big.tif" else "<u2")).save(path)
    assert torch.equal(read(path), torch.from_numpy(RAMP.astype(np.uint8)).expand(3, 32, 32))


def test_values_between_those_of_8_bits_are_rounded(tmp_path):
    Image.fromarray(np.full((40, 40), 257 * 9 + 129, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert colours(tmp_path / "grey.png") == {(10, 10, 10)}


def test_12_bits_and_white_that_is_zero(tmp_path):
    tiff(tmp_path / "12.tif", 12, bytes([0xFF, 0xF0, 0x00]), width=2)
    tiff(tmp_path / "inverted.tif", 16, struct.pack("<HH", 0, 65535), width=2, photometric=0)
    for name, expected in [("12.tif", [255, 0]), ("inverted.tif", [255, 0])]:
        assert row(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("depth", "samples", "expected"), [(1, b"\x40", [0, 255]), (2, b"\x1b", [0, 85, 170, 255]), (4, b"\x7f", [119, 255])]
)
def test_few_bits(tmp_path, depth, samples, expected):
    png(tmp_path / "few.png", depth, 0, samples, transparent=9)  # a colour that no pixel has
    assert row(tmp_path / "few.png")[: len(expected)] == expected


@pytest.mark.parametrize(("bits", "entries"), [(1, 2), (4, 3), (8, 3), (8, 256)])
def test_a_palette_of_a_bmp(tmp_path, bits, entries):
    bmp(tmp_path / "white.bmp", bits, entries)
    assert colours(tmp_path / "white.bmp") == {(255, 255, 255)}


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_in_planes(tmp_path, order):
    """As tifffile writes (3, H, W) arrays."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint16)
    planes(tmp_path / "planes.tif", pixels * 257, order, {262: [2], 258: [16] * 3})
    assert torch.equal(read(tmp_path / "planes.tif"), torch.from_numpy(pixels.astype(np.uint8)))


def test_white_that_is_zero_in_one_plane(tmp_path):
    planes(tmp_path / "inverted.tif", 255 - RAMP[None].astype(np.uint8), "<", {262: [0], 258: [8]})
    assert torch.equal(read(tmp_path / "inverted.tif"), torch.from_numpy(RAMP.astype(np.uint8)).expand(3, 32, 32))


# ------------------------------------------------------------------------------------------------------------ orientation


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, *UNDO])
def test_a_picture_stored_turned_is_the_upright_one(tmp_path, orientation, kind):
    upright = noise(70, 41)
    stored = upright.transpose(UNDO[orientation]) if orientation in UNDO else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"turned.{kind}", exif=exif, lossless=True)
    upright.save(tmp_path / "upright.png")
    assert torch.equal(read(tmp_path / f"turned.{kind}"), read(tmp_path / "upright.png"))


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "I;16"])
def test_a_picture_stored_turned_that_is_not_in_rgb(tmp_path, mode, kind):
    upright, exif = noise(70, 41).convert("L"), Image.Exif()
    exif[0x0112] = 6
    upright = Image.fromarray(np.asarray(upright, dtype=np.uint16) * 257) if mode == "I;16" else upright.convert(mode)
    if mode in ("RGBA", "LA"):
        upright.putalpha(noise(70, 41, seed=1).convert("L"))
    upright.transpose(UNDO[6]).save(tmp_path / f"turned.{kind}", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert torch.equal(read(tmp_path / f"turned.{kind}"), read(tmp_path / "upright.png"))


@pytest.mark.parametrize("kind", ["jpg", "mpo"])  # mpo is what many telephones write: a JPEG with further pictures behind it
def test_a_photograph_stored_turned(tmp_path, kind):
    upright, exif = noise(704, 416), Image.Exif()
    exif[0x0112] = 6
    options = {"save_all": True, "append_images": [upright]} if kind == "mpo" else {}
    upright.transpose(UNDO[6]).save(tmp_path / f"turned.{kind}", exif=exif, quality=95, **options)
    upright.save(tmp_path / "upright.png")
    difference = read(tmp_path / f"turned.{kind}").int() - read(tmp_path / "upright.png").int()
    assert difference.abs().max() <= 4


def test_exif_that_cannot_be_read_says_nothing(tmp_path):
    noise(64, 64).save(tmp_path / "plain.jpg", quality=95)
    for exif in (b"Exif\0\0rubbish", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"rubbish" * 9):
        noise(64, 64).save(tmp_path / "broken.jpg", quality=95, exif=exif)
        assert torch.equal(read(tmp_path / "broken.jpg"), read(tmp_path / "plain.jpg"))


# ------------------------------------------------------------------------------------------------- colours, transparency


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (0, 0, 0, 0), 255),
        ("RGBA", (0, 0, 0, 255), 0),
        ("RGBA", (0, 0, 0, 51), 204),
        ("LA", (0, 0), 255),
        ("LA", (100, 255), 100),
        ("1", 1, 255),
        ("L", 77, 77),
    ],
)
def test_alpha_is_laid_on_white(tmp_path, mode, colour, expected):
    Image.new(mode, (40, 50), colour).save(tmp_path / "picture.png")
    assert colours(tmp_path / "picture.png") == {(expected,) * 3}


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
@pytest.mark.parametrize("kind", ["png", "gif"])
def test_a_palette_with_transparency(tmp_path, transparency, kind):
    picture = Image.new("P", (40, 40), 0)
    picture.putpalette([0, 0, 0, 200, 10, 20])
    picture.paste(1, (0, 0, 40, 20))
    picture.save(tmp_path / f"palette.{kind}", transparency=transparency if kind == "png" else 0)
    assert colours(tmp_path / f"palette.{kind}") >= {(200, 10, 20), (255, 255, 255)}
    assert read(tmp_path / f"palette.{kind}")[0].min() >= 200


@pytest.mark.parametrize(
    ("depth", "colour", "samples", "transparent", "expected"),
    [
        (8, 0, bytes([7, 9]), 7, [255, 9]),
        (4, 0, bytes([0x79]), 7, [255, 153]),
        (2, 0, bytes([0x1B]), 1, [0, 255, 170, 255]),
        (1, 0, b"\x40", 0, [255, 255]),
        (16, 0, struct.pack(">HH", 4863, 2570), 4863, [255, 10]),
        (16, 0, struct.pack(">HH", 4863, 4864), 4863, [255, 19]),  # another one, though the same in 8 bits
        (8, 2, bytes([5, 5, 5, 5, 5, 6]), 5, [255, 5]),
    ],
)
def test_one_colour_of_a_png_is_transparent(tmp_path, depth, colour, samples, transparent, expected):
    png(tmp_path / "key.png", depth, colour, samples, transparent)
    assert row(tmp_path / "key.png")[: len(expected)] == expected


def test_what_is_transparent_leaves_no_fringe(tmp_path):
    """White beside transparent black is all white, also where the two are mixed by the resizing."""
    picture = Image.new("RGBA", (99, 99), (0, 0, 0, 0))
    picture.paste((255, 255, 255, 255), (0, 0, 50, 99))
    picture.save(tmp_path / "half.png")
    assert colours(tmp_path / "half.png") == {(255, 255, 255)}


@pytest.mark.parametrize("name", ["ink.jpg", "ink.tif"])
def test_cmyk(tmp_path, name):
    Image.new("CMYK", (40, 40), (0, 255, 0, 0)).save(tmp_path / name, quality=95)
    assert colours(tmp_path / name) == {(255, 0, 255)}


def test_lab_and_ycbcr(tmp_path):
    Image.new("LAB", (40, 40), (255, 128, 128)).save(tmp_path / "white.tif")
    assert min(min(colours(tmp_path / "white.tif"))) >= 254
    Image.new("YCbCr", (40, 40), (100, 128, 128)).save(tmp_path / "grey.tif")
    assert colours(tmp_path / "grey.tif") == {(100, 100, 100)}


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_of_an_animation(tmp_path, kind):
    red, blue = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    red.save(tmp_path / f"frames.{kind}", save_all=True, append_images=[blue], lossless=True)
    assert colours(tmp_path / f"frames.{kind}") == {(255, 0, 0)}


@pytest.mark.parametrize("kind", ["jpg", "jpeg", "JPG", "png", "gif", "bmp", "webp", "tif", "tiff", "ppm", "pgm"])
def test_every_kind_of_file_that_readme_names_is_found_and_read(tmp_path, kind):
    Image.new("L" if kind == "pgm" else "RGB", (40, 40), 0).save(tmp_path / f"black.{kind}")
    (path,) = folder.pictures_in(tmp_path)
    assert colours(path) == {(0, 0, 0)}


def test_the_content_tells_the_format_not_the_name(tmp_path):
    noise(40, 40).save(tmp_path / "picture.png")
    shutil.copy(tmp_path / "picture.png", tmp_path / "picture.jpg")
    assert torch.equal(read(tmp_path / "picture.jpg"), read(tmp_path / "picture.png"))


# ------------------------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("tall", [False, True])
def test_the_middle_is_cut_out_and_not_squeezed(tmp_path, size, tall):
    """Red, green, blue side by side, each a third of the longer side, twice the shorter: left are two halves and the green."""
    pixels = np.zeros((96, 192, 3), dtype=np.uint8)
    for i in range(3):
        pixels[:, 64 * i : 64 * i + 64, i] = 255
    Image.fromarray(pixels.transpose(1, 0, 2) if tall else pixels).save(tmp_path / "bands.png")
    image = read(tmp_path / "bands.png", size)
    row = (image.transpose(1, 2) if tall else image)[:, size // 2]  # (3, size)
    green = (row[1] > 127).sum().item()
    assert abs(green - size * 64 / 96) <= 1  # squeezed it would be a third
    for column, colour in [(0, [255, 0, 0]), (-1, [0, 0, 255])]:
        assert (row[:, column].int() - torch.tensor(colour)).abs().max() <= 4  # at 8 the filter reaches the green


def test_small_details_are_averaged(tmp_path):
    """A fine chessboard is grey: antialiased."""
    board = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    assert {value for colour in colours(tmp_path / "board.png") for value in colour} <= {126, 127, 128, 129}


def test_a_thin_line_is_spread_by_a_triangle():
    """At half the size over the two nearest pixels, 3/8 and 1/8 of it: a trained net is to see what it was trained on."""
    picture = Image.new("L", (64, 64), 0)
    picture.paste(255, (30, 0, 31, 64))
    row = pictures.to_tensor(picture, 32)[0, 0].tolist()
    assert row == [0] * 14 + [32, 96] + [0] * 16


@pytest.mark.parametrize(
    ("size", "decoded"), [((256, 256), (64, 64)), ((255, 300), (128, 150)), ((512, 300), (128, 75)), ((63, 900), (63, 900))]
)
def test_a_photograph_is_decoded_at_twice_the_size_at_least(tmp_path, size, decoded):
    """The rest is left to the antialiasing."""
    Image.new("RGB", size).save(tmp_path / "large.jpg")
    assert pictures.open_picture(tmp_path / "large.jpg", 32).size == decoded


def test_a_large_photograph_decoded_at_a_quarter_is_the_same_but_for_rounding(tmp_path):
    noise(800, 600).save(tmp_path / "large.jpg", quality=95)
    with Image.open(tmp_path / "large.jpg") as picture:
        whole = pictures.ImageOps.fit(picture.convert("RGB"), (32, 32), Image.Resampling.BILINEAR)
    difference = read(tmp_path / "large.jpg").int() - torch.from_numpy(np.array(whole)).permute(2, 0, 1).int()
    assert difference.abs().max() <= 6
    assert difference.abs().float().mean() < 1


@pytest.mark.parametrize("shape", [(1, 1), (3000, 1), (1, 3000), (7, 5)])
def test_pictures_that_are_small_or_thin(tmp_path, shape):
    Image.new("RGB", shape, (1, 2, 3)).save(tmp_path / "thin.png")
    assert colours(tmp_path / "thin.png") == {(1, 2, 3)}


# --------------------------------------------------------------------------------------------------------------- refusals


RANGE, NO_FORMAT, NO_FILE = "its pixels are of type", "cannot identify image file", "there is no such file"
BOMB = "Image size (200000000 pixels) exceeds limit"
REFUSED = {  # how to make the file, why it is refused
    "16 bits, signed": (lambda p: tiff(p, 16, struct.pack("<hh", -5, 300), 2, sample_format=2), RANGE),
    "8 bits, signed": (lambda p: tiff(p, 8, bytes([5, 250]), 2, sample_format=2), RANGE),
    "32 bits": (lambda p: Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)).save(p, "TIFF"), RANGE),
    "32 bits, unsigned": (lambda p: tiff(p, 32, struct.pack("<II", 5, 300), 2), RANGE),
    "floats": (lambda p: Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(p, "TIFF"), RANGE),
    "transparent colour": (lambda p: png(p, 16, 2, bytes(6), 4863), "its transparent colour has 16 bits"),
    "plane of transparency": (
        lambda p: planes(p, np.full((2, 8, 8), 9, np.uint8), "<", {262: [1], 258: [8, 8], 338: [2]}),
        "its transparency is in a separate plane",
    ),
    "text for a colour": (
        lambda p: png_with_text(p, "transparency", "none"),
        "its palette or its transparent colour is invalid",
    ),
    "two colours in 8 bits": (lambda p: bmp(p, 8, 2), "its two colours have more than one bit"),
    "two colours in 4 bits": (lambda p: bmp(p, 4, 2), "its two colours have more than one bit"),
    "bomb": (lambda p: Image.new("1", (20_000, 10_000)).save(p), BOMB),
    "empty": (lambda p: p.write_bytes(b""), NO_FORMAT),
    "text": (lambda p: p.write_text("no picture"), NO_FORMAT),
    "a folder": (lambda p: p.mkdir(), "it is not a file)"),
    "nothing": (lambda p: None, NO_FILE),
    "broken link": (lambda p: p.symlink_to("nowhere"), NO_FILE),
    "pipe": (lambda p: os.mkfifo(p), "it is not a file)"),
}


def test_a_photograph_of_a_hundred_million_pixels_is_no_bomb(tmp_path, recwarn):
    Image.new("L", (12_000, 9_000), 77).save(tmp_path / "large.jpg")
    assert (read(tmp_path / "large.jpg") == 77).all()
    assert not recwarn.list


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_picture_is_refused_in_one_sentence(tmp_path, recwarn, kind):
    make, why = REFUSED[kind]
    path = tmp_path / "picture.png"
    make(path)
    with pytest.raises(Refused, match="cannot be read as pictures") as refusal:
        read(path)
    assert str(refusal.value).startswith(f"cannot be read as pictures: {path} ({why}")
    assert str(refusal.value).endswith("): make them readable pictures in 8-bit RGB, or remove them")
    assert "\n" not in str(refusal.value)
    assert not recwarn.list


def test_the_system_says_why_it_does_not_open_a_file(monkeypatch, tmp_path):
    """As to a user who may not read it, which root always may."""

    def may_not_be_read(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    picture = tmp_path / "secret.png"
    picture.touch()
    monkeypatch.setattr(Image, "open", may_not_be_read)
    with pytest.raises(Refused, match=r"secret\.png \(Permission denied\): "):
        read(picture)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"])
def test_a_file_that_is_cut_off_anywhere_is_refused_or_whole(tmp_path, kind):
    whole = io.BytesIO()
    noise(60, 50).save(whole, kind, **({"compression": "tiff_lzw"} if kind == "tiff" else {}))
    content, path = whole.getvalue(), tmp_path / "cut.png"
    path.write_bytes(content)
    image, refused = read(path), 0
    for end in [*range(0, len(content), len(content) // 25), len(content) - 2, len(content) - 1]:
        path.write_bytes(content[:end])
        try:
            assert torch.equal(read(path), image)
        except Refused:
            refused += 1
    assert refused >= 25


# ------------------------------------------------------------------------------------------------------------- many files


@pytest.fixture
def twenty(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(20)]
    for i, path in enumerate(paths):
        noise(50 + 20 * (i % 3), 40, seed=i).save(path)
    return paths


def test_the_number_of_threads_changes_nothing(twenty, monkeypatch):
    results = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(pictures, "num_cpus", lambda threads=threads: threads)
        results.append(pictures.read_pictures(twenty, 16)[0])
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[0], torch.stack([read(path, 16) for path in twenty]))


def test_all_broken_files_are_told_and_the_others_read(twenty, monkeypatch):
    monkeypatch.setattr(pictures, "num_cpus", lambda: 7)
    twenty[5].write_bytes(twenty[5].read_bytes()[:-20])  # found out late
    twenty[6].unlink()
    twenty[9].write_bytes(b"")
    paths = [*twenty, twenty[9], twenty[0]]  # some twice
    for _ in range(5):
        images, readable, unreadable = pictures.read_pictures(paths, 16)
        assert list(unreadable) == [twenty[5], twenty[6], twenty[9]]
        assert readable == [path for path in paths if path not in unreadable]
        assert torch.equal(images, torch.stack([read(path, 16) for path in readable]))
        told = r": \S*/5.jpg \(.*\), \S*/6.jpg \(there is no such file\), \S*/9.jpg \(.*\): make them readable"
        with pytest.raises(Refused, match=told):
            pictures.refuse_unreadable(unreadable)


def test_a_picture_that_cannot_be_read_is_not_kept(tmp_path):
    """Its reason is, and that has no frames: they would hold its pixels."""
    (tmp_path / "a.png").write_bytes(b"broken")
    (reason,) = pictures.read_pictures([tmp_path / "a.png"], 8)[2].values()
    assert (str(reason), reason.__traceback__, reason.__cause__) == (NO_FORMAT, None, None)


@pytest.mark.parametrize(("number", "more"), [(9, ""), (10, ""), (11, " and 1 more")])
def test_ten_that_cannot_be_read_are_named(number, more):
    with pytest.raises(Refused) as refusal:
        pictures.refuse_unreadable({str(i): "broken" for i in range(number)})
    named = ", ".join(f"{i} (broken)" for i in range(min(number, 10)))
    remedy = "make them readable pictures in 8-bit RGB, or remove them"
    assert str(refusal.value) == f"cannot be read as pictures: {named}{more}: {remedy}"


def test_a_title_is_one_line_where_there_is_no_terminal(twenty, capsys):
    pictures.read_pictures(twenty, 16, title="reading 20 pictures")
    assert capsys.readouterr() == ("reading 20 pictures\n", "")
    pictures.read_pictures(twenty, 16)
    assert capsys.readouterr() == ("", "")


def test_after_ctrl_c_the_rest_is_not_read(monkeypatch):
    """One thread; the others wait in its queue."""
    read, proceed = [], threading.Event()

    def read_picture(path, size):
        read.append(path)
        if len(read) > 3:
            proceed.wait()
        return torch.zeros(3, size, size, dtype=torch.uint8)

    def progress(images, *_, **options):
        yield next(images)
        raise KeyboardInterrupt

    class Pool(pictures.ThreadPoolExecutor):
        def shutdown(self, **options):
            super().shutdown(wait=False, **options)
            proceed.set()
            super().shutdown()

    monkeypatch.setattr(pictures, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(pictures, "num_cpus", lambda: 1)
    monkeypatch.setattr(pictures, "read_picture", read_picture)
    monkeypatch.setattr(pictures, "progress", progress)
    with pytest.raises(KeyboardInterrupt):
        pictures.read_pictures([str(i) for i in range(100)], 8)
    assert len(read) <= 4


@pytest.mark.parametrize(("error", "reason"), [(EOFError(), "EOFError"), (OSError("one\ntwo"), "one")])
def test_a_reason_is_one_line_or_the_name_of_an_error_that_says_nothing(monkeypatch, tmp_path, error, reason):
    def fail(path):
        raise error

    (tmp_path / "a.png").write_bytes(b"broken")
    monkeypatch.setattr(pictures.Image, "open", fail)
    assert str(pictures.read_picture(tmp_path / "a.png", 8)) == reason
