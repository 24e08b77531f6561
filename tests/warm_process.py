"""Processes that have imported torch, transformers, peft and datasets already: forked off one that waits.

A fresh interpreter spends five seconds of CPU on those imports. A fork has what a test of a command needs of a process:
an id to send signals to, an exit code, its own memory, environment, working directory, stdout and stderr, and an end
with joined threads and `atexit`. What it does not have is an unimported module: tests of what gets imported, of hash
seeds and of the interpreter's own options start fresh interpreters. Nor are its modules taken apart at the end, which
would be most of a short command's time. With `plain=True` the fork has only the libraries
and nothing of ours, which it can import like everybody else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from types import FunctionType
from typing import Any

#: What the `phi3-lora` script does, as a program for `Warm.run` or `python -c`.
COMMAND = "from phi3_lora_plugin.cli import main; main()"

#: What `python FILE ARGUMENTS` does, as a program for `Warm.run`, which gets the file as its first argument.
FILE = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"

#: What `python -m MODULE ARGUMENTS` does, in the same way.
MODULE = "import runpy, sys; del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"

#: What `accelerate launch` does.
LAUNCH = "from accelerate.commands.launch import main; main()"

_CALL = "import importlib; getattr(importlib.import_module({module!r}), {function!r})(*{arguments!r})"

#: Hash seed of the warm process and its forks: not the one of this process, so that what depends on it shows.
HASH_SEED = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"

_WAITS = """
import atexit, gc, json, os, signal, sys
__code = []  # with which a child ends
@atexit.register  # registered first, it runs last
def leave(code=__code, exit=os._exit, sys=sys):
    if code:
        try:
            sys.stdout.flush(), sys.stderr.flush()
        except OSError:
            return  # the interpreter says it
        exit(code[0])
gc.disable()  # none of what is imported is garbage
tests, asked, told = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
import datasets, peft, torch.optim
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3ForCausalLM, Trainer
gc.collect()
gc.freeze()  # or every Trainer of a child would look through all modules
if os.fork() == 0:  # the plain one, which shares all memory with this one
    requests, answers = open(asked), open(told, "w")
else:
    sys.path.insert(1, tests)
    import lora_runs, phi3_lora_plugin.training.callbacks, phi3_lora_plugin.training.resume
    lora_runs.peft_model()  # fills caches
    sys.path.remove(tests)
    gc.collect()
    gc.freeze()
    os.close(asked), os.close(told)
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w")
gc.enable()
print("ready", file=answers, flush=True)
for line in iter(requests.readline, ""):
    request = json.loads(line)
    if "wait" in request:
        print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), file=answers, flush=True)
    elif (child := os.fork()) == 0:
        break
    else:
        print(child, file=answers, flush=True)
else:
    os._exit(0)
