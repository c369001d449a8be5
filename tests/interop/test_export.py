"""Exports of models and layers: torch.export, torch.jit.trace, AOTInductor, and programs without this package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.export_cases import ALL, assert_same, dynamic_shapes, other_input

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tracers: constants, deprecation


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.full
@pytest.mark.parametrize("name", ALL)
def test_torch_export(name: str) -> None:
    """A graph of torch's own ops, of any batch and image size; the model is afterwards what it was."""
    model, x = ALL[name]()
    other = other_input(x, name)
    expected = model(other)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic_shapes(name))
    assert not [target for target in operators(program) if "pyglow" in target or "higher_order" in target]
    assert_same(program.module()(other), expected)
    assert_same(model(other), expected)


@pytest.mark.full
@pytest.mark.parametrize("name", ALL)
def test_torch_jit_trace(name: str, tmp_path: Path) -> None:
    model, x = ALL[name]()
    traced = torch.jit.trace(model, (x,))
    assert "pyglow_fast::" not in str(traced.inlined_graph)
    torch.jit.save(traced, tmp_path / "model.pt")
    other = torch.randn(5, *x.shape[1:])
    with torch.no_grad():
        assert_same(torch.jit.load(tmp_path / "model.pt")(other), model(other))


_RUN = """
import sys, torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pyglow_fast", "FrEIA", "normflows", "nflows"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
folder, compiled = sys.argv[1], sys.argv[2] == "compiled"
x = torch.load(folder + "/x.pt")
if compiled:
    run = torch._inductor.aoti_load_package(folder + "/compiled.pt2")
else:
    run = torch.export.load(folder + "/program.pt2").module()
with torch.no_grad():
    torch.save(list(torch.utils._pytree.tree_leaves(run(x))), folder + "/out.pt")
"""


@pytest.mark.full
@pytest.mark.parametrize(("name", "form"), [("FrEIA, reversible", "saved"), ("glow", "saved"), ("FrEIA", "compiled")])
def test_a_program_needs_no_package(name: str, form: str, tmp_path: Path) -> None:
    """In a process that cannot import it, saved by torch.export or compiled ahead of time."""
    model, x = ALL[name]()
    other = other_input(x, name)
    torch.save(other, tmp_path / "x.pt")
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=dynamic_shapes(name))
        if form == "saved":
            torch.export.save(program, tmp_path / "program.pt2")
        else:
            torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
        expected = model(other)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", _RUN, str(tmp_path), form]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(torch.load(tmp_path / "out.pt"), expected)
