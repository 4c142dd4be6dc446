r"""A page in your browser: drop a picture, see what a model says and where it looks.

Examples:
    python -m metaformer_jax.demo
    python -m metaformer_jax.demo --weights runs/digits --port 8000

It runs on this machine alone: nothing is sent anywhere, and no other machine can reach the page.
Only published weights are fetched, once, when a model is first asked without weights of its own.
"""

import argparse
import functools
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from metaformer_jax import programs
from metaformer_jax.paths import local_path

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from metaformer_jax.inference.classifier import Classifier
    from metaformer_jax.inference.drawing import Explainer

HOST = "127.0.0.1"
TOP = 5
BY_WEIGHTS = "what the weights say"
LAST_STAGE = "last"
# Nothing of the page may come from, or go to, anywhere but this program.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "connect-src 'self' data: blob:; frame-ancestors 'none'"
)
_PROG = "python -m metaformer_jax.demo"


def parse_args(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").replace(_PROG, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="NAME", help="the model that is chosen at first")
    parser.add_argument(
        "--weights",
        default="",
        metavar="PATH",
        help="its weights: a .pth or .safetensors file, a converted folder or a run's workdir; by "
        "default the published ones",
    )
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, *, prog: str = _PROG) -> int:
    """Serves the page until it is interrupted; returns the exit code."""
    args = parse_args(argv, prog)
    return programs.run(lambda: _show(args))


def _show(args: argparse.Namespace) -> None:
    _check_free(args.port)
    # Read when gradio is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # Gradio keeps all pictures in files, by default in one folder for all users of a machine.
    with tempfile.TemporaryDirectory(prefix="metaformer-jax-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(args.model, args.weights)
        # By its default SIGTERM would leave the folder behind.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            serve(page, args.port)
        except KeyboardInterrupt:
            print()


def _check_free(port: int) -> None:
    if not 0 < port < 2**16:
        raise ValueError(f"`--port` must be in [1, 65535], got {port}.")
    with socket.socket() as probe:
        # What a page that has just ended leaves behind does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"`--port` must be free on {HOST}, got {port}: {error.strerror}. Choose another, "
                f"--port {port + 1}, or end what listens there."
            ) from error


def _state_of(weights: str) -> tuple[int, ...]:
    """Another one once something else is at the path, or a run there has saved a checkpoint."""
    path = local_path(weights.strip())
    paths = (path, path / "checkpoints") if weights.strip() else ()
    return tuple(part.stat().st_mtime_ns for part in paths if part.exists())


@functools.lru_cache(maxsize=4)
def _load(name: str, weights: str, state: tuple[int, ...]) -> "Classifier":
    """The model that the page's fields ask for; the last four stay in memory."""
    from metaformer_jax.inference import load_classifier

    del state
    return load_classifier(None if name == BY_WEIGHTS else name, weights=weights.strip() or None)


# Each keeps its model in memory: as many as `_load` does.
@functools.lru_cache(maxsize=4)
def _explainer(name: str, weights: str, state: tuple[int, ...], stage: str) -> "Explainer":
    from metaformer_jax.inference.drawing import Explainer

    return Explainer(_load(name, weights, state), None if stage == LAST_STAGE else int(stage))


def answer(
    image: "Image.Image | None", name: str, weights: str, stage: str
) -> tuple[dict[str, float], "np.ndarray | None"]:
    """What the page shows for a picture: probabilities by class, and the picture with its maps.

    Raises:
        ValueError: the model, its weights or the stage are wrong, or the picture has 32 bits per
            channel.
        FileNotFoundError: there are no weights at the path.
        weights.DownloadError: the published weights could not be fetched.
    """
    if image is None:
        return {}, None
    import numpy as np

    from metaformer_jax.data.transforms import to_channels
    from metaformer_jax.figures import to_array
    from metaformer_jax.inference.drawing import Explanation, explanations_figure
    from metaformer_jax.inference.results import likeliest
    from metaformer_jax.models.class_names import shortened

    question = (name, weights, _state_of(weights))
    classifier, explainer = _load(*question), _explainer(*question, stage)
    pixels = classifier.transform.of_image(to_channels(image, classifier.transform.channels))
    guesses = likeliest(
        np.asarray(classifier.probabilities(pixels[None]))[0], classifier.class_names, top=TOP
    )
    best = guesses[0]
    maps = explainer(pixels[None], np.array([best.index]))[0]
    title = f"stage {explainer.stage}: {shortened(best.name)}"
    figure = explanations_figure([Explanation(pixels, title, maps)])
    # Of two classes of one name both are shown.
    names = [guess.name for guess in guesses]
    shown = {
        guess.name if names.count(guess.name) == 1 else f"{guess.name} ({guess.index})": guess
        for guess in guesses
    }
    return {label: guess.probability for label, guess in shown.items()}, to_array(figure)


