"""A process of its own that renders a stranger's chat template: a loop without end or a text of 10 GB ends it alone.

Read from standard input is `{"template", "conversations", "tokens"}` as JSON; written is a list with what each
conversation renders to, without and with a prompt for the next answer. The environment is that of transformers, whose
import would take longer than all of this; a test holds the two together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

SECONDS = 10  # of computing; a template takes milliseconds
MEMORY = 1024**3  # bytes of addresses
LONGEST = 1_000_000  # characters that one conversation of a few words may render to


def main() -> None:
    """Answer one question; whatever the template raises is an answer too."""
    _limit()
    from jinja2 import ext, nodes
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}`, which marks what the assistant says and changes nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, **how: Any) -> str:
        return json.dumps(value, **({"ensure_ascii": False} | how))

    asked = json.load(sys.stdin)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    # Compiled anew for each, as an error of compiling is what each of them renders to.
    made = [
        _answer(
            lambda chat=chat, prompt=prompt: environment.from_string(asked["template"]).render(  # type: ignore[misc]
                messages=chat, tools=None, documents=None, add_generation_prompt=prompt, **asked["tokens"]
            )
        )
        for chat in asked["conversations"]
        for prompt in (False, True)
    ]
    json.dump(made, sys.stdout)


def _answer(render: Callable[[], str]) -> str:
    try:
        text = render()
    except Exception as error:
        return f"error {type(error).__name__}"
    return text if len(text) <= LONGEST else "error TooLong"


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows, where the time alone is bounded, by who waits
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
