"""The rules of the house, held over the syntax trees of all programs and libraries."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LIBRARIES = ("models", "orders", "util")
PACKAGES = (*LIBRARIES, "engine")
PROGRAMS = sorted(REPOSITORY.glob("main_*.py")) + sorted((REPOSITORY / "scripts").rglob("*.py"))
DEMO = sorted((REPOSITORY / "demo").rglob("*.py"))
OWN = {*PACKAGES, "benchmarks", "demo", "scripts", "tests", *(path.stem for path in PROGRAMS)}
MAY_IMPORT = {name: {name} for name in LIBRARIES} | {"engine": set(PACKAGES), "main": set(PACKAGES)}
MAY_IMPORT["demo"] = {*PACKAGES, "demo"}

# Text with "cuda" in it outside util/dist.py, by file, each with its reason.
CUDA_TEXTS = {
    "util/cli.py": {"auto, cpu, cuda, or mps"},  # the help of --device
}


def sources():
    """(path relative to the repository, syntax tree) of every program and library file."""
    paths = (
        PROGRAMS + DEMO + [path for name in PACKAGES for path in sorted((REPOSITORY / name).rglob("*.py"))]
    )
    return [(path.relative_to(REPOSITORY).as_posix(), ast.parse(path.read_text("utf-8"))) for path in paths]


SOURCES = sources()


def layer(path):
    """The library a file is in, or demo; `main` for a program."""
    first = path.split("/")[0]
    return first if first in (*PACKAGES, "demo") else "main"


def imported(tree):
    """Names of the top-level packages a file imports, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function):
    a = function.args
    return [p.arg for p in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if p is not None]


def cuda_mentions(tree):
    """Every name, attribute, keyword and text of a file in which cuda stands; docstrings are texts too."""
    for node in ast.walk(tree):
        for value in (getattr(node, field, None) for field in ("id", "attr", "arg", "name", "value")):
            if isinstance(value, str) and "cuda" in value.lower():
                yield f"{value}={ast.unparse(node.value)}" if isinstance(node, ast.keyword) else value


def test_there_are_files_to_look_at():
    assert {layer(path) for path, _ in SOURCES} == {*PACKAGES, "demo", "main"}


@pytest.mark.parametrize("path, tree", SOURCES, ids=[path for path, _ in SOURCES])
def test_imports_go_down_only(path, tree):
    forbidden = imported(tree) & OWN - MAY_IMPORT[layer(path)]
    assert not forbidden, f"{path} imports {sorted(forbidden)}"


def test_flags_stay_in_the_programs():
    """No function of engine or models takes `args`, the flags of a program."""
    takers = [
        f"{path}: {function.name}"
        for path, tree in SOURCES
        if layer(path) in ("engine", "models")
        for function in functions(tree)
        if "args" in parameters(function)
    ]
    assert takers == []


def test_one_place_chooses_the_device():
    others = [
        f"{path}: {mention}"
        for path, tree in SOURCES
        if path != "util/dist.py"
        for mention in cuda_mentions(tree)
        if not any(text in mention for text in CUDA_TEXTS.get(path, ()))
    ]
    assert others == []


def test_every_exception_to_the_device_rule_is_still_needed():
    found = {path: list(cuda_mentions(tree)) for path, tree in SOURCES}
    for path, texts in CUDA_TEXTS.items():
        for text in texts:
            assert any(text in mention for mention in found[path]), f"{path} no longer has {text!r}"


def test_tokenizers_is_no_package():
    """A package of this name would shadow PyPI's `tokenizers`."""
    assert list((REPOSITORY / "tokenizers").rglob("*.py")) == []


def is_program(tree):
    """Whether a file is also run by itself; its `flags` and `main` are told by its module's docstring."""
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


def test_every_public_function_of_a_library_has_a_docstring():
    without = [
        f"{path}: {node.name}"
        for path, tree in SOURCES
        if layer(path) in PACKAGES
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        and not (is_program(tree) and node.name in ("flags", "main"))
        and not ast.get_docstring(node)
    ]  # fmt: skip
    assert without == []


def test_every_file_says_what_it_is():
    assert [path for path, tree in SOURCES if not ast.get_docstring(tree)] == []
