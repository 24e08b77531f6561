"""Run a training script unchanged, in a process where Phi-3 works: `python -m phi3_lora_plugin.run script.py`.

The script sees what it would see under plain python: its own `sys.argv`, `sys.path`, `__main__` and exit code, and its
tracebacks. What was done for it is printed on stderr. Also for `accelerate launch -m` and `torchrun -m`.
"""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.hosts import first_rank

_HELP = """Run a training script, unedited, with our callbacks, target defaults, templates and fast paths."""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m phi3_lora_plugin.run") -> None:
    """Activate, then become the script."""
    parser = argparse.ArgumentParser(prog=prog, description=_HELP, allow_abbrev=False)
    parser.add_argument(
        "--recipe", metavar="R", help="preset or YAML file: its checkpoint, speed and lora.targets apply"
    )
    parser.add_argument(
        "--callbacks",
        metavar="C,C",
        help="names of plugins whose callbacks to add, or module:Class; none: no callbacks",
    )
    parser.add_argument(
        "--parts", metavar="P,P", help="parts to activate: targets, report_to, trl, older, trainers (default: all)"
    )
    parser.add_argument("--quiet", action="store_true", help="do not print what was activated")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="path of a Python file")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="...", help="arguments for the script")
    given = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    code = None if given.module else _read(parser, given.script)

    interrupted: list[bool] = []
    atexit.register(_end_by_the_signal, interrupted)  # before any library's: exit handlers run in reverse
    say = (lambda sentence: None) if given.quiet else first_rank.say
    try:
        for sentence in _activate(given, say):
            say(sentence)
    except Phi3LoraError as error:
        parser.exit(error.exit_code, f"{type(error).__name__}: {error}\n")
    _show_only_own_frames()
    sys.argv = [given.script, *given.args]
    try:
        if code is None:
            sys.path[0] = os.getcwd()
            runpy.run_module(given.script, run_name="__main__", alter_sys=True)
            return
        sys.path[0] = str(Path(given.script).resolve().parent)
        exec(code, _become_main(os.path.abspath(given.script)).__dict__)
    except KeyboardInterrupt:
        interrupted.append(True)
        raise


def _end_by_the_signal(interrupted: list[bool]) -> None:
    """End a script that Ctrl-C ended by SIGINT, as Python does.

    Python forgets why it ends, and exits with 1, where an exit handler runs code of its own, as torch._dynamo's does.
    """
    if interrupted and os.name == "posix":
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _read(parser: argparse.ArgumentParser, script: str) -> CodeType:
    """Compiled as Python compiles a script, its encoding line included; syntax errors look as in Python."""
    try:
        content = Path(script).read_bytes()
    except OSError as error:
        parser.exit(2, f"{parser.prog}: can't open file {script!r}: [Errno {error.errno}] {error.strerror}\n")
    try:
        return compile(content, os.path.abspath(script), "exec", dont_inherit=True)
    except SyntaxError as error:
        sys.excepthook(SyntaxError, error.with_traceback(None), None)
        sys.exit(1)


def _activate(given: Any, say: Any) -> list[str]:
    from phi3_lora_plugin.hosts.activate import PARTS, activate
    from phi3_lora_plugin.plugins.discovery import load_plugins
    from phi3_lora_plugin.recipe import load_recipe

    recipe = None
    if given.recipe is not None:
        plugins = load_plugins()
        recipe = load_recipe(given.recipe, find=lambda name: plugins.pick("recipes", name))
    names = None if given.callbacks is None else [name for name in given.callbacks.split(",") if name]
    noise = logging.getLogger("bitsandbytes")  # logs at every start which of its kernels are missing
    level = noise.level
    noise.setLevel(logging.ERROR)
    try:
        parts = list(PARTS) if given.parts is None else [part for part in given.parts.split(",") if part]
        optional = ["trl"] if given.parts is None else []  # a script that has no use for TRL runs beside any release
        return activate(recipe, parts=parts, callbacks=[] if names == ["none"] else names, optional=optional, say=say)
    finally:
        noise.setLevel(level)


def _become_main(script: str) -> ModuleType:
    """A `__main__` like that of a plain script; classes that it defines are pickled by this name."""
    from importlib.machinery import SourceFileLoader

    module = ModuleType("__main__")
    module.__dict__.update(
        __file__=script, __builtins__=__builtins__, __spec__=None, __cached__=None, __package__=None, __doc__=None,
        __loader__=SourceFileLoader("__main__", script), __annotations__={},
    )  # fmt: skip
    sys.modules["__main__"] = module
    return module


def _show_only_own_frames() -> None:
    """Leave our frames and the interpreter's out of tracebacks that end the process."""
    hook = sys.excepthook

    def show(kind: Any, error: BaseException, trace: TracebackType | None) -> None:
        own = _own(trace)
        hook(kind, error.with_traceback(own), own)

    sys.excepthook = show


def _own(trace: TracebackType | None) -> TracebackType | None:
    """A traceback from the script's first line on; all of it if the script was not reached."""
    top = trace
    while top is not None and top.tb_frame.f_code is not main.__code__:
        top = top.tb_next
    while top is not None and (top.tb_frame.f_code is main.__code__ or "<frozen runpy>" in str(top.tb_frame.f_code)):
        top = top.tb_next
    return top or trace


if __name__ == "__main__":
    main()
