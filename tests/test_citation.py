"""CITATION.cff is YAML with the keys that its format needs, and names the paper as the README does."""

import itertools
import re

from conftest import ROOT

LINE = re.compile(r"( *(?:- )?)([a-z-]+):(?: ([A-Za-z0-9](?:[^:#]|:(?! )|(?<! )#)*))?")  # YAML, as far as this file needs it


def entries():
    """(indentation, key, value or None) of each line."""
    matches = [LINE.fullmatch(line) for line in (ROOT / "CITATION.cff").read_text().splitlines()]
    return [(len(match[1]), match[2], match[3]) for match in matches]


def test_it_is_valid_and_has_the_keys_that_are_needed():
    for (indent, key, value), (following, *_) in itertools.pairwise(entries()):
        assert (following > indent) == (value is None), key  # a key has either a value, or lines of its own
        assert following % 2 == 0
    top = {key: value for indent, key, value in entries() if indent == 0}
    expected = {"cff-version": "1.2.0", "title": "DenseNet-BC in PyTorch", "type": "software", "license": "Apache-2.0"}
    assert expected.items() <= top.items()
    assert top.keys() == expected.keys() | {"message", "authors", "preferred-citation"}
    assert len(top) == len([indent for indent, *_ in entries() if indent == 0])


def test_it_names_the_paper_as_the_readme_does():
    paper = {key: value for indent, key, value in entries() if indent == 2}
    bibtex = (ROOT / "README.md").read_text().partition("@inproceedings")[2]
    told = dict(re.findall(r"^  (\w+) += \{(.*)\}", bibtex, re.MULTILINE))
    assert paper["type"] == "conference-paper"
    assert {"title": paper["title"], "booktitle": paper["collection-title"], "year": paper["year"]}.items() <= told.items()
    names = [f"{value}," if key == "family-names" else value for indent, key, value in entries() if indent == 6]
    assert " ".join(names) == told["author"].replace(" and ", " ")
