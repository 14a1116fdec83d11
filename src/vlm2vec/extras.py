"""Optional dependencies: which extras of the package are installed, read from its own metadata."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version

from packaging.requirements import Requirement

PACKAGE = "vlm2vec"
FOR_DEVELOPERS = ("dev", "docs")


@dataclass(frozen=True)
class Extra:
    """An extra.

    Attributes:
        name: Name such as "pdf".
        missing: Requirements that are not installed, or installed in an unsuitable version.
    """

    name: str
    missing: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command that installs it."""
        return f"pip install '{PACKAGE}[{self.name}]'"


def extras() -> list[Extra]:
    """Every extra for users, in alphabetical order; empty if the package runs from its source without metadata."""
    try:
        about = distribution(PACKAGE)
    except PackageNotFoundError:
        return []
    wanted = [Requirement(text) for text in about.requires or ()]
    names = sorted(set(about.metadata.get_all("Provides-Extra") or ()) - {*FOR_DEVELOPERS})
    return [Extra(name, tuple(dict.fromkeys(_missing(wanted, name)))) for name in names]


def installed_version(name: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _missing(wanted: list[Requirement], extra: str) -> list[str]:
    found = []
    for requirement in wanted:
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == PACKAGE:  # vlm2vec[ui] includes vlm2vec[index]
            found += [each for inner in sorted(requirement.extras) for each in _missing(wanted, inner)]
            continue
        have = installed_version(requirement.name)
        if have is None or not requirement.specifier.contains(have, prereleases=True):
            found.append(f"{requirement.name}{requirement.specifier}")
    return found