def build_page(name: str | None, weights: str) -> Any:
    """The page, to be launched.

    Raises:
        ImportError: gradio is not installed.
        ValueError: an unknown model.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError(
            'The page needs gradio. Install it with: pip install "metaformer-jax[demo]"'
        ) from error
    from metaformer_jax import models

    if name is not None:
        name = models.model_info(name).name
    name = name or (BY_WEIGHTS if weights else "caformer_s18")

    def opened(open_file: Callable[[Any], Any], file: Any) -> Any:
        from metaformer_jax.inference.images import why_unreadable

        try:
            return open_file(file)
        except gr.Error:
            raise
        # Each format's reader fails in its own way.
        except Exception as error:
            message = f"The picture cannot be read: {why_unreadable(error)}."
            raise gr.Error(message, duration=None, print_exception=False) from error

    def shown(*fields: Any) -> tuple[dict[str, float], Any]:
        from metaformer_jax.weights import DownloadError

        try:
            return answer(*fields)
        except (ValueError, OSError, ImportError, DownloadError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    def shown_if(compares: bool, *fields: Any) -> tuple[dict[str, float], Any]:
        return shown(*fields) if compares else ({}, None)

    def side(elem_id: str) -> tuple[list[Any], list[Any]]:
        model = gr.Dropdown([BY_WEIGHTS, *models.list_models()], value=name, label="model")
        path = gr.Textbox(
            weights,
            label="weights",
            placeholder="empty: the published ones; or a file, a converted folder, a run's workdir",
            elem_id=f"{elem_id}-weights",
        )
        stage = gr.Radio([LAST_STAGE, "1", "2", "3", "4"], value=LAST_STAGE, label="stage")
        label = gr.Label(num_top_classes=TOP, label="likeliest classes", elem_id=f"{elem_id}-label")
        heat = gr.Image(
            label="where it looks",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id=f"{elem_id}-heat",
        )
        return [model, path, stage], [label, heat]

    with gr.Blocks(title="metaformer_jax", analytics_enabled=False) as page:
        gr.Markdown("# What does it show?\nA picture through one MetaFormer, or through two.")
        with gr.Row():
            # Gradio's own conversion would turn 16-bit pictures white.
            picture = gr.Image(
                type="pil",
                image_mode=None,
                sources=["upload", "clipboard"],
                label="picture",
                height=260,
                buttons=[],
            )
            # Not by a subclass: Gradio writes a stub for it beside this file.
            picture.preprocess = functools.partial(opened, picture.preprocess)
            with gr.Column():
                compares = gr.Checkbox(label="compare two models", elem_id="compares")
                button = gr.Button("Classify", variant="primary", elem_id="classify")
        with gr.Row():
            with gr.Column():
                first, first_results = side("first")
            with gr.Column(visible=False) as second_column:
                second, second_results = side("second")
        compares.change(lambda on: gr.Column(visible=on), compares, second_column)
        gr.on(
            [button.click, picture.change, *(field.change for field in (first[0], first[2]))],
            shown, [picture, *first], first_results,
        )  # fmt: skip
        triggers = [button.click, picture.change, compares.change]
        gr.on(
            [*triggers, *(field.change for field in (second[0], second[2]))],
            shown_if, [compares, picture, *second], second_results,
        )  # fmt: skip
    return page


def serve(page: Any, port: int) -> None:
    """Serves the page on this machine alone, until interrupted."""
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware

    async def with_policy(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = _POLICY
        return response

    page.queue(api_open=False).launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        app_kwargs={"middleware": [Middleware(BaseHTTPMiddleware, dispatch=with_policy)]},
    )
    print(f"http://{HOST}:{port} shows the page; Ctrl-C ends it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    sys.exit(main())
