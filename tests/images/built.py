"""Images built by a real builder, and programs run in them as a pod would run them.

``BASE`` and the other settings of `make images` are taken from the environment; ``DRAFTLINE_TEST_IMAGE_CPU`` and
``DRAFTLINE_TEST_IMAGE_SERVE`` name images that are there already. Needs buildah and root, and chroot from coreutils:
the user of the image gets a root file system that is mounted read-only, and a /tmp.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.images.dockerfile import ROOT, read_dockerfile

_SHELL = """
set -eu
mount --rbind "$1" "$2"; mount -o remount,bind,ro "$2"
mount -t tmpfs -o mode=1777,size=1g tmp "$2/tmp"
mount --bind "$3" "$2/mnt"
mount -t proc proc "$2/proc"; mount --rbind /dev "$2/dev"
shift 3
exec chroot --userspec=10001:10001 "$ROOTFS" env -i $IMAGE_ENV "$@"
"""


class Image:
    """An image's file system and its variables."""

    def __init__(self, folder: Path, variables: list[str], mount_point: Path, shared: Path) -> None:
        self._folder, self._variables, self._mount_point, self.shared = folder, variables, mount_point, shared

    def run(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command as the image's user, on a read-only root with a fresh /tmp, and ``shared`` at /mnt."""
        arguments = ["unshare", "--mount", "--pid", "--fork", "bash", "-c", _SHELL, "image"]
        return subprocess.run(
            [*arguments, str(self._folder), str(self._mount_point), str(self.shared), *command],
            env={**os.environ, "ROOTFS": str(self._mount_point), "IMAGE_ENV": " ".join(self._variables)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def built_image(target: str, folders: pytest.TempPathFactory) -> Iterator[Image]:
    """The image of a target of the Dockerfile, mounted."""
    name = os.environ.get(f"DRAFTLINE_TEST_IMAGE_{target.upper()}", "")
    if not name:
        environment = {**os.environ, "BUILDER": "buildah", "REGISTRY": "localhost"}
        subprocess.run([ROOT / ".ci" / "images.sh", target], check=True, env=environment)
        name = f"localhost/{read_dockerfile()[1][target].labels['title']}:0.1.0"
    config = json.loads(_output("buildah", "inspect", "--type", "image", name))["OCIv1"]["config"]
    assert config["User"] == "10001:10001"
    container = _output("buildah", "from", "--pull-never", name)
    try:
        shared = folders.mktemp("shared")
        # pytest's folders are closed to other users.
        for folder in (shared, *shared.parents):
            if folder.owner() == shared.owner() and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o055)
        shared.chmod(0o777)
        yield Image(Path(_output("buildah", "mount", container)), config["Env"], folders.mktemp("root"), shared)
    finally:
        subprocess.run(["buildah", "rm", container], check=True, capture_output=True)
