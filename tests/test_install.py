"""What `pip install .` installs: the model, its dense block and its kernels, and nothing else."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or later builds the wheel")
pytestmark = pytest.mark.xdist_group("wheel")  # built once

NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "data", "work", "shared", "build", "*.egg-info"
)


def pip(*arguments):
    done = subprocess.run([sys.executable, "-m", "pip", "--no-cache-dir", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built offline from a copy, since it is built beside its source."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_COPIED)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, folder / "source")
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_library_alone(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"densenet.py", "dense_block.py", "kernels.py", "densenet_bc-0.1.0.dist-info"}


def test_what_is_installed_makes_a_net_without_the_repository(wheel, tmp_path):
    pip("install", "--no-deps", "--no-index", "--target", tmp_path / "installed", wheel)
    code = f"""
import sys
assert {str(ROOT)!r} not in sys.path
import torch, densenet
net = densenet.DenseNet(depth=10, efficient=True)
net(torch.zeros(2, 3, 8, 8)).sum().backward()
print(densenet.__file__)
"""
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "elsewhere",
        env={"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{tmp_path / 'installed' / 'densenet.py'}\n", done.stderr
