"""What we patch in other libraries, and what we read of them although they do not promise it: looked up here alone.

A library that has changed gives an `ActivationError` that names it, its version and what is switched off. Where a
public way exists it is taken, and stands nowhere in this table.
"""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError


class ActivationError(Phi3LoraError):
    """A part that does not exist, or a place that the installed library does not have any more."""


@dataclass(frozen=True)
class Seam:
    """One place in another library.

    Attributes:
        place: `module:path`; a part that ends in `()` is called without arguments.
        off: what does not work without it.
        takes: names of the first parameters, for a function that is wrapped and called by position.
    """

    place: str
    off: str
    takes: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        """What the library is imported as."""
        return self.place.partition(".")[0].partition(":")[0]

    @property
    def library(self) -> str:
        """Its distribution."""
        return {"swift": "ms-swift", "olive": "olive-ai"}.get(self.package, self.package)


_MODULE = "LoRA's tensors cannot be found in a model"
_MEASURED = "phi3-lora plan cannot measure memory"
_AXOLOTL, _FACTORY, _SWIFT = "Phi-3 in axolotl", "Phi-3 in LLaMA-Factory", "Phi-3 in ms-swift"
_OLIVE = "every projection in Olive's LoRA pass"
_ROWS = ("self", "dataset", "processing_class", "args")

SEAMS = {
    # Patched while a process runs.
    "peft.targets": Seam(
        "peft.utils.constants:TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "default targets for phi3 and phimoe (part targets)",
    ),
    "transformers.report_to": Seam(
        "transformers.integrations.integration_utils:INTEGRATION_TO_CALLBACK", "report_to: phi3_lora (part report_to)"
    ),
    "transformers.train": Seam(
        "transformers:Trainer.train", "callbacks and fast paths of every Trainer (part trainers)", ("self",)
    ),
    "trl.sft_rows": Seam(
        "trl.trainer.sft_trainer:SFTTrainer._prepare_dataset", "exact masks in SFTTrainer (part trl)", _ROWS
    ),
    "trl.dpo_rows": Seam(
        "trl.trainer.dpo_trainer:DPOTrainer._prepare_dataset", "chats in DPOTrainer (part trl)", _ROWS
    ),
    "transformers.backend": Seam(
        "transformers:PreTrainedTokenizerFast.backend_tokenizer", "published ids in a host's tokenizer"
    ),
    **{
        f"trl.{script}_{kind}": Seam(f"trl.scripts.{script}:{place}", f"phi3-lora trl {script}")
        for script in ("sft", "dpo", "kto", "reward", "grpo", "rloo")
        for kind, place in (("parser", "make_parser"), ("main", "main"))
    },
    # Read, though private.
    "torch.parameters": Seam("torch.nn:Module()._parameters", _MODULE),
    "torch.modules": Seam("torch.nn:Module()._modules", _MODULE),
    "torch.buffers": Seam("torch.nn:Module()._buffers", _MODULE),
    "torch.persistent": Seam("torch.nn:Module()._non_persistent_buffers_set", _MODULE),
    "torch.state_hooks": Seam("torch.nn:Module()._state_dict_hooks", _MODULE),
    "torch.state_pre_hooks": Seam("torch.nn:Module()._state_dict_pre_hooks", _MODULE),
    "torch.hooks": Seam("torch.nn:Module()._forward_hooks", "all fast paths"),
    "torch.pre_hooks": Seam("torch.nn:Module()._forward_pre_hooks", "all fast paths"),
    "torch.backward_hooks": Seam("torch.nn:Module()._backward_hooks", "all fast paths"),
    "torch.backward_pre_hooks": Seam("torch.nn:Module()._backward_pre_hooks", "all fast paths"),
    "torch.save_state": Seam("torch.nn:Module._save_to_state_dict", "LoRA for slices of a projection"),
    "torch.load_state": Seam("torch.nn:Module._load_from_state_dict", "LoRA for slices of a projection"),
    "torch.fake": Seam("torch._subclasses.fake_tensor:FakeTensor", _MEASURED),
    "torch.fake_mode": Seam("torch._subclasses.fake_tensor:FakeTensorMode", _MEASURED),
    "torch.dispatch": Seam("torch.utils._python_dispatch:TorchDispatchMode", _MEASURED),
    "torch.without_modes": Seam("torch.utils._python_dispatch:_disable_current_modes", _MEASURED),
    "torch.leaves": Seam("torch.utils._pytree:tree_leaves", _MEASURED),
    "torch.item": Seam("torch:ops.aten._local_scalar_dense.default", _MEASURED),
    "torch.device": Seam("torch:ops.prim.device.default", _MEASURED),
    "torch.storage": Seam("torch:UntypedStorage()._cdata", _MEASURED),
    "torch.changes": Seam("torch:Tensor()._version", "NF4 weights unpacked ahead"),
    "transformers.attention": Seam("transformers:PretrainedConfig()._attn_implementation", "attention by documents"),
    "transformers.checkpointing": Seam(
        "transformers:PreTrainedModel._set_gradient_checkpointing",
        _MEASURED,
        ("self", "enable", "gradient_checkpointing_func"),
    ),
    "transformers.tokens": Seam(
        "transformers:Trainer._track_num_input_tokens", "tokens counted without a wait for the card", ("self", "inputs")
    ),
    "transformers.trials": Seam("transformers:Trainer._get_output_dir", "checkpoints in a hyperparameter search"),
    # What hosts have for plugins.
    "axolotl.plugin": Seam("axolotl.integrations.base:BasePlugin", _AXOLOTL),
    "axolotl.model": Seam("axolotl.model_support.base:ModelSupport", _AXOLOTL),
    "axolotl.unsupported": Seam("axolotl.model_support.base:Unsupported", _AXOLOTL),
    "axolotl.prepare": Seam("axolotl.cli.config:prepare_plugins", _AXOLOTL, ("cfg",)),
    "axolotl.rows": Seam("axolotl.prompt_tokenizers:PromptTokenizingStrategy", _AXOLOTL),
    "llamafactory.templates": Seam("llamafactory.data.template:TEMPLATES", _FACTORY),
    "llamafactory.template": Seam("llamafactory.data.template:Template", _FACTORY),
    "llamafactory.register": Seam("llamafactory.data.template:register_template", _FACTORY),
    "llamafactory.v1_rendering": Seam("llamafactory.v1.plugins.model_plugins.rendering:RenderingPlugin", _FACTORY),
    "llamafactory.v1_known": Seam(
        "llamafactory.v1.plugins.model_plugins.rendering:RenderingPlugin._attempted_template_imports", _FACTORY
    ),
    "llamafactory.v1_renderer": Seam("llamafactory.v1.core.utils.rendering:Renderer", _FACTORY),
    "llamafactory.run": Seam("llamafactory.train.tuner:run_exp", _FACTORY),
    "llamafactory.read": Seam("llamafactory.hparams.parser:read_args", _FACTORY),
    "swift.callbacks": Seam("swift.callbacks.mapping:callbacks_map", _SWIFT),
    "swift.template": Seam("swift.template.base:Template", _SWIFT),
    "swift.encode": Seam("swift.template.base:Template._encode", _SWIFT, ("self", "inputs")),
    "swift.templates": Seam("swift.template.register:TEMPLATE_MAPPING", _SWIFT),
    "swift.register": Seam("swift.template.register:register_template", _SWIFT),
    "swift.meta": Seam("swift.template.template_meta:TemplateMeta", _SWIFT),
    "olive.targets": Seam("olive.common.hf.mappings:MODELS_TO_LORA_TARGET_MODULES_MAPPING", _OLIVE),
}


