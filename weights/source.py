"""Finding a checkpoint: a folder as it is, or what a thinker needs of a repository on the Hugging Face hub."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from weights.adapters import CONFIG_FILE, WEIGHTS_FILE
from weights.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointError,
    listed,
    listing_file,
    other_weights,
    read_names,
    read_weight_map,
)
from weights.names import read_layout

SHIPPED = Path(__file__).parent / "tiny"
SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    CONFIG_FILE,  # of what is an adapter and no checkpoint
    INDEX_FILE,
]


def locate(
    source: str | Path,
    *,
    revision: str | None = None,
    shards: bool = True,
    judge: Callable[[Path, Callable[[], Collection[str] | None]], None] | None = None,
) -> Path:
    """The folder of a checkpoint.

    source: "tiny", the checkpoint that is shipped with this package (a folder of that name is "./tiny"); or an existing
    folder, returned as it is; or a hub id `owner/name`, of which the files that are not in the hub's cache yet are
    fetched: configuration, tokenizer, index, and then the one file of all tensors, or the shards that hold some of the
    thinker (`shards`); never code, pickles or other parts of the model. revision: branch, tag or commit of a hub id.
    The hub library's environment variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, …) hold.
    judge: called before any shard is asked for, with the folder and what yields the names of all tensors, or None where
    the hub does not tell; what it raises is the end. How many bytes shards take is said on stderr before they come.
    Raises CheckpointError where the checkpoint cannot be found or fetched.
    """
    local = SHIPPED if source == SHIPPED.name else source
    if _is_folder(local):
        if revision is not None:
            raise CheckpointError(f"{source} is a local folder, which has no revision {revision!r}: leave it out.")
        folder = Path(local)
        _refuse_broken_links(folder)
        return folder
    source = str(source)
    folder = _fetch(source, revision, SMALL_FILES)
    _refuse_broken_links(folder)
    if not shards:
        return folder
    files = [SINGLE_FILE]
    if listing_file(folder) == INDEX_FILE:
        files = sorted(set(read_weight_map(folder, read_layout(folder).prefix).values()))
    if absent := _absent(folder, files):
        found = _listed(source, folder)
        if SINGLE_FILE in found:
            absent = files = [SINGLE_FILE]
        if judge is not None:
            judge(folder, lambda: _names(source, folder, files))
        many = f"{len(absent)} files" if len(absent) > 1 else absent[0]
        size = f", {sum(found[file] for file in absent) / 1e9:.2f} GB," if found.keys() >= set(absent) else ""
        print(f"fetching {many} of {source}{size} into {folder}", file=sys.stderr)
        # The commit that answered the first request, so that all files are of one version.
        _fetch(source, folder.name, absent)
        if absent := _absent(folder, files):
            others = other_weights(found.keys() - set(files))
            raise listed(
                f"{source} holds no weights, or they could not be fetched.{others} Absent from {folder}:", absent
            )
    return folder


def locate_adapter(source: str | Path) -> Path:
    """The folder of an adapter, which a hub id is fetched to. Raises CheckpointError."""
    folder = Path(source) if _is_folder(source) else _fetch(str(source), None, [CONFIG_FILE, WEIGHTS_FILE])
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{source} holds no adapter: {CONFIG_FILE} is not there.")
    return folder


def _is_folder(source: str | Path) -> bool:
    """Whether a source is an existing folder; if not, it is a hub id. Raises CheckpointError where it is neither."""
    try:
        if source != "" and Path(source).is_dir():  # Path("") is the working directory
            return True
    except (OSError, TypeError, ValueError):  # no name that a folder could have
        pass
    if not isinstance(source, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII):
        raise CheckpointError(f"{str(source)!r} is neither an existing folder nor a hub id (owner/name).")
    return False


def _refuse_broken_links(folder: Path) -> None:
    """Raises CheckpointError for a small file that is there by name alone: it would count as absent."""
    for file in SMALL_FILES:
        path = folder / file
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path} is a link that leads nowhere: fetch the file, or take the link away.")


def _names(repo_id: str, folder: Path, files: list[str]) -> Collection[str] | None:
    """All tensor names: from the index, or by the first bytes of the one file; None where they do not come."""
    if files != [SINGLE_FILE]:
        return read_names(folder)
    from huggingface_hub import HfApi

    try:
        return HfApi().parse_safetensors_file_metadata(repo_id, SINGLE_FILE, revision=folder.name).tensors.keys()
    except Exception:  # without it the file is fetched, and judged then
        return None


def _listed(repo_id: str, folder: Path) -> dict[str, int]:
    """The files of a repository and their bytes; none where the hub does not tell."""
    from huggingface_hub import HfApi

    try:
        entries = HfApi().list_repo_tree(repo_id, revision=folder.name)
        return {entry.path: getattr(entry, "size", 0) for entry in entries}  # folders have none
    except Exception:  # whatever is wrong will show in the fetch itself
        return {}


def _absent(folder: Path, files: list[str]) -> list[str]:
    return [file for file in files if not (folder / file).is_file()]


def _fetch(repo_id: str, revision: str | None, files: list[str]) -> Path:
    """The snapshot folder in the hub's cache, holding those of the files that the repository has."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except Exception as error:  # The library's HTTP client, and so what it raises, changes between versions.
        raise CheckpointError(f"{repo_id} {_reason(error, revision)}.") from error


def _reason(error: Exception, revision: str | None) -> str:
    """What went wrong at the hub and what to do about it."""
    from huggingface_hub import constants, errors

    cache = f"the hub's cache in {constants.HF_HUB_CACHE}"
    wanted = "the default revision" if revision is None else f"revision {revision!r}"
    # Where a commit is named, version 1 of the hub's library raises it as it is.
    offline = any(isinstance(each, errors.OfflineModeIsEnabled) for each in (error, error.__cause__))
    match error:
        case errors.HFValidationError():
            return "is neither an existing folder nor a valid hub id"
        case errors.GatedRepoError():
            return "is gated: ask for access on its page, then log in (`hf auth login`, or set HF_TOKEN)"
        case errors.RepositoryNotFoundError():
            return (
                "is neither an existing folder nor a repository that the hub shows you: check the spelling, "
                "and log in if it is private (`hf auth login`, or set HF_TOKEN)"
            )
        case errors.RevisionNotFoundError():
            return f"has no {wanted}: its page on the hub lists branches, tags and commits"
        case _ if offline:
            return f"is not wholly in the hub's cache ({wanted}) and HF_HUB_OFFLINE is set: unset it once to fetch it"
        case errors.LocalEntryNotFoundError():
            return f"is not wholly in the hub's cache ({wanted}) and the hub cannot be reached: check the network"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"could not be fetched: the disk of {cache} is full. Make room there, or set HF_HUB_CACHE to another"
        case OSError(errno=errno.EROFS | errno.EACCES | errno.EPERM):
            return f"could not be fetched: {cache} cannot be written to. Set HF_HUB_CACHE to a folder that can"
        case _:
            cause = (str(error).splitlines() or [""])[0]
            return f"could not be fetched, try again ({type(error).__name__}: {cause})"
