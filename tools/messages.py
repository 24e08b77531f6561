"""The texts of all errors in the package, read from its source: what differs from case to case is `...`.

python tools/messages.py [WORD...]    those that contain all words
"""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "phi3_lora_plugin"


def every_message() -> dict[str, list[tuple[str, str]]]:
    """Module -> (class, text) of each error that is raised with a text, in the order of the source."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        mine = []
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or not call.args:
                continue
            kind = call.func.id
            text = next((said for arg in call.args if (said := as_text(arg))), "")
            if (kind.endswith("Error") or isinstance(node, ast.Raise) or kind == "Problem") and len(text) > 12:
                mine.append((kind, text))
        if mine:
            found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = list(dict.fromkeys(mine))
    return found


def texts() -> list[str]:
    """Every text in the source that may be part of a message, f-strings with `...` for what they fill in."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp) and (text := as_text(node)):
                found.append(text)
    return found


def as_text(node: ast.AST) -> str:
    """A string, an f-string or a sum of them as text; empty for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(as_text(part) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = as_text(node.left), as_text(node.right)
        return (left or "...") + (right or "...") if left or right else ""
    if isinstance(node, ast.List | ast.Tuple) and node.elts:
        return as_text(node.elts[0])
    return ""


if __name__ == "__main__":
    for module, said in every_message().items():
        for kind, text in said:
            if all(word in text for word in sys.argv[1:]):
                print(f"{module}: {kind}: {text}")
