"""The wheel, its data files, its examples, the names it answers to; and what `make` sets up."""

import doctest
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import resa.conformance
import resa.reference

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "resa": "resa",
    "reference": "resa.reference",
    "reference/conformance": "resa.conformance",
    "fast": "resa.fast",
    "docs/examples": "resa.examples",
    "docs/results": "resa.results",
    "tests/vectors": "resa.vectors",
}


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
    """Files that the wheel must hold, by the name they are imported or found under."""
    found = {}
    for folder, package in FOLDERS.items():
        others = [other for other in FOLDERS if other != folder and Path(other).is_relative_to(folder)]
        inside = [path for path in sources() if path.is_relative_to(folder)]
        inside = [path for path in inside if not any(path.is_relative_to(other) for other in others)]
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


def test_the_wheel_holds_the_two_folders_the_command_and_nothing_else(wheel):
    """Every source, asset and py.typed, byte for byte; no tests, no caches."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        expected = shipped()
        assert held == set(expected)
        assert {"resa/reference/py.typed", "resa/fast/py.typed"} <= held
        assert any(name.startswith("resa/reference/weights/assets/") for name in held)
        assert "resa/vectors/manifest.json" in held
        for name, path in expected.items():
            assert archive.read(name) == (ROOT / path).read_bytes(), name


DECODED = """
import sys
from resa.reference import GPT, GPTConfig, ReSAConfig, generate
config = ReSAConfig(block_size=1, min_blocks=1, interval=2)
(generation,) = generate(GPT(GPTConfig(11, 2, 4, 2, 4, 8, 8)), [[1, 2, 3]], 5, config)
assert len(generation.tokens) == 5
assert not {"numpy", "safetensors", "tiktoken", "rich", "matplotlib", "triton", "resa.fast"} & set(sys.modules)
rooms = {"resa.conformance", *(f"resa.reference.{name}" for name in ("weights", "lab", "cli"))}
assert not rooms & set(sys.modules)
"""
IMPORTED = """
import json, pathlib, sys
import resa.reference, resa.fast
from importlib.metadata import version
from resa.conformance.vectors import load_vectors
assert resa.__version__ == version("resa")
assert len(load_vectors().manifest["operations"]) > 40
assert resa.reference.load_model().config.n_layer == 12
folders = [str(pathlib.Path(module.__file__).parent) for module in (resa.reference, resa.fast)]
print(json.dumps({"prefix": sys.prefix, "folders": folders, "path": list(resa.__path__)}))
"""


def link(folder, package):
    """Link a package and those that it requires into a folder, and nothing else."""
    wanted = [package]
    while wanted:
        try:
            found = metadata.distribution(wanted.pop())
        except metadata.PackageNotFoundError:  # of another platform or an extra
            continue
        for name in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(found.locate_file(name))
                wanted += [re.match(r"[\w.-]+", each)[0] for each in found.requires or [] if "extra ==" not in each]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment that holds the wheel alone → its interpreter, and variables without the editable copy in reach."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = next(path for path in (environment / "bin/python", environment / "Scripts/python.exe") if path.exists())
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, env=clean, cwd=environment)
    return python, clean


def lent():
    """PYTHONPATH that lends the dependencies: no .pth file runs there, so the editable copy stays out."""
    return os.pathsep.join(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))


def test_the_wheel_works_in_an_environment_of_its_own(installed, tmp_path):
    """The reference decodes where there is nothing but torch."""
    python, clean = installed
    link(tmp_path, "torch")
    run(python, "-c", DECODED, env={**clean, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    told = json.loads(run(python, "-c", IMPORTED, env={**clean, "PYTHONPATH": lent()}, cwd=tmp_path))
    inside = python.parents[1].resolve()
    assert Path(told["prefix"]).resolve() == inside
    for place in [*told["folders"], *told["path"]]:
        assert inside in Path(place).resolve().parents, f"{place} is not the installed copy"
    (script,) = python.parent.glob("resa*")
    help_text = run(script, "--help", env={**clean, "PYTHONPATH": lent()}, cwd=tmp_path)
    assert all(command in help_text for command in ("generate", "bench"))
    told = run(script, "--version", env={**clean, "PYTHONPATH": lent()}, cwd=tmp_path)
    assert re.fullmatch(rf"resa {re.escape(resa.__version__)} \(Python [\d.]+, torch \S+\)\n", told)


def test_at_the_root_of_a_clone_the_installed_package_is_found(installed):
    """Its folder `resa/` comes first there, and has nothing but the version."""
    python, clean = installed
    code = "import resa.reference, resa.conformance; print(resa.reference.__file__)"
    told = run(python, "-c", code, env={**clean, "PYTHONPATH": lent()}, cwd=ROOT)
    assert python.parents[1].resolve() in Path(told.strip()).resolve().parents


def test_everything_but_the_kernels_works_without_triton(installed, tmp_path):
    """Decode on the reference with what `pip install .` brings."""
    python, clean = installed
    link(tmp_path, "resa")
    for name in ("resa", "triton"):  # the wheel's, and what a torch for GPUs brings along
        (tmp_path / name).unlink(missing_ok=True)
    (script,) = python.parent.glob("resa*")
    environment = {**clean, "PYTHONPATH": str(tmp_path)}
    told = run(script, "generate", "x = ", "--tokens", 3, "--device", "cpu", "--json", env=environment, cwd=tmp_path)
    assert len(json.loads(told)["tokens"]) == 3
    run(python, "-c", "import resa.fast; assert not hasattr(resa.fast, 'generate')", env=environment, cwd=tmp_path)


def test_the_metadata_says_what_is_needed(wheel):
    """Python as the Makefile, Triton as an extra with the versions that are tested, the paper as in CITATION.cff."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = archive.read(name).decode()
    assert f"Version: {resa.__version__}\n" in told
    python = re.search(r"Requires-Python: >=(\d+)\.(\d+)\n", told).groups()
    assert f"sys.version_info >= ({', '.join(python)})" in (ROOT / "Makefile").read_text(encoding="utf-8")
    (triton,) = re.findall(r"Requires-Dist: (triton.*)\n", told)
    assert re.fullmatch(r"triton<3\.10,>=3\.6; sys_platform == \Wlinux\W and extra == \Wfast\W", triton)
    paper = re.search(r"Project-URL: Paper, (https://arxiv.org/abs/[\d.]+)\n", told)[1]
    yaml = pytest.importorskip("yaml", reason="the extra `models` has it")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert [each["url"] for each in cited["references"]] == [paper]


