"""Hand rendered configs to the parser of the host whose environment runs this, as the host itself would.

    python tools/parse_rendered.py HOST FILE...

Prints a line for each file; exit code 1 if any is refused. It imports the host and nothing of this package but the
plugins that the configs name.
"""

import sys
from pathlib import Path


def axolotl(file: Path) -> str:
    """As `axolotl train` does up to the model; the base has to be here."""
    import yaml
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(yaml.safe_load(file.read_text(encoding="utf-8")))
    given = set(cfg)
    prepare_plugins(cfg)
    checked = validate_config(
        cfg,
        capabilities={"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"},
        env_capabilities={"torch_version": "2.13.0"},
    )
    lost = sorted(key for key in given if cfg[key] is not None and key not in checked)
    if lost:
        raise ValueError(f"dropped without a word: {', '.join(lost)}")
    return str(checked.adapter)


def llamafactory(file: Path) -> str:
    """As its train command does, without the section that our launcher takes out first."""
    from llamafactory.hparams import get_train_args
    from omegaconf import OmegaConf

    args = OmegaConf.to_container(OmegaConf.load(file))
    args.pop("phi3_lora", None)
    args |= {"use_cpu": True} if on_cpu("use_cpu") else {}
    return str(get_train_args(args)[3].finetuning_type)


def on_cpu(*words: str) -> list[str]:
    """`words` without a GPU, since parsers look for one when they read `bf16: true`."""
    import torch

    return [] if torch.accelerator.is_available() else list(words)


def trl(file: Path) -> str:
    """As `trl sft --config FILE` does, or the command that the file names."""
    from importlib import import_module
    from re import search

    script = search(r"trl (\w+) --config", file.read_text(encoding="utf-8"))
    make_parser = import_module(f"trl.scripts.{script[1] if script else 'sft'}").make_parser
    words = ["--config", str(file), *on_cpu("--use_cpu", "True")]
    parsed = make_parser().parse_args_and_config(args=words, fail_with_unknown_args=True)
    return str(parsed[2].lora_target_modules)


def swift(file: Path) -> str:
    """As `swift sft FILE` does up to the model."""
    from swift.arguments import SftArguments
    from swift.cli.main import parse_yaml_args
    from swift.utils import parse_args

    words = [str(file)]
    parse_yaml_args(words)
    words += [] if "--use_cpu" in words else on_cpu("--use_cpu", "true")
    args, unknown = parse_args(SftArguments, words)
    if unknown:
        raise ValueError(f"unknown: {unknown}")
    return str(args.tuner_type)


def main() -> None:
    host, *names = sys.argv[1:]
    failed = False
    for name in names:
        try:
            print(f"{name}: accepted ({globals()[host](Path(name))})")
        except (Exception, SystemExit) as error:  # a parser may do either
            failed = True
            print(f"{name}: refused: {type(error).__name__}: {error}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
