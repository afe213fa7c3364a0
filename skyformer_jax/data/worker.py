"""Worker process of parallel.ordered_map: python -m skyformer_jax.data.worker FD.

FD is the file descriptor of an inherited connection. The worker receives calls, (function,
arguments), and sends answers, (True, result) or (False, exception).
"""

import os
import pickle
import queue
import sys
import threading
import traceback
from multiprocessing.connection import Connection


def main(connection: Connection) -> None:
    """Answers calls until the other end closes, even because its process was killed."""
    calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, calls), daemon=True).start()
    while True:
        try:
            function, arguments = pickle.loads(calls.get())
            answer = pickle.dumps((True, function(*arguments)))
        except Exception as error:
            answer = pickle.dumps((False, _portable(error)))
        connection.send_bytes(answer)


def _portable(error: Exception) -> Exception:
    """Adds the traceback to an exception as a note; replaces one that cannot be pickled."""
    error.add_note(f"in a worker:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _receive(connection: Connection, calls: queue.SimpleQueue[bytes]) -> None:
    """Queues calls. When the connection closes, ends the process, even while it computes."""
    while True:
        try:
            calls.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
