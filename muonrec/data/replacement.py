"""Puts a finished data set in the place of the one before, and mends what runs that were killed left beside it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from upath import UPath

from muonrec.data.manifest import ITEMS, MANIFEST
from muonrec.data.places import names_in, publish, published

logger = logging.getLogger(__name__)

# In the names of the hidden siblings of a data set that is being replaced.
_PARTIAL, _PREVIOUS = ".partial-", ".previous-"


@contextlib.contextmanager
def replaced_folder(
    output: Path | UPath, *, scratch: Path | None = None, setting: str = "data.output", key_file: str = ITEMS
) -> Iterator[Path]:
    """Yield an empty folder here, whose files take the place of ``output`` if the block ends well and vanish if not.

    A sibling that is renamed; for an object store, a folder of ``scratch`` that is copied there, the manifest last.
    Killed at any moment, it leaves what `put_right` or the next run mends.

    Args:
        output: where the data set shall be.
        scratch: an existing folder, for object stores only; the system's temporary folder where not given.
        setting: that names ``output``, for the messages.
        key_file: what the manifest of every folder of this kind lists.

    Raises:
        ValueError: ``output`` holds files that no manifest lists, or another kind of data: replacing it would destroy
            somebody's work.
    """
    if not isinstance(output, Path):
        check_replaceable(output, setting, key_file)
        with tempfile.TemporaryDirectory(prefix="muonrec-data-", dir=scratch) as folder:
            yield Path(folder)
            publish(Path(folder), output, commit=MANIFEST)
        return
    check_replaceable(output, setting, key_file)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial, lock = _locked_sibling(output)
    try:
        yield partial
        # A folder cannot replace a full one in one step: between these renames there is no data set, never half of one.
        previous = partial.with_name(partial.name.replace(_PARTIAL, _PREVIOUS))
        if output.exists():
            os.rename(output, previous)
        os.rename(partial, output)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def put_right(output: Path | UPath) -> None:
    """Mend what runs that were killed left beside ``output``: bring back a data set, remove unfinished folders.

    Leftovers of a run that may still be alive, here or on another host, stay as they are.
    """
    if not isinstance(output, Path):
        return  # what a killed run leaves on an object store, the next one replaces
    dead = [folder for folder in sorted(output.parent.glob(f".{output.name}{_PARTIAL}*")) if _is_abandoned(folder)]
    for folder in dead:
        # Killed between the two renames: the new data set is complete, the one before it has been moved away.
        if not output.exists() and (folder / MANIFEST).is_file():
            logger.warning("%s was complete when its run was killed: it becomes %s", folder, output)
            os.rename(folder, output)
        else:
            logger.warning("%s was left by a run that was killed: removed", folder)
            shutil.rmtree(folder, ignore_errors=True)
    for folder in sorted(output.parent.glob(f".{output.name}{_PREVIOUS}*")):
        if folder.with_name(folder.name.replace(_PREVIOUS, _PARTIAL)).exists():
            continue  # its run is still at it
        if output.exists():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            logger.warning("%s was moved away by a run that was killed: it becomes %s again", folder, output)
            os.rename(folder, output)


def _locked_sibling(output: Path) -> tuple[Path, int]:
    """A new folder beside ``output``, and a lock on it that ends with this process, however that ends."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}{_PARTIAL}{platform.node()}-", dir=output.parent))
        lock = os.open(partial, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: its leftovers are for people to remove
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if partial.exists():  # else another run has just taken it for a leftover
            partial.chmod(0o755)
            return partial, lock
        os.close(lock)


def _is_abandoned(partial: Path) -> bool:
    """Whether the run that made ``partial`` is dead for certain: of this host, and its lock is gone."""
    if not partial.name.partition(_PARTIAL)[2].startswith(f"{platform.node()}-"):
        logger.warning("%s is of a run on another host: remove it unless that is running", partial)
        return False
    try:
        lock = os.open(partial, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.warning("%s belongs to a run that is writing the same output now", partial)
        return False
    except OSError:
        logger.warning("%s is left over from a run that was killed, unless one is running: remove it", partial)
        return False
    finally:
        os.close(lock)
    return True


def check_replaceable(output: Path | UPath, setting: str, key_file: str = ITEMS) -> None:
    """Refuse an ``output`` that is a file, or holds other files than its manifest lists or another kind of data.

    Raises:
        ValueError: names what was found, and ``setting``.
    """
    if not isinstance(output, Path):
        found, ours = names_in(output), published(output, commit=MANIFEST)
    elif not output.exists():
        return
    elif not output.is_dir():
        raise ValueError(f"output {output} is a file; pass a folder as {setting}")
    else:
        found, ours = sorted(path.name for path in output.iterdir()), set()
        if (output / MANIFEST).is_file():
            with contextlib.suppress(ValueError, AttributeError):
                ours = {MANIFEST, *json.loads((output / MANIFEST).read_text()).get("files", {})}
    if foreign := [name for name in found if name not in ours]:
        raise ValueError(
            f"output {output} holds {', '.join(foreign[:5])}, which no manifest of a data set lists; "
            f"pass another folder as {setting} or move them away"
        )
    listed = ours - {MANIFEST, f"{MANIFEST}.partial"}
    if listed and key_file not in listed:
        raise ValueError(
            f"output {output} holds other data ({', '.join(sorted(listed)[:5])}), and no {key_file} of before "
            f"that could be replaced; pass another folder as {setting}"
        )
