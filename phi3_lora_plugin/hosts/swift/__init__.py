"""ms-swift: `swift sft --external_plugins $(phi3-lora host-path swift) --callbacks phi3_lora ...`.

The file that ms-swift is given is alone in its folder, because ms-swift puts that folder on the import path.
"""

from __future__ import annotations

from pathlib import Path


def plugin_file() -> Path:
    """The file for `--external_plugins`."""
    return Path(__file__).parent / "external" / "phi3_lora_swift.py"
