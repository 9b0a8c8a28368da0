"""``python -m virnuc_dask``, which is also the program ``virnuc-dask``."""

# Python's `signal` takes milliseconds to import, in which Ctrl-C would be a traceback.
import _signal  # type: ignore[import-not-found]


def main() -> None:
    """Run the command line, whatever becomes of its output, and whenever it is interrupted."""
    before = _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from virnuc_dask.cli.interrupts import leave_at_interrupt

    leave_at_interrupt()
    _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
    import os
    import sys

    # Processes that this one starts look for modules in the working directory no more than it does.
    os.environ["PYTHONSAFEPATH"] = "1"
    from virnuc_dask.standard_streams import lost_output, protect

    protect()
    from virnuc_dask.cli.main import main as command

    try:
        command()
    finally:
        if reason := lost_output():
            print(f"standard output: {reason}; some of it is lost", file=sys.stderr)


if __name__ == "__main__":
    main()
