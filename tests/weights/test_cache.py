"""The hub's cache on a bad day: a download that breaks off, a full disk, a folder that cannot be written to."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
from hub import COMMIT, Hub, ask

from weights.source import _reason

SHARD = "model-00001-of-00001.safetensors"
INDEX = json.dumps({"weight_map": {"thinker.a": SHARD}}).encode()
FILES = {"config.json": b"{}", "vocab.json": b"{}", "model.safetensors.index.json": INDEX, SHARD: os.urandom(300_000)}
REPOSITORIES = {"acme/omni": FILES}
OMNI = ("acme/omni", None)


def mounted(script: str, folder: Path) -> tuple[str, ...]:
    """What starts a process in a name space of its own, after `script` mounted something over the folder $0."""
    command = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", script, str(folder))
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs Linux with user name spaces")
    return command


def is_whole(folder: str) -> bool:
    return all((Path(folder) / name).read_bytes() == content for name, content in FILES.items())


def test_a_download_that_breaks_off_is_never_taken_for_whole(tmp_path: Path) -> None:
    """Protects: half a file is an error now and offline, and the next run fetches what is missing."""
    cache = tmp_path / "cache"
    hub = Hub(REPOSITORIES, cut=frozenset({SHARD}))
    (broken,) = ask(cache, hub.address, OMNI)
    hub.close()
    assert broken.startswith("CheckpointError: acme/omni could not be fetched, try again")
    assert not [path for path in cache.rglob(SHARD) if path.exists()]
    (offline,) = ask(cache, hub.address, OMNI, HF_HUB_OFFLINE="1")
    assert offline.startswith("CheckpointError: acme/omni is not wholly in the hub's cache")
    hub = Hub(REPOSITORIES)
    (folder,) = ask(cache, hub.address, OMNI)
    hub.close()
    assert is_whole(folder)


def test_a_full_disk_is_said_and_the_next_run_goes_on(tmp_path: Path) -> None:
    """Protects: no room is one sentence that says where; with room again the same cache is completed."""
    cache = tmp_path / "cache"
    cache.mkdir()
    script = 'mount -t tmpfs -o size=200k none "$0"; "$@"; mount -o remount,size=9m "$0"; "$@"'
    hub = Hub(REPOSITORIES)
    full, folder = ask(cache, hub.address, OMNI, within=mounted(script, cache))
    hub.close()
    assert full == (
        f"CheckpointError: acme/omni could not be fetched: the disk of the hub's cache in {cache} is full. Make room "
        "there, or set HF_HUB_CACHE to another."
    )
    assert folder == str(cache / "models--acme--omni" / "snapshots" / COMMIT)


def test_a_cache_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Protects: what is in it is taken, with and without the hub; what is not is one sentence."""
    cache = tmp_path / "cache"
    cache.mkdir()
    read_only = 'mount --bind "$0" "$0"; mount -o remount,ro,bind "$0"; exec "$@"'
    hub = Hub(REPOSITORIES)
    (refused,) = ask(cache, hub.address, OMNI, within=mounted(read_only, cache))
    assert refused == (
        f"CheckpointError: acme/omni could not be fetched: the hub's cache in {cache} cannot be written to. Set "
        "HF_HUB_CACHE to a folder that can."
    )
    (folder,) = ask(cache, hub.address, OMNI)
    assert is_whole(folder)
    assert ask(cache, hub.address, OMNI, within=mounted(read_only, cache)) == [folder]
    hub.close()
    assert ask(cache, hub.address, OMNI, within=mounted(read_only, cache)) == [folder]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "is full. Make room there, or set HF_HUB_CACHE to another"),
        (errno.EDQUOT, "is full. Make room there, or set HF_HUB_CACHE to another"),
        (errno.EROFS, "cannot be written to. Set HF_HUB_CACHE to a folder that can"),
        (errno.EACCES, "cannot be written to. Set HF_HUB_CACHE to a folder that can"),
    ],
)
def test_the_disks_refusals_say_what_to_do(code: int, says: str) -> None:
    """Protects: the same where there are no name spaces to try it in."""
    assert _reason(OSError(code, os.strerror(code)), None).endswith(says)
