"""Public functions say what they take and give: that there is a docstring, shapes of arrays, and errors they raise."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import exit_plugins

PACKAGE = Path(exit_plugins.__file__).parent
MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if not any(part.startswith("_") and part != "__init__.py" for part in path.relative_to(PACKAGE).parts)
)
# "(B, C)", "(K,)", "K tensors", "a scalar": any of them says what an array looks like.
SHAPE = re.compile(r"\([A-Z0-9.][^()]*,[^()]*\)|\(\)|\bscalar\b|\bshapes?\b|\bbatch first\b", re.IGNORECASE)
ARRAYS = re.compile(r"\b(Tensor|ndarray)\b")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def exported(tree: ast.Module) -> set[str]:
    """The names in a module's ``__all__``, as far as they are written out."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return {item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant)}
    return set()


def public(path: Path) -> Iterator[tuple[str, str, Function | ast.ClassDef]]:
    """(name, what a reader finds written about it, its definition) of what a module exports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = ast.get_docstring(tree) or ""
    names = exported(tree)
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name not in names:
            continue
        own = ast.get_docstring(node) or ""
        yield node.name, own, node
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, Function) and not item.name.startswith("_") and ast.get_docstring(item):
                    yield f"{node.name}.{item.name}", f"{ast.get_docstring(item)}\n{own}\n{module}", item


def annotations(node: Function) -> str:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return " ".join(ast.unparse(a) for a in (*(arg.annotation for arg in every), node.returns) if a is not None)


def raised(node: Function) -> set[str]:
    """Names of the exceptions a function raises itself, in no function inside it."""
    found, inner = (
        set(),
        {id(n) for f in ast.walk(node) if isinstance(f, Function) and f is not node for n in ast.walk(f)},
    )
    for item in ast.walk(node):
        if isinstance(item, ast.Raise) and id(item) not in inner and isinstance(item.exc, ast.Call):
            found.add(ast.unparse(item.exc.func))
    return found - {"NotImplementedError", "StopIteration", "AttributeError", "SystemExit"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_names_are_documented(path):
    faults = []
    for name, said, node in public(path):
        if not said.strip():
            faults.append(f"{name} has no docstring")
            continue
        if isinstance(node, ast.ClassDef):
            continue
        if ARRAYS.search(annotations(node)) and not SHAPE.search(said):
            faults.append(f"{name} takes or gives arrays and says no shape")
        unsaid = {error for error in raised(node) if error not in said}
        if unsaid and not re.search(r"\bRaises?\b", said, re.IGNORECASE):
            faults.append(f"{name} raises {', '.join(sorted(unsaid))} and does not say so")
    assert not faults, "\n".join(faults)


def test_the_check_sees_what_it_is_for():
    source = '''
__all__ = ["f", "g"]
def f(x: Tensor) -> Tensor:
    """Twice x."""
    raise ValueError("no")
def g(x: Tensor) -> Tensor:
    """Twice x (B, C). ValueError if it is not."""
    raise ValueError("no")
'''
    tree = ast.parse(source)
    assert exported(tree) == {"f", "g"}
    f, g = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert raised(f) == {"ValueError"} and ARRAYS.search(annotations(f)) and not SHAPE.search(ast.get_docstring(f))
    assert SHAPE.search(ast.get_docstring(g)) and "ValueError" in ast.get_docstring(g)