for number, name in enumerate(("stdin", "stdout", "stderr")):
    os.dup2(os.open(request[name], os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
sys.stdin = open(0, closefd=False)
if request["environment"].get("PYTHONUNBUFFERED"):
    sys.stdout.reconfigure(write_through=True)
if encoding := request["environment"].get("PYTHONIOENCODING"):
    for stream, errors in ((sys.stdout, "strict"), (sys.stderr, "backslashreplace")):
        stream.reconfigure(encoding=encoding, errors=errors)
signal.alarm(request["timeout"])  # a child that hangs is ended, with exit code -14
os.environ.clear()
os.environ.update(request["environment"])
os.chdir(request["cwd"])
sys.path[1:1] = request["paths"]
sys.argv = ["-c", *request["arguments"]]
for name in [name for name in globals() if not name.startswith("__") and name not in ("request", "name")]:
    del globals()[name]
# Not inside the loop: the process has to end as any other does, its threads joined and its errors shown.
try:
    exec(compile(request["program"], "<string>", "exec"), globals())
except SystemExit as __end:
    __code.append(0 if __end.code is None else __end.code & 255 if isinstance(__end.code, int) else 1)
    raise
except Exception:
    __code.append(1)
    raise
else:
    __code.append(0)
"""


@dataclass(frozen=True)
class Child:
    """One process: its id, and what it says into a file."""

    pid: int
    said: Path
    _warm: Warm

    def wait_for(self, word: str) -> str:
        """Return once `word` was said; gives what was said until then."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            said = self.said.read_text(encoding="utf-8", errors="replace") if self.said.exists() else ""
            if word in said:
                return said
            time.sleep(0.002)
        raise AssertionError(f"{word!r} did not come: {said or 'nothing was said'}")

    def code(self) -> int:
        """Its exit code, negative for a signal, once it has ended."""
        return int(self._warm._ask(wait=self.pid))

    def wait(self) -> tuple[int, str]:
        """(exit code, negative for a signal; what it said on stdout and stderr)."""
        return self.code(), self.said.read_text(encoding="utf-8", errors="replace")


class Warm:
    """Runs programs, and functions of test modules, in processes of their own."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory()
        asked, told = os.pipe(), os.pipe()  # of the plain one
        self._parent = subprocess.Popen(
            [sys.executable, "-c", _WAITS, str(Path(__file__).parent), str(asked[0]), str(told[1])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONHASHSEED": HASH_SEED},
            pass_fds=(asked[0], told[1]),
        )  # fmt: skip
        os.close(asked[0])
        os.close(told[1])
        self._lines = {
            False: (self._parent.stdin, self._parent.stdout),
            True: (os.fdopen(asked[1], "w"), os.fdopen(told[0])),
        }
        for _, answers in self._lines.values():
            assert answers is not None and answers.readline() == "ready\n"

    def run(
        self,
        program: str,
        *arguments: str,
        cwd: Path,
        input: str = "",
        timeout: int = 300,
        plain: bool = False,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """What `python -c program arguments` gives, without the time for imports; `PYTHONPATH` is heeded.

        With `plain`, nothing of ours is imported.
        """
        place = Path(mkdtemp(dir=self._folder.name))
        (place / "stdin").write_text(input, encoding="utf-8")
        files = [place / name for name in ("stdin", "stdout", "stderr")]
        pid = self._start(program, arguments, cwd, timeout, environment, *files, plain=plain)
        code = int(self._ask(plain, wait=pid))
        said = [file.read_bytes().decode("utf-8") for file in files[1:]]
        return subprocess.CompletedProcess([program, *arguments], code, *said)

    def command(self, *arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """What `phi3-lora arguments` gives, run in `cwd`; `options` are those of `run`."""
        return self.run(COMMAND, *arguments, cwd=cwd, **options)

    def start_command(self, said: Path, *arguments: str, cwd: Path, typed: bool = False, **environment: str) -> Child:
        """Start `phi3-lora arguments` in `cwd`; with `typed`, `said` is a terminal that is also its input."""
        if not typed:
            said.unlink(missing_ok=True)
        files = (said if typed else Path(os.devnull), said, said)
        return Child(self._start(COMMAND, arguments, cwd, 600, environment, *files), said, self)

    def start(self, said: Path, function: FunctionType, *arguments: Any, **environment: str) -> Child:
        """Start `function(*arguments)` of a test module; arguments are what JSON has."""
        said.unlink(missing_ok=True)
        module = Path(function.__code__.co_filename).stem  # also of a file that runs as a script
        call = _CALL.format(module=module, function=function.__name__, arguments=arguments)
        paths = {"PYTHONPATH": str(Path(__file__).parent)}
        nothing = Path(os.devnull)
        return Child(self._start(call, (), Path.cwd(), 600, paths | environment, nothing, said, said), said, self)

    def ranks(self, folder: Path, function: FunctionType, *arguments: Any, **environment: str) -> list[str]:
        """What two processes say that call `function(*arguments)` as ranks of one group; both have to end well.

        The store that they meet in is here, as with torchrun, so that no port has to be guessed.
        """
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        environment |= {"GLOO_SOCKET_IFNAME": "lo"}
        children = [
            self.start(
                folder / f"said-{rank}", function, *arguments, **environment, RANK=str(rank), LOCAL_RANK=str(rank)
            )
            for rank in range(2)
        ]
        codes, said = zip(*(child.wait() for child in children), strict=True)
        assert codes == (0, 0), "\n\n".join(said)
        return list(said)

    def _start(
        self,
        program: str,
        arguments: tuple[str, ...],
        cwd: Path,
        timeout: int,
        changes: dict[str, str],
        *files: Path,
        plain: bool = False,
    ) -> int:
        environment = os.environ | {"PYTHONHASHSEED": HASH_SEED} | changes
        return int(
            self._ask(
                plain, program=program, arguments=arguments, cwd=str(cwd), timeout=timeout, environment=environment,
                paths=[path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path],
                **dict(zip(("stdin", "stdout", "stderr"), map(str, files), strict=True)),
            )
        )  # fmt: skip

    def _ask(self, plain: bool = False, **request: Any) -> str:
        requests, answers = self._lines[plain]
        assert requests is not None and answers is not None
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        return answers.readline()

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines[True][0].close()  # which ends the plain one
        self._lines[True][1].close()
        self._parent.kill()
        self._parent.wait()
        self._folder.cleanup()