def test_the_kit_needs_numpy_alone(installed, tmp_path):
    """Vectors, example ports and the command, where there is nothing but NumPy."""
    python, clean = installed
    link(tmp_path, "numpy")
    command = [python, "-m", "resa.conformance", "resa.examples.numpy_port", "--only", "*e*_blocks"]
    told = run(*command, env={**clean, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert re.search(r"\n\d\d pass\n", told)


def test_a_tutorial_runs_with_an_installed_package(installed, tmp_path):
    """Alone in a folder, as somebody downloads it. The shortest of those that read recorded results stands for all."""
    python, clean = installed
    alone = shutil.copy2(ROOT / "tutorials" / "10_roofline.py", tmp_path)
    environment = {**clean, "PYTHONPATH": lent(), "MPLBACKEND": "Agg"}
    assert "µs" in run(python, alone, env=environment, cwd=tmp_path)


@pytest.mark.parametrize("tutorial", sorted(ROOT.glob("tutorials/*.py")), ids=lambda path: path.stem)
def test_tutorials_ask_for_no_file_of_a_clone(tutorial):
    """Recorded results come from `resa.results`, because a notebook may lie anywhere."""
    assert not re.search(r"__(file|path)__|\.parents?\b", tutorial.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", ["reference", "reference/conformance", "fast"])
def test_the_bare_folder_name_is_refused(folder):
    """At the root of the checkout `import reference` finds the folder; two copies of one class would follow."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {Path(folder).name}"],
        cwd=(ROOT / folder).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: ")
    assert FOLDERS[folder] in done.stderr.strip().splitlines()[-1]


MODULES = [
    name
    for package in (resa.reference, resa.conformance)
    for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    # The first starts the program. The second is another package, mapped from inside of this one.
    if not name.endswith(".__main__") and not name.startswith("resa.reference.conformance")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name):
    """Each example is run where it stands; a module may have none."""
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert failed == 0, f"{failed} of {attempted} examples"


def test_the_tree_stays_small():
    """A clone holds no file over 6 MB, and 16 MB in all."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    assert len(sizes) > 200
    assert max(sizes.values()) <= 6_000_000
    assert sum(sizes.values()) <= 16_000_000


# What make sets up.


def make(*arguments, **environment):
    command = ["make", "--no-print-directory", *arguments]
    clean = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=clean | environment)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")


@needs_make
def test_an_interpreter_that_holds_another_clone_is_refused(tmp_path):
    """It would silently run that clone's code."""
    other = tmp_path / "resa" / "reference"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    done = make("demo", f"PYTHON={sys.executable}", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert f"holds the code of {other}" in done.stderr
    assert "Traceback" not in done.stderr
    assert make("install", f"PYTHON={sys.executable}").returncode == 0  # this clone's own


@needs_make
def test_an_older_python_is_told_what_is_needed(tmp_path):
    """In one line, before anything is installed."""
    old = tmp_path / "python"
    old.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 10, 13)\nexec(sys.argv[2])\n")
    old.chmod(0o755)
    done = make("install", f"BASE_PYTHON={old}", f"VENV={tmp_path / 'new'}")
    assert done.returncode != 0
    assert "Python 3.11 or newer" in done.stderr
    assert len(done.stderr.splitlines()) == 2  # with make's own
    assert not (tmp_path / "new").exists()


@needs_make
def test_the_demo_installs_less_than_the_tests(tmp_path):
    """Read from the commands that make would run. The real model needs packages to be read with."""
    demo, tests = [".", ".[models]"], [".", ".[dev]"]
    for target, extras in (("install", ["."]), ("demo", demo), ("test", [*tests, ".[models]"]), ("lint", tests)):
        told = make("--dry-run", target, f"VENV={tmp_path / 'new'}").stdout
        installs = re.findall(r"pip install .*--constraint constraints.txt --editable '(.*)'", told)
        assert list(dict.fromkeys(installs)) == extras, target


def test_sanitize_looks_at_every_kernel():
    """OWN_KERNELS of the Makefile names the kernels that are launched, and no others."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    listed = re.search(r"foreach name,([^,]*),--kernel-name", makefile)[1].split()
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "fast").rglob("*.py"))
    assert sorted(listed) == sorted(set(re.findall(r"\b_(\w+)_kernel\[", source)))
