"""The command line: reads the words, calls the verb, and tells what went wrong in one line."""

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from stores import BlocksFailed
from unlearning.arguments import BAD_INPUT, check_options, make_parser
from unlearning.evaluation import plain
from unlearning.verbs import VERBS

FAILURE, INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: words after `dmm`; None: those of the process.

    Returns:
        0, 2 for bad input, 1 for a failure, 130 after Ctrl-C.

    Example:
        >>> main(["status", "--run", "nowhere"])
        2
    """
    options = make_parser().parse_args(arguments)
    warnings.showwarning = _warn  # type: ignore[assignment]
    try:
        check_options(options)
        told, text = VERBS[options.verb](options)
    except (ValueError, TypeError, ImportError) as error:
        return _fail(error, BAD_INPUT)
    except KeyboardInterrupt:
        # Of each read that was under way asyncio would tell that it is given up.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        return _fail("stopped; what is finished is kept, the same command resumes", INTERRUPTED)
    except (BlocksFailed, OSError, RuntimeError) as error:
        return _fail(error, FAILURE)
    print(json.dumps(plain(told), indent=2) if options.json else text)
    return 0


def _fail(error: object, code: int) -> int:
    line = " ".join(str(error).split())
    print(f"dmm: {line}", file=sys.stderr)
    return code


def _warn(message: Warning | str, *_: Any) -> None:
    print(f"dmm: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
