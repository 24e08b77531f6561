"""`phi3-lora`: every command is a plain function in a module of this package; heavy imports wait inside them."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from phi3_lora_plugin.cli.chat import chat_command
from phi3_lora_plugin.cli.convert import convert_command, merge_command
from phi3_lora_plugin.cli.data import check_command
from phi3_lora_plugin.cli.docs import docs_command
from phi3_lora_plugin.cli.doctor import doctor_command
from phi3_lora_plugin.cli.evaluate import eval_command
from phi3_lora_plugin.cli.export import export_command
from phi3_lora_plugin.cli.hosts import host_path_command, import_command, render_command
from phi3_lora_plugin.cli.inspect import inspect_command
from phi3_lora_plugin.cli.new import new_command
from phi3_lora_plugin.cli.overrides import TakesOverrides
from phi3_lora_plugin.cli.plan import plan_command
from phi3_lora_plugin.cli.plugins import plugins_command
from phi3_lora_plugin.cli.recipes import recipes_command, schema_command, show_command, validate_command
from phi3_lora_plugin.cli.report import report_command
from phi3_lora_plugin.cli.run import AS_IT_IS, directly, run_command, trl_command
from phi3_lora_plugin.cli.train import train_command
from phi3_lora_plugin.cli.verify import verify_command
from phi3_lora_plugin.cli.watch import watch_command
from phi3_lora_plugin.error import Phi3LoraError

#: What the machine refuses, whatever the input was.
_SURROUNDINGS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

app = typer.Typer(
    name="phi3-lora",
    help="Fine-tune Microsoft's Phi-3 family with LoRA: a recipe in, a checked adapter out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("new")(new_command)
app.command("train", cls=TakesOverrides)(train_command)
app.command("plan", cls=TakesOverrides)(plan_command)
app.command("watch")(watch_command)
app.command("report")(report_command)
app.command("chat")(chat_command)
app.command("eval", cls=TakesOverrides)(eval_command)
app.command("verify")(verify_command)
app.command("inspect")(inspect_command)
app.command("recipes")(recipes_command)
app.command("show", cls=TakesOverrides)(show_command)
app.command("validate", cls=TakesOverrides)(validate_command)
app.command("schema")(schema_command)
app.command("plugins")(plugins_command)
app.command("doctor")(doctor_command)
app.command("docs")(docs_command)
app.command("convert")(convert_command)
app.command("merge")(merge_command)
app.command("export")(export_command)
app.command("run", context_settings=AS_IT_IS, add_help_option=False)(run_command)
app.command("trl", context_settings=AS_IT_IS, add_help_option=False)(trl_command)
app.command("render", cls=TakesOverrides)(render_command)
app.command("import")(import_command)
app.command("host-path")(host_path_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"phi3-lora-plugin {version('phi3-lora-plugin')}")
        raise typer.Exit


@app.callback()
def everywhere(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; with any command.")] = False,
) -> None:
    """Options that every command takes; `main` reads them at any position."""


data = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)
data.command("check", cls=TakesOverrides)(check_command)
data.callback()(lambda: None)  # keeps `check` a word of its own although it is the only one
app.add_typer(data, name="data")


def main() -> None:
    """Run the command line; exit with 0 fine, 1 failed, 2 wrong input, 130 interrupted."""
    # Messages of other libraries at every start that users cannot act on: an optional kernel that is not installed, and
    # a name of transformers that PEFT still uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated", FutureWarning)
    # pydantic would read the entry points of every distribution, for plugins of its own that recipes have no use for:
    # it takes time, and one damaged file among them would end the command.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments, debug = _without_debug(sys.argv[1:])
    theirs = True  # until it is known that the command is one of ours
    try:
        if not (theirs := directly(arguments)):
            app(arguments)
    except Exception as error:
        # Our own errors need no traceback, nor does a full disk. Anything else shows one, and so does whatever a user's
        # script raises.
        ours = isinstance(error, Phi3LoraError)
        broken = not theirs and isinstance(error, ImportError)  # a library that is missing, or cannot be imported
        if not ours and not broken and (theirs or not isinstance(error, OSError) or error.errno not in _SURROUNDINGS):
            raise
        if debug:
            traceback.print_exception(error)
        else:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            if broken:
                print("phi3-lora doctor looks at every library and names the remedy", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, Phi3LoraError) else 1)


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` out at any position; after `run`, `trl` and `--` it belongs to the script."""
    ends = [index for index, word in enumerate(arguments) if word in ("run", "trl", "--")][:1]
    end = ends[0] if ends and (arguments[ends[0]] == "--" or set(arguments[: ends[0]]) <= {"--debug"}) else None
    ours, rest = arguments[:end], [] if end is None else arguments[end:]
    return [word for word in ours if word != "--debug"] + rest, "--debug" in ours
