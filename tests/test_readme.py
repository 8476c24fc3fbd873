"""The README cannot rot: its commands exist, its files exist, its keys are keys of the configuration."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pipelines.cli import _parser
from pipelines.tickets import ColumnMap
from router.config import Config, load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = next(a for a in _parser()._actions if a.dest == "==SUPPRESS==" or a.choices).choices


def test_the_first_screen_says_what_it_is_and_names_two_commands():
    first = README[: README.index("```text")]
    assert len(first.splitlines()) < 25
    assert "make serve" in first
    assert "make test" in first


@pytest.mark.parametrize("name", sorted(set(re.findall(r"deskroute ([a-z]+)\b", README)) - {"block"}))
def test_every_command_named_exists(name):
    assert name in COMMANDS


def test_every_command_of_the_contract_exists():
    assert {"serve", "route", "ask", "retrain", "compare", "promote", "rollback", "ui", "pretrain", "doctor"} <= set(COMMANDS)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:router|persona_models|pipelines|mlflow|docs)/[\w./]+)`", README))))
def test_every_file_named_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?<![\w/`])((?:router|persona_models|pipelines)/\w+\.py)", README))))
def test_every_module_drawn_exists(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("snippet", re.findall(r"`((?:base|knowledge|desk|personas|registry): [^`]+)`", README))
def test_every_configuration_line_is_valid(snippet, tmp_path):
    (tmp_path / "my-articles").mkdir()
    (tmp_path / "personas.yaml").write_text((ROOT / "persona_models" / "personas.yaml").read_text())
    path = tmp_path / "deskroute.yaml"
    path.write_text(snippet + "\n")
    assert isinstance(load_config(path), Config)


def test_ticket_columns_are_those_that_are_read():
    named = re.search(r"columns: prompt, answer; optional: ([\w, ]+)", README)[1].split(", ")
    assert {"prompt", "answer", *named} == set(ColumnMap.model_fields) - {"names", "time", "only", "strip"}


def test_make_lists_its_targets():
    done = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("serve", "test", "lint", "help"):
        assert re.search(rf"(?m)^{target} ", done.stdout)


def test_no_placeholder_is_left_empty():
    assert not re.findall(r"<!-- begin:(\w+) -->\n<!-- end", README)


def test_the_changelog_has_this_version():
    version = re.search(r'(?m)^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_requirement_is_pinned():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    block = re.search(r"(?s)dependencies = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text())[1]
    names = re.findall(r'"([A-Za-z][\w-]*)', block)
    known = {n.lower().replace("_", "-") for n in pins}
    assert {n.lower().replace("_", "-") for n in names} <= known
