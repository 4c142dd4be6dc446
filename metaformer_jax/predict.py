r"""What pictures show: the likeliest classes with their probabilities.

Examples:
    python -m metaformer_jax.predict photo.jpg --model caformer_s18
    python -m metaformer_jax.predict photos/ "more/**/*.png" --model caformer_s18 --output all.csv
    python -m metaformer_jax.predict digits/*.png --weights runs/digits --explain why.png
"""

import argparse
import contextlib
import os
import pathlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING

from metaformer_jax import programs

if TYPE_CHECKING:
    from metaformer_jax.inference import Classifier
    from metaformer_jax.inference.batches import Classified

SOME_LEFT_OUT = 1
# What a picture of explanations can show at a readable size.
MAX_EXPLAINED = 48
FORMATS = ("table", "csv", "jsonl")
_PROG = "python -m metaformer_jax.predict"


def parse_args(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").replace(_PROG, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code: 0 if every picture was predicted, 1 if some were left out (each is "
        "named),\n2 if nothing could be done.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, folders (with those inside them) and globs",
    )
    model = parser.add_argument_group("the model")
    model.add_argument("--model", metavar="NAME", help="a published name, such as caformer_s18")
    model.add_argument(
        "--weights",
        metavar="PATH",
        help="a .pth or .safetensors file, a converted folder or a training run's workdir, which "
        "knows its own model, classes and image size; by default the published weights, which are "
        "downloaded once",
    )
    model.add_argument(
        "--class-names",
        type=pathlib.Path,
        metavar="FILE",
        help="a text file with the name of each class on a line of its own",
    )
    model.add_argument(
        "--image-size", type=_positive, metavar="PIXELS", help="by default the model's own"
    )
    pictures = parser.add_argument_group("the pictures")
    pictures.add_argument(
        "--upright",
        action="store_true",
        help="turn photographs as their EXIF orientation says; evaluation on ImageNet does not",
    )
    pictures.add_argument("--batch-size", type=_positive, default=32, metavar="N")
    results = parser.add_argument_group("the results")
    results.add_argument(
        "--top", type=_positive, default=5, metavar="K", help="classes named (default: 5)"
    )
    results.add_argument(
        "--format",
        choices=FORMATS,
        help="by default as the suffix of --output says (.csv, .jsonl), and otherwise a table",
    )
    results.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="FILE",
        help="write there, and replace what is there; by default to the terminal",
    )
    results.add_argument(
        "--explain",
        type=pathlib.Path,
        metavar="PNG",
        help="also draw where the model looks: Grad-CAM and, for a stage that has it, attention",
    )
    results.add_argument(
        "--stage",
        type=_positive,
        metavar="N",
        help="of --explain: 1 for the first stage and the finest map; by default the last that "
        "sees more than one place",
    )
    args = parser.parse_args(argv)
    if args.stage and not args.explain:
        parser.error("--stage is that of --explain PNG: give it as well")
    if args.explain and args.explain.suffix.lower() != ".png":
        parser.error(f"--explain writes a .png file, got {args.explain}")
    suffix = args.output.suffix.lower() if args.output else ""
    args.format = args.format or (suffix[1:] if suffix[1:] in FORMATS else "table")
    return args


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None, *, prog: str = _PROG) -> int:
    """Predicts, prints or writes; returns the exit code."""
    args = parse_args(argv, prog)
    with warnings.catch_warnings():
        # Pillow's, of what it finds odd in a file: what matters here is said by name.
        warnings.filterwarnings("ignore", module=r"PIL|metaformer_jax\.(data|inference)")
        return programs.run(
            lambda: _predict(args), if_device_fails="A smaller --batch-size takes less memory."
        )


