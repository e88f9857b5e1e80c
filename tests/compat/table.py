"""What works with which SDK: kept in results.json, shown in docs/compatibility.md.

An outcome is a text: `works`, or `fails: `, `sdk: ` (the SDK's own bug) or `absent: ` and the reason. Where runs are
compared, the reasons do not count.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.compat.sdks import SDKS, Sdk
from tests.support import ROOT

Outcomes = dict[str, dict[str, str]]
"""By program, then by check."""

DOCUMENT = ROOT / "docs" / "compatibility.md"
RESULTS = Path(__file__).parent / "results.json"
SDK_BUGS = Path(__file__).parent / "programs" / "sdk_bugs.toml"
REASON_LENGTH = 160
MARKS = {"works": "✓", "fails": "✗", "sdk": "SDK", "absent": "–"}
SECTIONS = {
    "Agents": "The agents routes, by raw calls and, up to 0.2, by the SDK's `Agent`, `AsyncAgent` and `ReActAgent`.",
    "Responses": "Responses, Conversations and what newer SDKs use beside them; their `Agent` classes run on these.",
}
_CHANGING = re.compile(
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}|(?<=[a-z]_)[0-9a-f-]{16,}|(?<=127\.0\.0\.1:)\d+|(?<=-)[0-9a-f]{12}\b"
    r"|(?<=HTTP response headers: )Headers\(.*?\)"
)
"""What differs between two runs: ids, ports, unique names, dates."""


def outcome(sdk: str, line: Mapping[str, Any]) -> str:
    """The outcome of a check, from the line that the program printed."""
    if line["ok"]:
        return "works"
    reason = _CHANGING.sub("…", " ".join(str(line["error"]).split()))[:REASON_LENGTH]
    if line["ok"] is None:
        return f"absent: {reason}"
    bug = sdk_bugs().get((sdk, line["check"]))
    return f"sdk: {bug}" if bug else f"fails: {reason}"


def sdk_bugs() -> dict[tuple[str, str], str]:
    """The reason, by SDK and check."""
    bugs = tomllib.loads(SDK_BUGS.read_text())["bug"]
    return {(sdk, bug["check"]): bug["reason"] for bug in bugs for sdk in bug["sdks"]}


def read_results() -> dict[str, Outcomes]:
    """What is committed, by the SDK's name."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def write_results(results: Mapping[str, Outcomes]) -> None:
    """Enters these SDKs' outcomes beside the others', and writes the page."""
    merged = {**read_results(), **results}
    ordered = {sdk.name: merged[sdk.name] for sdk in SDKS if sdk.name in merged}
    RESULTS.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n")
    DOCUMENT.write_text(page(ordered))


def differences(now: Mapping[str, Outcomes], committed: Mapping[str, Outcomes]) -> list[str]:
    """A line for each check of these SDKs that does not come out as committed."""
    found = []
    for sdk, outcomes in now.items():
        for program in sorted(outcomes.keys() | committed.get(sdk, {}).keys()):
            new, old = outcomes.get(program, {}), committed.get(sdk, {}).get(program, {})
            for check in dict.fromkeys([*new, *old]):
                was, came = old.get(check, "no such check"), new.get(check, "no such check")
                if _state(was) != _state(came):
                    found.append(f"{sdk}: {program}: {check}: committed is {was!r}, now it is {came!r}")
    return found


def page(results: Mapping[str, Outcomes]) -> str:
    """docs/compatibility.md."""
    parts = [
        "# Compatibility",
        "Real SDKs, unmodified, each in an environment of its own, against one running Caravan (`tests/compat`). This\n"
        "page is generated: `make compat` runs every version, and fails if anything comes out otherwise, worse or\n"
        "better; `make test` does so with the newer ones.",
        "py and npm are the llama-stack-client of Python and of Node; ogx is its successor, ogx-client.",
        "✓ works · ✗ fails · SDK: the SDK's own bug, whatever a server answers · – the SDK has no such thing",
    ]
    for section, what in SECTIONS.items():
        columns = [(sdk, program) for sdk in SDKS for program in sdk.programs if _section(program) == section]
        shown = [(sdk, results[sdk.name][program]) for sdk, program in columns if sdk.name in results]
        parts += [f"## {section}", what, _table(shown), *_reasons(shown)]
    return "\n\n".join(parts) + "\n"


def _section(program: str) -> str:
    return "Agents" if program.startswith("agents") else "Responses"


def _state(outcome: str) -> str:
    return outcome.partition(":")[0]


def _table(columns: list[tuple[Sdk, dict[str, str]]]) -> str:
    checks = dict.fromkeys(check for _, outcomes in columns for check in outcomes)
    rows = [["Check", *(sdk.title for sdk, _ in columns)], ["---", *("---" for _ in columns)]]
    for check in checks:
        marks = [MARKS[_state(outcomes.get(check, "absent"))] for _, outcomes in columns]
        rows.append([check.replace("_", " "), *marks])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _reasons(columns: list[tuple[Sdk, dict[str, str]]]) -> Iterator[str]:
    """Why things do not work: a list of what we fail at, and one of the SDKs' bugs."""
    for state, heading in (("fails", "### What fails"), ("sdk", "### Bugs of the SDKs")):
        whose: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for sdk, outcomes in columns:
            for check, text in outcomes.items():
                if _state(text) == state:
                    whose[check][text.partition(": ")[2]].append(sdk.title)
        if whose:
            yield heading
            yield "\n".join(_reasons_of(check, titles) for check, titles in whose.items())


def _reasons_of(check: str, titles: Mapping[str, list[str]]) -> str:
    reasons = (f"  - {', '.join(names)}: {_code(reason)}" for reason, names in titles.items())
    return "\n".join([f"- {check.replace('_', ' ')}", *reasons])


def _code(reason: str) -> str:
    return reason if "`" in reason else f"`{reason}`"
