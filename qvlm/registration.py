"""`import qvlm` alone makes our models known to other packages, and costs no import of PyTorch.

transformers finds an architecture by the `model_type` of config.json. Ours is registered as soon as
transformers' module of configurations is imported, by a stand-in whose `from_dict` imports
`qvlm.models`. That registers the architecture itself, its processor and the packed format. The
packed format has a stand-in of its own, because a LLaMA alone and the models of families have the
`model_type` of transformers: without it their packed layers would be left at random.

lm-eval finds a model by its name. "qvlm" is registered once lm-eval has registered its own, and
`qvlm.lm_eval_model` is imported when somebody asks for it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPE = "qvlm_llava"
PACKED = "qvlm_packed"
CONFIGURATIONS = "transformers.models.auto.configuration_auto"
QUANTIZERS = "transformers.quantizers.auto"
LM_EVAL_MODELS = "lm_eval.models"


def register_lazily() -> None:
    """Registers our models now, or when transformers or lm-eval is imported."""
    for name, register in (
        (CONFIGURATIONS, _register_architecture),
        (QUANTIZERS, _register_packed_format),
        (LM_EVAL_MODELS, _register_with_lm_eval),
    ):
        if name in sys.modules:
            register(sys.modules[name])
        else:
            sys.meta_path.insert(0, _AfterImport(name, register))


def _register_with_lm_eval(module: ModuleType) -> None:
    from lm_eval.api.registry import model_registry

    model_registry.register("qvlm", target="qvlm.lm_eval_model:QvlmModel")


def _register_architecture(module: ModuleType) -> None:
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


def _register_packed_format(module: ModuleType) -> None:
    known = module.AUTO_QUANTIZATION_CONFIG_MAPPING
    if PACKED in known:
        return  # qvlm.packing was imported before

    class StandIn(module.QuantizationConfigMixin):  # type: ignore[name-defined]
        """The configuration of packed layers until `qvlm.models` is imported."""

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Returns the configuration itself; see `QuantizationConfigMixin.from_dict`."""
            importlib.import_module("qvlm.models")  # takes the place of this one
            return known[PACKED].from_dict(config_dict, **kwargs)

    known[PACKED] = StandIn


class _AfterImport(MetaPathFinder):
    """Calls a function once a module is imported.

    Args:
        name: Name of the module.
        register: Function that is called with the module.
    """

    def __init__(self, name: str, register: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.register = register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the ordinary spec of that module, with a loader that registers afterwards."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            self.register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
