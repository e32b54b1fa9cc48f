"""What becomes of a process when another one died: it says so and ends, since what they computed together is lost.

A collective fails in the survivors, or waits until JAX's coordination service misses the heartbeats of the dead and
ends everybody by SIGABRT. Either way a process ends here with the exit code `PEER_LOST`, so that whoever started it
knows that nothing is wrong with it.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

PEER_LOST = 76
"""Exit code of a process whose run lost another one."""
GRACE = 10.0
"""Seconds in which the others may end the same way, when this process ends by an error of its own."""

# What a collective, or whatever else asks the others, says when one of them does not answer: XLA's status, in an
# exception of any type, and a reason that only others can give.
_LOST = re.compile(
    r"^(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): .*"
    r"(gloo|nccl|connection|socket|broken pipe|coordination|heartbeat|barrier|peer)",
    re.IGNORECASE | re.DOTALL,
)
_WHAT_TO_DO = "Start all processes again with --resume auto: they go on from the last checkpoint."


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Ends this process when another one died inside of the block, or when the block fails; `SystemExit` passes."""
    handler = _on_abort()
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        traceback.print_exc()
        if lost := _lost(error):
            _say(f"{_where(traceback.extract_tb(lost.__traceback__))}: {str(lost).splitlines()[0]}")
            _leave(PEER_LOST)
        _end(error)
    finally:
        del handler


def _lost(error: BaseException | None) -> BaseException | None:
    """The failure of a collective, or another talk with the others, behind an error; None when there is none."""
    while error is not None and not _LOST.search(str(error)):
        error = error.__cause__ or error.__context__
    return error


def _end(error: BaseException) -> None:
    """Ends by an error of this process: with the others if they do, too, or else before them, so that they notice."""
    together = threading.Thread(target=jax.distributed.shutdown, daemon=True)  # waits for all
    together.start()
    together.join(GRACE)
    _leave(130 if isinstance(error, KeyboardInterrupt) else 1)


def _leave(code: int) -> None:
    """Ends at once: whatever would be done on the way out may wait for the dead."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _on_abort() -> object:
    """Makes SIGABRT by the coordination service an exit with `PEER_LOST`; returns what must be kept alive.

    It comes from a thread of the service, in which Python's own handlers never run, and the process is gone when a
    handler has returned: hence a handler in C. Any other SIGABRT ends the process as it always does.
    """

    def handle(number: int) -> None:
        del number
        asked = threading.Thread(target=_ask, args=(answers := [],), daemon=True)
        asked.start()
        asked.join(3.0)
        if answers:
            return  # the service is well
        stack = sys._current_frames()[threading.main_thread().ident or 0]
        _say(f"{_where(traceback.extract_stack(stack))}: the coordination service lost a process, see above")
        os._exit(PEER_LOST)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    return handler


def _ask(answers: list[str]) -> None:
    """Asks the coordination service for something: it answers as long as it has found nobody dead."""
    from jax._src import distributed

    try:
        client: Any = distributed.global_state.client
        client.key_value_try_get("alignax/anything")
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            time.sleep(60)
    answers.append("well")


def _where(frames: traceback.StackSummary) -> str:
    """The innermost line of the scripts or the library in a stack."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    own = [frame for frame in frames if frame.filename.startswith(here) and frame.filename != __file__] or frames
    return f"{os.path.basename(own[-1].filename)} line {own[-1].lineno}, `{own[-1].line}`"


def _say(what: str) -> None:
    number, count = jax.process_index(), jax.process_count()
    text = f"\nprocess {number} of {count}: another process died, in {what}\n{_WHAT_TO_DO} Exit code {PEER_LOST}.\n"
    os.write(2, text.encode())
