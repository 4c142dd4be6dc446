"""The code that README.md, the pages beside it and docs/*.md show, block by block."""

import pathlib
import re
import shlex
import textwrap

REPOSITORY = pathlib.Path(__file__).parent.parent
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)


def blocks():
    """(page, language, text) of all."""
    return [
        (str(page.relative_to(REPOSITORY)), language, textwrap.dedent(text))
        for page in PAGES
        for _, language, text in _BLOCK.findall(page.read_text())
    ]


def commands():
    """(page, words) of every command in the blocks that a shell runs; parts of `&&` are several."""
    found = []
    for page, language, text in blocks():
        if language != "bash":
            continue
        for line in text.replace("\\\n", " ").splitlines():
            for words in _split(shlex.split(line, comments=True)):
                found.append((page, words))
    return found


def _split(words):
    command = []
    for word in [*words, "&&"]:
        if word != "&&":
            command.append(word)
        elif command:
            yield command
            command = []
