"""Who may import whom: each file of the reading path only from its left,
`config → blocks → sketch → attention → operations → cache → model → sampling → generate`.

Rooms import from the path, never the reverse, and `fast/` imports from the reference, never the reverse. Read from the
syntax trees, function bodies and type-checking blocks included. That the reference needs torch alone is tested with the
wheel.
"""

import ast
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOTS = {
    package: Path(find_spec(package).origin).parent for package in ("resa.reference", "resa.fast", "resa.conformance")
}
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
ARROW = [
    "checks", "rope", "config", "blocks", "sketch", "attention", "operations", "cache", "model", "sampling",
    "requests", "generate", "speculate",
]  # fmt: skip
# A kernel that appends a token and scores blocks needs what the cache does, so here the cache comes first.
FAST_ARROW = [
    "gpu", "pages", "sketch", "cache", "blocks", "attention", "estimate", "operations", "model", "sampling", "generate",
    "port", "bench", "cli",
]  # fmt: skip
# Rooms beside the path, and the rooms that each may import besides itself.
ROOMS = {
    "weights": set(),
    "lab": {"weights"},
    "cli": {"weights", "lab"},
    "__main__": {"cli"},
}
# Third-party packages of the edges of the fast path.
EXTRA = {
    "cli.py": {"rich"},
    "four_bit.py": {"humming"},
    "port.py": {"numpy"},
    "vllm": {"vllm", "prometheus_client"},
}


def imports(tree, package):
    """Every (line, module by its full name) that a syntax tree imports; `from a import b` gives a and a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, module), *((node.lineno, f"{module}.{alias.name}") for alias in node.names)]
    return found


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


KIT = sorted(ROOTS["resa.conformance"].rglob("*.py"))
FILES = [
    (package, path)
    for package in ("resa.reference", "resa.fast")
    for path in sorted(ROOTS[package].rglob("*.py"))
    if path not in KIT
]


def place_of(package, path):
    """The room, or the file of the arrow, that a file belongs to."""
    return "__main__" if path.name == "__main__.py" else path.relative_to(ROOTS[package]).parts[0].removesuffix(".py")


def read(package, path):
    """A file's syntax tree, and (line, module) of its imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tree, imports(tree, ".".join([package, *path.relative_to(ROOTS[package]).parent.parts]))


def allowed_in(package, place):
    """Places of its own package that a file may import from."""
    arrow = ARROW if package == "resa.reference" else FAST_ARROW
    if place == "__init__":
        return set(arrow)
    if place in arrow:
        own = {place} if (ROOTS[package] / place).is_dir() else set()
        return set(arrow[: arrow.index(place)]) | own
    assert package == "resa.fast" or place in ROOMS, f"{place} has no place in the order of imports"
    return set(arrow) | {place} | ROOMS.get(place, set())


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: getattr(value, "name", value))
def test_a_file_imports_only_from_its_left(package, path):
    place = place_of(package, path)
    modules = {file.stem for _, file in FILES} | set(ROOMS) | {"gpu", "bench"}
    for line, module in read(package, path)[1]:
        where, parts = f"{path.name}:{line} imports {module}", module.split(".")
        assert parts[0] not in PICKLERS, where
        assert module != "torch.load", where
        if parts[0] == "resa":
            other = ".".join(parts[:2])
            assert other in ROOTS, where
            assert (package, other) != ("resa.reference", "resa.fast"), where
            if other == package and len(parts) > 2 and parts[2] in modules:
                is_type = (path.name, parts[2]) == ("requests.py", "generate")  # for type checkers alone
                assert is_type or parts[2] in allowed_in(package, place), f"{where}, which is not to its left"
            if other != package:
                assert not any(part.startswith("_") for part in parts[2:]), where
            continue
        known = {"torch", "__future__", *sys.stdlib_module_names}
        if package == "resa.fast":
            known |= {"triton"} | EXTRA.get(path.name, set()) | EXTRA.get(place, set())
        is_on_path = package == "resa.fast" or place in ARROW or place == "__init__"
        assert parts[0] in known or not is_on_path, where
        assert parts[0] != "triton" or package == "resa.fast", where


@pytest.mark.parametrize(
    "path", [path for package, path in FILES if package == "resa.reference"], ids=lambda path: path.name
)
def test_the_reference_stands_alone(path):
    """No absolute import of itself, no import of the kernels by a name, no file format that runs code on loading."""
    for node in ast.walk(read("resa.reference", path)[0]):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert "resa" not in {name.split(".")[0] for name in names}, f"{where}: imports inside are relative"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = f"{node.value.id}.{node.attr}"
            assert used not in {"torch.load", "torch.save", "torch.hub"}, f"{where} uses {used}"
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__", "find_spec"}:
                names = [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
                assert not {"triton", "fast"} & set(".".join(names).split(".")), where
            allows = [keyword.value for keyword in node.keywords if keyword.arg == "allow_pickle"]
            assert all(getattr(value, "value", True) is False for value in allows), where


@pytest.mark.parametrize("path", KIT, ids=lambda path: path.name)
def test_the_kit_needs_numpy_alone(path):
    """But for the reference as a port."""
    modules = {module.split(".")[0] for _, module in read("resa.conformance", path)[1]}
    allowed = {"numpy", "resa", *sys.stdlib_module_names} - PICKLERS
    if path.name == "port.py":
        allowed |= {"torch"}
    assert modules <= allowed
    inside = {
        ".".join(module.split(".")[:2]) for _, module in read("resa.conformance", path)[1] if module[:5] == "resa."
    }
    assert inside <= {"resa.conformance", "resa.examples", *(["resa.reference"] if path.name == "port.py" else [])}
