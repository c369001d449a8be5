"""Who may import whom, read from the sources: the folders of the Python package and the includes of the native code."""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import architecture
import faults
from support import ROOT

PACKAGE = "pyglow_fast"

# What each folder of the package may import of the others, beside itself.
PLAIN = {"_core", "reference", "likelihood", "presets"}  # torch at most
FLOWS = {*PLAIN, "functional", "nets", "runs", "layers", "models"}
APPLICATION = {*FLOWS, "interop", "data", "latents", "train"}
ALLOWED: dict[str, set[str]] = {
    "_core": set(),
    "reference": {"_core"},
    "likelihood": {"_core"},
    "presets": {"_core"},
    "functional": {"_core", "reference"},
    "nets": {"_core", "reference", "functional"},
    "runs": {"_core", "reference", "functional", "nets"},
    "layers": {"_core", "reference", "functional", "nets", "runs"},
    "models": {*PLAIN, "functional", "nets", "runs", "layers"},
    "interop": FLOWS,
    "data": PLAIN,
    "latents": FLOWS,
    "train": {*FLOWS, "interop", "data", "latents"},
    "app": set(),
    "app.studio": APPLICATION,
    "app.web": {*APPLICATION, "app.studio"},
    "app.experiments": {*APPLICATION, "app.studio"},
    "app.cli": {*APPLICATION, "app.studio", "app.experiments"},
    "__init__": FLOWS,
    "__main__": {"app.cli"},
}

DEPENDENCIES = {"torch", "numpy", "safetensors"}  # always installed; anything else is imported inside functions
MAY_USE_EXTRAS = {"data", "train", "interop", "app"}
# Modules that nothing of the package imports, and the library that each is made for: its class is theirs' base.
MADE_FOR = {
    "pyglow_fast.train.lightning": "lightning",
    "pyglow_fast.app.web": "gradio",
}
# The one exception, inside a function: the command that starts the page, after it has looked whether Gradio is there.
MAY_START = {"pyglow_fast.app.cli.serve": "pyglow_fast.app.web"}
COMES_WITH = {"gradio": {"fastapi", "starlette", "uvicorn"}}  # and may be imported where it may


def is_within(module: str, name: str) -> bool:
    """Tells whether ``module`` is ``name`` or something in it."""
    return f"{module}.".startswith(f"{name}.")


def folder_of(module: str) -> str | None:
    """The folder of ALLOWED, or the module beside the folders, that a module of the package is in."""
    found = [name for name in ALLOWED if is_within(module, f"{PACKAGE}.{name}")]
    return max(found, key=len, default=None)


def made_for(module: str) -> str | None:
    """The library that a module, or the package it is in, is made for."""
    return next((top for name, top in MADE_FOR.items() if is_within(module, name)), None)


@dataclass(frozen=True)
class Import:
    module: str  # absolute, as far as it can be told: pyglow_fast.layers.actnorm, torch.nn
    line: int
    deferred: bool  # inside a function, or for type checkers only


def imports(source: str, module: str) -> Iterator[Import]:
    """The imports of a module; `from pyglow_fast import x` counts as an import of pyglow_fast.x."""

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            names = [f"{base}.{alias.name}" for alias in node.names] if base == PACKAGE else [base]
            yield from (Import(name, node.lineno, deferred) for name in names)
        inner = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inner = inner or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(ast.parse(source), False)


def python_faults(source: str, module: str) -> list[str]:
    """The forbidden imports of one module, in words. `module` is dotted, with __init__ spelled out."""
    folder = folder_of(module)
    if folder is None:
        return [f"{module} is not entered in ALLOWED of tests/test_architecture.py"]
    faults = []
    for found in imports(source, module):
        top = found.module.split(".")[0]
        where = f"{module}:{found.line} imports {found.module}"
        library = made_for(module)
        starts = found.deferred and is_within(found.module, MAY_START.get(module, "nothing"))
        if made_for(found.module) and made_for(found.module) != library and not starts:
            faults.append(f"{where}: made for a library that may be missing, it is imported by users alone")
        elif top == PACKAGE:
            target = folder_of(found.module) or "__init__"
            if target not in {folder, *ALLOWED[folder]} and not starts:
                faults.append(f"{where}: {folder} may import {', '.join(sorted(ALLOWED[folder])) or 'nothing'}")
        elif top not in sys.stdlib_module_names and top not in DEPENDENCIES:
            if folder.split(".")[0] not in MAY_USE_EXTRAS:
                faults.append(f"{where}: only {', '.join(sorted(MAY_USE_EXTRAS))} may use other libraries")
            elif not found.deferred and library != top and top not in COMES_WITH.get(library or "", set()):
                faults.append(f"{where}: a library that may be missing is imported inside a function")
    return faults


