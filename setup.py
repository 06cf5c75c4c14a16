"""Lists the packages; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["activation_store", "activation_store.*", "dictlearn", "dictlearn.*"]),
        "dictlearn_app",
        *(f"dictlearn_app.{name}" for name in find_packages("app")),
    ],
    # An installed top-level package called "app" would claim that name in every user's environment.
    package_dir={"dictlearn_app": "app"},
)
