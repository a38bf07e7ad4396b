"""JSON files: written whole or not at all, read with every error named."""

import json
import os
from pathlib import Path

import pytest
from hub_server import TOKEN

from increlora_hf import AdapterFormatError
from increlora_hf.documents import check_format, parsed_json, read_json_object, without_tokens, write_json


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    document = {"r": 2, "λ": [0.5, None], "name": "encoder.layer.0"}
    write_json(tmp_path / "a.json", document)
    assert read_json_object(tmp_path / "a.json") == document


def test_what_json_cannot_hold_is_written_by_default(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"folder": Path("x")}, default=str)
    assert read_json_object(tmp_path / "a.json") == {"folder": "x"}


@pytest.mark.parametrize("fails", ["dumps", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("no space left")

    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr(*{"dumps": (json, "dumps"), "fsync": (os, "fsync"), "replace": (Path, "replace")}[fails], fail)
    with pytest.raises(OSError, match="no space left"):
        write_json(path, {"new": 2}, durable=True)
    assert read_json_object(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_durable_file_is_on_disk_before_it_replaces_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(sorted(p.name for p in tmp_path.iterdir())))
    write_json(tmp_path / "a.json", {})
    assert flushed == []
    write_json(tmp_path / "a.json", {}, durable=True)
    assert flushed == [["a.json", "a.json.tmp"]]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "file: expected a JSON file, found nothing"),
        (b"{", "content: expected JSON, found Expecting"),
        (b"\xff", "content: expected JSON, found 'utf-8' codec"),
        (b"[" * 100_000, "content: expected JSON, found"),
        (b"[1]", "content: expected an object, found a list"),
        (b'{"a": NaN}', "content: expected JSON, found the constant NaN"),
    ],
    ids=["missing", "broken", "not UTF-8", "too deep", "a list", "NaN"],
)
def test_what_is_no_json_object_is_refused_by_name(tmp_path: Path, text: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(AdapterFormatError, match=message):
        read_json_object(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1,\n 2", r"here, line 2, column 3: not valid JSON \(Expecting ',' delimiter\)\. Correct it"),
        ("[" * 100_000, r"here: not valid JSON \(it is nested too deeply\)"),
        ('{"a": {"b": 1, "b": 2}}', r"here: not valid JSON \(the key 'b' stands twice\)"),
        ("9" * 5000, r"here: not valid JSON \(Exceeds the limit"),
        (r'["\ud800"]', r"here: not valid JSON \('utf-8' codec can't encode"),
        (b'"\xff"', r"here: not valid JSON \('utf-8' codec can't decode"),
    ],
    ids=["broken", "too deep", "a key twice", "a long number", "half a character", "not UTF-8"],
)
def test_a_text_that_is_not_json_is_refused_with_the_place(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed_json(text, "here")
    with pytest.raises(ValueError, match=r"^here, line 7.* Look there\.$"):
        parsed_json(text, "here", line=7, remedy="Look there.")


def test_a_text_of_json_is_read_as_json_reads_it() -> None:
    text = '{"a": ["\\ud83d\\ude00", "\\\\ud800", 1.5, null], "λ": {"a": 1}}'
    assert parsed_json(text, "here") == parsed_json(b"\xef\xbb\xbf" + text.encode(), "here") == json.loads(text)


def test_infinity_is_read_where_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"loss": Infinity}')
    assert read_json_object(tmp_path / "a.json", strict=False) == {"loss": float("inf")}


@pytest.mark.parametrize("version", [None, 0, 3, True, "1", 1.0])
def test_a_format_of_later_versions_or_none_is_refused(tmp_path: Path, version: object) -> None:
    check_format(tmp_path, {"format_version": 2}, supported=2)
    with pytest.raises(AdapterFormatError, match="format_version: expected 1 to 2, found"):
        check_format(tmp_path, {"format_version": version}, supported=2)


@pytest.mark.parametrize(
    "name",
    ["token", "HF_TOKEN", "api_key", "X-API-Key", "apiKey", "password", "Authorization", "auth", "client_secret"],
)
def test_what_a_secret_name_holds_is_masked(name: str) -> None:
    for value in ("abc", ["abc"], ("abc",), {"abc"}, b"abc"):
        assert "abc" not in json.dumps(without_tokens({"outer": {name: value}}), default=str)


@pytest.mark.parametrize("value", [TOKEN, [TOKEN], {TOKEN}, TOKEN.encode(), Path(TOKEN), "https://user:pw@host/x"])
def test_a_value_of_the_form_of_a_secret_is_masked(value: object) -> None:
    text = json.dumps(without_tokens({"proxies": {"https": value}}), default=str)
    assert text == '{"proxies": {"https": ' + ('["<HTTPS>"]}}' if isinstance(value, list) else '"<HTTPS>"}}')


def test_other_values_are_as_they_were() -> None:
    plain = {"max_new_tokens": 20, "tokenizer": "a", "num_tokens_seen": "no", "author": "b", "url": "https://host/a@b"}
    assert without_tokens({**plain, "token": None, "average_tokens": True}) == {
        **plain,
        "token": None,
        "average_tokens": True,
    }
