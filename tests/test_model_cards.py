"""The figures in docs/models.md are those of the tables in models/variants.py."""

import pathlib
import re

from metaformer_jax.models import list_models, model_info

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "models.md"
ROWS = {
    cells[0].strip("`"): cells[1:]
    for line in PAGE.read_text().splitlines()
    if re.match(r"\| `\w+_[smb]\d\d` \|", line)
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}


def test_every_architecture_has_a_row():
    assert set(ROWS) == {model_info(name).architecture for name in list_models()}


def test_every_figure_is_the_published_one():
    for name, cells in ROWS.items():
        info = model_info(name)
        params = f"{info.published_params_millions:g} M"
        if name.startswith(("convformer", "caformer")):
            tags = ("", "_384", "_in21ft1k", "_384_in21ft1k")
            expected = [f"{model_info(name + tag).published_top1:.1f}" for tag in tags]
            macs = [f"{model_info(name + tag).published_gmacs:.1f}" for tag in tags[:2]]
            expected += [params, f"{', '.join(macs)} G"]
        else:
            expected = [f"{info.published_top1:.1f} %", params]
            if info.published_frozen_params_millions:
                expected.append(f"{info.published_frozen_params_millions} M")
            expected.append(f"{info.published_gmacs:.1f} G")
        assert cells == expected, name
