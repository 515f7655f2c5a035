"""Which file imports which: programs import no program, modules import in no circle, the model needs little."""

import ast
import functools
import graphlib
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = [*ROOT.glob("*.py"), *ROOT.glob("attic/*.py"), *ROOT.glob("images/*.py")]
PROGRAMS = {path.stem for path in FILES if path.read_text().startswith("#!")}
ALLOWED = {"train-vgg": {"train"}, "compare-speed": {"bench"}}  # in attic/: the very functions of a program are what they run


@functools.cache
def imports(path):
    """The top-level names of all that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.removeprefix("attic.").split(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_imports_a_program(path):
    assert imports(path) & PROGRAMS <= ALLOWED.get(path.stem, set())


def test_no_program_and_no_module_imports_the_attic():
    attic = {path.stem for path in ROOT.glob("attic/*.py")}
    assert not [path.name for path in ROOT.glob("*.py") if imports(path) & attic]


def test_no_circle():
    ours = {path.stem for path in FILES}
    graph = {path.stem: imports(path) & ours for path in FILES}
    assert {"checkpoint", "machine", "metrics"} <= graph["train"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_model_needs_torch_and_its_kernels_triton():
    needed = {name: imports(ROOT / f"{name}.py") - sys.stdlib_module_names for name in ("densenet", "dense_block", "kernels")}
    assert needed == {"densenet": {"torch", "dense_block"}, "dense_block": {"torch"}, "kernels": {"torch", "triton"}}


@pytest.mark.parametrize(("program", "needed"), [("plot", {"pandas", "drawing", "files"}), ("compare", {"pandas", "files"})])
def test_what_reads_runs_needs_pandas_and_for_figures_matplotlib_alone(program, needed):
    assert imports(ROOT / f"{program}.py") - sys.stdlib_module_names == needed | {"endings", "runs"}
    assert imports(ROOT / "runs.py") - sys.stdlib_module_names == {"pandas", "endings", "files"}
    assert imports(ROOT / "drawing.py") - sys.stdlib_module_names == {"matplotlib", "endings", "files"}
    assert imports(ROOT / "files.py") - sys.stdlib_module_names == {"endings"}
    assert imports(ROOT / "endings.py") <= sys.stdlib_module_names
    code = (
        f"import sys, {program}; print(*{{'torch', 'torchvision', 'PIL.ImageShow', 'matplotlib.pyplot'}} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
