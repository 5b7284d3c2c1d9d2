"""Who may import whom, each only from its left:
`config → cache → blocks → attention → model → sampling → speculate → generate`.

`fast/` keeps the same order and may import from `reference/` besides, never the reverse.

Read from the syntax trees, function bodies and type-checking blocks included, and once at run time.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from resa import fast, reference

FOLDER = Path(reference.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
FAST = Path(fast.__file__).parent
FAST_FILES = sorted(FAST.rglob("*.py"))
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
ARROW = ["checks", "config", "cache", "blocks", "attention", "model", "sampling", "speculate", "generate"]
FAST_ARROW = [
    "checks", "launch", "bounds8", "cache", "blocks", "attention", "elementwise", "bookkeeping", "model", "graphs",
    "generate",
]  # fmt: skip


def imports(tree, package="resa.reference"):
    """Every module that a syntax tree imports, by its full name, as (line, module); `from a import b` gives a and a.b.

    >>> imports(ast.parse("from .a import b\\nimport c.d"))
    [(1, 'resa.reference.a'), (1, 'resa.reference.a.b'), (2, 'c.d')]
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, module), *((node.lineno, f"{module}.{alias.name}") for alias in node.names)]
    return found


def read(path):
    """The syntax tree of a file of either package, and what it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    folder, package = (FAST, "resa.fast") if path.is_relative_to(FAST) else (FOLDER, "resa.reference")
    return tree, imports(tree, ".".join([package, *path.relative_to(folder).parent.parts]))


def test_relative_imports_are_understood():
    """The helper itself, or else the tests below would pass on nothing."""
    tree = ast.parse("from .a import b\nfrom . import c\nimport d.e\nfrom ..f import g\ndef h():\n  from i import j")
    assert imports(tree, "resa.reference.sub") == [
        (1, "resa.reference.sub.a"), (1, "resa.reference.sub.a.b"),
        (2, "resa.reference.sub"), (2, "resa.reference.sub.c"),
        (3, "d.e"),
        (4, "resa.reference.f"), (4, "resa.reference.f.g"),
        (6, "i"), (6, "i.j"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ARROW)
def test_a_file_imports_only_from_its_left(name):
    """The arrow's files may import torch, the standard library, and files to their left; nothing else."""
    _, found = read(FOLDER / f"{name}.py")
    allowed = {"resa.reference", *(f"resa.reference.{left}" for left in ARROW[: ARROW.index(name)])}
    for line, module in found:
        top = module.split(".")[0]
        assert top in {"resa", "torch", "__future__"} | set(sys.stdlib_module_names), f"{name}.py:{line}: {module}"
        if top == "resa":
            owner = ".".join(module.split(".")[:3])
            assert owner in allowed, f"{name}.py:{line} imports {module}, which is not to its left"


def test_the_arrow_is_connected():
    """Every file of the arrow but the leftmost imports some file to its left, so the rule above governs something."""
    for name in ARROW[1:]:
        _, found = read(FOLDER / f"{name}.py")
        assert any(module.startswith("resa.reference.") for _, module in found), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_the_reference_stands_alone(path):
    """No triton, nothing of the fast path, no absolute import of itself, no file format that runs code on loading."""
    tree, found = read(path)
    for line, module in found:
        where = f"{path.name}:{line} imports {module}"
        assert module.split(".")[0] not in {"triton", *PICKLERS}, where
        assert module.split(".")[:2] != ["resa", "fast"], where
        assert module != "torch.load", where
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            tops = {name.split(".")[0] for name in names}
            assert "resa" not in tops, f"{path.name}:{node.lineno}: imports inside the package are relative"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = f"{node.value.id}.{node.attr}"
            assert used not in {"torch.load", "torch.save", "torch.hub"}, f"{path.name}:{node.lineno} uses {used}"
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__", "find_spec"}:
                names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                assert not {"triton", "fast"} & set(".".join(map(str, names)).split(".")), f"{path.name}:{node.lineno}"
            allows = [keyword.value for keyword in node.keywords if keyword.arg == "allow_pickle"]
            assert all(getattr(value, "value", True) is False for value in allows), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", FAST_FILES, ids=lambda path: str(path.relative_to(FAST)))
def test_the_fast_path_imports_the_reference_and_itself(path):
    """Besides them torch, triton and the standard library; of the reference only what is public."""
    _, found = read(path)
    for line, module in found:
        where = f"{path.name}:{line} imports {module}"
        parts = module.split(".")
        extra = {"cli.py": {"rich"}, "four_bit.py": {"humming"}}.get(path.name, set())
        assert parts[0] in {"resa", "torch", "triton", "__future__"} | extra | set(sys.stdlib_module_names), where
        assert parts[0] not in PICKLERS, where
        assert module != "torch.load", where
        if parts[0] == "resa":
            assert parts[1] in {"reference", "fast"}, where
            assert parts[1] == "fast" or not any(part.startswith("_") for part in parts[2:]), where


@pytest.mark.parametrize("path", FAST_FILES, ids=lambda path: str(path.relative_to(FAST)))
def test_a_fast_file_imports_only_from_its_left(path):
    """Of its own package; the command line and what goes with it may import from all of it."""
    if path.parent.name == "bench":
        return
    if path.stem not in FAST_ARROW:
        assert path.stem in {"__init__", "__main__", "cli", "crossover", "four_bit", "port"}
        return
    allowed = {f"resa.fast.{left}" for left in FAST_ARROW[: FAST_ARROW.index(path.stem)]}
    for line, module in read(path)[1]:
        owner = ".".join(module.split(".")[:3])
        is_own = module.split(".")[:2] == ["resa", "fast"]
        assert not is_own or owner in allowed, f"{path.name}:{line} imports {module}, which is not to its left"


def test_the_fast_arrow_is_connected():
    """Every file of it is there, and the last one imports from both packages: the rules above govern something."""
    assert {path.stem for path in FAST_FILES} >= set(FAST_ARROW)
    found = {module for _, module in read(FAST / "generate.py")[1]}
    assert {"resa.fast.attention", "resa.fast.blocks", "resa.reference.model"} <= found


WATCHED_RUN = """
import sys, traceback
from pathlib import Path

asked = []

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" or name == "resa.fast":
            files = [frame.filename for frame in traceback.extract_stack() if "importlib" not in frame.filename]
            asked.append((name, files[-2]))  # the last is this file itself

sys.meta_path.insert(0, Watch())
from resa.reference import GPT, GPTConfig, ReSAConfig, generate
model = GPT(GPTConfig(11, 2, 4, 2, 4, 8, 8))
generate(model, [[1, 2, 3, 4, 5, 6]], 6, ReSAConfig(block_size=1, min_blocks=1, interval=2))
import resa.reference
folder = Path(resa.reference.__file__).parent
assert "resa.fast" not in sys.modules
ours = [(name, file) for name, file in asked if folder in Path(file).parents or name == "resa.fast"]
assert not ours, ours
import resa.fast
assert "resa.fast" in [name for name, _ in asked], "the watch must see what it watches for"
print("watched")
"""


def test_decoding_asks_for_neither_triton_nor_the_fast_path():
    """In a fresh process: torch may look for triton on its own account, the reference does not."""
    run = subprocess.run([sys.executable, "-c", WATCHED_RUN], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "watched", run.stderr
