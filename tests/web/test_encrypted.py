"""The page over TLS: with a certificate that the tests make by the program openssl."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Callable
from http.client import HTTPSConnection
from pathlib import Path

import pytest
from support import machine, web

web.require("gradio")
if shutil.which("openssl") is None:
    pytest.skip("these tests need the program openssl", allow_module_level=True)

from pyglow_fast.cli import main  # noqa: E402
from pyglow_fast.web import server  # noqa: E402
from pyglow_fast.web.server import check_certificate  # noqa: E402

WANTED = "^certificate: expected the file of a certificate and that of its key, in PEM format and without a password"


def make(folder: Path) -> None:
    """Writes a certificate of this machine, its key, both in one file, the key with a password, and another key."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)

    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=page", "-addext", "subjectAltName=IP:127.0.0.1"]
    openssl("req", "-x509", *curve, "-keyout", "key.pem", "-out", "cert.pem", "-days", "2", *names)
    openssl("req", "-x509", *curve, "-keyout", "other.pem", "-out", "unused.pem", "-days", "2", *names)
    openssl("ec", "-in", "key.pem", "-aes128", "-passout", "pass:secret", "-out", "locked.pem")
    (folder / "both.pem").write_bytes((folder / "cert.pem").read_bytes() + (folder / "key.pem").read_bytes())
    (folder / "text.pem").write_text("no certificate")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what :func:`make` wrote."""
    return machine.made_once(tmp_path_factory, "certificates", make)


@pytest.fixture
def named(files: Path) -> Callable[[str | None], str | None]:
    """The path of one of them; None of None."""
    return lambda name: None if name is None else str(files / name)


@pytest.mark.parametrize(("certificate", "key"), [("cert.pem", "key.pem"), ("both.pem", None), (None, None)])
def test_a_certificate_and_its_key_may_be_two_files_or_one(
    certificate: str | None, key: str | None, named: Callable[[str | None], str | None]
) -> None:
    check_certificate(named(certificate), named(key))


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        (None, "key.pem", "^certificate: expected the certificate of the key, found none$"),
        ("none.pem", "key.pem", "^certificate: expected a file in PEM format, found '.*none.pem', which is none$"),
        ("cert.pem", "none.pem", "^key: expected a file in PEM format, found '.*none.pem', which is none$"),
        ("cert.pem", ".", "^key: expected a file in PEM format, found '.*', which is none$"),
        ("cert.pem", "other.pem", f"{WANTED}, found key values mismatch$"),
        ("cert.pem", None, f"{WANTED}, found .+$"),
        ("text.pem", "key.pem", f"{WANTED}, found .+$"),
        ("key.pem", "cert.pem", f"{WANTED}, found .+$"),
        ("cert.pem", "locked.pem", f"{WANTED}, found .+$"),
    ],
)
def test_what_is_none_is_refused_before_anything_is_served(
    certificate: str | None, key: str | None, message: str, named: Callable[[str | None], str | None]
) -> None:
    """In a sentence; a key with a password is not asked about on the terminal."""
    with pytest.raises(ValueError, match=message):
        check_certificate(named(certificate), named(key))
    with pytest.raises(ValueError, match=message):
        server.serve(lambda: pytest.fail("built"), certificate=named(certificate), key=named(key))


def test_the_command_refuses_it_too(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").touch()
    assert main(["serve", str(tmp_path), "--certificate", str(files / "text.pem"), "--no-browser"]) == 2
    assert capsys.readouterr().err.startswith("error: certificate: expected the file of a certificate")


@pytest.mark.full
def test_the_page_is_encrypted(files: Path, tmp_path: Path) -> None:
    """And its login cookies are sent by a browser in no other way."""
    options = {"certificate": str(files / "cert.pem"), "key": str(files / "key.pem")}
    with web.small_server(tmp_path, auth=["ada", "pass"], **options) as running:
        assert running.address.startswith("https://127.0.0.1:")
        name, _, port = running.host.rpartition(":")
        trusted = ssl.create_default_context(cafile=files / "cert.pem")
        connection = HTTPSConnection(name, int(port), timeout=web.WAIT, context=trusted)
        form = {"Content-Type": "application/x-www-form-urlencoded", "Origin": f"https://{running.host}"}
        connection.request("POST", "/login", "username=ada&password=pass", form)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"success":true}')
        cookies = [value for name, value in answer.getheaders() if name.lower() == "set-cookie"]
        assert ["; Secure" in cookie for cookie in cookies] == [True, True]
        connection.request("GET", "/config", headers={"Cookie": cookies[0].partition(";")[0]})
        answer = connection.getresponse()
        assert (answer.status, b"Double" in answer.read()) == (200, True)
        connection.close()
        untrusted = HTTPSConnection(name, int(port), timeout=web.WAIT, context=ssl.create_default_context())
        with pytest.raises(ssl.SSLCertVerificationError):
            untrusted.request("GET", "/")
        assert running.end() == 0
        assert running.log() == ""
