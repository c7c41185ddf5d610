"""What people copy from the pages: links that lead somewhere, code that compiles, options that exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kdcache.cli import COMMANDS, cli
from tests.docs.pages import DOCS, ROOT, blocks

README = ROOT / "README.md"
SHELL = ("bash", "sh", "shell", "console")
PAGES = sorted({README, ROOT / "SECURITY.md", *DOCS.rglob("*.md"), *(ROOT / "pipelines").rglob("*.md")})
SCRIPTS = sorted((ROOT / "pipelines").rglob("*.sh"))

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")
_FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(page: str) -> set[str]:
    """The anchors of the headings, as web forges make them."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path) -> Iterator[str]:
    for link in _LINK.findall(_FENCE.sub("", path.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists():
            yield f"{link}: there is no {target}"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
            yield f"{link}: {target.name} has no heading {anchor}"


def commands_in(shell: str) -> Iterator[list[str]]:
    """Yield the words after ``kdcache`` of every call in a piece of shell."""
    joined = re.sub(r"\\\n\s*", " ", shell)
    for line in joined.splitlines():
        line = re.sub(r"^\s*[$>] ", "", line)
        if "kdcache" not in line.split("#")[0]:
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()<>")
        lexer.whitespace_split = True
        words = list(lexer)
        for at, word in enumerate(words):
            called = word == "kdcache" or (word.endswith("/kdcache") and "=" not in word)
            # A program's name starts a command, or follows a launcher such as time, or python -m.
            before = words[at - 1] if at else ""
            if called and (not before or re.fullmatch(r"[|&;(]+|time|-m|then|do|else|exec|!|\w+=.*", before)):
                rest = words[at + 1 :]
                if not rest or re.match(r"[($]", rest[0]):
                    continue  # a function of that name, or what a function was given
                stop = next((n for n, word in enumerate(rest) if re.fullmatch(r"[|&;()<>]+", word)), len(rest))
                yield rest[:stop]


def unknown_options(words: list[str]) -> list[str]:
    """What the live command line does not know of a call: its command or its options."""
    # Not a bare context: click remembers the help options of the first one that it sees.
    context = cli.make_context("kdcache", [], resilient_parsing=True)
    options = {o for p in cli.get_params(context) for o in (*p.opts, *p.secondary_opts)}
    name, *rest = words or [""]
    if name.startswith("-"):
        return [word for word in words if word.startswith("-") and word.partition("=")[0] not in options]
    if name not in COMMANDS:
        return [f"command {name!r}"]
    command = cli.get_command(context, name)
    assert command is not None
    own = click.Context(command, info_name=name, **{"help_option_names": ["-h", "--help"]})
    options = {o for p in command.get_params(own) for o in (*p.opts, *p.secondary_opts)}
    given = [word.partition("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)]
    return [option for option in given if option not in options]


def calls() -> list[tuple[str, list[str]]]:
    """Every call of kdcache in README, docs and pipelines, with the file that it stands in."""
    found = []
    for path in PAGES:
        for block in blocks(path.read_text() if path.exists() else "", *SHELL):
            found += [(name_of(path), words) for words in commands_in(block)]
    for path in SCRIPTS:
        found += [(name_of(path), words) for words in commands_in(path.read_text())]
    return found


def test_there_is_a_readme() -> None:
    assert README.exists(), "README.md is missing; the package names it as its description"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    assert list(broken_links(path)) == []


def test_python_in_the_readme_compiles() -> None:
    for block in blocks(README.read_text(), "python", "py"):
        compile(block, "README.md", "exec")


def test_readme_shows_the_main_commands() -> None:
    shown = {words[0] for page, words in calls() if page == "README.md" and words}
    assert {"dump-teacher", "train-student", "evaluate"} <= shown


def test_options_on_the_pages_exist() -> None:
    wrong = [
        f"{page}: kdcache {' '.join(words)}: {unknown}"
        for page, words in calls()
        if (unknown := unknown_options(words))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        ("kdcache inspect cache --json | head", [["inspect", "cache", "--json"]]),
        ("$ kdcache verify cache --deep && kdcache peek cache", [["verify", "cache", "--deep"], ["peek", "cache"]]),
        ("OMP_NUM_THREADS=1 kdcache peek \\\n  cache --at 1  # positions", [["peek", "cache", "--at", "1"]]),
        ("python -m kdcache inspect 'a b' > out.json", [["inspect", "a b"]]),
        ('kdcache() { "$PYTHON" -m kdcache "$@"; }\nkdcache verify c', [["verify", "c"]]),
        ("pip install kdcache\ncd kdcache\n# kdcache nonsense", []),
    ],
)
def test_calls_are_found_in_shell(shell: str, expected: list[list[str]]) -> None:
    assert list(commands_in(shell)) == expected


@pytest.mark.parametrize(
    ("call", "unknown"),
    [
        ("dump-teacher --teacher x --corpus y --output z", []),
        ("dump-teacher --set targets.codec.grid=32 --top-k=8 -q", []),
        ("dump-teacher --teecher x", ["--teecher"]),
        ("inspect --deep", ["--deep"]),
        ("dump", ["command 'dump'"]),
        ("--version", []),
        ("--versions", ["--versions"]),
    ],
)
def test_unknown_options_are_found(call: str, unknown: list[str]) -> None:
    assert unknown_options(call.split()) == unknown


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n[a](page.md#a-page) [b](no.md) [c](#nowhere) [d](https://x.org/no) ![e](e.png)\n")
    assert [problem.split(":")[0] for problem in broken_links(page)] == ["no.md", "#nowhere", "e.png"]
