"""The words of the project: where sentences are, in Python, Markdown, HTML and JavaScript."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# Each phrase with what to write instead.
AVOIDED = {
    "is told": "prints, or receives",
    "are told": "print, or receive",
    "through with": "finishes",
    "no more": "no longer, or at most",
    "any more": "no longer",
    "says so": "reports it",
    "say so": "report it",
    "others than": "differs from",
    "other than those that": "differs from",
    "what is usual": "the baseline",
    "less what": "minus",
    "beside": "next to, or compared with",
    "so many": "N",
    "of which": "a new sentence",
    "heard": "the standard term",
    "told": "the standard term",
    "asleep": "the standard term",
    "awake": "the standard term",
    "steered": "the standard term",
    "steers": "the standard term",
    "steering": "the standard term",
    "kin": "the standard term",
    "twin": "copy",
    "twins": "copies",
}
LONG = 25  # words
_AVOIDED = re.compile(rf"(?<![\w.`/-])({'|'.join(map(re.escape, AVOIDED))})(?![\w`/]|[.-]\w)", re.IGNORECASE)
_CODE = re.compile(r"``[^`]+``|`[^`]+`")
_NAME = re.compile(r"^\s+\w+: |#beside\b", re.MULTILINE)  # an argument in a docstring; an id of the playground's page


def avoided(text: str) -> list[str]:
    """The words to avoid that a text has; names in backticks, of arguments and of constants are code."""
    plain = _NAME.sub(" ", _CODE.sub("`", text))
    return [found for found in _AVOIDED.findall(" ".join(plain.split())) if not found.isupper()]


def python_texts(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings, strings of more than one word, and comments, each with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


_SCRIPT = re.compile(r"""/\*.*?\*/|//[^\n]*|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|`(?:[^`\\]|\\.)*`""", re.DOTALL)


def script_texts(source: str) -> Iterator[tuple[int, str]]:
    """Comments and strings of more than one word of JavaScript, CSS or C."""
    for found in _SCRIPT.finditer(source):
        if " " in found.group():
            yield source.count("\n", 0, found.start()) + 1, found.group().strip("`\"'")


class _Page(HTMLParser):
    """Collects what a reader of a page sees."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, str]] = []
        self._hidden = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden = tag in ("script", "style")
        shown = ("title", "placeholder", "aria-label", "alt")
        self.found += [(self.getpos()[0], value) for name, value in attrs if name in shown and value]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.found.append((self.getpos()[0], data))


def page_texts(source: str) -> Iterator[tuple[int, str]]:
    """Text and visible attributes of HTML."""
    page = _Page()
    page.feed(re.sub(r"<svg.*?</svg>", lambda drawn: "\n" * drawn.group().count("\n"), source, flags=re.DOTALL))
    yield from page.found


def markdown_prose(source: str) -> str:
    """Markdown without code blocks, options of directives, images, tables, headings, front matter and addresses."""
    text = re.sub(r"\A---\n.*?\n---\n", "", source, flags=re.DOTALL)
    text = re.sub(
        r"^(`{3,}|~{3,})(?!\{(?:note|tip|warning|important|admonition)).*?^\1`*\s*$",
        "\n",
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|<!--.*?-->|\\\[.*?\\\]|\$\$.*?\$\$", " ", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    kept = [line for line in text.split("\n") if not re.match(r"\s*(\||#|:\w+:|`{3,}|:{3,}|\(\w[\w-]*\)=)", line)]
    return "\n".join(kept)


def markdown_texts(source: str) -> Iterator[tuple[int, str]]:
    """Paragraphs of Markdown, with tables and headings and without code blocks, each with its line."""
    fenced = re.compile(r"^(`{3,}|~{3,}).*?^\1`*\s*$", re.DOTALL | re.MULTILINE)
    text = fenced.sub(lambda block: "\n" * block.group().count("\n"), source)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for found in re.finditer(r"\S(?:.|\n(?!\s*\n))*", text):
        yield text.count("\n", 0, found.start()) + 1, found.group()


def sentences(source: str) -> list[str]:
    """The sentences of Markdown. An item of a list is a paragraph; code between backticks is one word."""
    prose = re.sub(r"`[^`]+`", "CODE", markdown_prose(source))
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.)\s)", prose)
    found: list[str] = []
    for paragraph in paragraphs:
        line = re.sub(r"^\s*(?:[-*+]|\d+\.)\s+", "", " ".join(paragraph.split()))
        found += re.split(r"(?<=[.?!])[)\"*]*\s+(?=[\"*(]*[A-Z0-9])", line)
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def words(sentence: str) -> int:
    """How many words a sentence has; what holds no letter or digit is none."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """What people read in a file, by its type."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return python_texts(source)
    if path.suffix == ".html":
        return page_texts(source)
    if path.suffix == ".md":
        return markdown_texts(source)
    return script_texts(source)
