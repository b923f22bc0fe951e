"""The pages say what is there: generated ones are fresh, links lead somewhere, code runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aspo_jax.config import packaged
from aspo_jax.config.sections import SECTIONS, fields
from aspo_jax.model.hf_config import FAMILIES, SUPPORTED

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = {DOCS / "api.md", DOCS / "library.md"}  # signatures, and files with tests of their own


def name(path: Path) -> str:
    return path.stem


def load_generator():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec and spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    return generate


def test_generated_pages_are_fresh():
    for path, text in load_generator().pages().items():
        assert path.read_text() == text, f"{path.name}: run `python docs/generate.py`"


def test_every_argument_in_the_reference_has_a_meaning():
    rows = re.findall(r"^\| `[\w.]+` \|.*$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert [row for row in rows if not row.rstrip(" |").rpartition("| ")[2].strip()] == []
    assert [row for row in rows if row.endswith("|  |")] == []
    assert len(rows) > 100


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path)
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "reference" / "index.html").exists()


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f": {page.name}\n" not in text] == []


def test_the_page_of_models_lists_every_family():
    text = (DOCS / "models.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \|", text, re.MULTILINE)
    assert [model_type for _, model_type in rows[1:]] == list(FAMILIES)
    for title in SUPPORTED.replace(" or ", ", ").split(", "):
        assert any(title in titles for titles, _ in rows)
        for page in ("index.md", "own_data.md", "scale.md"):
            assert title in (DOCS / page).read_text(), f"{page} does not name {title}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!\w+:)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", sorted({*PAGES} - {DOCS / "api.md"}), ids=name)
def test_settings_that_are_named_exist(page):
    text = re.sub(r"^ *error: .*$", "", page.read_text(), flags=re.MULTILINE)
    named = set(re.findall(r"\b([A-Z]\w+)(?:\.[a-z]\w*)?\.([a-z]\w*)", text))
    settings = {(owner, field) for owner, field in named if owner in SECTIONS}
    assert {(owner, field) for owner, field in settings if field not in fields(owner)} == set()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_that_are_named_exist(page):
    for module in set(re.findall(r"-m (aspo_jax(?:\.\w+)*)", page.read_text())):
        assert importlib.util.find_spec(module), f"no module {module}"


def blocks(page: Path) -> Iterator[tuple[str | None, str]]:
    """The Python of a page: the name of the file that a block is, if it is one, and its text."""
    for text in FENCE.findall(page.read_text()):
        first = re.match(r"# file: (\S+)\n", text)
        yield (first[1] if first else None), text


@pytest.mark.parametrize("page", sorted({p for p in PAGES if [*blocks(p)]} - SHOWN), ids=name)
def test_python_on_a_page_runs(page, tmp_path):
    programs = []
    for file, text in blocks(page):
        if file:
            (tmp_path / file).write_text(text)
        programs.append(f"import {Path(file).stem}\n" if file else text)
    command = (sys.executable, "-W", "error", "-c", "\n".join(programs))
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    ran = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_house_is_as_drawn():
    drawn = re.findall(r"^ {6}([\w./]+) ", (DOCS / "house.md").read_text(), re.MULTILINE)
    assert [path for path in drawn if not (ROOT / "aspo_jax" / path).exists()] == []
    assert len(drawn) > 15


def test_every_packaged_config_is_on_its_page():
    text = (DOCS / "configs.md").read_text()
    assert [config for config in packaged() if f"`{config}`" not in text] == []
