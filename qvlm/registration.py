"""`import qvlm` alone lets transformers open packed checkpoints, and costs no import of PyTorch.

transformers finds an architecture by the `model_type` of config.json. Ours is registered as soon as
transformers' module of configurations is imported, by a stand-in whose `from_dict` imports
`qvlm.models`. That registers the architecture itself, its processor and the packed format.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPE = "qvlm_llava"
CONFIGURATIONS = "transformers.models.auto.configuration_auto"


def register_lazily() -> None:
    """Registers the stand-in now, or when transformers is imported."""
    if CONFIGURATIONS in sys.modules:
        _register(sys.modules[CONFIGURATIONS])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register(module: ModuleType) -> None:
    if MODEL_TYPE in module.CONFIG_MAPPING:
        return  # qvlm.models was imported before

    class StandIn(module.PreTrainedConfig):  # type: ignore[name-defined]
        """The configuration of our architecture until `qvlm.models` is imported."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Returns the configuration itself; see `PreTrainedConfig.from_dict`."""
            from qvlm.models.llava import LlavaArchitecture

            return LlavaArchitecture.from_dict(config_dict, **kwargs)

    module.AutoConfig.register(MODEL_TYPE, StandIn)


class _AfterImport(MetaPathFinder):
    """Calls `_register` once transformers' module of configurations is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the ordinary spec of that module, with a loader that registers afterwards."""
        if fullname != CONFIGURATIONS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
