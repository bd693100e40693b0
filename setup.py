"""Beside what pyproject.toml declares: the programs and recipes are built into the package."""

from setuptools import setup
from setuptools.command.build_py import build_py

# Part of the package when it is installed without the repository -> its folder there.
PROGRAMS = {
    "taming.programs": ".",
    "taming.programs.scripts": "scripts",
    "taming.programs.configs": "configs",
}


class BuildWithPrograms(build_py):
    """Copy main.py, scripts/ and configs/; an editable installation uses the repository's."""

    def run(self) -> None:
        """Add them to what is built."""
        if not self.editable_mode:
            self.packages = [*self.packages, *PROGRAMS]
            self.package_dir = {**(self.package_dir or {}), **PROGRAMS}
            self.package_data["taming.programs.configs"] = ["**/*.yaml"]
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """List the modules of a package, of which this file is none."""
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[1] != "setup"]


setup(cmdclass={"build_py": BuildWithPrograms})
