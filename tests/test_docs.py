"""Every Python block of the README and the docs runs; every example in a docstring shows what it gives."""

import doctest
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.checks import DTYPES

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in page.read_text()]
FILES = sorted(p.relative_to(ROOT) for p in (ROOT / "lipfast").rglob("[!_]*.py"))
MODULES = [".".join(f.with_suffix("").parts) for f in FILES if ">>>" in (ROOT / f).read_text()]


def blocks(page: Path) -> list[str]:
    """Python blocks, after as many empty lines as stand before them in the page: so tracebacks name its lines."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, m.start(1)) + m.group(1) for m in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks(page):
        exec(compile(block, page, "exec"), namespace)


def test_the_example_op_of_contributing_passes_its_own_test(monkeypatch):
    page = ROOT / "CONTRIBUTING.md"
    modules = [ModuleType("lipfast.ops.soft_threshold"), ModuleType("tests.test_soft_threshold")]
    for module, block in zip(modules, blocks(page), strict=True):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(block, page, "exec"), module.__dict__)
    for case in modules[1].CASES:
        for dtype in DTYPES:
            modules[1].test_op(case, dtype, "cpu")
    modules[1].test_names_the_wrong_argument()
    assert doctest.testmod(modules[0]).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_module_give_what_they_show(name):
    torch.manual_seed(0)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
