"""Shared by train.py, eval.py and the other command lines: flags, and errors in one line."""

import contextlib
import errno
import logging as python_logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from skyformer_jax.errors import UserError, missing_package
from skyformer_jax.files import expand
from skyformer_jax.shipped import find_config, make_configs_importable

# Failures of the machine, not of the program: the user can fix them.
_MACHINE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT),  # of shared file systems
    *(errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
)


def _open_standard_streams() -> None:
    """Opens the null device for standard streams that the process was started without.

    Otherwise the next file that is opened would get the descriptor of such a stream, and with it
    everything that libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # os.open returns the lowest free number, which is this one. Child processes inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _nobody_reads() -> bool:
    """Returns True if standard output is a pipe whose reader has ended."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are reported without being asked for
    return bool(poll.poll(0))


def _fail(text: str, status: int = 2) -> NoReturn:
    """Prints one line and ends the process at once.

    Files of this package are closed by now. On a full disk, threads and exit handlers of libraries
    would add tracebacks to the line.
    """
    for stream, line in ((sys.stdout, ""), (sys.stderr, f"error: {' '.join(text.split())}\n")):
        with contextlib.suppress(OSError):
            stream.write(line)
            stream.flush()
    os._exit(status)


def parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Parses a command line with absl, including the config file and its overrides.

    Args:
      values: the flags to parse into.
      argv: the command line, beginning with the program's name. A ~ at the beginning of a flag's
        value is replaced by the home folder, because shells leave it alone after =. A config file
        that does not exist is looked up among those that come with the package.

    Raises:
      UserError: with one line that says what is wrong.
    """
    make_configs_importable()
    try:
        rest = values([argv[0], *map(_with_whole_path, argv[1:])])
    except UserError:
        raise
    except flags.Error as error:
        # A UserError of the config file itself comes as the last line of a traceback in the text.
        _, _, own = str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")
        raise UserError(own.strip() or str(error)) from None
    except ModuleNotFoundError as error:
        where = {
            "configs": "is none of the package's configs",
            "experiments": "lies in the clone: put that into PYTHONPATH",
        }.get((error.name or "").partition(".")[0], "is not installed")
        raise UserError(f"the config file imports {error.name}, which {where}") from None
    except (AttributeError, KeyError) as error:
        reason = error.args[0]
        if isinstance(reason, KeyError):  # ml_collections wraps one in another
            reason = reason.args[0]
        raise UserError(f"no such config field: {' '.join(str(reason).split())}") from None
    except (OSError, TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value")


def _with_whole_path(argument: str) -> str:
    """Expands ~ in an argument (only paths begin with ~), or finds a shipped config."""
    name, equals, value = argument.partition("=")
    if argument.startswith("~"):
        return str(expand(argument))
    if equals and value.startswith("~"):
        return f"{name}={expand(value)}"
    return f"{name}={find_config(value)}" if name.lstrip("-") == "config" else argument


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        parse(flags.FLAGS, argv)
    except UserError as error:
        _fail(str(error))
    return [argv[0]]


def _without_late_arrays(report: Callable[[Any], None]) -> Callable[[Any], None]:
    """Returns a sys.unraisablehook that calls report for all errors except one kind.

    If an array of a checkpoint cannot be read or written, Orbax closes its event loop while
    TensorStore still works on other arrays. Each of these then prints a traceback beside the error
    that matters.
    """

    def hook(unraisable: Any) -> None:
        late = isinstance(unraisable.exc_value, RuntimeError) and unraisable.object is None
        if not late or str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    return hook


def run(main: Callable[[], None], module: str = "__main__") -> None:
    """Runs main() with parsed flags; on a UserError, prints one line and exits with status 2.

    Args:
      main: the program, called without arguments once the flags are parsed.
      module: name of the module whose docstring and flags --help shows.
    """

    def guarded(argv: Sequence[str]) -> None:
        del argv
        if not flags.FLAGS["verbosity"].present:
            # Orbax warns about routine work, and also logs the errors that it raises.
            logging.set_verbosity(logging.FATAL)
            python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
            sys.unraisablehook = _without_late_arrays(sys.unraisablehook)
        try:
            main()
            sys.stdout.flush()
        except KeyboardInterrupt:
            _fail("interrupted; start the same command to go on", status=130)
        except UserError as error:
            _fail(str(error))
        except ModuleNotFoundError as error:
            _fail(missing_package(error))
        except OSError as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                os._exit(128 + signal.SIGPIPE)  # as if SIGPIPE had ended the program
            if error.errno not in _MACHINE_ERRORS:
                raise
            _fail(f"{error.strerror}: {error.filename or 'while writing'}")

    _open_standard_streams()
    if module != "__main__":
        sys.modules["__main__"].__doc__ = sys.modules[module].__doc__
        for flag in flags.FLAGS.get_key_flags_for_module(module):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(guarded, flags_parser=_parse_flags)
