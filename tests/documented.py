"""The code that README.md, docs/*.md and the text of notebooks show, block by block."""

import json
import pathlib
import re
import shlex
import textwrap

REPOSITORY = pathlib.Path(__file__).parent.parent
PAGES = [
    page
    for pattern in ("*.md", "docs/*.md", "examples/*.ipynb")
    for page in sorted(REPOSITORY.glob(pattern))
]
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)


def blocks():
    """(page, language, text) of all."""
    return [
        (str(page.relative_to(REPOSITORY)), language, textwrap.dedent(text))
        for page in PAGES
        for _, language, text in _BLOCK.findall(_text(page))
    ]


def _text(page):
    text = page.read_text()
    if page.suffix != ".ipynb":
        return text
    cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def commands(text):
    """The words of every command that a shell would run; parts of `&&` and `;` are several."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        tokens = shlex.shlex(line, posix=True, punctuation_chars=";&")
        tokens.whitespace_split = True
        found += _split(list(tokens))
    return found


def _split(words):
    command = []
    for word in [*words, ";"]:
        if word not in ("&&", ";"):
            command.append(word)
        elif command:
            yield command[1:] if command[0] in ("until", "do") else command
            command = []
