"""What Hydra needs to compose a configuration, and the check of what it lets through.

`register` makes the schema known to Hydra, and `from_hydra` turns a composed configuration into a
`RunConfig`. Hydra accepts keys that are added with `+` or deleted with `~`; `from_hydra` does not.
"""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from qvlm.command import program
from qvlm.config.explain import explained
from qvlm.config.schema import PATHS, RunConfig
from qvlm.errors import UserError
from qvlm.routes import listing
from qvlm.validation import expanded_path, seed

# The folder stands beside the package in the repository, and in it in a wheel.
_PACKAGE = Path(__file__).resolve().parents[1]
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())


def register() -> None:
    """Makes the schema known to Hydra, the plugins of `hydra_plugins`, and what help texts name."""
    OmegaConf.register_new_resolver("qvlm.program", program, replace=True)
    OmegaConf.register_new_resolver("qvlm.commands", listing, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=_schema())
    sweeper = {
        "_target_": "hydra_plugins.qvlm_sweeper.CellSweeper",
        "max_batch_size": None,
        "params": None,
    }
    store.store(group="hydra/sweeper", name="cells", node=sweeper)
    launcher = {"_target_": "hydra_plugins.qvlm_launcher.CellLauncher"}
    store.store(group="hydra/launcher", name="cells", node=launcher)


def compose(overrides: Sequence[str]) -> RunConfig:
    """Makes the configuration of a cell as the command line does.

    Args:
        overrides: Words of the command line, such as "bits=w4a4".

    Raises:
        UserError: for a word that Hydra refuses, or a value that is refused.
    """
    register()
    hydra = HydraConfig.instance()
    before = hydra.cfg
    with explained(overrides), initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra_compose("config", list(overrides), return_hydra_config=True)
        hydra.set_config(composed)
        try:
            return from_hydra(composed)
        finally:
            hydra.cfg = before


def from_hydra(composed: DictConfig) -> RunConfig:
    """Makes the typed configuration of a composed one, in which "~" is expanded in every path.

    Raises:
        UserError: for a key that is not in the schema, a missing one, or a value that is refused.
        OmegaConfBaseException: for a value of a wrong type, or an interpolation of a missing key.
    """
    schema = _schema()
    _compare_keys(composed, schema, "")
    for key in sorted(OmegaConf.missing_keys(composed)):
        if not key.startswith("hydra."):
            raise UserError(f"{key} is not given. Give {key}=VALUE.")
    for option in PATHS:
        path = OmegaConf.select(composed, option)
        if isinstance(path, str):
            OmegaConf.update(composed, option, expanded_path(option, path))
    container = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(container, dict)
    seed("seed", container["seed"])  # before the seeds that follow it by default
    return typed({str(key): value for key, value in container.items() if key != "hydra"})


def typed(container: dict[str, object]) -> RunConfig:
    """Makes the typed configuration of plain values; a key that is left out has its default.

    Raises:
        UserError: for a value that is refused.
        OmegaConfBaseException: for an unknown key, or a value of a wrong type.
    """
    config = OmegaConf.to_object(OmegaConf.merge(_schema(), container))
    assert isinstance(config, RunConfig)
    return config


def _schema() -> DictConfig:
    schema = OmegaConf.structured(RunConfig)
    OmegaConf.set_struct(schema.method, False)  # a class has parameters of its own
    OmegaConf.set_struct(schema.launcher, False)
    OmegaConf.set_readonly(schema.bits, False)  # frozen as a value, not while it is composed
    return schema


def _compare_keys(given: DictConfig, schema: DictConfig, prefix: str) -> None:
    """Refuses keys that were added with `+` or deleted with `~`, in all nodes of the schema."""
    accepted = [str(key) for key in schema.keys()]  # noqa: SIM118
    present = [str(key) for key in given.keys()]  # noqa: SIM118 - `in` skips missing values
    for key in present:
        if key not in accepted and f"{prefix}{key}" != "hydra":
            choices = ", ".join(sorted(accepted))
            raise UserError(f"{prefix}{key} is not a known key. Choose one of: {choices}.")
    for key in accepted:
        if key not in present:
            raise UserError(f"{prefix}{key} is not a key that can be deleted. Give it a value.")
        inner = schema._get_node(key)
        if isinstance(inner, DictConfig) and OmegaConf.get_type(inner) is not dict:
            below = given._get_node(key)
            if not isinstance(below, DictConfig) or below._is_none():
                raise UserError(f"{prefix}{key}=null is not a group of options. Give it a value.")
            _compare_keys(below, inner, f"{prefix}{key}.")
