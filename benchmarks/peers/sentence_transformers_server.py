"""A server as people write it around SentenceTransformer: uvicorn, one call of `encode` a request, in threads.

python benchmarks/peers/sentence_transformers_server.py MODEL PORT
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvicorn
from sentence_transformers import SentenceTransformer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


def make_app(folder: str) -> Starlette:
    model: Any = SentenceTransformer(folder, device="cpu")
    busy = asyncio.Lock()  # its batches use all cores: two at once are slower

    async def embed(request: Request) -> JSONResponse:
        texts = (await request.json())["inputs"]
        async with busy:
            vectors = await asyncio.to_thread(model.encode, texts, normalize_embeddings=True)
        return JSONResponse(vectors.tolist())

    return Starlette(routes=[Route("/embed", embed, methods=["POST"])])


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)
