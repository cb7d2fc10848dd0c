"""Results go to a remote, and come back in a fresh clone: over SSH, and in an S3 bucket."""

from __future__ import annotations

import getpass
import importlib.util
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.states import ENV, make_project, make_results, run
from terraloom.operate.provenance import restore_state
from terraloom.operate.release import release
from terraloom.operate.versions import verify_state

pytestmark = pytest.mark.slow

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert process.poll() is None, "the server ended at once"
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the server does not answer")


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[list[list[str]]]:
    """Settings of a remote on an SSH server of this machine with a key of its own."""
    if SSHD is None:
        pytest.skip("no sshd here: apt-get install openssh-server")
    for module in ("dvc_ssh", "asyncssh"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'dvc[ssh]'")
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        run(keys, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name))
    (keys / "authorized_keys").write_text((keys / "user.pub").read_text())
    port = free_port()
    (keys / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {keys}/host\nPidFile {keys}/pid\n"
        f"AuthorizedKeysFile {keys}/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nPasswordAuthentication no\nSubsystem sftp internal-sftp\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(keys / "sshd_config")])
    try:
        wait_for(port, server)
        url = f"ssh://{getpass.getuser()}@127.0.0.1:{port}{tmp_path}/store"
        yield [["add", "-d", "store", url]]
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[list[list[str]]]:
    """Settings of a remote in a bucket of a server on this machine."""
    for module in ("dvc_s3", "moto", "flask"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'dvc[s3]' 'moto[server]'")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(port, server)
        address = f"http://127.0.0.1:{port}"
        request = urllib.request.Request(f"{address}/maps", method="PUT")
        urllib.request.urlopen(request, timeout=20).close()
        yield [["add", "-d", "store", "s3://maps/store"], ["modify", "store", "endpointurl", address]]
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.parametrize("kind", ["ssh", "s3"])
def test_push_clone_fetch_restore(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = request.getfixturevalue(kind)
    for key, value in (ENV | KEYS).items():
        monkeypatch.setenv(key, value)
    project = make_project(tmp_path / "project")
    for words in settings:
        run(project, "dvc", "remote", words[0], "-q", *words[1:])
    run(project, "git", "commit", "-qam", "remote")
    # Where the key lies is a matter of each machine: in the local settings, not in git.
    local = ["dvc", "remote", "modify", "--local", "-q", "store", "keyfile", f"{tmp_path}/keys/user"]
    if kind == "ssh":
        run(project, *local)
    make_results(project, seed=1)
    said = release("v1", project)
    assert "dvc push: store" in said, said
    assert "keys/user" not in run(project, "git", "grep", "-I", "-e", "keys", "v1", ok=False)
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "-q", str(project), str(clone))
    if kind == "ssh":
        run(clone, *local)
    run(clone, "dvc", "fetch", "-q", **KEYS)
    restore_state(clone)
    assert (clone / "results/model/net.txt").read_text() == "net 1\n"
    assert verify_state(clone)
    assert run(clone, "dvc", "status", "-q") == ""
