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
