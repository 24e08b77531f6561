"""`phi3-lora chat`: talk to an adapter or a model, or send it one prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi3_lora_plugin.error import Phi3LoraError

if TYPE_CHECKING:
    from phi3_lora_plugin.evaluate.conversation import Partner

_HELP = """\
/reset          start the conversation again
/system TEXT    set the system message and start again; without TEXT, remove it
/save FILE      append the conversation to FILE as one JSON row of messages
/help           print this
/exit           leave; so does Ctrl-D. Ctrl-C stops an answer."""


class ChatError(Phi3LoraError):
    """A request that this model or this machine cannot answer."""


def chat_command(
    model: Annotated[str, typer.Argument(help="Adapter, checkpoint, run, base or merged model.")],
    prompt: Annotated[str | None, typer.Option(help="Send one prompt and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System message to start with.")] = None,
    tools: Annotated[Path | None, typer.Option(help="JSON list of tools to declare.")] = None,
    hide_thoughts: Annotated[bool, typer.Option("--hide-thoughts", help="Print answers only.")] = False,
    base: Annotated[str | None, typer.Option(help="Base model, if it moved since training.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base model's answer too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum new tokens per answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantize: Annotated[str, typer.Option(help="none, nf4 or int8.")] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps or xpu.")] = "auto",
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare files with the manifest.")] = True,
) -> None:
    """Chat with an adapter or a model.

    Prompts are rendered, and answers stopped, as in training.
    """
    from phi3_lora_plugin.evaluate.conversation import find_partner

    def say(sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)

    declared = _declared(tools)
    partner = find_partner(model, base=base, check=check, say=say, dtype=dtype, quantize=quantize, device=device)
    if compare and partner.adapter is None:
        raise ChatError(f"--compare needs an adapter, and {model} is a model without one")
    say(partner.banner())
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    talk = Conversation(partner, system, declared, compare, hide_thoughts, options)
    if prompt is not None:
        if not talk.ask(prompt):
            raise KeyboardInterrupt
        return
    if sys.stdin.isatty():
        say("/help lists the commands; Ctrl-D leaves.")
    _talk(talk, say)


class Conversation:
    """What was said so far, and, with `compare`, what the base model said to the same questions."""

    def __init__(
        self, partner: Partner, system: str | None, declared: dict[str, Any], compare: bool, hide_thoughts: bool,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.partner, self.system, self.declared, self.options = partner, system, declared, options
        self.hide_thoughts = hide_thoughts
        self.sides = (True, False) if compare else (False,)  # without the adapter?
        self.messages: dict[bool, list[dict[str, Any]]] = {}
        self.reset()

    def reset(self) -> None:
        start = [{"role": "system", "content": self.system or "", **self.declared}]
        start = start if self.system or self.declared else []
        self.messages = {side: list(start) for side in self.sides}

    def ask(self, text: str) -> bool:
        """Stream the answers to a question; whether they came to their end. An answer that was stopped is forgotten."""
        from phi3_lora_plugin.chat.thoughts import hidden
        from phi3_lora_plugin.chat.turns import read_turns

        for side in self.sides:
            if len(self.sides) > 1:
                print("base model: " if side else "adapter: ", end="", flush=True)
            asked = [*self.messages[side], {"role": "user", "content": text}]
            said: list[str] = []
            with closing(self.partner.answer(asked, without_adapter=side, **self.options)) as pieces:
                try:
                    kept = _kept(pieces, said)
                    for piece in hidden(kept) if self.hide_thoughts else kept:
                        print(piece, end="", flush=True)
                except KeyboardInterrupt:
                    pieces.close()
                    print("\n[stopped]", flush=True)
                    return False
            print(flush=True)
            # Read as a row is, so that its calls and thoughts stand in the next prompt as they do in training.
            self.messages[side] = [*asked, *read_turns([{"role": "assistant", "content": "".join(said)}])]
        return True

    def save(self, file: Path) -> None:
        with file.expanduser().open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"messages": self.messages[False]}, ensure_ascii=False) + "\n")


def _kept(pieces: Iterator[str], said: list[str]) -> Iterator[str]:
    for piece in pieces:
        said.append(piece)
        yield piece


def _talk(talk: Conversation, say: Callable[[str], None]) -> None:
    """Read lines until the end of input: commands begin with `/`, everything else is a question."""
    typed = sys.stdin.isatty()
    while True:
        try:
            text = input("> " if typed else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not typed:
                raise
            print()
            say("Ctrl-D or /exit leaves.")
            continue
        if text == "/exit":
            return
        try:
            if text.startswith("/"):
                _command(talk, text, say)
            elif text and not talk.ask(text) and not typed:
                raise KeyboardInterrupt
        except (Phi3LoraError, OSError) as error:
            if not typed:
                raise
            say(str(error))


def _command(talk: Conversation, text: str, say: Callable[[str], None]) -> None:
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        talk.reset()
        say("The conversation starts again.")
    elif name == "/system":
        talk.system = rest or None
        talk.reset()
        say("System message set; the conversation starts again." if rest else "System message removed.")
    elif name == "/save" and rest:
        talk.save(Path(rest))
        say(f"Saved to {rest}.")
    elif name == "/help":
        say(_HELP)
    else:
        raise ChatError(f"{text!r} is not a command:\n{_HELP}")


def _declared(file: Path | None) -> dict[str, Any]:
    """`tools` of a system message, as a row that declares them in a list has them."""
    from phi3_lora_plugin.chat.row_error import RowError
    from phi3_lora_plugin.chat.turns import read_tools

    if file is None:
        return {}
    try:
        declared = read_tools(json.loads(file.read_text(encoding="utf-8-sig")), str(file))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, RowError):
            raise
        raise Phi3LoraError(f"--tools {file}: is not a JSON list of tools: {error}") from error
    return {} if declared is None else {"tools": declared}
