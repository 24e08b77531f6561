"""Signatures of the hooks that this package hangs on, read from a host's installed source without importing it.

`python tests/host_hooks.py HOST...` prints what is installed beside this Python, as host_hooks.json has it.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

#: host: {file below site-packages: names in it; `Class.*` is every public method, `=NAME` a table that has to be there}
HOOKS: dict[str, dict[str, tuple[str, ...]]] = {
    "transformers": {
        "transformers/trainer_callback.py": ("TrainerCallback.*",),
        "transformers/trainer.py": ("=DEFAULT_CALLBACKS", "Trainer.add_callback", "Trainer.train"),
        "transformers/integrations/integration_utils.py": ("=INTEGRATION_TO_CALLBACK",),
    },
    "peft": {"peft/utils/constants.py": ("=TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",)},
    "trl": {"trl/scripts/sft.py": ("main", "make_parser")},
    "axolotl": {
        "axolotl/integrations/base.py": ("BasePlugin.*", "load_plugin", "get_builtin_plugins"),
        "axolotl/model_support/base.py": ("ModelSupport.validate_cfg", "check_capability"),
        "axolotl/model_support/registry.py": ("=MODEL_SUPPORT_ENTRY_POINT_GROUP", "register_model_support"),
        "axolotl/cli/config.py": ("prepare_plugins",),
        "axolotl/prompt_strategies/__init__.py": ("load",),
        "axolotl/prompt_tokenizers.py": (
            "PromptTokenizingStrategy.__init__",
            "PromptTokenizingStrategy.tokenize_prompt",
            "PromptTokenizingStrategy.supports_batched",
        ),
    },
    "llamafactory": {
        "llamafactory/train/tuner.py": ("run_exp",),
        "llamafactory/hparams/parser.py": ("read_args", "get_train_args"),
        "llamafactory/data/template.py": (
            "=TEMPLATES",
            "register_template",
            "Template.encode_oneturn",
            "Template.encode_multiturn",
            "Template.fix_special_tokens",
            "Template.get_stop_token_ids",
        ),
        "llamafactory/v1/core/utils/rendering.py": ("Renderer.__init__", "Renderer.render_messages"),
        "llamafactory/v1/plugins/model_plugins/rendering.py": ("RenderingPlugin.render_messages",),
    },
    "swift": {
        "swift/callbacks/mapping.py": ("=callbacks_map",),
        "swift/trainers/mixin.py": ("SwiftMixin._get_callbacks",),
        "swift/template/register.py": ("=TEMPLATE_MAPPING", "register_template"),
        "swift/template/template_meta.py": ("TemplateMeta.init",),
        "swift/template/base.py": ("Template._encode", "Template.init_processor", "Template.is_training"),
        "swift/utils/utils.py": ("import_external_file",),
    },
}


def places(host: str) -> Iterator[Path]:
    """Folders to look in: where this Python finds packages, and the host's own environment below PHI3_HOST_ENVS."""
    yield from (Path(entry) for entry in sys.path if entry)
    if environments := os.environ.get("PHI3_HOST_ENVS"):
        yield from sorted(Path(environments, host).glob("lib/python3*/site-packages"))


def installed(host: str) -> dict[str, str] | None:
    """`file:name` to signature, "absent" where it is gone; None if the host is not installed."""
    top = next(iter(HOOKS[host])).split("/")[0]
    home = next((place for place in places(host) if (place / top / "__init__.py").is_file()), None)
    if home is None:
        return None
    found: dict[str, str] = {}
    for file, names in HOOKS[host].items():
        path = home / file
        known = signatures(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name in names:
            if name.endswith(".*"):
                prefix = name[:-1]
                methods = {key: value for key, value in known.items() if key.startswith(prefix) and "._" not in key}
                found |= {f"{file}:{key}": value for key, value in methods.items()} or {f"{file}:{name}": "absent"}
            else:
                found[f"{file}:{name}"] = known.get(name, "absent")
    return found


def signatures(source: str) -> dict[str, str]:
    """Names of functions, methods (`Class.method`) and tables (`=NAME`) to what they are called with."""
    found: dict[str, str] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and not prefix:
                visit(node.body, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[prefix + node.name] = _arguments(node.args)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and not prefix:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update({f"={target.id}": "there" for target in targets if isinstance(target, ast.Name)})

    visit(ast.parse(source).body, "")
    return found


def _arguments(arguments: ast.arguments) -> str:
    """Names, order and defaults; annotations change without anybody being hurt."""
    for one in ast.walk(arguments):
        if isinstance(one, ast.arg):
            one.annotation = None
    return f"({ast.unparse(arguments)})"


if __name__ == "__main__":
    print(json.dumps({host: installed(host) for host in sys.argv[1:] or HOOKS}, indent=1))
