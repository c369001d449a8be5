"""What README and the pages show works.

Each block of Python and of commands runs as printed, alone: in an empty folder, knowing nothing of the other blocks.
But where a page in docs trains on digits for some steps without naming a width, the model is SMALL.
Commands that stand in the text parse, and links lead somewhere.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.util
import json
import re
import signal
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from support import ROOT
from support.pages import Block, blocks, page, shell_commands
from support.tiny_run import write_images

from pyglow_fast._core import backend
from pyglow_fast.app.cli import app, main
from pyglow_fast.data import DataConfig
from pyglow_fast.models import GlowConfig
from pyglow_fast.train import TrainConfig

PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
EXAMPLES = tuple(f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.md")))
LINKING = (*PAGES, *EXAMPLES, "CONTRIBUTING.md", "docs/reference/index.md")
SHOWN = [(name, block) for name in PAGES for block in blocks(page(name))]
LANGUAGES = ("python", "sh", "console", "text", "toml")
SHIPPED = ROOT / "pyglow_fast" / "shown" / "best.safetensors"
SMALL = ["--n-levels", "1", "--n-steps", "2", "--hidden", "16", "--eval-images", "64"]
COMMAND = re.compile(r"`(pyglow-fast [^`]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def cases(language: str) -> list[object]:
    """The blocks in one language, each code once, named by page and line; those of several processes with --full."""
    shown = {block.code: (name, block) for name, block in reversed(SHOWN) if block.language == language}
    return [
        pytest.param(
            block,
            id=f"{Path(name).stem}-line{block.line}",
            marks=[pytest.mark.full] * ("torchrun" in block.code),
        )
        for name, block in shown.values()
    ]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, one thread, and no data set that was fetched before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYGLOW_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.parametrize("block", cases("python"))
def test_python_runs(block: Block) -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(block.code))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    missing = sorted(name for name in imported if importlib.util.find_spec(name) is None)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if " MB" in block.code and backend.extension() is None:
        pytest.skip(f"bytes need the extension: {backend.reason()}")
    exec(block.code, {"__name__": "__main__"})


@pytest.mark.skipif(not SHIPPED.is_file(), reason=f"this copy has no {SHIPPED}")
def test_the_example_of_inverse_problems_runs() -> None:
    """In few steps; what it finds agrees better with what was observed than the mean of every prior does."""
    (block,) = blocks(page("examples/inverse_problem.md"))
    example: dict[str, Any] = {"__name__": "example"}
    exec(block.code.replace("steps=150", "steps=6"), example)
    assert Path("found.png").is_file()
    truth, found = example["truth"], [x for name, x in example["rows"] if name == "found"]
    noise = [torch.zeros(len(truth), *shape) for shape in example["model"].latent_shapes]
    mean, _ = example["model"].from_noise(noise, example["labels"])
    for (observe, _), x in zip(example["problems"].values(), found, strict=True):
        assert (observe(x) - observe(truth)).norm() < 0.9 * (observe(mean) - observe(truth)).norm()


@pytest.mark.skipif(not SHIPPED.is_file(), reason=f"this copy has no {SHIPPED}")
def test_the_example_of_hiding_runs() -> None:
    """In few steps; its blocks are joined, and it reveals more of the secrets than nothing, which it does at first."""
    (block,) = blocks(page("examples/hiding.md"))
    example: dict[str, Any] = {"__name__": "example"}
    exec(block.code.replace("steps, batch = 300, 8", "steps, batch = 10, 8"), example)
    assert Path("hidden.png").is_file()
    assert example["steps"] == 10
    assert list(example["done"].joined) == ["blocks"]
    secret, revealed = example["secret"], example["revealed"]
    assert (revealed - secret).norm() < 0.9 * secret.norm()


def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells of code, in turn and in few steps; none holds an output, which would be of another version."""
    plt.switch_backend("agg")  # which shows nothing
    notebook = json.loads(page("examples/first_glow.ipynb"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    scope: dict[str, Any] = {"__name__": "notebook"}
    for cell in cells:
        exec("".join(cell["source"]).replace("steps = 400", "steps = 20"), scope)
    plt.close("all")
    assert scope["steps"] == 20
    assert scope["bits"].mean() < 3.5  # 4.3 untrained
    assert "histogram 2.43" in capsys.readouterr().out


@pytest.mark.parametrize("block", cases("sh"))
def test_commands_run(block: Block) -> None:
    if re.search(r" shown\b| serve$", block.code, re.MULTILINE) and not SHIPPED.is_file():
        pytest.skip(f"this copy has no {SHIPPED}")
    if "folder:PICTURES" in block.code:
        write_images(Path("PICTURES"), names=("cats", "dogs"))
    for words in shell_commands(block.code.replace("--max-minutes 8", "--max-minutes 0.1")):
        if words[:2] == ["pyglow-fast", "serve"]:
            look_at(words[1:])
        elif words[0] in ("torchrun", "python"):
            module = [sys.executable, *(["-m", "torch.distributed.run"] if words[0] == "torchrun" else []), *words[1:]]
            done = subprocess.run(module, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
        else:
            assert words[0] == "pyglow-fast", f"only this package's commands can be shown as sh: {words}"
            trains = words[1:3] == ["train", "digits"]
            small = SMALL if trains and not {"--hidden", "100"} & {*words} else []  # README's takes 100 steps
            assert main([*words[1:], *small]) == 0, words
        if "--out" in words:
            assert Path(words[words.index("--out") + 1]).exists(), words


def look_at(words: list[str]) -> None:
    """Serve a page, read it, and end it by Ctrl-C."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "pyglow_fast", *words, "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            (address,) = re.findall(r"http://\S+", process.stdout.readline())
            with urllib.request.urlopen(address) as answer:
                assert b"pyglow_fast" in answer.read()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=300) == 0
        finally:
            process.kill()


def test_all_code_is_of_a_kind_that_is_tested() -> None:
    """A block of commands or of Python cannot stand where nothing runs it."""
    for name, block in SHOWN:
        assert block.language in LANGUAGES, (name, block.line)
        if block.language in ("console", "text"):
            assert not re.search(r"^(pyglow-fast|python|torchrun|import|from) ", block.code, re.MULTILINE), (
                name,
                block.line,
            )
    for name in PAGES:
        assert not re.search(
            r"^    (pyglow-fast|python|torchrun|make|pip|import|from) ",
            re.sub(r"```.*?```", "", page(name), flags=re.DOTALL),
            re.MULTILINE,
        ), name


def test_what_sets_up_a_machine_exists() -> None:
    """The targets of make and the extras of pip that blocks and text name."""
    targets = set(re.findall(r"^([\w-]+):", page("Makefile"), re.MULTILINE))
    extras = set(tomllib.loads(page("pyproject.toml"))["project"]["optional-dependencies"])
    named = "\n".join(page(name) for name in (*PAGES, "CONTRIBUTING.md"))
    assert set(re.findall(r"(?:^make |`make\s+)([a-z-]+)", named, re.MULTILINE)) <= targets
    found = {
        extra for extras in re.findall(r"(?:pyglow-fast|'\.|`\.)\[([\w,]+)\]", named) for extra in extras.split(",")
    }
    assert found
    assert found <= extras


def test_commands_in_the_text_parse() -> None:
    """Those that are shown without being run, and the command is installed under the name that the pages say."""
    shown = [command for name in (*PAGES, "CONTRIBUTING.md") for command in COMMAND.findall(page(name))]
    assert len(shown) > 20
    for command in shown:
        ((_, *arguments),) = shell_commands(command.replace("\n", " "))
        if arguments[0] != "info" and "--help" not in command:
            try:
                app.parser().parse_args(arguments)
            except SystemExit:
                pytest.fail(command)
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="pyglow-fast")
    assert entry.load() is main


def test_settings_of_the_pages_are_known() -> None:
    ((_, block),) = [shown for shown in SHOWN if shown[1].language == "toml"]
    shown = tomllib.loads(block.code)
    DataConfig(**shown.pop("data"))
    assert shown.pop("model").keys() <= {field.name for field in dataclasses.fields(GlowConfig)}
    assert shown.keys() <= {field.name for field in dataclasses.fields(TrainConfig)}


def anchors(text: str) -> set[str]:
    """What a link into a page can end with: its headings as mkdocs and GitHub spell them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("name", LINKING)
def test_links_lead_somewhere(name: str) -> None:
    text = re.sub(r"```.*?```", "", page(name), flags=re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_in_the_table_of_the_front_page_and_in_the_menu() -> None:
    front, menu = page("docs/index.md"), page("mkdocs.yml")
    for name in PAGES[1:]:
        short = name.removeprefix("docs/")
        assert short == "index.md" or f"]({short})" in front, name
        assert f": {short}" in menu, name
