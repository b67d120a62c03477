"""Composes configurations as the command line does."""

from collections.abc import Iterator
from contextlib import contextmanager

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from qvlm.config.compose import CONF, from_hydra, register
from qvlm.config.schema import RunConfig


@contextmanager
def composed(*overrides: str) -> Iterator[DictConfig]:
    """The configuration as Hydra hands it to a job, resolvers included."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        yield config


def load(*overrides: str) -> RunConfig:
    with composed(*overrides) as config:
        return from_hydra(config)