def test_folders_say_what_lives_there() -> None:
    for folder in (name for name in ALLOWED if (ROOT / PACKAGE / name.replace(".", "/")).is_dir()):
        source = (ROOT / PACKAGE / folder.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
        words = ast.get_docstring(ast.parse(source)) or ""
        assert "may import" in words or "imports no other" in words, folder
        assert "Read " in words, folder
        assert len([line for line in words.splitlines() if line]) <= 6, folder


def test_figure_shows_the_folders() -> None:
    """A box for each, and arrows along which a folder may import another."""
    assert set(architecture.PARTS) == set(ALLOWED) - {"app", "__main__"}
    starts = {(folder_of(module), folder_of(started)) for module, started in MAY_START.items()}
    for upper, lower in architecture.ARROWS:
        assert lower in ALLOWED[upper] or (upper, lower) in starts


def test_python_layers() -> None:
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found += python_faults(path.read_text(encoding="utf-8"), module)
    assert found == []


# The native code: which includes a file may have, by the folder it is in. "quoted" are the project's own headers.
# Instructions by name are in the nets alone: their sources are compiled for more instruction sets than the others, none
# of which may come to need what is in them.
FOREIGN = {
    "bindings": re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^Python\.h$"),
    "run": re.compile(r"^(ATen|c10)/"),
    "cuda": re.compile(r"^(cuda|cub/|thrust/|cooperative_groups|mma\.h|nv)"),
    "cpu/net": re.compile(r"^(\w*intrin|arm_\w+)\.h$"),
}
OWN_HEADERS = {
    "math": re.compile(r"math/"),
    "core.h": re.compile(r"math/(kinds|window|host_device)\.h$"),  # plain values that cross the boundary
    "cpu": re.compile(r"math/|core\.h$|cpu/(?!net/)"),
    "cpu/net": re.compile(r"math/|core\.h$|cpu/"),
    "cuda": re.compile(r"math/|core\.h$|cuda/"),
    "bindings": re.compile(r"core\.h$|bindings/|run/run\.h$"),
    "run": re.compile(r"run/|bindings/(coupling_kind|device|dry|ops)\.h$|math/kinds\.h$"),
}
# Not even in the bindings: the first three triple the compile time, the others tie the module to a torch with CUDA.
NEVER = re.compile(r"^torch/extension\.h$|^torch/all\.h$|^torch/torch\.h$|^(c10|ATen)/cuda/")


def include_faults(source: str, name: str) -> list[str]:
    """The forbidden includes of one native file, in words. `name` is relative to csrc, such as cpu/coupling.cpp."""
    part = name if "/" not in name else name.rpartition("/")[0]
    if part not in OWN_HEADERS:
        return [f"{name}: {part} is not entered in OWN_HEADERS of tests/test_architecture.py"]
    faults = []
    for line, text in enumerate(source.splitlines(), 1):
        found = re.match(r'\s*#\s*include\s*(?:<([^>]+)>|"([^"]+)")', text)
        if found is None:
            continue
        system, own = found.groups()
        where = f"{name}:{line} includes {system or own}"
        if own is not None:
            if not OWN_HEADERS[part].match(own):
                faults.append(f"{where}: {part} may include {OWN_HEADERS[part].pattern}")
            continue
        homes = [home for home, pattern in FOREIGN.items() if pattern.search(system)]
        if NEVER.search(system):
            faults.append(f"{where}: never included")
        elif homes and part not in homes:
            faults.append(f"{where}: only {' and '.join(homes)} may")
        elif part == "core.h" and system != "cstdint":
            faults.append(f"{where}: core.h may include <cstdint>")
    return faults


def native_files() -> Iterator[tuple[str, str]]:
    """The files of csrc by their names below it, and what is in them."""
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in {".h", ".cuh", ".cpp", ".cu"}:
            yield path.relative_to(ROOT / "csrc").as_posix(), path.read_text(encoding="utf-8")


def test_native_includes() -> None:
    assert [fault for name, source in native_files() for fault in include_faults(source, name)] == []


def test_formulas_are_written_once() -> None:
    """Kernels of both kinds take their functions from csrc/math, where each stands once for all devices."""
    own = re.compile(r"(?<!math::)\b(exp|expm1|log|log1p|tanh|atan|sigmoid|softplus)f?\(")
    found = [
        f"{name}:{line}: {text.strip()}"
        for name, source in native_files()
        if name.startswith(("cpu/", "cuda/"))
        for line, text in enumerate(source.splitlines(), 1)
        if own.search(text.split("//")[0])
    ]
    assert found == []


def test_runs_read_values_where_no_graph_is_captured() -> None:
    """On the CPU, and for a verdict that is not deferred."""
    reads = re.compile(r"\.(item|is_nonzero|equal|nonzero|cpu)\b *[<(]|kCPU|Synchronize|cudaMemcpy")
    found = Counter(name for name, source in native_files() if name.startswith("run/") for _ in reads.findall(source))
    assert found == {"run/backward.cpp": 1, "run/forward.cpp": 2}


def test_every_native_source_is_built() -> None:
    """A source outside the folders whose files are built would look like part of the module and never be compiled."""
    lists = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    built = {path for pattern in re.findall(r"csrc/[\w/]+/\*\.\w+", lists) for path in ROOT.glob(pattern)}
    assert built == {ROOT / "csrc" / name for name, _ in native_files() if name.endswith((".cpp", ".cu"))}


def test_every_fault_can_be_seeded() -> None:
    """The list of faults that ``make faults`` seeds is true of the sources as they are."""
    for fault in faults.load():
        assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old) == 1, fault.breaks
        assert fault.new != fault.old, fault.breaks
