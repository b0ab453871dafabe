"""What experiments with a page of their own share: its files, its command, checks, kept parts.

A page is docs/evidence/NAME.{json,md,png}: the results, and text and picture computed from them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxllm.errors import InputError
from jaxllm.training.run_folder import (
    first_difference,
    read_json,
    to_plain,
    versions,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]


@dataclass(frozen=True)
class EvidencePage:
    """How the results of one experiment become its three files.

    Attributes:
      name: Of the files, and of the experiment in `make evidence NAME=...`.
      markdown: Results -> the page.
      picture: Results -> the figure, or None where there is nothing to draw yet.
      dpi: Of the picture.
    """

    name: str
    markdown: Callable[[Result], str]
    picture: Callable[[Result], Figure | None]
    dpi: int = 120

    def write(self, result: Result, folder: Path) -> None:
        """Writes NAME.json, NAME.md and NAME.png to `folder`."""
        import matplotlib.pyplot as plt

        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{self.name}.json", result)
        write_text(folder / f"{self.name}.md", self.markdown(result))
        figure = self.picture(result)
        if figure is not None:
            figure.savefig(folder / f"{self.name}.png", dpi=self.dpi)
            plt.close(figure)

    def begin(self, run: Any) -> Result:
        """Returns what every result begins with: config, command, device and versions."""
        return {
            "config": to_plain(run),
            "command": self.command(run),
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
        }

    def command(self, run: Any) -> str:
        """Returns the command that makes the page: what differs from the defaults is named."""
        changed = _changes(to_plain(run), to_plain(type(run)()))
        arguments = f" EVIDENCE_ARGS='{' '.join(changed)}'" if changed else ""
        return f"make evidence NAME={self.name}{arguments}"

    def kept(self, folder: Path) -> Result:
        """Returns the results that `folder` holds, empty if it holds none.

        Raises:
          InputError: A file that is no JSON.
        """
        path = folder / f"{self.name}.json"
        return read_json(path) if path.is_file() else {}

    def check_kept(
        self, folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], part: str = "it"
    ) -> None:
        """Refuses to keep a part that was made with other settings than those of this run.

        Args:
          folder: Where the results are.
          before: The settings that the part depends on, as the results have them.
          now: The same of this run.
          part: What is kept.

        Raises:
          InputError: The first setting that differs.
        """
        if difference := first_difference(before, now, "config"):
            key, old, new = difference
            raise InputError(
                f"{folder / f'{self.name}.json'}: {part} was made with {key} {old!r}, this run has "
                f"{new!r}; the parts of a page belong together: run all of them"
            )


def _changes(values: dict[str, Any], defaults: dict[str, Any], prefix: str = "--") -> list[str]:
    changed = []
    for name, value in values.items():
        key = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, dict):
            changed += _changes(value, defaults[name], f"{key}.")
        elif value != defaults[name]:
            shown = value if isinstance(value, list) else [value]
            changed.append(f"{key} {' '.join(map(str, shown))}")
    return changed


# -- checks of a run -----------------------------------------------------------------------------


def check_interval(seeds: Sequence[int], **members: int) -> None:
    """Raises InputError without two seeds, and two of everything else that is resampled."""
    if min((len(seeds), *members.values())) < 2:
        more = "".join(f", {name} {count}" for name, count in members.items())
        needed = " and ".join(("two seeds", *(f"two {name}" for name in members)))
        raise InputError(f"seeds {tuple(seeds)}{more}: an interval needs {needed}")


def check_names(
    field: str,
    given: Sequence[str],
    known: Collection[str],
    left_out: Mapping[str, str] | None = None,
) -> None:
    """Raises InputError for the first name that is not known, with the reason if it has one."""
    for name in given:
        if name not in known:
            reason = f": it {left_out[name]}" if left_out and name in left_out else ""
            raise InputError(f"{field}: {name!r} is not one of {', '.join(known)}{reason}")


def check_curve(every: int, where: str = "", **steps: int) -> None:
    """Raises InputError unless all numbers of steps are multiples of those between two points."""
    if every < 1 or any(count % every for count in steps.values()):
        given = " and ".join(f"{where}{name} {count}" for name, count in steps.items())
        raise InputError(f"{given} are no multiples of {where}every {every}")
