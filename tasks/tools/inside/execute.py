"""Runs the code that stands on standard input as a program, and shows the value of its last expression.

Its folder is the current one. What matplotlib shows is saved there (`caravan_figures`).
"""

from __future__ import annotations

import ast
import linecache
import os
import sys
import traceback
import types
from typing import Any

NAME = "<code>"
PACKAGES = "/opt/packages"


def main() -> None:
    code = sys.stdin.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path += [PACKAGES, os.path.dirname(__file__), os.getcwd()]
    sys.argv = [NAME]
    sys.exit(run(code))  # files that were not closed are written, and threads waited for, as for any program


def run(code: str) -> int:
    """Its exit status."""
    linecache.cache[NAME] = (len(code), None, code.splitlines(keepends=True), NAME)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        show(code, vars(module))
        figures: Any = sys.modules.get("caravan_figures")
        if figures is not None:
            figures.save_unseen()
    except SystemExit as exit:
        return status_of(exit)
    except BaseException as error:
        traceback.print_exception(without_ours(error))
        return 1
    return 0


def show(code: str, names: dict[str, Any]) -> None:
    tree = ast.parse(code, NAME)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NAME, "exec"), names)  # noqa: S102 — that is what it is for
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), NAME, "eval"), names)  # noqa: S307
        if value is not None:
            print(repr(value))


def status_of(exit: SystemExit) -> int:
    if exit.code is None or isinstance(exit.code, int):
        return (exit.code or 0) & 0xFF
    print(exit.code, file=sys.stderr)
    return 1


def without_ours(error: BaseException) -> BaseException:
    """Its traceback from the code's own frame on; of code that is no Python, none."""
    found = error.__traceback__
    while found is not None and found.tb_frame.f_code.co_filename in (__file__, ast.__file__):
        found = found.tb_next
    return error.with_traceback(found)


if __name__ == "__main__":
    main()
