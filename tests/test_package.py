"""The package as a whole: cheap to import, and free of what only tests need."""

import ast
import subprocess
import sys
from pathlib import Path

import engine

_ROOT = Path(engine.__file__).parent


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_cheap_and_lazy() -> None:
    """The fastest of three, so that a busy machine does not fail the test."""
    code = (
        "import time, sys; start = time.perf_counter(); import engine; print(time.perf_counter() - start)\n"
        "print(sorted({'torch', 'transformers', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    seconds, modules = zip(*(_run(code).splitlines() for _ in range(3)), strict=True)
    assert min(float(value) for value in seconds) < 0.3
    assert set(modules) == {"[]"}


def test_every_public_name_resolves() -> None:
    for name in engine.__all__:
        assert getattr(engine, name) is not None
    assert set(dir(engine)) == set(engine.__all__)


def test_using_the_engine_does_not_import_diffusers(small_folder: Path) -> None:
    """Nor does the folder kernels/ in the working directory pass for Hugging Face's package of that name."""
    code = (
        f"import sys, engine; engine.load({str(small_folder)!r}).generate('a cat', steps=1, progress=False)\n"
        "from transformers.utils import is_kernels_available\n"
        "print('diffusers' in sys.modules, is_kernels_available())"
    )
    assert _run(code).strip() == "False False"


def test_no_source_file_imports_diffusers() -> None:
    files = [*_ROOT.rglob("*.py"), *(_ROOT.parent / "kernels").glob("*.py")]
    assert len(files) > 15
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "diffusers" for name in names), file


def test_files_stay_readable() -> None:
    for file in [*_ROOT.rglob("*.py"), *(_ROOT.parent / "kernels").glob("*.py")]:
        assert len(file.read_text().splitlines()) <= 350, file


# Each place may import from those before it, and from its own folder; places of one line not from one another
_ORDER = (
    ("errors", "version"),
    ("checks", "files", "read_picture", "warn"),
    ("options",),
    ("kernels",),
    ("backends",),
    ("models",),
    ("text", "weights", "observe"),
    ("methods",),
    ("sampling",),
    ("result",),
    ("saved_settings", "upscale"),
    ("engine",),
    ("calibrating",),
    ("loading",),
    ("compat",),
    ("train",),
    ("serve",),
    ("evaluate",),
    ("wildcards",),
    ("cli_runs", "cli_pictures", "completion"),
    ("cli",),
)


def _modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name under ``engine``."""
    files = [file for file in _ROOT.rglob("*.py") if file != _ROOT / "__init__.py"]
    files += [_ROOT / "kernels" / file.name for file in (_ROOT / "kernels").glob("*.py")]
    names = {".".join(file.relative_to(_ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return {name: ast.parse(file.read_text()) for name, file in names.items()}


def _imports(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of the package that a module imports when it runs, at its top or within a function."""
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    is_package = any(other.startswith(f"{name}.") for other in known)
    parts = [*name.split("."), *(["__init__"] if is_package else [])]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in types_only:
            base = parts[: -node.level]
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {full for alias in node.names if (full := f"{module}.{alias.name}".lstrip(".")) in known} or {
                module
            }
    return found


def test_imports_run_one_way() -> None:
    trees = _modules()
    rank = {place: i for i, places in enumerate(_ORDER) for place in places}
    assert {name.split(".")[0] for name in trees} <= rank.keys()
    graph = {name: _imports(name, tree, set(trees)) for name, tree in trees.items()}
    assert sum(map(len, graph.values())) > 100
    for name, imported in graph.items():
        for other in imported:
            here, there = name.split(".")[0], other.split(".")[0]
            assert here == there or rank[there] < rank[here], f"{name} imports {other}"
    assert not _circle(graph)


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another, by taking away those that import nothing that is left."""
    left = {name: set(imported) & graph.keys() for name, imported in graph.items()}
    while free := [name for name, imported in left.items() if not imported]:
        left = {name: imported - set(free) for name, imported in left.items() if name not in free}
    return sorted(left)


def test_a_circle_is_found() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert not _circle({"a": {"b"}, "b": set()})


def test_without_triton(small_folder: Path) -> None:
    """As on macOS and Windows: everything but the Triton backend works, and that says what it needs."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import engine\n"
        f"sd = engine.load({str(small_folder)!r})\n"
        "sd.generate('a cat', steps=1, progress=False, customization=engine.DCI('cat', fraction=1.0))\n"
        f"try: engine.load({str(small_folder)!r}, backend='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    assert "need the package triton, which is there for Linux only" in _run(code)


def test_triton_is_imported_when_it_is_asked_for() -> None:
    code = "import sys, engine.backends.ops; print('triton' in sys.modules)"
    assert _run(code).strip() == "False"
