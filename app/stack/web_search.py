"""Web search by Tavily, Brave or Bing: llama_stack's providers, which read the answers, with requests of our own.

Theirs go to fixed addresses, read whatever comes, have 5 s for everything and make a TLS context on the loop for each
search. Tavily gets its key in a header and not in the body, as its reference says today. What goes wrong is told in
words for the model and the user, without anything that the server said: that may be the key.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from functools import lru_cache
from typing import Any, ClassVar

import httpx
from llama_stack.apis.tools import ToolInvocationResult
from llama_stack.core.request_headers import NeedsRequestProviderData
from llama_stack.providers.remote.tool_runtime.bing_search import BingSearchToolConfig, BingSearchToolRuntimeImpl
from llama_stack.providers.remote.tool_runtime.brave_search import BraveSearchToolRuntimeImpl
from llama_stack.providers.remote.tool_runtime.brave_search.config import BraveSearchToolConfig
from llama_stack.providers.remote.tool_runtime.tavily_search import TavilySearchToolRuntimeImpl
from llama_stack.providers.remote.tool_runtime.tavily_search.config import TavilySearchToolConfig

from app.identity.secrets import HEADER, HIDDEN

TOOLGROUP = "builtin::websearch"
SECONDS = 60
MAX_BYTES = 8_388_608
"""Of an answer, unpacked."""


class TavilyConfig(TavilySearchToolConfig):
    url: str = "https://api.tavily.com"


class BraveConfig(BraveSearchToolConfig):
    url: str = "https://api.search.brave.com/res/v1"


class BingConfig(BingSearchToolConfig):
    url: str = "https://api.bing.microsoft.com/v7.0"


class WebSearch(NeedsRequestProviderData):
    """One search: its key, its request, its answer. `member` of the provider data, or `setting`, has the key."""

    name: ClassVar[str]
    setting: ClassVar[str]
    member: ClassVar[str]
    config: Any

    def request(self, key: str, query: str) -> httpx.Request:
        raise NotImplementedError

    def shown(self, answer: Any) -> str:
        raise NotImplementedError

    async def invoke_tool(self, tool_name: str, kwargs: dict[str, Any]) -> ToolInvocationResult:
        """Raises ValueError: no key, or no query. PermissionError, ConnectionError, TimeoutError."""
        query = kwargs.get("query")
        if not isinstance(query, str) or not query.strip():
            raise ValueError("web_search needs a query")
        key = self._key()
        try:
            async with asyncio.timeout(SECONDS):
                text = self.shown(await self._answer(self.request(key, query)))
        except TimeoutError:
            raise TimeoutError(f"{self.name} did not answer within {SECONDS} s") from None
        except httpx.HTTPError as error:
            raise ConnectionError(f"{self.name} cannot be reached: {type(error).__name__}") from None
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
            raise ConnectionError(f"{self.name} gave an answer that is not understood") from None
        return ToolInvocationResult(content=text.replace(key, HIDDEN) or "Nothing was found.")

    def _key(self) -> str:
        """The request's own, else the server's."""
        given = self.get_request_provider_data()
        key: str | None = getattr(given, self.member, None) or self.config.api_key
        if not key:
            raise ValueError(
                f"There is no key for web search by {self.name}: set {self.setting} for the worker processes, or send "
                f'one with the request, as {HEADER}: {{"{self.member}": "…"}}'
            )
        return key

    async def _answer(self, request: httpx.Request) -> dict[str, Any]:
        async with httpx.AsyncClient(verify=_tls()) as client:
            response = await client.send(request, stream=True)
            try:
                self._check(response.status_code)
                content = bytearray()
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > MAX_BYTES:
                        raise ConnectionError(f"{self.name} gave more than {MAX_BYTES} bytes")
            finally:
                await response.aclose()
        answer = json.loads(content)
        if not isinstance(answer, dict):
            raise TypeError("no object")
        return answer

    def _check(self, status: int) -> None:
        if status in (401, 403):
            raise PermissionError(f"{self.name} refused the key (status {status}): see {self.setting}, or {HEADER}")
        if status != httpx.codes.OK:
            raise ConnectionError(f"{self.name} answered with status {status}")


class Tavily(WebSearch, TavilySearchToolRuntimeImpl):
    name, setting, member = "Tavily", "TAVILY_SEARCH_API_KEY", "tavily_search_api_key"

    def request(self, key: str, query: str) -> httpx.Request:
        asked = {"query": query, "max_results": self.config.max_results}
        return httpx.Request(
            "POST", f"{self.config.url}/search", json=asked, headers={"Authorization": f"Bearer {key}"}
        )

    def shown(self, answer: Any) -> str:
        return json.dumps(self._clean_tavily_response(answer))


class Brave(WebSearch, BraveSearchToolRuntimeImpl):
    name, setting, member = "Brave", "BRAVE_SEARCH_API_KEY", "brave_search_api_key"

    def request(self, key: str, query: str) -> httpx.Request:
        headers = {"X-Subscription-Token": key, "Accept-Encoding": "gzip", "Accept": "application/json"}
        return httpx.Request("GET", f"{self.config.url}/web/search", params={"q": query}, headers=headers)

    def shown(self, answer: Any) -> str:
        return "\n".join(str(found) for found in self._clean_brave_response(answer) if found)


class Bing(WebSearch, BingSearchToolRuntimeImpl):
    name, setting, member = "Bing", "BING_SEARCH_API_KEY", "bing_search_api_key"

    def request(self, key: str, query: str) -> httpx.Request:
        asked: dict[str, Any] = {"count": self.config.top_k, "textDecorations": True, "textFormat": "HTML", "q": query}
        headers = {"Ocp-Apim-Subscription-Key": key}
        return httpx.Request("GET", f"{self.config.url}/search", params=asked, headers=headers)

    def shown(self, answer: Any) -> str:
        return json.dumps(self._clean_response(answer))


_KINDS: dict[type, type[WebSearch]] = {TavilyConfig: Tavily, BraveConfig: Brave, BingConfig: Bing}


async def get_adapter_impl(config: TavilyConfig | BraveConfig | BingConfig, deps: dict[Any, Any]) -> WebSearch:
    kind: Any = _KINDS[type(config)]
    made: WebSearch = kind(config)
    return made


@lru_cache
def _tls() -> ssl.SSLContext:
    """One for all: to make one takes some 30 ms, in which the loop stands still."""
    return httpx.create_ssl_context()
