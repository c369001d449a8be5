"""Who may import whom, read from the sources: the layers of the Python package and the includes of the native code."""

import ast
import re
import runpy
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import ROOT

PACKAGE = "pyglow_fast"

# What each part of the package may import of the others; a new module or subpackage is entered here. A part is a direct
# child of the package: layers stands for all modules in layers/.
FOUNDATION = {"_tracing", "_errors", "_settings", "_captures", "_derivatives", "_float32", "_moments", "_renamed"}
STACK = (  # each may import those before it
    "_backend",
    "ops",
    "convolutions",
    "autograd",
    "functional",
    "coupling_nets",
    "reversible",
    "layers",
    "models",
    "latents",
    "train",
    "experiments",
    "studio",
    "web",
    "cli",
)
BESIDE = {"reference", "likelihood", "presets"}  # torch at most, usable by every layer above _backend
ALLOWED: dict[str, set[str]] = {
    "_tracing": set(),
    "_float32": set(),
    "_moments": set(),
    "_errors": {"_tracing"},
    "_settings": {"_errors"},
    "_captures": {"_errors", "_tracing"},
    "_derivatives": {"_errors"},
    "_renamed": {"_errors"},
    **dict.fromkeys((*BESIDE, "data"), FOUNDATION),
    **{name: FOUNDATION | BESIDE | set(STACK[:rank]) for rank, name in enumerate(STACK)},
    "_backend": FOUNDATION,
    "info": FOUNDATION | BESIDE | {"_backend", "ops"},
    "memory": {"_backend"},
    "interop": FOUNDATION | BESIDE | set(STACK[: STACK.index("models") + 1]),
    "__init__": FOUNDATION | BESIDE | {"interop", "memory"} | set(STACK[: STACK.index("models") + 1]),
    "__main__": {"cli"},
}
for above_data in ("train", "experiments", "studio", "web", "cli"):
    ALLOWED[above_data] |= {"data", "interop", "info"}

DEPENDENCIES = {"torch", "numpy", "safetensors"}  # always installed; anything else is imported inside functions
MAY_USE_EXTRAS = {"data", "train", "experiments", "studio", "web", "cli", "interop"}
# Modules that nothing of the package imports, and the library that each is made for: its class is theirs' base.
MADE_FOR = {
    "pyglow_fast.train.lightning": "lightning",
    "pyglow_fast.interop.normflows": "normflows",
    "pyglow_fast.interop.nflows": "nflows",
    "pyglow_fast.interop.freia": "FrEIA",
    "pyglow_fast.web": "gradio",
}
# The one exception, inside a function: the command that starts the page, after it has looked whether Gradio is there.
MAY_START = {"pyglow_fast.cli.serve": "pyglow_fast.web"}
# What comes with a library that a module is made for, and may be imported where that may.
COMES_WITH = {"gradio": {"fastapi", "starlette", "uvicorn"}}


def is_within(module: str, name: str) -> bool:
    """Tells whether ``module`` is ``name`` or something in it."""
    return f"{module}.".startswith(f"{name}.")


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
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, inner)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(ast.parse(source), False)


def python_faults(source: str, module: str) -> list[str]:
    """The forbidden imports of one module, in words. `module` is dotted, with __init__ spelled out."""
    part = module.split(".")[1]
    if part not in ALLOWED:
        return [f"{module}: {part} is not entered in ALLOWED of tests/test_architecture.py"]
    faults = []
    for found in imports(source, module):
        top, *rest = found.module.split(".")
        where = f"{module}:{found.line} imports {found.module}"
        library = made_for(module)
        starts = found.deferred and is_within(found.module, MAY_START.get(module, "nothing"))
        if made_for(found.module) and made_for(found.module) != library and not starts:
            faults.append(f"{where}: made for a library that may be missing, it is imported by users alone")
        elif top == PACKAGE:
            target = rest[0] if rest else "__init__"
            if target != part and target not in ALLOWED[part]:
                faults.append(f"{where}: {part} may import {', '.join(sorted(ALLOWED[part])) or 'nothing'}")
        elif top not in sys.stdlib_module_names and top not in DEPENDENCIES:
            if part not in MAY_USE_EXTRAS:
                faults.append(f"{where}: only {', '.join(sorted(MAY_USE_EXTRAS))} may use other libraries")
            elif not found.deferred and library != top and top not in COMES_WITH.get(library or "", set()):
                faults.append(f"{where}: a library that may be missing is imported inside a function")
    return faults


def python_modules() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


