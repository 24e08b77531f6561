"""LLaMA-Factory: `python -m phi3_lora_plugin.hosts.llamafactory config.yaml key=value ...`, also under `torchrun -m`.

`llamafactory-cli train` restarts itself under torchrun and loses callbacks on the way; this is the same run,
started by us. For a base of the family it names our template, checks the targets and adds LoRA-only checkpoints. Any
other base it trains as `llamafactory-cli train` would.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from functools import wraps
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.hosts.base import check_targets, no_remote_code, phi_config
from phi3_lora_plugin.hosts.settings import HostSettings, SettingsError, checkpoint_callback, read_settings
from phi3_lora_plugin.seams import look_up

TEMPLATE = "phi3_lora"
_FILES = (".yaml", ".yml", ".json")
log = logging.getLogger(__name__)


def prepare(args: MutableMapping[str, Any], config: Mapping[str, Any], settings: HostSettings) -> list[str]:
    """Change LLaMA-Factory's arguments, as read from YAML, for a base with this config; a sentence for each change.

    Raises:
        TargetError: `lora_target` names what the model does not have, or slices of its fused projections.
    """
    done = []
    if settings.masks and args.get("template") != TEMPLATE:
        was = args.get("template")
        args["template"] = TEMPLATE
        done.append(f"template: {TEMPLATE} instead of {was}, which renders and masks as the published template does")
    done += no_remote_code(args)
    named = args.get("lora_target")
    if args.get("finetuning_type", "lora") == "lora" and named:
        names = [name.strip() for name in named.split(",")] if isinstance(named, str) else list(named)
        check_targets(config, names, "lora_target")
    return done


def run(words: Sequence[str]) -> None:
    """Train as `llamafactory-cli train` would with these words, and with what Phi-3 needs.

    Args:
        words: a YAML or JSON file, then `key=value` overrides.

    Raises:
        SettingsError, TargetError, EncodeError: what is wrong with the config, or with a row.
    """
    run_exp = look_up("llamafactory.run")
    train(_read(words), getattr(run_exp, "__wrapped__", run_exp), words[0])


def train(args: dict[str, Any], run_exp: Any, source: str, callbacks: Sequence[Any] = ()) -> None:
    """Call LLaMA-Factory's `run_exp` with what Phi-3 needs.

    Args:
        args: LLaMA-Factory's arguments, and perhaps `phi3_lora`; changed in place.
        source: where they are from, for messages.
        callbacks: those of the caller, which stay.

    Raises:
        SettingsError, TargetError, EncodeError: what is wrong with the config, or with a row.
    """
    section = args.pop("phi3_lora", None)
    base = args.get("model_name_or_path")
    if not base:
        raise SettingsError(f"{source}: names no model_name_or_path")
    config = phi_config(str(base), args.get("model_revision"))
    if config is None or section is False:
        why = "is not a supported Phi model" if config is None else "is trained without us (phi3_lora: false)"
        log.warning("%s %s; nothing changed", base, why)
        run_exp(args, callbacks=list(callbacks))
        return
    settings = read_settings(section)
    for sentence in prepare(args, config, settings):
        log.warning("%s", sentence)
    if settings.masks:
        from phi3_lora_plugin.hosts.llamafactory_template import register

        register(settings.data)
    callback = checkpoint_callback(settings) if args.get("finetuning_type", "lora") == "lora" else None
    run_exp(args, callbacks=[*callbacks, *([] if callback is None else [callback])])


def wrapped(run_exp: Any) -> Any:
    """`run_exp` for whoever calls it without us, such as `llamafactory-cli train`; a mistake ends it in a sentence."""

    @wraps(run_exp)
    def run(args: Any = None, callbacks: Any = None) -> Any:
        if isinstance(args, list) or (args is None and len(sys.argv) > 1 and not sys.argv[1].endswith(_FILES)):
            return run_exp(args, callbacks)  # words of a command line, which LLaMA-Factory alone takes apart
        try:
            given = _read(sys.argv[1:]) if args is None else dict(args)
            return train(given, run_exp, sys.argv[1] if args is None else "the arguments", callbacks or ())
        except Phi3LoraError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    return run


def _read(words: Sequence[str]) -> dict[str, Any]:
    """The config as LLaMA-Factory's own reader gives it, which looks at `sys.argv`."""
    if not words or not words[0].endswith(_FILES):
        raise SettingsError("expected a config file first: python -m phi3_lora_plugin.hosts.llamafactory config.yaml")
    read_args = look_up("llamafactory.read")
    kept, sys.argv = sys.argv, ["llamafactory-cli", *words]
    try:
        return dict(read_args())
    except FileNotFoundError as error:
        raise SettingsError(f"{words[0]}: no such file") from error
    finally:
        sys.argv = kept


def main() -> None:
    """Exit with 0 fine, 1 failed, 2 wrong input."""
    logging.basicConfig(format="phi3_lora_plugin: %(message)s")
    try:
        run(sys.argv[1:])
    except Phi3LoraError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
