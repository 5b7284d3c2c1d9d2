"""What is shipped: the wheel, its package list, its data files, its examples, and the names it answers to."""

import doctest
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the same module under another name
    import tomli as tomllib

import resa.fast
import resa.reference

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"reference": "resa.reference", "fast": "resa.fast", "tests/vectors": "resa.vectors"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources():
    """Every file of the project that git does not ignore, relative to its root; all files where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        names = listed.stdout.splitlines()
    else:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if "__pycache__" not in path.parts]
    return [Path(name) for name in names if (ROOT / name).is_file()]


def shipped():
    """What the wheel must hold: each file under the two folders, by the name it is imported or found under."""
    found = {}
    for folder, package in FOLDERS.items():
        inside = [path for path in sources() if path.is_relative_to(folder)]
        found |= {"/".join([*package.split("."), *path.relative_to(folder).parts]): path for path in inside}
    return found


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that the tree stays free of build folders."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in sources():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", copy, "--wheel-dir", out, *options, cwd=copy)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_two_folders_and_nothing_else(wheel):
    """Every source, asset and py.typed, byte for byte; no tests, no caches."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        expected = shipped()
        assert held == set(expected)
        assert {"resa/reference/py.typed", "resa/fast/py.typed"} <= held
        assert any(name.startswith("resa/reference/assets/") for name in held)
        assert "resa/vectors/manifest.json" in held
        for name, path in expected.items():
            assert archive.read(name) == (ROOT / path).read_bytes(), name


IMPORTED = """
import importlib.util, json, pathlib, sys
import resa.reference, resa.fast
from resa.reference.conformance import load_vectors
assert len(load_vectors().manifest["operations"]) > 40
from resa.reference import GPT, GPTConfig, generate
tokens = generate(GPT(GPTConfig(11, 1, 2, 1, 4, 8, 8)), [[1, 2]], 3).tokens
assert len(tokens[0]) == 3
folders = [str(pathlib.Path(module.__file__).parent) for module in (resa.reference, resa.fast)]
files = [str(p.relative_to(f)) for f in folders for p in pathlib.Path(f).rglob("*") if p.suffix != ".pyc"]
print(json.dumps({"prefix": sys.prefix, "folders": folders, "files": files, "path": list(resa.__path__)}))
"""


def test_the_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    """Installed without the editable copy in reach: PYTHONPATH lends the dependencies, but runs no .pth file there."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = next(path for path in (environment / "bin/python", environment / "Scripts/python.exe") if path.exists())
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, env=clean, cwd=tmp_path)
    lent = os.pathsep.join(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
    told = json.loads(run(python, "-c", IMPORTED, env={**clean, "PYTHONPATH": lent}, cwd=tmp_path))
    inside = environment.resolve()
    assert Path(told["prefix"]).resolve() == inside
    for place in [*told["folders"], *told["path"]]:
        assert inside in Path(place).resolve().parents, f"{place} is not the installed copy"
    assert "py.typed" in told["files"]
    assert any(name.startswith("assets") for name in told["files"])


def test_the_package_list_is_the_folders_with_an_init():
    """setuptools is told each package by name; a folder that was forgotten would be missing from the wheel alone."""
    settings = PROJECT["tool"]["setuptools"]
    found = {}
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            below = init.parent.relative_to(ROOT / folder).parts
            found[".".join([package, *below])] = "/".join([folder, *below])
    assert sorted(settings["packages"]) == sorted(found)
    for package, folder in found.items():
        mapping = settings["package-dir"]
        owner = max((name for name in mapping if package == name or package.startswith(f"{name}.")), key=len)
        assert "/".join([mapping[owner], *package[len(owner) :].split(".")[1:]]) == folder, package


def test_every_python_file_lies_in_a_package():
    """A folder of modules without an __init__ would be importable here and missing from the wheel."""
    for name, path in shipped().items():
        if name.endswith(".py"):
            top = next(folder for folder in FOLDERS if path.is_relative_to(folder))
            depth = len(Path(top).parts)
            folders = [ROOT / Path(*path.parts[:n]) for n in range(depth, len(path.parts))]
            assert all((folder / "__init__.py").is_file() for folder in folders), path


@pytest.mark.parametrize("folder", ["reference", "fast"])
def test_the_bare_folder_name_is_refused(folder):
    """At the root of the checkout `import reference` finds the folder; two copies of one class would follow."""
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: ")
    assert FOLDERS[folder] in done.stderr.strip().splitlines()[-1]


def test_the_packages_say_what_they_export():
    """Every name in __all__ exists and stands there once."""
    for package in (resa.reference, resa.fast) if find_spec("triton") else (resa.reference,):
        assert all(hasattr(package, name) for name in package.__all__)
        assert len(set(package.__all__)) == len(package.__all__)


MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(resa.reference.__path__, "resa.reference.")
    if not name.endswith(".__main__")  # that one starts the program
]


def test_modules_are_found():
    assert {"resa.reference.checks", "resa.reference.generate"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name):
    """Each example is run where it stands; a module may have none."""
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert failed == 0, f"{failed} of {attempted} examples"


def test_there_are_examples_at_all():
    finder = doctest.DocTestFinder(exclude_empty=True)
    assert sum(len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name))) > 0


def test_the_tree_stays_small():
    """What a clone holds: no file over 12 MB, all of them within 25."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    assert len(sizes) > 200
    assert max(sizes.values()) <= 12_000_000
    assert sum(sizes.values()) <= 25_000_000
