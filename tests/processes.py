"""Python in a process of its own that has PyTorch already: importing it takes longer than most of what tests ask."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from subprocess import CalledProcessError, CompletedProcess

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch"])


def python(
    *words: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    check: bool = False,
    timeout: float = 300,
) -> CompletedProcess[str]:
    """`python *words`, whether these begin with -c, -m or a script: forked from a process that has imported torch but
    nothing of ours or the hub's, so that these read `env`. What torch reads of it, and who wants to see imports, needs
    `subprocess`."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("out", "err")]
        arguments = ([str(word) for word in words], dict(os.environ if env is None else env), cwd, said)
        process = SERVER.Process(target=_run, args=arguments)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode is not None
        out, err = (path.read_text() for path in said)
        if check and process.exitcode:
            print(err)
            raise CalledProcessError(process.exitcode, words, out, err)
        return CompletedProcess(words, process.exitcode, out, err)


def _run(words: list[str], env: dict[str, str], cwd: Path, said: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent.absolute()))
        runpy.run_path(words[0], run_name="__main__")
