"""The documents say what is there: nothing missing, nothing stale, every example runs."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import adasplash_core
from adasplash_cli.main import COMMANDS, cli
from adasplash_core import errors, hookspecs

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
SOURCES = [path for folder in ("adasplash_core", "backends", "tuner", "cli") for path in (ROOT / folder).rglob("*.py")]


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def code_blocks(path: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S)


class TestNothingIsMissing:
    def test_hooks(self) -> None:
        hooks = [name for name in vars(hookspecs) if name.startswith("adasplash_")]
        assert hooks
        missing = [
            name for name in hooks if f"`{name}" not in text_of("plugins.md") and f"def {name}" not in text_of("plugins.md")
        ]
        assert not missing

    def test_environment_variables(self) -> None:
        used = {
            name for path in SOURCES for name in re.findall(r"\bADASPLASH_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8"))
        }
        described = set(re.findall(r"^\| `(ADASPLASH_[A-Z_]+)`", text_of("environment.md"), flags=re.M))
        assert used == described

    def test_arguments_of_attention(self) -> None:
        described = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", text_of("attention.md"), flags=re.M))))
        assert set(inspect.signature(adasplash_core.attention).parameters) <= described

    def test_errors(self) -> None:
        raised = {n for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, errors.AdasplashError)}
        missing = [name for name in raised if f"`{name}`" not in text_of("attention.md")]
        assert not missing

    def test_public_names(self) -> None:
        text = text_of("attention.md") + text_of("plugins.md")
        functions = [n for n in adasplash_core.__all__ if callable(getattr(adasplash_core, n))]
        assert not [name for name in functions if not re.search(rf"\b{name}\b", text)]

    @pytest.mark.parametrize("name", COMMANDS)
    def test_commands_and_options(self, name: str) -> None:
        section = text_of("cli.md").partition(f"\n## adasplash {name}\n")[2].partition("\n## ")[0]
        assert section
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for option in _options(command):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", section), option

    def test_pages_are_in_the_navigation(self) -> None:
        navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
        assert {path.name for path in DOCS.glob("*.md")} == set(re.findall(r"(\w+\.md)", navigation))


def _options(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            yield from (*parameter.opts, *parameter.secondary_opts)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _options(child)


class TestNothingIsStale:
    def test_generated_parts(self) -> None:
        # In a process of its own: plugins that other tests load must not show.
        done = subprocess.run([sys.executable, ROOT / "scripts" / "generate.py", "--check"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_the_plot_can_be_drawn(self, tmp_path: Path) -> None:
        output = tmp_path / "entmax.svg"
        subprocess.run([sys.executable, ROOT / "scripts" / "plot_entmax.py", output], check=True)
        drawn, committed = output.read_text(encoding="utf-8"), (DOCS / "images" / "entmax.svg").read_text(encoding="utf-8")
        assert drawn.startswith("<?xml")
        assert drawn.count("<path") == committed.count("<path")

    @pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
    def test_command_lines_parse(self, path: Path) -> None:
        for block in [*code_blocks(path, "console"), *code_blocks(path, "bash"), *code_blocks(path, "sh")]:
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words[:1] == ["adasplash"]:
                    _parse(words[1:])

    @pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
    def test_links_inside_the_repository_lead_somewhere(self, path: Path) -> None:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), target

    @pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
    def test_python_examples_run(self, page: str, tmp_path: Path) -> None:
        blocks = list(code_blocks(ROOT / page, "python"))
        assert blocks
        environment = os.environ | {"ADASPLASH_DB": str(tmp_path / "tuned.db")}
        for block in blocks:
            done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
            assert done.stdout

    def test_the_readme_example_has_ten_lines_or_fewer(self) -> None:
        (block,) = code_blocks(ROOT / "README.md", "python")
        assert len([line for line in block.splitlines() if line.strip()]) <= 10


def _parse(words: list[str]) -> None:
    """Raise click's UsageError unless the words are a call the command line takes; runs nothing."""
    command: click.Command = cli
    context = click.Context(cli, info_name="adasplash")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        child = command.get_command(context, words[0])
        assert child is not None, words
        command, words = child, words[1:]
    if words in (["--help"], ["-h"]):
        return
    command.make_context("adasplash", words)


def test_mkdocs_builds_strictly(tmp_path: Path) -> None:
    # Not with --quiet: it hides the warnings from --strict, too.
    config, site = ["--config-file", ROOT / "mkdocs.yml"], ["--site-dir", tmp_path]
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", *config, *site]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="https?://fonts\.', index)
