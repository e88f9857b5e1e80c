"""Sealed secrets: who can open them, and the setting SEALING_KEYS."""

from __future__ import annotations

import base64

import pytest
from pydantic import SecretStr

from app.cli.keys import keys as keys_command
from app.domain.errors import InvalidRequest, Unsealable
from app.identity.sealing import Sealing
from app.settings import Settings, SettingsError, get_settings

OLD, NEW = (SecretStr(base64.b64encode(32 * byte).decode()) for byte in (b"o", b"n"))  # fixed: in names of tests
SECRETS = {"authorization": "Bearer tökén", "headers": {"x": ["1", None]}}
TURN, OTHER_TURN = "0b0e", "0b0f"


def test_what_was_sealed_is_opened_and_not_to_be_read() -> None:
    sealing = Sealing([OLD])
    sealed = sealing.seal(SECRETS, TURN)
    assert sealing.open(sealed, TURN) == SECRETS
    assert b"Bearer" not in sealed
    assert b"headers" not in sealed


def test_each_sealing_of_the_same_is_another() -> None:
    sealing = Sealing([OLD])
    assert len({sealing.seal(SECRETS, TURN) for _ in range(20)}) == 20


def test_another_key_does_not_open_it_and_the_error_names_the_setting() -> None:
    sealed = Sealing([OLD]).seal(SECRETS, TURN)
    for keys in ([], [NEW]):
        with pytest.raises(Unsealable, match="SEALING_KEYS"):
            Sealing(keys).open(sealed, TURN)


def test_moved_to_another_turn_it_does_not_open() -> None:
    sealing = Sealing([OLD])
    with pytest.raises(Unsealable):
        sealing.open(sealing.seal(SECRETS, TURN), OTHER_TURN)


def test_changed_anywhere_or_cut_off_it_does_not_open() -> None:
    sealing = Sealing([OLD])
    sealed = sealing.seal({}, TURN)
    changed = [sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1 :] for i in range(len(sealed))]
    for wrong in [*changed, *(sealed[:i] for i in range(len(sealed))), sealed + b"0"]:
        with pytest.raises(Unsealable):
            sealing.open(wrong, TURN)


def test_the_first_key_seals_and_all_open() -> None:
    before, between, after = Sealing([OLD]), Sealing([NEW, OLD]), Sealing([NEW])
    assert between.open(before.seal(SECRETS, TURN), TURN) == SECRETS
    assert after.open(between.seal(SECRETS, TURN), TURN) == SECRETS
    with pytest.raises(Unsealable):
        before.open(between.seal(SECRETS, TURN), TURN)


def test_without_a_key_secrets_are_refused_and_told_how_to_make_one() -> None:
    with pytest.raises(InvalidRequest, match=r"SEALING_KEYS is not set.*caravan keys --sealing"):
        Sealing([]).seal(SECRETS, TURN)


def test_keys_are_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.cli.settings import _present

    keys = [OLD.get_secret_value(), NEW.get_secret_value()]
    settings = Settings(_env_file=None, database_url="postgresql://x/y", sealing_keys=",".join(keys))
    assert [key.get_secret_value() for key in settings.sealing_keys] == keys
    monkeypatch.setattr("app.settings.get_settings", lambda: settings)
    shown = f"{settings!r}{settings}{settings.model_dump()}{_present()}{vars(Sealing(settings.sealing_keys))}"
    assert "SEALING_KEYS = ***" in shown
    assert all(key not in shown for key in keys)


def test_the_command_makes_a_new_key_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        keys_command(sealing=True)
    made = capsys.readouterr().out.split()
    assert made[0] != made[1]
    settings = Settings(_env_file=None, database_url="postgresql://x/y", sealing_keys=",".join(made))
    Sealing(settings.sealing_keys[1:]).open(Sealing(reversed(settings.sealing_keys)).seal(SECRETS, TURN), TURN)


KEY = NEW.get_secret_value()


@pytest.mark.parametrize("wrong", ["x", "c2hvcnQ=", f"{KEY}0", KEY[:-1], KEY[:-4], f"{KEY};{KEY}", "ö" * 44])
def test_a_wrong_key_is_named_by_its_place_and_never_shown(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://x/y")
    monkeypatch.setenv("SEALING_KEYS", f"{OLD.get_secret_value()}, {wrong}")
    get_settings.cache_clear()
    with pytest.raises(SettingsError, match=r"^SEALING_KEYS must be base64 of 32 bytes .* entry 2 is not$") as raised:
        get_settings()
    assert OLD.get_secret_value() not in str(raised.value)
    assert f" {wrong}" not in str(raised.value)
