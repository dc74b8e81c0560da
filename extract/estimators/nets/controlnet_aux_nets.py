"""The network classes of controlnet_aux, without the rest of that package.

Importing the package itself takes five seconds, warns, and replaces entries of timm's registry of networks; the modules that
hold the networks need none of that. They are imported as parts of an empty package of the same name, which is gone again
afterwards.
"""

import contextlib
import importlib
import importlib.util
import io
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Any

from torch import nn

PACKAGE = "controlnet_aux"
_lock = threading.Lock()


@cache
def network_class(module: str, name: str) -> Any:
    """controlnet_aux.<module>.<name>."""
    with _lock, _empty_package(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)


@contextlib.contextmanager
def _empty_package() -> Iterator[None]:
    """Puts an empty package in the place of controlnet_aux, which finds its modules in the same folders."""
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None and found.submodule_search_locations is not None  # a dependency of this project
    own = {key: module for key, module in sys.modules.items() if key.partition(".")[0] == PACKAGE}
    for key in own:
        del sys.modules[key]
    package = ModuleType(PACKAGE)
    package.__path__ = list(found.submodule_search_locations)
    sys.modules[PACKAGE] = package
    try:
        yield
    finally:
        for key in [key for key in sys.modules if key.partition(".")[0] == PACKAGE]:
            del sys.modules[key]
        sys.modules.update(own)


def made_quietly(make: Any, *arguments: Any) -> nn.Module:
    """make(*arguments), without what it prints, ready to predict."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net: nn.Module = make(*arguments)
    return net.eval()


def without_prefix(weights: Mapping[str, Any], prefix: str = "module.") -> dict[str, Any]:
    """The weights of a network that was saved from inside a wrapper for several GPUs."""
    return {key.removeprefix(prefix): value for key, value in weights.items()}
