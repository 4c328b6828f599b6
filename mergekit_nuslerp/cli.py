# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The command `mergekit-nuslerp`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from mergekit_nuslerp import SWITCH, __version__, misspelt, register, switched_off
from mergekit_nuslerp.messages import brief, shortened

if TYPE_CHECKING:
    from mergekit_nuslerp.inspect import Inspection

# Run in a fresh interpreter, which has not imported this package by hand.
_PROBE = """
import json, sys
sys.path[:] = [path for path in sys.path if path]  # not what lies in this directory
from importlib.metadata import entry_points, version
answer = {"entry": [e.value for e in entry_points(group="torch.backends")]}
try:
    answer["mergekit"] = version("mergekit")
    answer["torch"] = version("torch")
    import mergekit.merge_methods as methods
    method = methods.get("nuslerp")
    answer["module"] = type(method).__module__
    import mergekit_nuslerp
    answer["failure"] = mergekit_nuslerp.failure
    if answer["module"].startswith("mergekit_nuslerp.adapters"):
        from mergekit_nuslerp import passes, plugin
        answer["arithmetic"] = passes.description()
        plugin.try_merge()
except Exception as error:
    answer["error"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(answer))
"""


@click.group()
@click.version_option(__version__, prog_name="mergekit-nuslerp")
def main() -> None:
    """NuSLERP for mergekit: spherical interpolation of language models."""


@main.command()
def status() -> None:
    """Say whether mergekit uses this plugin, and if not, why.

    Asks a fresh interpreter. Exits with 0 if it does and 1 if it does not.
    """
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False
    )
    lines = probe.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        answer = {"error": probe.stderr.strip() or "the interpreter printed nothing"}
    reason = why_not(answer)
    if reason is not None:
        click.echo(f"off: `merge_method: nuslerp` is not this plugin. {reason}")
        sys.exit(1)
    if misspelt():
        click.echo(f"warning: {misspelt()}.", err=True)
    click.echo(
        f"on: mergekit {answer['mergekit']} merges `merge_method: nuslerp` with "
        f"mergekit-nuslerp {__version__} (torch {answer['torch']})."
    )
    click.echo(f"arithmetic: {answer.get('arithmetic')}.")


def why_not(answer: dict[str, Any]) -> str | None:
    """The reason why a probed interpreter does not use the plugin, None if it does."""
    if answer.get("failure"):
        return str(answer["failure"])
    if str(answer.get("module", "")).startswith("mergekit_nuslerp."):
        return answer.get("error")
    if switched_off():
        return f"{SWITCH}={os.environ[SWITCH]} switches it off."
    if "error" in answer:
        return f"mergekit could not be imported ({answer['error']})."
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        return (
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps PyTorch from starting it: "
            "`import mergekit_nuslerp` first, or use `mergekit-nuslerp run`."
        )
    if "mergekit_nuslerp:_autoload" not in answer.get("entry", []):
        return "The package is not installed in this environment: pip install it."
    major, minor = (int(part) for part in answer["torch"].split(".")[:2])
    if (major, minor) < (2, 5):
        return f"torch {answer['torch']} starts no plugins: install 2.5 or newer."
    return "Its installation is damaged: reinstall it."


