"""Run by Python as it starts, where this folder is on PYTHONPATH; it then runs the `sitecustomize` that it hides."""

import importlib.machinery
import importlib.util
import os
import sys

if os.environ.get("PHI3_LORA_ACTIVATE"):
    try:
        from phi3_lora_plugin.hosts.startup.hooks import start
    except ImportError:  # the Python of another environment, which inherited the variable
        pass
    else:
        start()

_here = os.path.dirname(os.path.abspath(__file__))
_spec = importlib.machinery.PathFinder.find_spec(
    "sitecustomize", [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != _here]
)
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
