import importlib.util
import os
import subprocess
import sys
from types import ModuleType

import pytest

from kdcache.cli import COMMANDS
from tests.docs.pages import DOCS, ROOT, sections


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_cli", DOCS / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_what_the_commands_say(generator: ModuleType) -> None:
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == generator.render(), "run python docs/generate_cli.py"


def test_page_has_a_section_for_every_command() -> None:
    titles = [title for title in sections((DOCS / "cli.md").read_text()) if title.startswith("kdcache")]
    assert titles == ["kdcache", *(f"kdcache {name}" for name in COMMANDS)]


def test_page_does_not_depend_on_the_terminal(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generator.render()
    for name, value in {"COLUMNS": "40", "LINES": "10", "FORCE_COLOR": "1", "LC_ALL": "C"}.items():
        monkeypatch.setenv(name, value)
    assert generator.render() == expected


def test_page_shows_what_a_shell_shows() -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "kdcache", "inspect", "--help"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    page = (DOCS / "cli.md").read_text()
    # Wrapped alike or not, the words are the same.
    words = " ".join(result.stdout.replace("python -m kdcache", "kdcache").split())
    assert words in " ".join(page.split())