@main.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
    short_help="Run mergekit-yaml where PyTorch's autoloading is switched off.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Run mergekit-yaml with the plugin, passing on all arguments.

    For where PyTorch's autoloading is switched off. Elsewhere `mergekit-yaml` itself
    does the same.
    """
    if switched_off():
        raise click.UsageError(f"{_off()}, or run mergekit-yaml")
    register()
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    try:
        mergekit_yaml(args=list(arguments), prog_name="mergekit-nuslerp run")
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(shortened(str(error))) from error


def _off() -> str:
    return f"{SWITCH}={os.environ[SWITCH]} switches the plugin off; unset it"


def _print_schema(context: click.Context, _option: Any, wanted: bool) -> None:
    if wanted:
        from mergekit_nuslerp.inspect import Inspection

        schema = Inspection.model_json_schema(mode="serialization")
        click.echo(json.dumps(schema, indent=2))
        context.exit()


class _Refused(click.ClickException):
    exit_code = 2


class _Inspect(click.Command):
    def format_epilog(
        self, context: click.Context, formatter: click.HelpFormatter
    ) -> None:
        from mergekit_nuslerp.inspect.figures import FIGURES

        with formatter.section("Columns"):
            rows = [
                (each.heading, f"{each.title}: {each.meaning}.") for each in FIGURES
            ]
            formatter.write_dl(rows)


_FILE = click.Path(path_type=Path)
_STDOUT = Path("-")

# Columns of a terminal that tables fit, whatever it says that it has.
_NARROWEST = 20


@main.command(cls=_Inspect)
@click.argument("paths", metavar="CONFIG...", nargs=-1, required=True, type=_FILE)
@click.option("--base", type=_FILE, help="Of checkpoints: the model they come from.")
@click.option("--full", is_flag=True, help="Print a row for each tensor.")
@click.option("--html", type=_FILE, help="Write a page for a browser.")
@click.option("--json", "records", type=_FILE, help="Write all figures; - to print.")
@click.option("--csv", type=_FILE, help="Write a spreadsheet; - to print.")
@click.option("--strict", is_flag=True, help="Exit with 1 if there are warnings.")
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON schema of --json, and exit.",
)
@click.option("--cuda", is_flag=True, help="As mergekit's, like all that follow.")
@click.option("--device")
@click.option("--allow-crimes", is_flag=True)
@click.option("--unsafe-truncate-embeddings", is_flag=True)
@click.option("--lazy-unpickle", is_flag=True)
@click.option("--lora-merge-cache")
@click.option("--lora-merge-dtype")
@click.option("--transformers-cache")
@click.option("--trust-remote-code", is_flag=True)
def inspect(
    paths: tuple[Path, ...],
    base: Path | None,
    full: bool,
    html: Path | None,
    records: Path | None,
    csv: Path | None,
    strict: bool,
    **options: Any,
) -> None:
    """Show the geometry of a merge before it is carried out.

    Reads the checkpoints of each CONFIG once, as the merge would, and writes no model.
    Says what matters, prints angles and lengths of the (task) vectors by layer and by
    part of the model, and what to look out for. Several configs are compared. In place
    of configs, folders of checkpoints may be listed. Exits with 2 where something
    cannot be read or written.
    """
    outputs = [path for path in (html, records, csv) if path is not None]
    try:
        if switched_off():
            raise ValueError(_off())
        if html == _STDOUT:
            raise ValueError("--html needs the name of a file")
        check_writable(outputs, paths)
        inspections = [
            _inspected(name, content, options)
            for name, content in _configs(paths, base)
        ]
        texts = {}
        if html is not None:
            from mergekit_nuslerp.inspect.page import page

            texts[html] = page(inspections)
        if records is not None:
            entries = [
                each.model_dump(mode="json", by_alias=True) for each in inspections
            ]
            texts[records] = (
                json.dumps(entries if entries[1:] else entries[0], indent=2) + "\n"
            )
        if csv is not None:
            from mergekit_nuslerp.inspect.figures import table

            texts[csv] = table(inspections)
        printed = texts.pop(_STDOUT, None)
        write_together(texts)
        if printed is not None:
            click.echo(printed, nl=False)
        else:
            from rich.console import Console

            from mergekit_nuslerp.inspect.terminal import show

            console = Console()
            console.width = max(console.width, _NARROWEST)
            show(inspections, console, full=full)
        for path in texts:
            click.echo(f"wrote {path}", err=printed is not None)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # which click ends without a word
    except (ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise _Refused(shortened(str(error))) from error
    if strict and any(inspection.warnings for inspection in inspections):
        sys.exit(1)


def _configs(paths: Sequence[Path], base: Path | None) -> list[tuple[str, Any]]:
    """What is to be inspected: the configs in files, or one of checkpoints.

    Raises:
        OSError, ValueError: a file that is not a config.
    """
    if not any(path.is_dir() for path in paths):
        if base is not None:
            raise ValueError(
                "--base goes with folders of checkpoints, not with configs"
            )
        return [(str(path), _content(path)) for path in paths]
    for path in paths:
        if not path.is_dir():
            raise ValueError(
                f"{path} is no folder; list configs or checkpoints, not both"
            )
    content: dict[str, Any] = {
        "merge_method": "linear" if base is None else "task_arithmetic",
        "models": [{"model": str(path), "parameters": {"weight": 1}} for path in paths],
    }
    return [("", content if base is None else {**content, "base_model": str(base)})]


def _content(config: Path) -> dict[str, Any]:
    import yaml

    try:
        content, *others = [*yaml.safe_load_all(config.read_text("utf-8"))] or [None]
    except UnicodeDecodeError as error:
        raise ValueError(f"{config} is not a text in UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is not YAML: {error}") from error
    if others:
        raise ValueError(
            f"{config} is not a single config: it holds {1 + len(others)}. Write "
            "each to a file of its own"
        )
    if not isinstance(content, dict):
        raise ValueError(
            f"{config} is no config: it holds {brief(content)}, but must hold "
            "names and values, such as `merge_method: nuslerp`"
        )
    return content


def _inspected(name: str, content: Any, options: Mapping[str, Any]) -> Inspection:
    """Inspect a merge, with a bar where someone is looking.

    Raises:
        ArithmeticError, ImportError, OSError, RuntimeError, ValueError: what is wrong.
    """
    with _bar() as progress:
        register()  # first, as it checks configs while they are read
        from mergekit.config import MergeConfiguration
        from mergekit.options import MergeOptions

        from mergekit_nuslerp.inspect.measure import blaming_input, inspect

        with blaming_input():
            config = MergeConfiguration.model_validate(content)
        result = inspect(config, MergeOptions(**options), progress=progress)
    result.config, result.method = name, result.method if name else ""
    return result


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Starting", total=None)
        yield lambda done, total: bar.update(
            task, description="Reading", completed=done, total=total
        )


@main.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def demo(out: Path) -> None:
    """Make small checkpoints in OUT, merge two of them, and show the result."""
    if switched_off():
        raise click.UsageError(_off())
    from mergekit_nuslerp.demo import run as run_demo

    sys.exit(run_demo(out))


def check_writable(paths: Sequence[Path], configs: Sequence[Path]) -> None:
    """See that files can be written, before work is done for them.

    Raises:
        ValueError: one that cannot, or one that is named twice or is a config.
    """
    outputs = {path.resolve() for path in paths}
    inputs = {path.resolve() for path in configs}
    if len(outputs) < len(paths) or outputs & inputs:
        raise ValueError("each output needs a file of its own, other than the config")
    for path in paths:
        if path == _STDOUT:
            continue
        if path.exists() and not path.is_file():
            raise ValueError(f"cannot write {path}: it is not a file")
        try:
            with _beside(path) as trial:
                trial.touch()
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from error


def write_together(texts: Mapping[Path, str]) -> None:
    """Write files whole or not at all, whatever happens meanwhile.

    Raises:
        OSError: one that cannot be written.
    """
    with ExitStack() as stack:
        written = {path: stack.enter_context(_beside(path)) for path in texts}
        for path, text in texts.items():
            written[path].write_text(text, encoding="utf-8", newline="")
        for path in texts:
            os.replace(written[path], path.resolve())


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A place for a file, in a folder of our own in the folder of another file.

    That may be a link, whose target is then meant. In our own folder nobody else can
    have put a link.
    """
    path = path.resolve()
    with TemporaryDirectory(dir=path.parent, prefix=".mergekit-nuslerp-") as folder:
        yield Path(folder, path.name)
