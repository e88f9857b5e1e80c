"""llama_stack's RAG tools, for a worker, which searches, and the web process, which inserts documents too.

Differs from the original: the files API is optional, and a document that cannot be inserted is an error. The original
logs it, goes on, and answers as if all were well.
"""

from __future__ import annotations

import io
import mimetypes
from typing import Any

import httpx
from fastapi import UploadFile
from llama_stack.apis.files import OpenAIFilePurpose
from llama_stack.apis.tools import RAGDocument
from llama_stack.apis.vector_io import VectorStoreChunkingStrategyStatic, VectorStoreChunkingStrategyStaticConfig
from llama_stack.providers.datatypes import Api
from llama_stack.providers.inline.tool_runtime.rag.config import RagToolRuntimeConfig
from llama_stack.providers.inline.tool_runtime.rag.memory import MemoryToolRuntimeImpl, raw_data_from_doc


class RagTools(MemoryToolRuntimeImpl):
    async def insert(self, documents: list[RAGDocument], vector_db_id: str, chunk_size_in_tokens: int = 512) -> None:
        """Raises ValueError: a document cannot be had, or not be read, or the size is out of bounds (100 to 4096).
        VectorStoreNotFoundError is one of these. Documents before the one that failed stay."""
        chunking = VectorStoreChunkingStrategyStatic(
            static=VectorStoreChunkingStrategyStaticConfig(
                max_chunk_size_tokens=chunk_size_in_tokens, chunk_overlap_tokens=chunk_size_in_tokens // 4
            )
        )
        for document in documents:
            await self._insert(document, vector_db_id, chunking)

    async def _insert(self, document: RAGDocument, vector_db_id: str, chunking: Any) -> None:
        try:
            data, mime_type = await raw_data_from_doc(document)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(f"document {document.document_id!r} cannot be had: {error}") from error
        name = document.metadata.get("filename", f"{document.document_id}{_extension(mime_type)}")
        file = await self.files_api.openai_upload_file(
            file=UploadFile(io.BytesIO(data), filename=name), purpose=OpenAIFilePurpose.ASSISTANTS
        )
        attached = await self.vector_io_api.openai_attach_file_to_vector_store(
            vector_store_id=vector_db_id, file_id=file.id, attributes=document.metadata, chunking_strategy=chunking
        )
        if attached.status == "failed":
            reason = attached.last_error.message if attached.last_error else "the vector store gives no reason"
            raise ValueError(f"document {document.document_id!r} cannot be inserted: {reason}")


def _extension(mime_type: str) -> str:
    return mimetypes.guess_extension(mime_type) or ".txt"


async def get_provider_impl(config: RagToolRuntimeConfig, deps: dict[Api, Any]) -> RagTools:
    provider = RagTools(config, deps[Api.vector_io], deps[Api.inference], deps.get(Api.files))
    await provider.initialize()
    return provider
