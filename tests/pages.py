"""The code blocks of the documentation, and what their marks say.

A mark is an HTML comment right above a block, which readers do not see:

    <!-- not run: needs a GPU -->                          nothing of it can run in a test; its commands are parsed
    <!-- not run (fedit serve): it serves for ever -->     of its commands, those that begin so
    <!-- run by: tests/deployment/test_page.py -->         another test runs its commands
    <!-- first: fedit run --out runs/a -->                 run before the block
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
COMMENT = re.compile(r"<!--\s*(not run|run by|first)\s*(?:\(([^)]*)\))?\s*:\s*(.*?)\s*-->", re.DOTALL)
FENCE = re.compile(r"(?P<indent> *)(?P<ticks>```+)(?P<language>[\w-]*)(?P<attributes>.*)")


@dataclass(frozen=True)
class Mark:
    """What a comment above a block says of it."""

    kind: str
    beginning: str
    """Of the commands that it is about; empty: all"""
    text: str


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str
    """The file that it is the content of; empty: none"""
    text: str
    marks: tuple[Mark, ...]

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    def marked(self, kind: str, command: str = "") -> str | None:
        """Return what a mark of this kind says of a command, or of the block; None: there is none."""
        return next((m.text for m in self.marks if m.kind == kind and command.startswith(m.beginning)), None)

    def commands(self) -> Iterator[str]:
        """Yield the commands of a block for a shell, continued lines joined, prompts and comments left out."""
        for line in self.text.replace("\\\n", " ").splitlines():
            command = line.removeprefix("$ ").strip()
            if command and not command.startswith("#"):
                yield command.replace(".venv/bin/", "")


def read_blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = FENCE.fullmatch(lines[number])
        if fence is None:
            number += 1
            continue
        end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == fence["ticks"])
        text = "\n".join(line.removeprefix(fence["indent"]) for line in lines[number + 1 : end]) + "\n"
        title = re.search(r'title="([^"]*)"', fence["attributes"])
        yield Block(page, number + 1, fence["language"], title[1] if title else "", text, _marks(lines[:number]))
        number = end + 1


def _marks(above: list[str]) -> tuple[Mark, ...]:
    """Return the marks of the comments that end the lines `above` a block."""
    text = "\n".join(above).rstrip()
    marks: list[Mark] = []
    while text.endswith("-->"):
        begin = text.rindex("<!--")
        if found := COMMENT.fullmatch(text[begin:]):
            marks.insert(0, Mark(found[1], found[2] or "", " ".join(found[3].split())))
        text = text[:begin].rstrip()
    return tuple(marks)


def mentioned(page: Path) -> Iterator[str]:
    """Yield the commands that stand in the prose of a page, between single backticks."""
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"(?<!`)`((?:\.venv/bin/)?fedit [^`]+)`", prose):
        yield " ".join(span.removeprefix(".venv/bin/").split())


@dataclass(frozen=True)
class Simple:
    """One command without shell syntax around it."""

    words: list[str]
    stdin: str = ""
    output: str = ""
    """The file that its standard output goes to"""


def split(command: str) -> Iterator[Simple]:
    """Yield the commands of a line: ``&&`` between, ``echo ... |`` in front, ``> file`` behind, variables set."""
    for part in re.split(r"\s&&\s", command):
        said, pipe, last = part.rpartition(" | ")
        words = shlex.split(last if pipe else part, comments=True)
        stdin = " ".join(shlex.split(said)[1:]) if said.startswith("echo ") else ""
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        output = ""
        if ">" in words:
            output = words[words.index(">") + 1]
            words = words[: words.index(">")]
        if words:
            yield Simple(words, stdin, output)
