"""The language of the project: words that readers stumble over stay out, and sentences stay short."""

from __future__ import annotations

from pathlib import Path

import pytest

from language import AVOIDED, LONG, avoided, python_texts, sentences, texts_of, words

ROOT = Path(__file__).parents[1]
KINDS = (".py", ".html", ".js", ".css", ".md", ".c", ".h")
CHECKED = ("src", "tests", "benchmarks", "experts", "docs", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")
LISTS = {"language.py", "test_language.py"}  # have the words themselves
PAGES = ("docs", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")


def _files(place: str) -> list[Path]:
    path = ROOT / place
    return (
        [path]
        if path.is_file()
        else sorted(file for file in path.rglob("*") if file.suffix in KINDS and "_build" not in file.parts)
    )


@pytest.mark.parametrize("place", CHECKED)
def test_words_to_avoid_stay_out(place):
    files = [file for file in _files(place) if file.name not in LISTS]
    assert files, f"{place} has no files"
    found = [
        f"{file.relative_to(ROOT)}:{line}: '{word}': write {AVOIDED[word.lower()]}"
        for file in files
        for line, text in texts_of(file)
        for word in avoided(text)
    ]
    assert not found, "\n".join(found)


def test_at_most_one_sentence_in_ten_is_long():
    """Of the documentation, where a sentence of more than 25 words is long."""
    files = [file for place in PAGES for file in _files(place) if file.suffix == ".md"]
    found = [(file, sentence) for file in files for sentence in sentences(file.read_text(encoding="utf-8"))]
    long = [f"{file.relative_to(ROOT)}: {sentence}" for file, sentence in found if words(sentence) > LONG]
    assert len(found) > 1000
    assert len(long) <= len(found) / 10, "\n".join([f"{len(long)} of {len(found)} sentences are long", *long])


def test_the_checks_find_what_they_look_for():
    source = 'def f():\n    """It sits beside the cache."""\n    raise E(f"{x} is told to others")  # no more\n'
    assert [(line, *avoided(text)) for line, text in python_texts(source) if avoided(text)] == [
        (2, "beside"),
        (3, "is told"),
        (3, "no more"),
    ]
    assert not avoided("`beside` is a key, ``heard`` too; besides, `spectr.composition.steering` was a module")
    page = (
        "# A title\n\nOne. Two `a b c` [three](there.md)!\n\n```python\nx = 1. + 2\n```\n| a | b |\n\n- An item. More."
    )
    assert sentences(page) == ["One.", "Two CODE three!", "An item.", "More."]
    assert words("Two CODE - three!") == 3
