"""What an MCP tool gave, as llama_stack's content: text and images. Nothing of it fails the call."""

from __future__ import annotations

import json

from llama_stack.apis.common.content_types import ImageContentItem, TextContentItem
from llama_stack.apis.tools import ToolInvocationResult
from llama_stack.providers.utils.inference.prompt_adapter import convert_image_content_to_url
from mcp import types

type Item = TextContentItem | ImageContentItem


async def result(given: types.CallToolResult) -> ToolInvocationResult:
    """Text and images as they are; what else there is as text, or named in brackets."""
    items = [await _item(block) for block in given.content]
    if not items and given.structuredContent is not None:
        items.append(TextContentItem(text=json.dumps(given.structuredContent, ensure_ascii=False)))
    return ToolInvocationResult(content=items, error_code=1 if given.isError else 0)


async def _item(block: types.ContentBlock) -> Item:
    if isinstance(block, types.TextContent):
        return TextContentItem(text=block.text)
    if isinstance(block, types.ImageContent):
        return await _image(block.data, block.mimeType)
    if isinstance(block, types.EmbeddedResource):
        return await _resource(block.resource)
    if isinstance(block, types.ResourceLink):
        kind, about = block.mimeType or "a file", f": {block.description}" if block.description else ""
        return TextContentItem(text=f"[{block.name} ({kind}): {block.uri}{about}]")
    return TextContentItem(text=f"[{block.mimeType}, {_size(block.data)}: left out]")


async def _resource(resource: types.TextResourceContents | types.BlobResourceContents) -> Item:
    if isinstance(resource, types.TextResourceContents):
        return TextContentItem(text=resource.text)
    kind = resource.mimeType or "application/octet-stream"
    if kind.startswith("image/"):
        return await _image(resource.blob, kind)
    return TextContentItem(text=f"[{resource.uri} ({kind}), {_size(resource.blob)}: left out]")


async def _image(data: str, kind: str) -> Item:
    image = ImageContentItem(image={"data": data})
    try:
        # What is no image must be found out here: in the history it would fail each turn.
        await convert_image_content_to_url(image)
    except Exception:
        return TextContentItem(text=f"[{kind}, {_size(data)}: an image that cannot be read]")
    return image


def _size(base64: str) -> str:
    return f"{len(base64.rstrip('=')) * 3 // 4} bytes"
