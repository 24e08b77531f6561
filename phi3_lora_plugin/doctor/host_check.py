"""Training programs that are installed here, and how this package is active in each."""

from __future__ import annotations

from collections.abc import Iterator

from phi3_lora_plugin.doctor.finding import Finding
from phi3_lora_plugin.doctor.versions import installed

AREA = "hosts"
#: Distribution -> how a person makes us active there; docs/hosts.md has the rest.
WAYS = {
    "transformers": "Trainer(callbacks=[LoraCheckpoint()]), attach(trainer), or phi3-lora run SCRIPT",
    "trl": "phi3-lora trl sft --config FILE",
    "accelerate": "accelerate launch -m phi3_lora_plugin.cli train RECIPE",
    "ray": "phi3-lora train RECIPE --ray num_workers=N",
    "axolotl": "plugins: [phi3_lora_plugin.hosts.axolotl.Phi3LoraPlugin] in its config",
    "llamafactory": "python -m phi3_lora_plugin.hosts.llamafactory FILE instead of llamafactory-cli train FILE",
    "ms-swift": "swift sft --external_plugins $(phi3-lora host-path swift) --callbacks phi3_lora",
}


def hosts() -> Iterator[Finding]:
    """Each host that is here; nothing is imported and none is changed by being installed."""
    for name, way in WAYS.items():
        if (version := installed(name)) is not None:
            yield Finding(AREA, name, f"{version}: {way}")
