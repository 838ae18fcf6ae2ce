"""The house stays as docs/architecture.md draws it."""

import ast
from pathlib import Path

import pytest
from helpers import script

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "eigenattn"
# The way of a token in decoding.
PATH = ["models/attention.py", "cache/layers.py", "models/attend.py", "kernels/decoding/batched.py"]
MOST_LINES, MOST_PARAMETERS = 300, 12


@pytest.fixture(scope="module")
def drawing():
    return script(ROOT / "docs" / "draw_architecture.py")


def modules():
    """Each module's dotted name, and its syntax tree."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        yield ".".join(parts), path, ast.parse(path.read_text(encoding="utf-8"))


def edges() -> dict[str, set[str]]:
    """Which module imports which, inside functions too."""
    names = {name for name, *_ in modules()}
    found: dict[str, set[str]] = {}
    for name, path, tree in modules():
        package = list(path.relative_to(SOURCE).parent.parts)
        found[name] = set()
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                for target in (".".join([*base, alias.name]), ".".join(base), ".".join([*base, "__init__"])):
                    if target in names and target != name:
                        found[name].add(target)
                        break
    return found


def test_page_is_up_to_date(drawing):
    assert drawing.PAGE.read_text(encoding="utf-8") == drawing.page(), "run: python docs/draw_architecture.py"


def test_rooms_import_from_above(drawing):
    wrong = [
        (str(path.relative_to(SOURCE)), other)
        for room, path in drawing.modules()
        for other in drawing.imports(path)
        if (own := drawing.rank(room)) is not None and (drawing.rank(other) or 0) > own
    ]
    assert not wrong
    unknown = {room for room, _ in drawing.modules() if drawing.rank(room) is None}
    assert unknown == {"__init__"}


def test_no_module_imports_itself_by_a_detour():
    graph = edges()
    assert sum(map(len, graph.values())) > 200  # the search finds something
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in graph[name]:
            visit(other)
        done.add(path.pop())

    for name in graph:
        visit(name)


def test_the_path_of_a_token_is_short():
    lengths = {name: len((SOURCE / name).read_text(encoding="utf-8").splitlines()) for name in PATH}
    assert max(lengths.values()) < MOST_LINES, lengths


def test_functions_have_few_parameters():
    def launched(node):
        return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)

    def parameters(node):
        arguments = node.args
        found = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        return [name for name in found if name not in ("self", "cls")]

    many = [
        f"{name}.{node.name}: {len(parameters(node))}"
        for name, _, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and not launched(node) and len(parameters(node)) > MOST_PARAMETERS
    ]
    assert not many


def test_joint_is_a_word_of_few_files():
    files = [name for name, path, _ in modules() if "joint" in path.read_text(encoding="utf-8").lower()]
    assert len(files) <= 8, files


def test_public_definitions_say_what_they_are():
    """Methods that transformers, vLLM or Python call by their own names are described there."""
    silent = []
    for name, _, tree in modules():
        for parent in ast.walk(tree):
            if not isinstance(parent, (ast.Module, ast.ClassDef)) or getattr(parent, "name", "").startswith("_"):
                continue
            inherits = isinstance(parent, ast.ClassDef) and bool(parent.bases)
            for node in parent.body:
                public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
                if public and not ast.get_docstring(node) and not (inherits and isinstance(node, ast.FunctionDef)):
                    silent.append(f"{name}.{node.name}")
    assert not silent
