"""Overrides on the command line: `lora.r=4`, and `--lora.r=4` or `--lora.r 4` as other programs write it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from phi3_lora_plugin.cli.completion import complete_key, complete_recipe
from phi3_lora_plugin.error import Phi3LoraError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
RecipeName = Annotated[str, typer.Argument(help="Preset name or YAML file.", autocompletion=complete_recipe)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, for example lora.r=8.", autocompletion=complete_key),
]
#: Keys of a recipe that stand in no section.
_TOP = ("output_dir", "seed", "speed")


def or_demonstration(recipe: str, overrides: list[str] | None) -> tuple[str, list[str]]:
    """The recipe and the overrides that were meant: overrides alone are those of the demonstration."""
    return ("tiny-cpu", [recipe, *(overrides or ())]) if "=" in recipe else (recipe, overrides or [])


class OptionError(Phi3LoraError):
    """An option that a command does not have, and that is a setting of the recipe."""


class TakesOverrides(TyperCommand):
    """A command whose words `--section.key=value` are overrides; its own options stay what they are."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write dashed overrides without dashes, then parse as always."""
        known = {name for param in self.params for name in (*param.opts, *param.secondary_opts)}
        return super().parse_args(ctx, undashed(args, known))


def undashed(words: list[str], known: set[str]) -> list[str]:
    """`words` with every `--a.b=c` and `--a.b c` as `a.b=c`; what follows `--` stays.

    Raises:
        OptionError: an option that is not `known` and is what others call a setting, such as `--lr`; names the key.
    """
    from phi3_lora_plugin.recipe.near_keys import other_word

    done: list[str] = []
    waiting = iter(words)
    for word in waiting:
        if word == "--":
            return [*done, word, *waiting]
        name, equals, value = word.partition("=")
        key = name[2:].replace("-", "_")
        if not name.startswith("--") or name in known:
            done.append(word)
        elif "." in key or key in _TOP:
            if not equals and (following := next(waiting, None)) is None:
                raise OptionError(f"{word} has no value; write {key}=VALUE")
            done.append(f"{key}={value if equals else following}")
        elif setting := other_word(key):
            raise OptionError(f"no option {name}; settings of the recipe are overrides: {setting}={value or 'VALUE'}")
        else:
            done.append(word)
    return done
