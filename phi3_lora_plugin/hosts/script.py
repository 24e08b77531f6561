"""TRL's own scripts, run in this process with everything activated: `phi3-lora trl sft ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from phi3_lora_plugin.hosts.first_rank import say
from phi3_lora_plugin.hosts.trl import TrlError
from phi3_lora_plugin.seams import look_up

SCRIPTS = ("sft", "dpo", "kto", "reward", "grpo", "rloo")


def run_script(name: str, arguments: Sequence[str]) -> None:
    """TRL's own script `name` with its own arguments, in this process, activated."""
    from phi3_lora_plugin.hosts.activate import PARTS, activate

    if name not in SCRIPTS:
        raise TrlError(f"trl {name}: expected one of {', '.join(SCRIPTS)}")
    make_parser, script = look_up(f"trl.{name}_parser"), look_up(f"trl.{name}_main")
    for sentence in activate(parts=list(PARTS), say=say):
        say(sentence)
    sys.argv = [f"phi3-lora trl {name}", *arguments]
    parser = make_parser()
    parsed = parser.parse_args_and_config(list(arguments), fail_with_unknown_args=True)
    script(*parsed)
