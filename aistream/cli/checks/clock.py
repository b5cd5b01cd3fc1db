"""This machine's clock against the others': a token's times are judged with a leeway, and no more."""

from __future__ import annotations

from collections.abc import Iterator

from aistream.cli.checks import Finding, Patient
from aistream.tokens import LEEWAY

NAME = "clock"
#: Seconds that are worth a word: NTP keeps far below that.
NOTABLE = 3.0
_MEND = "synchronise both clocks (NTP, chrony, systemd-timesyncd)"


def check(patient: Patient) -> Iterator[Finding]:
    """After all others: they have met the clocks."""
    clocks = list(dict(patient.clocks).items())
    if not clocks:
        yield Finding(NAME, "skipped", "nobody has told the time")
        return
    for whose, ahead in clocks:
        how = f"{whose}'s clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
        if abs(ahead) > LEEWAY:
            yield Finding(NAME, "problem", f"{how}: tokens may have {LEEWAY} s between them", _MEND)
        elif abs(ahead) > NOTABLE:
            yield Finding(NAME, "warning", how, _MEND)
    if all(abs(ahead) <= NOTABLE for _, ahead in clocks):
        worst = max(abs(ahead) for _, ahead in clocks)
        agree = f"within {worst:.1f} s" if worst >= 0.05 else "to the second"
        yield Finding(NAME, "ok", f"agrees {agree} with {', '.join(whose for whose, _ in clocks)}")
