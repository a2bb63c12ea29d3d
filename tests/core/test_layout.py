"""Who may import whom, where devices are named, what has a docstring: held over all syntax trees."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FLOORS = {"util": 0, "models": 1, "orders": 1, "engine": 2}  # whatever is in no library is above all of these
DEVICE_FILES = ("util/device.py", "engine/fast.py")
# Elsewhere: the backends of a process group, the help of --device.
DEVICE_TEXTS = {
    "util/distributed.py": {"cuda", "cpu:gloo,cuda:nccl"}, "util/cli.py": {"auto, cpu, cuda, or mps"},
}

FILES = list(REPOSITORY.glob("*.py"))
for folder in (*FLOORS, "demo", "scripts", "benchmarks", "tests"):
    FILES += (REPOSITORY / folder).rglob("*.py")
PATHS = sorted(path.relative_to(REPOSITORY).as_posix() for path in FILES)
LIBRARIES = [path for path in PATHS if path.split("/")[0] in FLOORS]
PRODUCT = [path for path in PATHS if path.split("/")[0] not in ("tests", "benchmarks")]
TOP = {"demo", "scripts", "benchmarks", "tests", *(path.stem for path in REPOSITORY.glob("main_*.py"))}


@cache
def tree_of(path):
    return ast.parse((REPOSITORY / path).read_text("utf-8"))


def trees(paths):
    """Path and syntax tree of each."""
    return [(path, tree_of(path)) for path in paths]


def imported(tree):
    """Top-level packages that a file imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def is_program(tree):
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


@pytest.mark.parametrize("path", LIBRARIES)
def test_imports_go_down_only(path):
    own = path.split("/")[0]
    above = TOP | {name for name, floor in FLOORS.items() if floor >= FLOORS[own]} - {own}
    assert not above & set(imported(tree_of(path)))


def test_args_never_go_below_a_program():
    takers = [
        f"{path}: {node.name}"
        for path, tree in trees(LIBRARIES) if path != "util/cli.py" and not is_program(tree)
        for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
        if any(parameter.arg == "args" for parameter in [*node.args.args, *node.args.kwonlyargs])
    ]
    assert takers == []


def device_names(tree):
    """Names of devices in a file's texts, its docstrings left out, and its uses of torch.cuda."""
    nodes = list(ast.walk(tree))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            if re.search(r"\b(cuda|mps)\b", node.value):
                yield node.value
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
            yield "torch.cuda"


def test_devices_are_chosen_in_one_place():
    found = {path: set(device_names(tree)) for path, tree in trees(PRODUCT) if path not in DEVICE_FILES}
    assert {path: names for path, names in found.items() if names} == DEVICE_TEXTS


def test_programs_import_util_before_torch():
    """Itself or by a package whose `__init__` does: it sets what OpenMP reads when torch is loaded. The agent
    of torchrun only starts others."""
    late = []
    for path, tree in trees(PRODUCT):
        body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [n for n in imported(ast.Module(body, [])) if n in ("torch", "util", "engine", "models")]
        if is_program(tree) and path != "scripts/cli/agent.py" and names[:1] == ["torch"]:
            late.append(path)
    assert late == []


def test_tokenizers_has_no_code():
    """A package of this name would shadow PyPI's `tokenizers`."""
    assert list((REPOSITORY / "tokenizers").rglob("*.py")) == []


def test_no_file_changes_the_import_path():
    changing = [
        path
        for path, tree in trees(PATHS)
        if any(isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path" for node in ast.walk(tree))
    ]
    assert changing == []


def test_modules_and_public_functions_of_the_libraries_have_docstrings():
    missing = [path for path, tree in trees(PRODUCT) if not ast.get_docstring(tree)]
    for path, tree in trees(LIBRARIES):
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            if public and node.name not in ("flags", "main") and not ast.get_docstring(node):
                missing.append(f"{path}: {node.name}")
    assert missing == []
