"""What the doctor found: a list by severity, as a table, as `doctor.json` and as an exit code."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from stabletrain.errors import ConfigurationError
from stabletrain.folder import json_text, write_whole

Severity = Literal["broken", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("broken", "warning", "note")  # the worst one first
EXIT_CODES = {"broken": 3, "warning": 1, "note": 0}
VERDICTS = {0: "clean", 1: "warnings", 3: "broken"}  # by exit code
FILE_NAME = "doctor.json"
_COLORS = {"broken": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        severity: `broken` (training fails or learns nothing), `warning` (it may), `note` (worth knowing).
        check: what was looked for, one word for programs, such as `nonfinite`.
        where: which part of data, model or settings.
        what: the fault, in a few words.
        evidence: what was measured.
        remedy: overrides to add to the command, or empty where none helps.
        advice: what to do where no override helps.
        samples: positions in that part of the data, all of them.

    Example:
        >>> Finding(severity="note", check="imbalance", where="data", what="one class is rare", evidence="9:1").code
        0
    """

    severity: Severity
    check: str
    where: str
    what: str
    evidence: str
    remedy: str = ""
    advice: str = ""
    samples: list[int] = field(default_factory=list)

    @property
    def code(self) -> int:
        """Exit code of a report in which this is the worst."""
        return EXIT_CODES[self.severity]

    @property
    def to_do(self) -> str:
        """What to do about it: the overrides, and the advice."""
        return ". ".join(part for part in (self.remedy, self.advice) if part)


@dataclass(kw_only=True)
class Report:
    """All that was found and measured.

    Attributes:
        subject: what was examined, for the headline.
        findings: in the order in which they were found.
        facts: measurements that are no findings, plain values.
        seconds: how long it took.
    """

    subject: str
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def code(self) -> int:
        """0 clean (notes at most), 1 warnings, 3 broken."""
        return max((finding.code for finding in self.findings), default=0)

    def sorted(self) -> list[Finding]:
        """Return the findings, the worst ones first."""
        return sorted(self.findings, key=lambda finding: SEVERITIES.index(finding.severity))

    def verdict(self) -> str:
        """Return the last line: how many of each severity.

        Example:
            >>> Report(subject="digits", seconds=2.0).verdict()
            'clean: nothing found (2.0 s)'
        """
        counts = {severity: sum(one.severity == severity for one in self.findings) for severity in SEVERITIES}
        said = ", ".join(
            f"{count} {severity}{'s' if severity != 'broken' and count > 1 else ''}"
            for severity, count in counts.items()
            if count > 0
        )
        return f"{VERDICTS[self.code]}: {said or 'nothing found'} ({self.seconds:.1f} s)"

    def write(self, to: Path | str | None = None) -> Path:
        """Write `doctor.json`.

        Args:
            to: a folder, or a file whose name ends in .json; None: the current folder.

        Returns:
            The file.

        Raises:
            ConfigurationError: it can't be written.
        """
        path = Path(to) if to is not None else Path()
        path = path if path.suffix == ".json" else path / FILE_NAME
        content = {
            "subject": self.subject,
            "verdict": VERDICTS[self.code],
            "exit_code": self.code,
            "findings": [asdict(finding) for finding in self.sorted()],
            "facts": self.facts,
            "seconds": round(self.seconds, 3),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json_text(content))
        except OSError as error:
            raise ConfigurationError(
                f"{path} can't be written: {error.strerror or error}; give another folder as to=<folder>."
            ) from error
        return path

    def show(self) -> None:
        """Print the findings: a table on a terminal, plain lines elsewhere."""
        if sys.stdout.isatty():
            _table(self.subject, self.sorted())
        else:
            print("\n".join(plain_lines(self.subject, self.sorted())))


def plain_lines(subject: str, findings: Sequence[Finding]) -> list[str]:
    r"""Return the findings as text, a few lines for each.

    Example:
        >>> one = Finding(severity="warning", check="rate", where="settings", what="too high", evidence="0.1 > 0.01",
        ...     remedy="base_lr=0.01")
        >>> print("\n".join(plain_lines("digits", [one])))
        doctor: digits
        warning  settings: too high
                 evidence: 0.1 > 0.01
                 remedy:   base_lr=0.01
    """
    lines = [f"doctor: {subject}"]
    for finding in findings:
        lines.append(f"{finding.severity:<8} {finding.where}: {finding.what}")
        for name, text in (("evidence", finding.evidence), ("remedy", finding.remedy), ("advice", finding.advice)):
            if text:
                lines.append(f"         {name + ':':<9} {text}")
    return lines


def _table(subject: str, findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=max(60, shutil.get_terminal_size().columns))
    if len(findings) == 0:
        console.print(Text(f"doctor: {subject}"))
        return
    table = Table(title=f"doctor: {subject}", title_justify="left", show_lines=True, expand=True)
    for name, ratio in (("severity", None), ("where", 2), ("what, and the evidence", 5), ("what to do", 4)):
        table.add_column(name, ratio=ratio, no_wrap=name == "severity", overflow="fold")
    for one in findings:
        # As text, not markup: a sample's name may hold brackets.
        what = Text.assemble((one.what, "bold"), "\n", one.evidence)
        to_do = Text.assemble((one.remedy, "green"), "\n" if one.remedy and one.advice else "", one.advice)
        table.add_row(Text(one.severity, _COLORS[one.severity]), Text(one.where), what, to_do)
    console.print(table)


def listed(numbers: Sequence[object], most: int = 10) -> str:
    """Return numbers in words, the first ones where there are many.

    Example:
        >>> listed([3, 1]), listed(list(range(30)), most=3)
        ('3, 1', '0, 1, 2 and 27 more')
    """
    shown = ", ".join(str(number) for number in numbers[:most])
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"


def shortened(text: str, width: int = 160) -> str:
    """Return the first line of a message, cut to a width."""
    return textwrap.shorten(text.strip().splitlines()[0] if text.strip() else "", width, placeholder=" ...")
