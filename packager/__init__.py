"""Edge deployment packager: one score map of a language model, any size from it, ONNX bundles validated on the
target.

>>> import packager
>>> packager.load_profile("raspberry-pi-5-8gb").context_tokens
4096

Each verb of the command line is a function here, and has its defaults: see `packager.api.calls`. Importing this package
loads none of them: a name brings its module when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module

# As type checkers know it; to import `typing` would cost four times as much as all else here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from packager import errors as errors
    from packager.api.calls import build as build
    from packager.api.calls import calibrate_profile as calibrate_profile
    from packager.api.calls import chat as chat
    from packager.api.calls import curve as curve
    from packager.api.calls import frontier as frontier
    from packager.api.calls import inspect as inspect
    from packager.api.calls import load_profile as load_profile
    from packager.api.calls import open_bundle as open_bundle
    from packager.api.calls import open_map as open_map
    from packager.api.calls import pack as pack
    from packager.api.calls import plan as plan
    from packager.api.calls import profiles as profiles
    from packager.api.calls import run as run
    from packager.api.calls import score as score
    from packager.api.calls import validate as validate
    from packager.api.calls import write_plan as write_plan
    from packager.progress import Progress as Progress

__version__ = "0.2.0"
__all__ = [
    "Progress",
    "__version__",
    "build",
    "calibrate_profile",
    "chat",
    "curve",
    "errors",
    "frontier",
    "inspect",
    "load_profile",
    "open_bundle",
    "open_map",
    "pack",
    "plan",
    "profiles",
    "run",
    "score",
    "validate",
    "write_plan",
]

# Type checkers read the imports above; to them this would make every name there is.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name, from the module that has it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "errors":
            value = import_module("packager.errors")
        else:
            home = "packager.progress" if name == "Progress" else "packager.api.calls"
            value = getattr(import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
