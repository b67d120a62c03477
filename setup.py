"""Puts `conf/`, which stays beside the package in the repository, into it as `qvlm/conf`.

Everything else about the package is in pyproject.toml, which has no words for this.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["qvlm*", "hydra_plugins*"]), "qvlm.conf"],
    package_dir={"qvlm.conf": "conf"},
)
