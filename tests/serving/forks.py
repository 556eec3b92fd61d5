"""Runs scripts, each in a fork of one process that has imported vLLM. Run by vLLM's own Python:

    python forks.py

Standard input: a line of JSON a script: {"script": path, "arguments": [text, …], "log": path}.
Standard output: a line of JSON a script, once it has ended: {"log": path, "status": exit status}. A negative status is
the signal that ended it. What it prints is in its log.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback

SECONDS = 1200  # what a script may take: as long as its test


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints where it likes
    import serve  # noqa: F401 - sets what vLLM reads when it is imported
    import vllm._C
    import vllm.entrypoints.llm
    import vllm.model_executor.models.llama
    import vllm.v1.worker.cpu_worker  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            become(**asked)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"log": asked["log"], "status": os.waitstatus_to_exitcode(status)}), file=replies, flush=True)


def become(script: str, arguments: list[str], log: str) -> None:
    """Run the script in this process, and end it."""
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.argv = [script, *arguments]
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of the parent's is to be closed here


if __name__ == "__main__":
    main()