@cache
def require(*names: str) -> None:
    """`look_up` all of them, once, for what is read of objects that are at hand."""
    for name in names:
        look_up(name)


def look_up(name: str) -> Any:
    """The object at the place `name` of `SEAMS`.

    Raises:
        ActivationError: the installed library does not have it, or takes other arguments there.
    """
    seam = SEAMS[name]
    module, _, path = seam.place.partition(":")
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part.removesuffix("()"))
            if part.endswith("()"):
                found = found()
    except (ModuleNotFoundError, AttributeError) as error:
        raise changed(name, f"has no {seam.place.replace(':', '.').replace('()', '')}") from error
    except Exception as error:  # whatever a broken release raises while it is imported
        raise changed(name, f"cannot be imported ({type(error).__name__}: {error})") from error
    if seam.takes and tuple(inspect.signature(found).parameters)[: len(seam.takes)] != seam.takes:
        takes = ", ".join(inspect.signature(found).parameters)
        raise changed(name, f"has {seam.place.replace(':', '.')} with other arguments ({takes})")
    return found


def look_into(name: str) -> None:
    """As `look_up` of a method, but of its source where the module is not imported yet: importing it is the user's.

    Raises:
        ActivationError: as `look_up`. Nothing is raised where the library is not installed.
    """
    seam = SEAMS[name]
    module, _, path = seam.place.partition(":")
    kind, _, method = path.partition(".")
    spec = None if module in sys.modules else _spec(module)
    if module not in sys.modules and spec is None and not is_installed(seam.package):
        return
    try:
        body = [] if spec is None else class_body(Path(str(spec.origin)).read_text(encoding="utf-8"), kind)
    except (OSError, ValueError):
        body = []
    made = next((one for one in body if isinstance(one, ast.FunctionDef) and one.name == method), None)
    if made is None:  # without a source, or inherited: only the class itself knows
        look_up(name)
        return
    takes = tuple(argument.arg for argument in made.args.args)
    if takes[: len(seam.takes)] != seam.takes:
        raise changed(name, f"has {seam.place.replace(':', '.')} with other arguments ({', '.join(takes)})")


def class_body(source: str, name: str) -> list[ast.stmt]:
    """The statements of a class in a module's source; none where there is no such class, or no source."""
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    return next((node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == name), [])


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found; it is not imported."""
    return sys.modules.get(module) is not None or _spec(module) is not None


def _spec(module: str) -> ModuleSpec | None:
    try:
        return find_spec(module)
    except Exception:  # its package is imported for it, and a broken release raises whatever it raises
        return None


def changed(name: str, what: str) -> ActivationError:
    """The error for a library that is not as it was."""
    seam = SEAMS[name]
    remedy = "install a version that phi3-lora-plugin is tested with: phi3-lora docs versions"
    try:
        installed = f"{seam.library} {metadata.version(seam.library)} {what}"
    except metadata.PackageNotFoundError:
        if is_installed(seam.package):  # a checkout on the path has no version
            installed = f"{seam.library} {what}"
        else:
            installed, remedy = f"{seam.library} is not installed", f"pip install {seam.library}"
    advice = "leave that part out (parts=, or --parts of phi3-lora run), or " if "(part " in seam.off else ""
    return ActivationError(f"{installed}, so this is switched off: {seam.off}; {advice}{remedy}")


def obstacle(*names: str) -> str | None:
    """Why one of these places cannot be used, for callers that have another way; None if all can."""
    for name in names:
        try:
            look_up(name)
        except ActivationError as error:
            return str(error)
    return None