@pytest.mark.parametrize("path", python_modules(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_python_layers(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert python_faults(path.read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source", "word"),
    [
        ("pyglow_fast.functional", "from pyglow_fast import layers", "functional may import"),
        ("pyglow_fast.functional", "import pyglow_fast.layers.actnorm", "functional may import"),
        ("pyglow_fast.functional", "def f():\n    from pyglow_fast.models import Glow", "functional may import"),
        ("pyglow_fast.functional", "from . import cli", "functional may import"),
        ("pyglow_fast.layers.actnorm", "from ..models.glow import Glow", "layers may import"),
        ("pyglow_fast.layers.__init__", "from ..models import Glow", "layers may import"),
        ("pyglow_fast.models.glow", "import pyglow_fast", "models may import"),
        ("pyglow_fast.coupling_nets", "from pyglow_fast import reversible", "coupling_nets may import"),
        ("pyglow_fast.coupling_nets.run", "from ..layers import CouplingNet", "coupling_nets may import"),
        ("pyglow_fast.reversible", "from pyglow_fast import layers", "reversible may import"),
        ("pyglow_fast.reference", "from pyglow_fast import functional", "reference may import"),
        ("pyglow_fast.train.loop", "from pyglow_fast.cli import main", "train may import"),
        ("pyglow_fast.interop.nflows", "from pyglow_fast import train", "interop may import"),
        ("pyglow_fast.reference", "def f():\n    import scipy", "only"),
        ("pyglow_fast.data.folder", "from PIL import Image", "inside a function"),
        ("pyglow_fast.interop.convert", "import nflows", "inside a function"),
        ("pyglow_fast.newcomer", "", "not entered"),
        ("pyglow_fast.train.lightning", "import torchmetrics", "inside a function"),
        ("pyglow_fast.train.loop", "from lightning import Trainer", "inside a function"),
        ("pyglow_fast.train.__init__", "from pyglow_fast.train.lightning import GlowModule", "by users alone"),
        ("pyglow_fast.cli.train", "def f():\n    from pyglow_fast.train.lightning import GlowModule", "by users alone"),
        ("pyglow_fast.studio.run", "from pyglow_fast.web import server", "by users alone"),
        ("pyglow_fast.studio.run", "def f():\n    from pyglow_fast.web.page import page", "by users alone"),
        ("pyglow_fast.studio.run", "from pyglow_fast.cli import main", "studio may import"),
        ("pyglow_fast.studio.run", "import gradio", "inside a function"),
        ("pyglow_fast.experiments.ood", "from pyglow_fast import studio", "experiments may import"),
        ("pyglow_fast.cli.app", "def f():\n    from pyglow_fast.web.server import serve", "by users alone"),
        ("pyglow_fast.cli.serve", "from pyglow_fast.web.server import serve", "by users alone"),
        ("pyglow_fast.cli.serve", "from pyglow_fast import web", "by users alone"),
        ("pyglow_fast.cli.serve", "def f():\n    from pyglow_fast.interop.nflows import x", "by users alone"),
        ("pyglow_fast.cli.serve", "import gradio", "inside a function"),
        ("pyglow_fast.web.page", "from PIL import Image", "inside a function"),
        ("pyglow_fast.web.page", "from pyglow_fast.train.lightning import GlowModule", "by users alone"),
        ("pyglow_fast.web.page", "from pyglow_fast.cli import main", "web may import"),
        ("pyglow_fast.train.loop", "import uvicorn", "inside a function"),
        ("pyglow_fast.train.lightning", "import uvicorn", "inside a function"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, word: str) -> None:
    assert any(word in fault for fault in python_faults(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "pyglow_fast.functional",
            "import math\nimport torch.nn.functional as F\nfrom pyglow_fast import _errors, autograd",
        ),
        ("pyglow_fast.layers.actnorm", "from ._base import FlowLayer\nfrom ..functional import actnorm"),
        ("pyglow_fast.reversible.chain", "from pyglow_fast.coupling_nets.net_runner import NetRunner"),
        ("pyglow_fast.layers.__init__", "from .actnorm import ActNorm"),
        ("pyglow_fast.data.folder", "def f():\n    from PIL import Image"),
        ("pyglow_fast.data.folder", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from PIL import Image"),
        ("pyglow_fast.__main__", "from pyglow_fast.cli import main"),
        ("pyglow_fast.train.lightning", "from lightning import LightningModule"),
        ("pyglow_fast.web.page", "import gradio as gr\nfrom pyglow_fast import studio\nfrom .errors import on_page"),
        ("pyglow_fast.web.server", "import fastapi\nimport uvicorn\nfrom gradio.routes import App"),
        ("pyglow_fast.cli.serve", "def f():\n    from pyglow_fast.web.server import serve"),
        ("pyglow_fast.studio.run", "from pyglow_fast import data, experiments, info, interop, train"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert python_faults(source, module) == []


# The native code: which includes a file may have, by the folder it is in. "quoted" are the project's own headers.
TORCH = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^Python\.h$")
CUDA = re.compile(r"^(cuda|cub/|thrust/|cooperative_groups|mma\.h|nv)")
# Instructions by name. The nets alone have some: their sources are compiled for more instruction sets than the others,
# none of which may come to need what is in them.
INTRINSICS = re.compile(r"^(\w*intrin|arm_\w+)\.h$")
OWN_HEADERS = {
    "math": re.compile(r"math/"),
    "core.h": re.compile(r"math/(kinds|host_device)\.h$"),  # plain values that cross the boundary
    "cpu": re.compile(r"math/|core\.h$|cpu/(?!net/)"),
    "cpu/net": re.compile(r"math/|core\.h$|cpu/"),
    "cuda": re.compile(r"math/|core\.h$|cuda/"),
    "bindings": re.compile(r"core\.h$|bindings/"),
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
        header = system or own
        where = f"{name}:{line} includes {header}"
        if NEVER.search(header):
            faults.append(f"{where}: never included")
        elif TORCH.search(header):
            if part != "bindings":
                faults.append(f"{where}: only bindings see torch")
        elif CUDA.search(header) and own is None:
            if part != "cuda":
                faults.append(f"{where}: only cuda sees CUDA")
        elif INTRINSICS.search(header):
            if part != "cpu/net":
                faults.append(f"{where}: only cpu/net names instructions")
        elif own is not None and not OWN_HEADERS[part].match(own):
            faults.append(f"{where}: {part} may include {OWN_HEADERS[part].pattern}")
        elif system is not None and part == "core.h" and system != "cstdint":
            faults.append(f"{where}: core.h may include <cstdint>")
    return faults


def native_files() -> list[Path]:
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"})


@pytest.mark.parametrize("path", native_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_native_includes(path: Path) -> None:
    assert include_faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT / "csrc").as_posix()) == []


@pytest.mark.parametrize(
    ("name", "source", "word"),
    [
        ("math/coupling.h", '#include "core.h"', "math may include"),
        ("math/coupling.h", "#include <ATen/ATen.h>", "only bindings"),
        ("math/host_device.h", "#include <cuda_runtime.h>", "only cuda"),
        ("core.h", "#include <vector>", "core.h may include"),
        ("core.h", '#include "math/coupling.h"', "core.h may include"),
        ("cpu/coupling.cpp", '#include "cuda/runtime.h"', "cpu may include"),
        ("cpu/coupling.cpp", "# include <c10/util/Half.h>", "only bindings"),
        ("cpu/coupling.cpp", '#include "cpu/net/packing.h"', "cpu may include"),
        ("cpu/simd.h", "#include <immintrin.h>", "only cpu/net names"),
        ("cpu/net/matmul.cpp", '#include "bindings/checks.h"', "cpu/net may include"),
        ("cpu/net/other/new.h", "", "not entered"),
        ("cuda/coupling.cu", '#include "cpu/isa.h"', "cuda may include"),
        ("cuda/coupling.cu", "#include <torch/types.h>", "only bindings"),
        ("cuda/coupling.cu", "#include <torch/extension.h>", "never"),
        ("bindings/ops.cpp", "#include <torch/extension.h>", "never"),
        ("bindings/ops.cpp", "  #include <c10/cuda/CUDAStream.h>", "never"),
        ("bindings/ops.cpp", "#include <cuda_runtime_api.h>", "only cuda"),
        ("bindings/ops.cpp", '#include "math/coupling.h"', "bindings may include"),
        ("extra/new.h", "", "not entered"),
    ],
)
def test_a_forbidden_include_is_found(name: str, source: str, word: str) -> None:
    assert any(word in fault for fault in include_faults(source, name))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("math/coupling.h", '#include <math.h>\n#include "math/scale_map.h"'),
        (
            "cpu/coupling.cpp",
            '#include <algorithm>\n#include "core.h"\n#include "math/coupling.h"\n#include "cpu/isa.h"',
        ),
        ("cpu/net/packing.h", '#include <immintrin.h>\n#include "cpu/simd.h"\n#include "cpu/net/matrix.h"'),
        ("cuda/coupling.cu", '#include <cuda_runtime.h>\n#include "core.h"\n#include "cuda/reduce.cuh"'),
        ("bindings/ops.cpp", '#include <ATen/ops/empty.h>\n#include "bindings/checks.h"\n#include "core.h"'),
        ("core.h", '#include <cstdint>\n#include "math/kinds.h"\n// #include <vector>'),
    ],
)
def test_an_allowed_include_passes(name: str, source: str) -> None:
    assert include_faults(source, name) == []


def test_every_native_source_is_built() -> None:
    """A source outside the folders whose files are built would look like part of the module and never be compiled."""
    lists = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    built = {path for pattern in re.findall(r"csrc/[\w/]+/\*\.\w+", lists) for path in ROOT.glob(pattern)}
    assert built == {path for path in native_files() if path.suffix in {".cpp", ".cu"}}


# The figure of docs/architecture.md: the same parts, above what they import, and the imports that there are.
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(ROOT / "docs" / "_site")
    DRAWING = runpy.run_path(str(ROOT / "docs" / "_site" / "architecture.py"))
Edge = tuple[str, str]


def reduced(edges: Iterable[Edge]) -> set[Edge]:
    """The edges of a graph without cycles that do not follow from others."""
    below: dict[str, set[str]] = {}
    for upper, lower in edges:
        below.setdefault(upper, set()).add(lower)

    def reached(part: str) -> set[str]:
        return {part}.union(*(reached(lower) for lower in below.get(part, ())))

    def follows(upper: str, lower: str) -> bool:
        return any(lower in reached(other) for other in below[upper] - {lower})

    return {(upper, lower) for upper, others in below.items() for lower in others if not follows(upper, lower)}


def python_edges() -> Iterator[Edge]:
    """(part, another that it imports), of those that are drawn."""
    for path in python_modules():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for found in imports(path.read_text(encoding="utf-8"), module):
            names = module.split(".")[1], (*found.module.split("."), "__init__")[1]
            if is_within(found.module, PACKAGE) and names[0] != names[1] and set(names) <= set(DRAWING["PARTS"]):
                yield names


def native_edges() -> Iterator[Edge]:
    """(folder of csrc or core.h, another that it includes)."""
    for path in native_files():
        for included in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            names = path.relative_to(ROOT / "csrc").as_posix(), included
            upper, lower = (name.rpartition("/")[0] or name for name in names)
            if upper != lower:
                yield upper, lower


def test_the_drawn_parts_are_the_real_ones() -> None:
    small = {name for name in FOUNDATION | BESIDE if name.startswith("_")}  # which all may import
    assert set(DRAWING["PARTS"]) == set(ALLOWED) - small - {"__main__"}
    assert set(DRAWING["NATIVE"]) == set(OWN_HEADERS)


def test_the_drawn_arrows_are_the_real_imports() -> None:
    assert set(DRAWING["ARROWS"]) == reduced(python_edges())
    assert set(DRAWING["NATIVE_ARROWS"]) == reduced(native_edges())


def test_parts_are_drawn_above_what_they_may_import() -> None:
    rows = {name: place.row for name, place in {**DRAWING["PARTS"], **DRAWING["NATIVE"]}.items()}
    spine = [name for name in STACK if name != "latents"]  # which is beside
    assert sorted(spine, key=rows.__getitem__, reverse=True) == spine
    for upper, lower in (*DRAWING["ARROWS"], *DRAWING["NATIVE_ARROWS"]):
        beside = DRAWING["PARTS"].get(lower)
        sideways = beside is not None and (beside.column != "spine" or upper == "memory")
        assert rows[upper] < rows[lower] or (rows[upper] == rows[lower] and sideways), (upper, lower)


@pytest.mark.parametrize(
    ("edges", "left"),
    [
        ([("a", "b"), ("b", "c"), ("a", "c")], {("a", "b"), ("b", "c")}),
        ([("a", "b"), ("b", "c"), ("c", "d"), ("a", "d")], {("a", "b"), ("b", "c"), ("c", "d")}),
        ([("a", "c"), ("b", "c")], {("a", "c"), ("b", "c")}),
    ],
)
def test_arrows_that_follow_from_others_are_left_out(edges: list[Edge], left: set[Edge]) -> None:
    assert reduced(edges) == left


@pytest.mark.parametrize("name", DRAWING["FIGURES"])
def test_the_figures_are_what_their_script_draws(name: str) -> None:
    drawn = DRAWING["FIGURES"][name]().source()
    assert (ROOT / "docs" / "architecture" / name).read_text(encoding="utf-8") == drawn


def test_words_that_are_too_wide_for_their_box_are_refused() -> None:
    figure = DRAWING["Figure"](200, 100, "a figure")
    figure.titled(0, 0, 120, 40, "a name", ["words that fit"])
    with pytest.raises(ValueError, match="expected at most"):
        figure.titled(0, 0, 120, 40, "a name", ["words that are too long for it"])