def _predict(args: argparse.Namespace) -> int:
    # What is mistyped shows before the seconds that a model takes.
    from metaformer_jax.inference.images import find_images
    from metaformer_jax.paths import local_path

    paths, problems = find_images(args.images)
    if not paths:
        for problem in problems[:-1]:
            programs.failed(problem)
        return programs.failed(problems[-1])
    for output in (args.output, args.explain):
        if output and local_path(output).resolve() in {path.resolve() for path in paths}:
            return programs.failed(f"{output} is a picture to predict, and would be replaced.")
    outputs = [local_path(path).resolve() for path in (args.output, args.explain) if path]
    if len(set(outputs)) < len(outputs):
        return programs.failed(
            f"--output and --explain must be two files, got {args.output} for both."
        )
    class_names = _read_class_names(args.class_names) if args.class_names else None

    from metaformer_jax.inference.classifier import load_classifier
    from metaformer_jax.weights.outputs import whole_output

    with contextlib.ExitStack() as stack:
        # Opened first: what cannot be written should say so before the work.
        file, picture = sys.stdout, None
        if args.output:
            partial = stack.enter_context(whole_output(args.output, force=True, is_folder=False))
            file = stack.enter_context(partial.open("w", encoding="utf-8"))
        if args.explain:
            picture = stack.enter_context(whole_output(args.explain, force=True, is_folder=False))
            picture.touch()
        classifier = load_classifier(
            args.model, weights=args.weights, image_size=args.image_size, class_names=class_names
        )
        if args.explain:
            from metaformer_jax.inference import drawing

            explainer = drawing.Explainer(classifier, args.stage)
        report = _Report(args, problems, classifier.notes)
        explained = _write(args, classifier, paths, file, report)
        if report.num_predicted == 0:
            raise ValueError(f"none of the {len(paths)} files could be predicted.")
        if picture:
            file.flush()
            if len(explained) < report.num_predicted:
                report.say(f"note: {args.explain} shows the first {MAX_EXPLAINED} pictures.")
            drawing.explain_pictures(explainer, explained, picture)
    return SOME_LEFT_OUT if report.num_left_out else 0


def _read_class_names(path: pathlib.Path) -> list[str]:
    from metaformer_jax.paths import local_path

    try:
        # Not `splitlines`, which also takes other characters for the end of a line.
        lines = local_path(path).read_text(encoding="utf-8-sig").split("\n")
        return lines if lines[-1] else lines[:-1]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--class-names must be a text file in UTF-8, got {path}: {error.reason} at byte "
            f"{error.start}."
        ) from error


class _Report:
    """Says on stderr what the results do not say, above the progress bar."""

    def __init__(self, args: argparse.Namespace, problems: list[str], notes: Sequence[str]):
        from rich.console import Console

        self.console = Console(stderr=True)
        self.num_predicted = self.num_left_out = 0
        # A bar and rows of results would overwrite each other.
        shares_terminal = args.output is None and args.format != "table" and sys.stdout.isatty()
        self.shows_bar = self.console.is_terminal and not shares_terminal
        for note in notes:
            self.say(f"note: {note}")
        for problem in problems:
            self.leave_out(problem)

    def say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def leave_out(self, problem: str) -> None:
        self.num_left_out += 1
        self.say(f"left out: {problem}.")


def _write(
    args: argparse.Namespace,
    classifier: "Classifier",
    paths: list[pathlib.Path],
    file: IO[str],
    report: _Report,
) -> list["Classified"]:
    """Writes the results; returns what --explain shows."""
    from rich.progress import Progress

    from metaformer_jax.inference import batches, results

    explained: list[batches.Classified] = []
    progress = Progress(
        console=report.console,
        transient=True,
        disable=not report.shows_bar,
        redirect_stdout=False,
        redirect_stderr=False,
    )

    def predictions() -> Iterator[results.Prediction]:
        with progress:
            task = progress.add_task("predicting", total=len(paths))
            for outcome in batches.classify(
                classifier, paths, batch_size=args.batch_size, upright=args.upright
            ):
                progress.advance(task)
                # A name need not be text.
                name = os.fsencode(outcome.path).decode("utf-8", "replace")
                if isinstance(outcome, batches.Unreadable):
                    report.leave_out(f"{name}: {outcome.problem}")
                    continue
                for note in outcome.notes:
                    report.say(f"note: {name}: {note}.")
                report.num_predicted += 1
                if args.explain and len(explained) < MAX_EXPLAINED:
                    explained.append(outcome)
                guesses = results.likeliest(
                    outcome.probabilities, classifier.class_names, top=args.top
                )
                yield results.Prediction(name, guesses)

    results.WRITERS[args.format](predictions(), file)
    return explained


if __name__ == "__main__":
    sys.exit(main())
