"""Imports point one way: models <- weights; models, data, weights <- training <- programs.

Beside training stands inference, which builds on explain as well.
"""

import ast
import pathlib
import subprocess
import sys

import metaformer_jax

PACKAGE = pathlib.Path(metaformer_jax.__file__).parent
PROGRAMS = {"__main__", "convert", "demo", "export", "main", "predict", "validate", "zoo"}
MAY_IMPORT = {
    "models": {"models"},
    "weights": {"weights", "models", "messages", "paths"},
    "data": {"data", "messages", "paths", "programs"},
    "explain": {"explain", "models"},
    "inference": {
        *("inference", "explain", "models", "weights", "data"),
        *("figures", "messages", "paths"),
    },
    "training": {
        *("training", "models", "weights", "data"),
        *("exit_codes", "figures", "messages", "paths"),
    },
    "programs": {"exit_codes"},
    "exit_codes": set(),
    "figures": set(),
    "messages": set(),
    "paths": set(),
    "__init__": {"models", "weights"},
}
MODELS_MAY_IMPORT = {"flax", "jax", "jaxtyping", "metaformer_jax", "numpy"}


def _room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_modules(path: pathlib.Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def _imported_rooms(path: pathlib.Path) -> set[str]:
    rooms = set()
    for module in _imported_modules(path):
        package, *rest = module.split(".")
        if package == "metaformer_jax":
            is_room = rest and ((PACKAGE / rest[0]).is_dir() or rest[0] in {*PROGRAMS, *MAY_IMPORT})
            rooms.add(rest[0] if is_room else "models")
    return rooms


def test_every_module_imports_only_rooms_below_it():
    offences = {}
    for path in PACKAGE.rglob("*.py"):
        room = _room(path)
        allowed = MAY_IMPORT.get(room, set(MAY_IMPORT) | PROGRAMS)
        if beyond := _imported_rooms(path) - allowed:
            offences[str(path.relative_to(PACKAGE))] = beyond
    assert not offences


def test_programs_are_the_only_modules_without_a_rule():
    assert {_room(path) for path in PACKAGE.rglob("*.py")} - set(MAY_IMPORT) == PROGRAMS


def test_models_know_jax_and_flax_only():
    standard = sys.stdlib_module_names
    for path in (PACKAGE / "models").rglob("*.py"):
        packages = {module.split(".")[0] for module in _imported_modules(path)}
        assert packages - standard <= MODELS_MAY_IMPORT, path


def test_lowering_knows_arrays_alone():
    for path in (PACKAGE / "models" / "lowering").glob("*.py"):
        modules = {module for module in _imported_modules(path) if module.startswith("flax")}
        ours = {module for module in _imported_modules(path) if module.startswith("metaformer_jax")}
        above = {
            module for module in ours if not module.startswith("metaformer_jax.models.lowering")
        }
        assert not modules | above, path


def test_configs_import_recipes_alone():
    for path in (PACKAGE.parent / "configs").glob("*.py"):
        assert _imported_modules(path) == {"metaformer_jax.training.recipes"}, path


def test_models_and_their_training_step_need_none_of_the_packages_that_files_and_data_do():
    code = (
        "import sys, metaformer_jax, metaformer_jax.training.step\n"
        "assert metaformer_jax.MetaFormer and metaformer_jax.create_model\n"
        "others = {'torch', 'tensorflow', 'tensorflow_datasets', 'grain', 'ml_collections', 'clu',"
        " 'google_crc32c'}\n"
        "print(sorted(others & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_training_that_draws_nothing_does_not_import_what_draws():
    code = (
        "import sys, metaformer_jax.training.train\n"
        "print(sorted({'matplotlib', 'torch', 'tensorflow', 'tensorboardX'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
