"""A hash of the sources that a program reads, so that results outlive commits which change other things."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path


def sources_hash(root: Path, modules: Sequence[str], packages: Sequence[str]) -> str:
    """Hash of ``modules`` and of all that they import, directly or not, from ``packages``; found without running them.

    Comments, docstrings and layout do not count.

    Args:
        root: folder that holds the packages.
        modules: such as ``pipeline.train``.
        packages: whose modules are followed.

    Returns:
        12 hexadecimal digits.

    Raises:
        ValueError: one of the modules is not below ``root``.
    """
    for module in modules:
        if _file_of(root, module) is None:
            raise ValueError(f"there is no module {module} below {root}; start from the root of the clone")
    digest, waiting, seen = hashlib.sha256(), list(modules), set()
    trees: dict[str, ast.Module] = {}
    while waiting:
        name = waiting.pop()
        path = _file_of(root, name)
        if name in seen or path is None or name.partition(".")[0] not in packages:
            continue
        seen.add(name)
        trees[name] = ast.parse(path.read_bytes(), str(path))
        waiting += _imported(trees[name], name if path.name == "__init__.py" else name.rpartition(".")[0])
        waiting.append(name.rpartition(".")[0])  # importing a.b runs a/__init__.py
    for name in sorted(trees):
        digest.update(f"{name}\n{ast.unparse(_without_docstrings(trees[name]))}\n".encode())
    return digest.hexdigest()[:12]


def _file_of(root: Path, module: str) -> Path | None:
    if not module:
        return None
    path = root.joinpath(*module.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Names of all that a module imports, what is imported for type checkers alone left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for other in node.orelse:
                yield from _imported(ast.Module([other], []), package)
        else:
            yield from _imported(node, package)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return tree
