"""What a check found on this machine."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Finding:
    """One check: `verdict` is ok, warning or problem; `advice` is empty when ok."""

    check: str
    verdict: str
    seen: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """Convert to JSON."""
        return asdict(self)


def found(check: str, seen: str, advice: str = "", verdict: str = "warning") -> Finding:
    """Judge what was seen: `verdict` where there is something to advise, else ok."""
    return Finding(check, verdict if advice else "ok", seen, advice)
