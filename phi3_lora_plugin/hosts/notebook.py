"""`%load_ext phi3_lora_plugin`: the one line that makes the cells below it run as scripts do under `phi3-lora run`."""

from __future__ import annotations

from typing import Any

from phi3_lora_plugin.hosts.first_rank import say


def load_ipython_extension(shell: Any) -> None:
    """Activate everything in the process of this notebook; IPython calls it. `shell` is not changed."""
    from phi3_lora_plugin.hosts.activate import PARTS, activate

    for sentence in activate(parts=list(PARTS), optional=["trl"], say=say):
        say(sentence)


def unload_ipython_extension(shell: Any) -> None:
    """Undo it: `%unload_ext phi3_lora_plugin`. Trainers that exist keep what they were given."""
    from phi3_lora_plugin.hosts.activate import deactivate

    deactivate()
