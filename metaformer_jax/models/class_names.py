"""The class names of the published ImageNet-1K heads."""

import functools
import pathlib


def imagenet_class_names() -> tuple[str, ...]:
    """The 1,000 class names, by the index of the logit: the lemmas of each WordNet synset.

    Two classes are both a "crane", the bird (134) and the machine (517).

    Examples:
        >>> imagenet_class_names()[0]
        'tench, Tinca tinca'
    """
    return tuple(_names_by_synset().values())


def shortened(name: str) -> str:
    """The first lemma of an ImageNet class; any other name whole, whatever commas it has.

    Examples:
        >>> shortened("tench, Tinca tinca"), shortened("cat, black")
        ('tench', 'cat, black')
    """
    return name.partition(",")[0] if name in _names() else name


def imagenet_synsets() -> tuple[str, ...]:
    """The WordNet synset of each class, as ImageNet's folders are named.

    Examples:
        >>> imagenet_synsets()[0]
        'n01440764'
    """
    return tuple(_names_by_synset())


@functools.cache
def _names() -> frozenset[str]:
    return frozenset(imagenet_class_names())


@functools.cache
def _names_by_synset() -> dict[str, str]:
    text = (pathlib.Path(__file__).parent / "imagenet_1k.txt").read_text(encoding="utf-8")
    rows = (line.partition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {synset: names for synset, _, names in rows}
