"""Real servers on loopback, without privileges: OpenSSH's sshd, the S3 API of OpenStack Swift, PostgreSQL."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

SBIN = f"{os.environ['PATH']}:/usr/sbin"  # where Debian puts sshd; not on a user's path
SWIFT = ("account", "container", "object", "proxy")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run `command` until the end of the block; the block starts once the server accepts connections on `port`."""
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as server:
        try:
            for _ in range(300):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert server.poll() is None, f"{command} ended:\n{log.read_text()}"
                time.sleep(0.1)
            else:
                raise AssertionError(f"{command} does not answer:\n{log.read_text()}")
            yield
        finally:
            server.terminate()


@contextmanager
def sshd(folder: Path) -> Iterator[tuple[str, Path]]:
    """An SSH server with its own keys; gives `user@host:port` and the file of the key that it accepts."""
    program = shutil.which("sshd", path=SBIN)
    assert program, "sshd is missing: apt-get install openssh-server"
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # needed for root only; created at boot, so not in a container
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    port = free_port()
    (folder / "sshd_config").write_text(
        f"""
        ListenAddress 127.0.0.1:{port}
        HostKey "{folder}/host"
        AuthorizedKeysFile "{folder}/user.pub"
        # the folder is a temporary one, which others may list
        StrictModes no
        PasswordAuthentication no
        UsePAM no
        PidFile none
        Subsystem sftp internal-sftp
        """
    )
    with serving([program, "-D", "-e", "-f", str(folder / "sshd_config")], port, folder / "sshd.log"):
        yield f"{getpass.getuser()}@127.0.0.1:{port}", folder / "user"


@contextmanager
def swift(folder: Path) -> Iterator[dict[str, str]]:
    """An object store of four servers on one disk. Gives the endpoint of its S3 API, an access key and the secret."""
    programs = Path(sys.executable).parent
    ports = {name: free_port() for name in SWIFT}
    (folder / "devices/disk").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = test\n")
    for name in SWIFT:
        lines = ["[DEFAULT]", f"bind_ip = 127.0.0.1\nbind_port = {ports[name]}", f"user = {getpass.getuser()}"]
        lines += ["workers = 0", f"swift_dir = {folder}", f"devices = {folder}/devices", "mount_check = false"]
        filters = {}
        if name == "proxy":
            filters = {"s3api": "allow_multipart_uploads = false", "tempauth": "user_test_tester = testing .admin"}
        else:
            for step in (
                ["create", "2", "1", "1"],  # 2^2 partitions, one copy of each
                ["add", f"r1z1-127.0.0.1:{ports[name]}/disk", "1"],
                ["rebalance"],
            ):
                builder = [programs / "swift-ring-builder", f"{name}.builder", *step]
                subprocess.run(builder, cwd=folder, check=True, capture_output=True)
        lines += ["[pipeline:main]", f"pipeline = {' '.join([*filters, f'{name}-server'])}"]
        lines += [f"[app:{name}-server]", f"use = egg:swift#{name}", "account_autocreate = true"]
        for part, setting in filters.items():
            lines += [f"[filter:{part}]", f"use = egg:swift#{part}", setting]
        (folder / f"{name}.conf").write_text("\n".join(lines))
    with ExitStack() as running:
        for name in SWIFT:
            command = [str(programs / f"swift-{name}-server"), str(folder / f"{name}.conf"), "--verbose"]
            running.enter_context(serving(command, ports[name], folder / f"{name}.log"))
        yield {"endpoint_url": f"http://127.0.0.1:{ports['proxy']}", "key": "test:tester", "secret": "testing"}


@contextmanager
def postgresql() -> Iterator[str]:
    """A PostgreSQL server with an empty database, in its own folder; gives its URL, as Optuna takes it."""
    where = ":".join([os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])
    initdb, server = shutil.which("initdb", path=where), shutil.which("postgres", path=where)
    assert initdb and server, "PostgreSQL is missing: apt-get install postgresql"
    # PostgreSQL refuses to run as root, as in a container: run it as the user that Debian's package made
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="ddpm-postgresql-", dir="/tmp") as folder:
        if user:
            shutil.chown(folder, "postgres")
        data, port = f"{folder}/data", free_port()
        subprocess.run(
            [*user, initdb, "-A", "trust", "-U", "me", "-D", data], cwd=folder, check=True, capture_output=True
        )
        options = ["-p", str(port), "-h", "127.0.0.1", "-k", folder, "-c", "fsync=off"]
        with (
            tempfile.TemporaryDirectory() as logs,
            serving([*user, server, "-D", data, *options], port, Path(logs, "log")),
        ):
            yield f"postgresql://me@127.0.0.1:{port}/postgres"
