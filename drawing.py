"""What the figures of plot.py and evaluate.py have in common: names are text in them, in the fonts that have their letters."""

import warnings

import matplotlib
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from endings import naming


def as_text(names):
    """(names with undecodable bytes replaced, text style): no mathtext, fonts that have all letters."""
    names = [name.encode(errors="replace").decode() for name in names]
    return names, {"parse_math": False, "fontfamily": font_families("".join(names))}


def font_families(text):
    """The usual fonts, and behind them those installed that have some of the letters that these lack."""
    usual = get_font(findfont(FontProperties())).get_charmap()
    lacking = {ord(letter) for letter in text if letter.isprintable()} - usual.keys()
    others = {font.name: font.fname for font in fontManager.ttflist if lacking and not font.name.startswith("Last Resort")}
    return ["sans-serif", *(name for name, path in others.items() if lacking & get_font(path).get_charmap().keys())]


def save(figure, path):
    """Writes the figure; its axes have 0.01 and not 10^-2."""
    with naming(path), matplotlib.rc_context({"axes.formatter.min_exponent": 3}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # no font has that letter
        figure.savefig(path, dpi=150)
