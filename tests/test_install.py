"""What `pip install .` installs: the model, its dense block and its kernels, and nothing else."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or later builds the wheel")
pytestmark = pytest.mark.xdist_group("wheel")  # built once

NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "data", "work", "shared", "build", "*.egg-info"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which `pip install .` installs; offline, from a copy, since the wheel is built beside its source."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_COPIED)
    offline = ["--no-cache-dir", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", folder / "installed", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "installed"


def test_the_library_alone_is_installed(installed):
    names = {path.name for path in installed.iterdir()} - {"__pycache__"}
    assert names == {"densenet.py", "dense_block.py", "kernels.py", "densenet_bc-0.1.0.dist-info"}


def test_what_is_installed_makes_a_net_without_the_repository(installed, tmp_path):
    code = f"""
import sys
assert {str(ROOT)!r} not in sys.path
import torch, densenet
net = densenet.DenseNet(depth=10, efficient=True)
net(torch.zeros(2, 3, 8, 8)).sum().backward()
print(densenet.__file__)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True)
    assert done.stdout == f"{installed / 'densenet.py'}\n", done.stderr
