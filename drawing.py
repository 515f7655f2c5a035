"""What all figures share: no Matplotlib setting changes them; names are plain text, in fonts that have their letters."""

import io
import os
import re
import textwrap
import unicodedata
import warnings

os.environ["MPLBACKEND"] = "agg"  # figures are only saved; Matplotlib does not start with a missing backend

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.ticker import AutoLocator, LogLocator, NullLocator

from endings import Refused, in_one_line, say_once
from files import PICTURE, refuse_foreign, replace_file

matplotlib.rcdefaults()  # a matplotlibrc may ask for LaTeX
warnings.filterwarnings("ignore", message="Glyph .* missing")  # said by font_families
FORMATS = ("png", "pdf", "svg")
MANY_LETTERS = 20  # more without a font are not named
OTHER_FORMATS = ("jpg", "jpeg", "gif", "tif", "tiff", "webp", "bmp", "eps", "ps", "avif")


def picture_format(path):
    """The format of the picture that the path names; None if it names a folder. Refused if it is another file."""
    suffix = "" if path.is_dir() else path.suffix.lower().removeprefix(".")
    if suffix in OTHER_FORMATS or (suffix not in FORMATS and path.is_file()):
        raise Refused(f"{path} has a format that cannot be written: name a file in .{', .'.join(FORMATS)}, or a folder")
    return suffix if suffix in FORMATS else None


def new_figure(width, height):
    """An empty figure; width and height are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # has one renderer; without it each measuring of a text makes, and keeps, a new one
    figure.get_layout_engine().set(wspace=0.04)
    return figure


def make_logarithmic(axes):
    """Makes the y axis logarithmic, unless no value is above 0; 3 to 16 numbers, at 1, 2, 5 of each decade if they fit."""
    if axes.dataLim.ymax <= 0:
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    locators = [LogLocator(subs=subs, numticks=15) for subs in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), (1,))]
    fits = (each for each in locators if 3 <= sum(low <= tick <= high for tick in each.tick_values(low, high)) <= 16)
    axes.yaxis.set_major_locator(next(fits, AutoLocator()))
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.yaxis.set_minor_locator(NullLocator())


def number(value):
    """A number of an axis as text, 0.001 or 1e9."""
    if 9e-6 < value < 1e7:
        return f"{value:.12f}".rstrip("0").rstrip(".")
    return re.sub(r"e\+?(-?)0?", r"e\1", f"{value:g}")


def as_text(names):
    """(names without undecodable bytes and control characters, text style): no mathtext, fonts that have all letters."""
    names = [name.encode(errors="replace").decode() for name in names]
    names = ["\n".join(map(in_one_line, name.split("\n"))) for name in names]
    return names, {"parse_math": False, "fontfamily": font_families("".join(names))}


def font_families(text):
    """The default fonts, then the installed ones that have letters which those lack; tells of letters that no font has."""
    usual = get_font(findfont(FontProperties())).get_charmap()
    lacking = {ord(letter) for letter in text if letter.isprintable()} - usual.keys()
    others = {font.name: font.fname for font in fontManager.ttflist if lacking and not font.name.startswith("Last Resort")}
    found = {name: lacking & get_font(path).get_charmap().keys() for name, path in others.items()}
    if missing := lacking.difference(*found.values()):
        letters = "".join(map(chr, sorted(missing)))
        named = letters if len(letters) <= MANY_LETTERS else f"{letters[:MANY_LETTERS]}…"
        say_once(f"no installed font has {named}: they are drawn as boxes until you install one")
    return ["sans-serif", *(name for name, letters in found.items() if letters)]


def wrapped(text, figure, letters):
    """The text in lines as long as the figure is wide, of so many letters an inch. (Matplotlib's own wrapping parses math.)"""
    filled = "".join(letter + "\0" * (unicodedata.east_asian_width(letter) in "WF") for letter in text)  # wide ones count twice
    return textwrap.fill(filled, int(letters * figure.get_figwidth()), replace_whitespace=False).replace("\0", "")


def add_legend(figure, entries, style):
    """One legend of (label, look of a line) below the panels, as wide as they are; the figure grows by its height."""
    labels = [wrapped(label, figure, letters=10) for label, _ in entries]
    lines = [figure.axes[0].plot([], [], **look)[0] for _, look in entries]
    for columns in range(min(len(labels), 8), 0, -1):
        legend = figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False)
        for text in legend.get_texts():
            text.set(**style)
        size = legend.get_window_extent()
        if size.width < figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)


def save(figure, path):
    """Writes the figure. Refused if it would replace a picture that Matplotlib did not make."""
    refuse_foreign(path, PICTURE)
    content = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # TrueType, which journals accept
        figure.savefig(content, format=path.suffix[1:].lower(), dpi=200)
    replace_file(path, content.getvalue(), alone=False)
