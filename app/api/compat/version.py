"""Which version of a Llama Stack SDK asks."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Python SDKs send the first. npm's do not, but the second, as every SDK that Stainless generates does: openai's too,
# whose numbers are all above Llama Stack's.
_HEADERS = ("x-llamastack-client-version", "x-stainless-package-version")
_VERSION = re.compile(r"v?(\d{1,6})\.(\d{1,6})")


def client_version(headers: Mapping[str, str]) -> tuple[int, int] | None:
    """Major and minor version of the client's SDK; None if it does not say, or says what is no version."""
    for name in _HEADERS:
        if found := _VERSION.match(headers.get(name, "")):
            return int(found[1]), int(found[2])
    return None


def is_llama_stack(headers: Mapping[str, str]) -> bool:
    """Whether a llama-stack-client asks: Python's send their version, npm's name themselves.

    In a browser, minified, or derived from, npm's do not: by their version, since openai's for JavaScript are above 1.
    """
    if "x-llamastack-client-version" in headers or _named(headers, "llamastack"):
        return True
    version = client_version(headers)
    return headers.get("x-stainless-lang") == "js" and version is not None and version < (1, 0)


def is_ogx(headers: Mapping[str, str]) -> bool:
    """Whether an ogx-client asks, llama-stack-client's successor."""
    return "x-ogx-client-version" in headers or _named(headers, "ogx")


def _named(headers: Mapping[str, str], name: str) -> bool:
    return headers.get("user-agent", "").removeprefix("Async").lower().startswith(name)
