"""The one switch for hosts that find this package by themselves: `PHI3_LORA_ACTIVATE`.

Unset, a host's own way applies: axolotl's entry points are active for Phi bases, and nothing else happens. `1` adds
what `hosts/startup` does in every Python process that can see it; `0` switches all of it off.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from phi3_lora_plugin.error import Phi3LoraError

VARIABLE = "PHI3_LORA_ACTIVATE"
_ON, _OFF = ("1", "on", "true", "yes"), ("0", "off", "false", "no")


class SwitchError(Phi3LoraError):
    """`PHI3_LORA_ACTIVATE` is neither on nor off."""


def switched(environment: Mapping[str, str] = os.environ) -> bool | None:
    """True and False for on and off; None where the variable is unset or empty.

    Raises:
        SwitchError: any other value.
    """
    value = environment.get(VARIABLE, "").strip().lower()
    if value in (*_ON, *_OFF):
        return value in _ON
    if value:
        raise SwitchError(f"{VARIABLE}={environment[VARIABLE]}: expected 1 or 0")
    return None
