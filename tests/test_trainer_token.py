"""The token of trainers and servers: what a file of one must be, and who may see it."""

import pytest

from rlinvariant import trainer_token
from rlinvariant.errors import UserError

TOKEN = "0123456789abcdef" * 2


def written(path, content: str, mode: int = 0o600) -> str:
    path.write_text(content)
    path.chmod(mode)
    return str(path)


def test_a_token_is_shown_by_its_own_header_alone_and_by_no_text(tmp_path):
    token = trainer_token.read(written(tmp_path / "t", f"{TOKEN}\n"), "key=")
    assert token.header == {"Authorization": f"Bearer {TOKEN}"} and token.is_shown_by(f"bearer {TOKEN}")
    wrong = ("", "Bearer", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}0", f"Bearer {TOKEN[:-1]}", f"Bearer  {TOKEN}")
    assert not any(token.is_shown_by(x) for x in (*wrong, f"Bearer {TOKEN}\udc80"))
    assert TOKEN not in f"{token} {token!r} {[token]}"


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (TOKEN, 0o640, "mode 640: expected 600"),
        (TOKEN, 0o604, "mode 604: expected 600"),
        (TOKEN[:-1], 0o600, "expected one line of 32 characters or more"),
        ("", 0o600, "expected one line"),
        (f"{TOKEN}\n{TOKEN}", 0o600, "expected one line"),
        (f"{TOKEN} {TOKEN}", 0o600, "without spaces"),
    ],
)
def test_a_file_that_holds_no_secret_is_refused_in_one_line(content, mode, said, tmp_path):
    path = written(tmp_path / "t", content, mode)
    with pytest.raises(UserError, match=said) as caught:
        trainer_token.read(path, "--trainer-token-file ")
    assert str(caught.value).startswith(f"--trainer-token-file {path}: ") and "\n" not in str(caught.value)
    assert TOKEN[:-1] not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "none", tmp_path, tmp_path / "binary"):
        with pytest.raises(UserError, match="cannot be read"):
            trainer_token.read(str(path), "key=")
