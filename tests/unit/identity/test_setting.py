"""The setting API_KEYS."""

from __future__ import annotations

import pytest

from app.identity.keys import entry
from app.settings import Settings, SettingsError, get_settings

KEY = "caravan_" + "k" * 43  # a fixed one: it is part of the names of tests
GOOD = entry("alice", KEY)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://x/y")
    get_settings.cache_clear()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("", []),
        (GOOD, [GOOD]),
        (f" {GOOD} , {entry('bob@example.org', KEY)},", [GOOD, entry("bob@example.org", KEY)]),
    ],
)
def test_entries_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch, value: str, found: list[str]) -> None:
    monkeypatch.setenv("API_KEYS", value)
    assert Settings(_env_file=None).api_keys == found


@pytest.mark.parametrize(
    "wrong",
    [
        KEY,
        f"alice:{KEY}",
        f"{GOOD},bob:{KEY}",
        GOOD.upper(),
        f"{GOOD}0",
        f"a b:{'0' * 64}",
        f"it's:{'0' * 64}",
        f":{'0' * 64}",
        f"-a:{'0' * 64}",
        f"{GOOD};{GOOD}",
    ],
)
def test_a_wrong_entry_is_named_by_its_place_and_never_shown(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("API_KEYS", wrong)
    with pytest.raises(SettingsError, match=r"^API_KEYS must be name:sha256 .* entry [12] is none$") as raised:
        get_settings()
    assert "\n" not in str(raised.value)
    assert KEY not in str(raised.value)
    assert "0000" not in str(raised.value)
