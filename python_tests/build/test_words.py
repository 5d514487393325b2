"""Documentation: line lengths, links that lead somewhere, and words that have one right form here."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("csrc", "bench", "docs", "python_tests")
TEXTS = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
SOURCES = [
    path
    for folder in ("arch", "common", "conformance", "emulator")
    for path in sorted((ROOT / "csrc" / folder).iterdir())
    if path.suffix in (".h", ".cuh", ".cpp", ".cu")
]
WORDS = {  # the field's word instead
    r"multiprocessors?": "SM",
    r"thread blocks?": "CTA",
    r"(is|are|was|were|be|been) told": "say what passes which value to what",
    r"nobody": "name the thread, the kernel or the user",
    r"in vain": "time-out",
}


def name(path):
    return str(path.relative_to(ROOT))


def uncoded(text):
    """The numbered lines of a Markdown file outside of code blocks."""
    code = False
    for number, line in enumerate(text.splitlines(), 1):
        code ^= line.startswith("```")
        if not code:
            yield number, line


def prose(text):
    """The same without `code`."""
    return ((number, re.sub(r"`[^`]*`", "", line)) for number, line in uncoded(text))


def comments(text):
    """The // comments of a C++ file."""
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.search(r'^[^"]*?//(.*)', line):
            yield number, match[1]


def wrong_words(lines):
    found = (
        (number, re.search(rf"\b{word}\b", line, re.I), right)
        for number, line in lines
        for word, right in WORDS.items()
    )
    return [f"line {number}: {match[0]!r}, better: {right}" for number, match, right in found if match]


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_lines_of_documents_are_short(path):
    assert [number for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) >= 120] == []


@pytest.mark.parametrize("path", [ROOT / "CONTRIBUTING.md", *TEXTS], ids=name)
def test_links_lead_to_files_and_headings(path):
    def anchors(text):
        headings = (line.lstrip("#").strip().lower() for _, line in uncoded(text) if line.startswith("#"))
        return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}

    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file) if file else path
        if not there.exists() or (anchor and anchor not in anchors(there.read_text())):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_words_of_documents(path):
    assert wrong_words(prose(path.read_text())) == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_words_of_comments(path):
    assert wrong_words(comments(path.read_text())) == []


def test_wrong_words_are_found():
    assert len(wrong_words(prose("a multiprocessor\n```\nnobody\n```\n`nobody` and Nobody"))) == 2
    assert wrong_words(comments('int multiprocessors;\nf("// nobody");\nint n;  // of SMs')) == []
