"""The command line: one file a command, and no logic of its own.

What a command needs is imported in its function, so that `spectune --help` loads neither torch nor transformers.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import typer
from typer.core import TyperGroup

from spectune import __version__
from spectune.cli import cache as cache_
from spectune.cli import (
    chat,
    classify,
    compare,
    compose,
    data,
    demo,
    doctor,
    eval,
    export,
    generate,
    import_,
    init,
    library,
    lr,
    methods,
    plan,
    serve,
    spectrum,
    train,
)
from spectune.cli.shared import let_the_main_process_speak, say_error
from spectune.errors import SpectuneError, is_out_of_memory
from spectune.plugins import import_module_of_user
from spectune.reading import check_text

_debug = ContextVar("debug", default=False)


class _Stopped(Exception):
    """Somebody wanted it to end."""


class _Group(TyperGroup):
    """The commands; a mistake in one and its interruption come through to `main`, which says both in its own way."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _plainly():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: typer.Context) -> object:
        try:
            with _plainly():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Stopped(str(interrupt)) from None


_UsageError: Any = typer.BadParameter.__bases__[0]  # of click, or of the copy of it in newer typer


@contextmanager
def _plainly() -> Iterator[None]:
    """Within the context options that do not fit are told in one sentence, where typer would draw a box."""
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # no mistake: the help is what it shows
            raise
        told = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
        within = error.ctx.command_path.removeprefix(error.ctx.find_root().command_path) if error.ctx else ""
        raise SpectuneError(f"{told[:1].lower()}{told[1:]} (see `spectune{within} --help`)") from None


app = typer.Typer(
    cls=_Group,
    name="spectune",
    help="Fine-tune transformer models through the singular values and vectors of their own weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("methods")(methods.methods)
app.command("init", context_settings=train.SETTINGS)(init.init)
app.command("train", context_settings=train.SETTINGS, help=train.HELP)(train.train)
app.command("data", context_settings=train.SETTINGS)(data.data)
app.command("lr", context_settings=train.SETTINGS)(lr.lr)
app.command("eval")(eval.eval_)
app.command("doctor")(doctor.doctor)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("classify")(classify.classify)
app.command("chat")(chat.chat)
app.command("compose")(compose.compose)
app.command("export")(export.export)
app.command("import")(import_.import_)
app.command("compare", context_settings=train.SETTINGS, help=compare.HELP)(compare.compare)
app.command("plan")(plan.plan)
app.command("spectrum")(spectrum.spectrum)
app.add_typer(library.app, name="library")
app.add_typer(cache_.app, name="cache")


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    cache: str | None = typer.Option(None, "--cache", metavar="FOLDER", help="For decompositions; `off` goes without."),
    bin_: bool = typer.Option(
        False, "--bin", help="Read pickled models where there are no safetensors, as weights only."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show where an unforeseen error came from."),
    plugin: list[str] = typer.Option([], "--plugin", metavar="MODULE", help="Import first: methods of your own."),
) -> None:
    _debug.set(debug)
    if bin_:
        os.environ["SPECTUNE_BIN"] = "1"  # for the processes that are started too
    if cache is not None:
        os.environ["SPECTUNE_CACHE"] = cache
    for module in plugin:
        import_module_of_user(module)


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # on processors with AVX-512 bitsandbytes recommends another package as it is imported, which PEFT does
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):  # a console of one byte a character lacks most of what models say
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        for text in sys.argv[1:]:
            check_text(text, "what was given")
        app()
    except SpectuneError as error:
        let_the_main_process_speak(10)
        say_error(str(error))
        sys.exit(2)
    except PermissionError as error:
        say_error(
            f"{error.filename2 or error.filename} cannot be read or written ({error.strerror}): another program "
            "may have it open, or its permissions forbid it; close the program, or give another folder"
        )
        sys.exit(2)
    except UnicodeDecodeError as error:
        say_error(f"what was given is not text in UTF-8 ({error.reason} at byte {error.start}): convert it")
        sys.exit(2)
    except (KeyboardInterrupt, _Stopped) as interrupt:
        say_error(str(interrupt) or "interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that vanished, a file in place of a folder
        place = error.filename2 or error.filename
        told = error.strerror or " ".join(str(error).split())
        say_error(f"{place!s:.300} cannot be read or written: {told}" if place else f"the system refused: {told}")
        sys.exit(2)
    except Exception as error:
        if _debug.get():
            raise
        if is_out_of_memory(error):
            say_error(
                "there is not enough memory for this: `spectune plan MODEL` says what fits; dtype=bf16, "
                "quantize=nf4, smaller batches or a smaller model take less"
            )
            sys.exit(2)
        what = " ".join(str(error).split())[:200]
        say_error(
            f"this should not have happened ({type(error).__name__}: {what}); please report it, with what "
            "`spectune --debug` and the same arguments show"
        )
        sys.exit(1)
