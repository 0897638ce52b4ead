"""Lists the packages over the several roots (core/, domains/, recipes/ are real folders at the top)."""

from setuptools import find_namespace_packages, setup

roots = {"limbeck.core": "core", "limbeck.domains": "domains", "limbeck.recipes": "recipes"}
inner = [f"{name}.{package}" for name, root in roots.items() for package in find_namespace_packages(root)]
setup(packages=["limbeck", *roots, *inner])
