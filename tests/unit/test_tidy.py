"""Properties of the text of the project itself: size, shape, names, dead modules, words that slipped in."""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SRC = ROOT / "src"
MODULES = sorted(SRC.rglob("*.py"))

# Marks of well-kept code bases.  What passes one of them wants to be two things.
MODULE_LINES = 400
FUNCTION_LINES = 60
POSITIONAL = 5
INHERITED = "# as the base class has it"
NESTING = 4

VAGUE = {
    "utils",
    "util",
    "helpers",
    "helper",
    "common",
    "misc",
    "manager",
    "base",
    "types",
    "constants",
    "core_utils",
}
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
TO_DO = re.compile(r"#.*\b(TODO|FIXME|XXX|HACK)\b(?!\(#\d+\))")
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".sh", ".lua", ".html", ".js", ".css", ""}
SKIPPED = {".git", ".venv", ".cache", ".ondol", "__pycache__", "node_modules", "LICENSE"}
# Spelled in two halves, so that this file does not find itself.
FORBIDDEN = [
    "/wo" + "rk/",
    "/fa" + "rm/",
    ".lib" + "rary/",
    "sub" + "agent",
    "this ses" + "sion",
    "acceptance" + ".bin",
]


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool, bool]]:
    """Every function, with whether it is a method, and whether all around it is public."""

    def walk(node: ast.AST, *, in_class: bool, is_public: bool) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool, bool]]:  # fmt: skip
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FUNCTIONS):
                yield child, in_class, is_public and not child.name.startswith("_")
                yield from walk(child, in_class=False, is_public=False)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, in_class=True, is_public=is_public and not child.name.startswith("_"))
            else:
                yield from walk(child, in_class=in_class, is_public=is_public)

    return walk(tree, in_class=False, is_public=True)


def nesting(node: ast.AST, level: int = 0) -> int:
    """The deepest block below a node, not entering functions inside of it; elif is no deeper than if."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and [child] == node.orelse
        deepest = max(deepest, nesting(child, level + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


def problems(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = []
    lines = text.splitlines()
    if len(lines) > MODULE_LINES:
        found.append(f"{len(lines)} lines; the mark is {MODULE_LINES}")
    if path.stem in VAGUE:
        found.append(f"'{path.stem}' says nothing; name what the module holds")
    if not ast.get_docstring(tree):
        found.append("no module docstring")
    found += [
        f"{n}: a to-do needs an issue: TODO(#123)" for n, line in enumerate(lines, 1) if TO_DO.search(line)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append(f"{node.lineno}: global state")
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            found.append(f"{node.lineno}: {node.name}: a public class without a docstring")
    for function, is_method, is_public in functions(tree):
        where = f"{function.lineno}: {function.name}"
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > FUNCTION_LINES:
            found.append(f"{where}: {length} lines; the mark is {FUNCTION_LINES}")
        inherited = INHERITED in lines[function.lineno - 1]
        if len(function.args.posonlyargs + function.args.args) > POSITIONAL + is_method and not inherited:
            found.append(f"{where}: more than {POSITIONAL} positional arguments; make them keyword-only")
        if nesting(function) > NESTING:
            found.append(f"{where}: nested more than {NESTING} deep")
        if is_public and not ast.get_docstring(function) and not _is_overload(function):
            found.append(f"{where}: public, without a docstring")
    return found


def _is_overload(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in function.decorator_list)


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_a_module_is_tidy(path: Path) -> None:
    assert problems(path) == []


def dotted(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_is_used_by_another_or_run_by_name() -> None:
    by = {path: imported(path) for path in MODULES}
    run = "".join(path.read_text(encoding="utf-8") for path in MODULES)
    run += "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").iterdir())
    dead = [
        dotted(path)
        for path in MODULES
        if path.stem not in ("__init__", "__main__")
        and not any(dotted(path) in names for other, names in by.items() if other != path)
        and f'"{dotted(path)}"' not in run
        and f'"{dotted(path)}:' not in run  # loaded late, by its name
        and f"-m {dotted(path)}" not in run
        and f"from {dotted(path)} " not in run.replace(path.read_text(encoding="utf-8"), "")
    ]
    assert dead == []


def test_the_tree_of_unit_tests_is_that_of_the_source() -> None:
    folders = {
        path.parent.relative_to(ROOT / "tests/unit") for path in (ROOT / "tests/unit").rglob("test_*.py")
    }
    assert [str(folder) for folder in folders if not (SRC / "ondol" / folder).is_dir()] == []


def texts() -> Iterator[tuple[Path, str]]:
    for top in sorted(ROOT.iterdir()):
        if top.name in SKIPPED or top.name.startswith(".") and top.name not in (".ci", ".gitignore"):
            continue
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and path.suffix in TEXT and not SKIPPED & set(path.parts):
                yield path, path.read_text(encoding="utf-8", errors="replace")


def test_no_words_of_the_workshop() -> None:
    found = [
        f"{ids(path)}:{number}: {word}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        for word in FORBIDDEN
        if word in line
    ]
    assert found == []


@pytest.mark.parametrize("name", ["runtime", "dev", "starter"])
def test_a_lock_names_versions_and_hashes_and_no_place(name: str) -> None:
    lines = (ROOT / f"requirements/{name}.txt").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    assert entries
    assert [
        line for line in entries if not re.match(r"[a-z0-9.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", line)
    ] == []
    assert not any("://" in line or line.startswith("-") for line in entries)


def test_decisions_are_numbered_without_a_gap_and_in_one_form() -> None:
    pages = sorted((ROOT / "docs/adr").glob("*"))
    numbers = [page.name[:4] for page in pages]
    assert numbers == [f"{n:04}" for n in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", page.name), page.name
        assert text.startswith(f"# {page.name[:4]}: "), page.name
        assert "\nStatus: " in text, page.name
        for part in ("Context", "Decision", "Refused", "What would change it"):
            assert f"\n## {part}" in text, f"{page.name} lacks {part}"


def test_nothing_runs_at_the_start_of_python_but_what_we_know() -> None:
    """A .pth file runs code in every Python of the environment; that is how packages were attacked."""
    assert [ids(path) for path in SRC.rglob("*.pth")] == []
    if sys.prefix == sys.base_prefix:
        pytest.skip("not in an environment of its own")
    known = re.compile(r"(__editable__\.ondol-.*|distutils-precedence|_virtualenv)\.pth")
    places = Path(sysconfig.get_path("purelib"))
    assert [path.name for path in places.glob("*.pth") if not known.fullmatch(path.name)] == []
