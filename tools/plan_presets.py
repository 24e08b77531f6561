"""Plan the presets that are new or changed, or those named, and write the figures that `phi3-lora recipes` shows.

python tools/plan_presets.py [NAME...]
python tools/plan_presets.py --all    after a change of what a run keeps in memory
"""

import json
import sys
from pathlib import Path

from phi3_lora_plugin.plan import presets
from phi3_lora_plugin.plan.checkpointing import least
from phi3_lora_plugin.plan.machine import machine, planned_device
from phi3_lora_plugin.plan.plan import plan
from phi3_lora_plugin.recipe import load_recipe
from phi3_lora_plugin.recipe.layers import shipped_names

TABLE = Path(presets.__file__).with_name("presets.json")


def row(name: str) -> dict[str, object]:
    """The figures of one preset, on a card unless it names another device."""
    recipe = load_recipe(name)
    device = "cuda" if recipe.model.device == "auto" else recipe.model.device
    made = plan(load_recipe(name, least(recipe)), None, device)
    margin = machine(planned_device(recipe, device), made.program).margin
    return {"device": device, "peak": made.peak, "margin": margin, "digest": recipe.digest()}


def main() -> None:
    table = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    changed = [name for name in shipped_names() if table.get(name, {}).get("digest") != load_recipe(name).digest()]
    named = shipped_names() if "--all" in sys.argv else sys.argv[1:]
    for name in named or changed:
        table[name] = row(name)
    TABLE.write_text(json.dumps({name: table[name] for name in shipped_names()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
