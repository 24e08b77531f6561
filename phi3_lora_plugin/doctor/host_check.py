"""Training programs that are installed here, and how this package is active in each."""

from __future__ import annotations

import os
from collections.abc import Iterator

from phi3_lora_plugin.doctor.finding import Finding
from phi3_lora_plugin.doctor.versions import installed
from phi3_lora_plugin.hosts.startup import folder
from phi3_lora_plugin.hosts.switch import VARIABLE, SwitchError, switched

AREA = "hosts"
#: Distribution -> how a person makes us active there; docs/hosts.md has the rest.
WAYS = {
    "transformers": "Trainer(callbacks=[LoraCheckpoint()]), attach(trainer), or phi3-lora run SCRIPT",
    "trl": "phi3-lora trl sft --config FILE",
    "accelerate": "accelerate launch -m phi3_lora_plugin.cli train RECIPE",
    "ray": "phi3-lora train RECIPE --ray num_workers=N",
    "axolotl": "active by itself for Phi bases; before 0.21, plugins: [phi3_lora_plugin.hosts.axolotl.Phi3LoraPlugin]",
    "llamafactory": "python -m phi3_lora_plugin.hosts.llamafactory FILE instead of llamafactory-cli train FILE",
    "ms-swift": "swift sft --external_plugins $(phi3-lora host-path swift) --callbacks phi3_lora",
}


def hosts() -> Iterator[Finding]:
    """Each host that is here; nothing is imported and none is changed by being installed."""
    for name, way in WAYS.items():
        if (version := installed(name)) is not None:
            yield Finding(AREA, name, f"{version}: {way}")
    yield _variable()


def _variable() -> Finding:
    """What the environment says about all of them."""
    try:
        on = switched()
    except SwitchError as error:
        return Finding(AREA, VARIABLE, str(error), "problem", f"unset {VARIABLE}, or set it to 1 or 0")
    if on is None:
        text = "not set; with 1, and phi3-lora host-path startup on PYTHONPATH, every host is served without a line"
    elif not on:
        text = "0: switched off in every host"
    else:
        there = str(folder()) in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        text = "1: on in every host" if there else "1, but phi3-lora host-path startup is not on PYTHONPATH: no effect"
    return Finding(AREA, VARIABLE, text)
