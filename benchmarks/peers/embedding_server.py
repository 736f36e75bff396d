"""A server as people write it around a library of embeddings: uvicorn, one call a request, in threads.

python benchmarks/peers/embedding_server.py sentence-transformers|onnxruntime|fastembed PROCESSES PORT MODEL [GRAPH]

Several processes share the socket; each has its part of the cores as threads.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

Encode = Callable[[list[str]], Any]  # texts to unit vectors, (N, E)
_NAMES = "input_ids", "attention_mask"


def sentence_transformers(threads: int, model: str) -> Encode:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    loaded: Any = SentenceTransformer(model, device="cpu")
    return lambda texts: loaded.encode(texts, normalize_embeddings=True)


def onnxruntime(threads: int, model: str, graph: str) -> Encode:
    """The mean of the states of a graph, over padded texts."""
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()

    def encode(texts: list[str]) -> Any:
        encodings = tokenizer.encode_batch(texts)
        rows = [one.ids for one in encodings], [one.attention_mask for one in encodings]
        inputs = {name: np.array(values, np.int64) for name, values in zip(_NAMES, rows, strict=True)}
        mask = inputs["attention_mask"][..., None].astype(np.float32)
        means = (session.run(None, inputs)[0] * mask).sum(1) / mask.sum(1)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    return encode


def fastembed(threads: int, model: str, graph: str) -> Encode:
    import numpy as np
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    folder = Path(tempfile.mkdtemp(prefix="fastembed-"))
    for file in (*Path(model).glob("*.json"), Path(graph)):
        (folder / file.name).symlink_to(file.resolve())
    width = int(json.loads((folder / "config.json").read_text())["hidden_size"])
    source = ModelSource(hf="local/model")
    TextEmbedding.add_custom_model(
        "local/model", PoolingType.MEAN, normalization=True, sources=source, dim=width, model_file="model.onnx"
    )
    loaded = TextEmbedding("local/model", specific_model_path=str(folder), threads=threads)
    return lambda texts: np.stack(list(loaded.embed(texts)))


ENGINES: dict[str, Callable[..., Encode]] = {
    "sentence-transformers": sentence_transformers,
    "onnxruntime": onnxruntime,
    "fastembed": fastembed,
}


def make_app(encode: Encode) -> Starlette:
    busy = asyncio.Lock()  # a call uses all cores: two at once are slower

    async def embed(request: Request) -> JSONResponse:
        texts = (await request.json())["inputs"]
        async with busy:
            vectors = await asyncio.to_thread(encode, texts)
        return JSONResponse(vectors.tolist())

    return Starlette(routes=[Route("/embed", embed, methods=["POST"])])


def serve(engine: str, processes: str, port: str, *given: str) -> None:
    count = int(processes)
    listening = socket.create_server(("127.0.0.1", int(port)), backlog=1024)
    for _ in range(count - 1):
        if not os.fork():
            break
    encode = ENGINES[engine](max(1, len(os.sched_getaffinity(0)) // count), *given)
    uvicorn.Server(uvicorn.Config(make_app(encode), log_level="warning", access_log=False)).run([listening])


if __name__ == "__main__":
    serve(*sys.argv[1:])
