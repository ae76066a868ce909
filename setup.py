"""Packages come from three roots, which PEP 621 cannot say; all else is in pyproject.toml."""

from setuptools import find_packages, setup

ROOTS = {
    "megatrain": ".",
    "megatrain_bridges": "bridges",
    "megatrain_kernels": "kernels",
}

setup(
    packages=[
        package
        for name, root in ROOTS.items()
        for package in find_packages(root, include=[name, f"{name}.*"])
    ],
    package_dir={
        "megatrain": "megatrain",
        "megatrain_bridges": "bridges/megatrain_bridges",
        "megatrain_kernels": "kernels/megatrain_kernels",
    },
    package_data={
        "megatrain": ["config/support.json", "service/console/assets/*", "sampler/vllm/plugin/*/*"]
    },
)
