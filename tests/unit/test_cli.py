"""The command line as a person meets it: help, typos, missing things, exit codes, no tracebacks."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ledger.cli.contributions import read_rows, salted
from ledger.cli.demo import event_lines
from ledger.cli.demo_data import MIN_CONTRIBUTORS, from_file, standard_library
from ledger.cli.evaluation import read_answers
from ledger.cli.runs import settings_from
from ledger.client import Client, load_key
from ledger.config import load_settings
from ledger.domain.rows import decode_rows, encode_rows, rows_root
from ledger.errors import ConfigError, InvalidEvent, Unauthenticated, Unavailable

NOBODY = "http://127.0.0.1:9"
VECTOR = str(Path(__file__).parents[1] / "vectors/bundles/v1/answer.lineage.json")


def tributary(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "TRIBUTARY_HOME": str(home), "TRIBUTARY_API": NOBODY}
    return subprocess.run(
        [sys.executable, "-m", "ledger.cli.main", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "Whose data made this model"),
        (["datanet", "--help"], 0, "Gather, license and review data"),
        (["datanets"], 2, "No such command"),
        (["verify", "no-such-file.json"], 4, "no-such-file.json"),
        (["verify", VECTOR, "--key", "typo"], 2, "argument --key: a verifier key has the form"),
        (["verify", VECTOR, "--witness", "typo"], 2, "argument --witness:"),
        (["evidence", "check", VECTOR, "--key", "typo"], 8, "--key: a verifier key has the form"),
        (["log", "import", "no-such-folder"], 4, "no-such-folder is no folder"),
        (["verify", "--help"], 0, "Verify a lineage bundle offline"),
        (["datanet", "list"], 7, "did not answer"),
        (["identity", "register", "Ann", "--as", "../evil"], 8, "is no key name"),
        (["datanet", "create", "docs", "--as", "nobody"], 4, "tributary keys new nobody"),
        (["serve", "everything"], 8, "choose one of api"),
    ],
)
def test_what_a_person_types(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    done = tributary(tmp_path, *arguments)
    said = " ".join((done.stdout + done.stderr).split())
    assert words in said
    assert done.returncode == code
    assert "Traceback" not in said


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    made = tributary(tmp_path, "keys", "new", "ann")
    path = tmp_path / "keys" / "ann.key"
    assert made.stdout.strip().startswith("ed25519:")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_text()
    again = tributary(tmp_path, "keys", "new", "ann")
    assert again.returncode == 8
    assert "not overwritten" in again.stderr
    assert path.read_text() == before
    listed = json.loads(tributary(tmp_path, "keys", "list", "--json").stdout)
    assert [key["name"] for key in listed] == ["ann"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rows"),
        ('{"prompt": "a"}\n', "line 1 needs prompt and completion"),
        ('{"prompt": "a", "completion": "b"}\n{oops\n', "line 2 is not JSON"),
        ('{"prompt": "a", "completion": "  "}\n', "line 1"),
        ("[]\n", "line 1"),
    ],
)
def test_a_bad_rows_file_is_named_by_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidEvent, match=words):
        read_rows(path)


ODD = "a\u2028b\u2029c\x85d"
"""What `str.splitlines` takes for four lines, and JSON for one string."""


def test_only_a_newline_ends_a_line_of_rows(tmp_path: Path) -> None:
    row = json.dumps({"prompt": ODD, "completion": ODD}, ensure_ascii=False)
    assert len(row.splitlines()) == 7
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{row}\n\n{row}\r\n{row}".encode())
    assert read_rows(path) == [{"prompt": ODD, "completion": ODD}] * 3
    assert read_answers(path) == [(ODD, ODD)] * 3
    path.write_bytes(f"{row}\n{{oops\n".encode())
    with pytest.raises(InvalidEvent, match="line 2 is not JSON"):
        read_rows(path)


def test_only_a_newline_ends_a_line_of_events() -> None:
    stream = f"data: {ODD}\n\ndata: [DONE]\n\ncut".encode()
    for size in (1, 2, 3, 7, len(stream)):
        chunks = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert list(event_lines(chunks)) == [f"data: {ODD}", "", "data: [DONE]", ""]


def test_rows_are_salted_afresh_and_survive_the_blob(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c"}] * 3
    one, other = salted(rows), salted(rows)
    assert rows_root(one) != rows_root(other)
    assert decode_rows(encode_rows(one)) == one


def test_the_standard_library_is_enough_for_the_demo() -> None:
    rows = standard_library()
    assert len(rows) >= MIN_CONTRIBUTORS
    assert sum(map(len, rows.values())) >= 1_000
    assert standard_library() == rows
    completions = [row["completion"] for some in rows.values() for row in some]
    assert len(set(completions)) == len(completions)


def test_rows_that_name_nobody_are_dealt(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    line = '{"prompt": "p%d", "completion": "c%d"}\n'
    path.write_text("".join(line % (n, n) for n in range(240)))
    assert len(from_file(path)) >= MIN_CONTRIBUTORS
    path.write_text("".join(line % (n, n) for n in range(40)))
    with pytest.raises(InvalidEvent, match="the demo needs"):
        from_file(path)


def test_training_settings_from_words() -> None:
    assert settings_from(["r=8", "lr=0.001", "target_modules=q_proj,v_proj"]) == {
        "r": 8, "lr": "0.001", "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    with pytest.raises(InvalidEvent, match="KEY=VALUE"):
        settings_from(["r"])


def test_settings_name_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIBUTARY_PORT", "99999")
    with pytest.raises(ConfigError, match=r"setting .*PORT|setting port"):
        load_settings()


def test_settings_travel_to_a_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = load_settings(home=tmp_path, port=1234, database_url="postgresql://x", dev_chain=True)
    for name, value in ours.environment().items():
        monkeypatch.setenv(name, value)
    theirs = load_settings()
    assert theirs == ours


def test_a_bad_key_file_is_a_designed_error(tmp_path: Path) -> None:
    path = tmp_path / "x.key"
    with pytest.raises(ConfigError, match="cannot read"):
        load_key(path)
    path.write_text("not hex")
    with pytest.raises(ConfigError, match="64 hex digits"):
        load_key(path)


def test_a_client_without_key_or_server_says_so() -> None:
    with Client(NOBODY) as client:
        with pytest.raises(Unavailable, match="did not answer"):
            client.get("/v1/info")
        with pytest.raises(Unauthenticated, match="keys new"):
            _ = client.actor
