"""The routes: those of OpenAI, text-embeddings-inference, Cohere, vLLM and infinity, and the server's own."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from fastbert.inference.vector_precision import quantize_vectors
from fastbert.serve import schemas
from fastbert.serve.batcher import Batcher
from fastbert.serve.models import ALL_ANSWERS, Answering, Embedding, InputError, aside
from fastbert.serve.schemas import Body

Handler = Callable[..., Awaitable[Response]]


@dataclass(frozen=True)
class Api:
    """A route: its body is checked by a schema, if it has one, and given to the handler after the request."""

    path: str
    schema: type[Body] | None
    handler: Handler
    tag: str

    @property
    def method(self) -> str:
        return "GET" if self.schema is None else "POST"


APIS: list[Api] = []


def api(tag: str, *paths: str, schema: type[Body] | None = None) -> Callable[[Handler], Handler]:
    """Makes a handler that of these paths; with a schema they are posted to."""

    def register(handler: Handler) -> Handler:
        APIS.extend(Api(path, schema, handler, tag) for path in paths)
        return handler

    return register


def reply(content: Any) -> Response:
    """JSON, with arrays as lists."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def _vectors(request: Request, vectors: np.ndarray, wrap: Callable[[Any], Any] = lambda x: x) -> Response:
    """Vectors as JSON or, where the client accepts them so, as the bytes of a (N, E) float32 array."""
    if "application/octet-stream" in request.headers.get("accept", ""):
        shape = ",".join(map(str, vectors.shape))
        data = np.ascontiguousarray(vectors).astype("<f4", copy=False).tobytes()
        return Response(data, media_type="application/octet-stream", headers={"X-Shape": shape, "X-Dtype": "float32"})
    return reply(wrap(np.ascontiguousarray(vectors)))


def _texts(request: Request, given: str | list[str]) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    request.app.state.serve.check_count(len(texts))
    return texts


def _embedding(request: Request, name: str | None) -> Embedding:
    found: Embedding = request.app.state.serve.pick(name, "embedding")
    return found


def _answering(request: Request, name: str | None, *kinds: str) -> Answering:
    found: Answering = request.app.state.serve.pick(name, *kinds)
    return found


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(vector).astype("<f4", copy=False).tobytes()).decode()


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _listed(kind: str, model: str, data: list[dict[str, Any]], tokens: int) -> Response:
    head = {"id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model}
    return reply({**head, "data": data, "usage": _usage(tokens)})


# OpenAI; infinity has the same at its root. Its /classify is another than vLLM's, so it has a prefix for all, too.


@api("OpenAI", "/v1/embeddings", schema=schemas.OpenAIEmbeddings)
@api("infinity", "/embeddings", "/infinity/embeddings", schema=schemas.OpenAIEmbeddings)
async def openai_embeddings(request: Request, body: schemas.OpenAIEmbeddings) -> Response:
    model = _embedding(request, body.model)
    found = await model.embed(_texts(request, body.input), dimensions=body.dimensions)
    encode: Callable[[np.ndarray], Any] = _base64 if body.encoding_format == "base64" else np.ascontiguousarray

    def wrapped(vectors: np.ndarray) -> dict[str, Any]:
        data = [{"object": "embedding", "index": i, "embedding": encode(v)} for i, v in enumerate(vectors)]
        return {"object": "list", "data": data, "model": model.name, "usage": _usage(found.tokens)}

    return _vectors(request, found.vectors, wrapped)


@api("OpenAI", "/v1/models")
@api("infinity", "/models", "/infinity/models")
async def models(request: Request) -> Response:
    state = request.app.state.serve
    kinds: dict[str, list[str]] = {}
    for model in state.models:
        kinds.setdefault(model.name, []).append(model.kind)
    data = [
        {"id": name, "object": "model", "owned_by": "fastbert", "created": 0, "capabilities": several}
        for name, several in kinds.items()
    ]
    return reply({"object": "list", "data": data})


# text-embeddings-inference


@api("text-embeddings-inference", "/embed", schema=schemas.Embed)
async def embed(request: Request, body: schemas.Embed) -> Response:
    found = await _embedding(request, body.model).embed(
        _texts(request, body.inputs),
        prompt_name=body.prompt_name,
        truncate=bool(body.truncate),
        side=body.side,
        normalize=body.normalize,
        dimensions=body.dimensions,
    )
    return _vectors(request, found.vectors)


@api("text-embeddings-inference", "/", schema=schemas.Root)
async def root(request: Request, body: schemas.Root) -> Response:
    """The route of the default model: /embed or /similarity, or /predict."""
    state = request.app.state.serve
    model = state.pick(body.model, *(served.kind for served in state.models))
    given = body.model_dump(exclude_none=True) | {"model": model.name}
    if model.kind == "sparse-embedding":
        return await embed_sparse(request, schemas.EmbedSparse.model_validate(given))
    if not isinstance(model, Embedding):
        return await predict(request, schemas.Predict.model_validate(given))
    if isinstance(body.inputs, dict):
        return await similarity(request, schemas.Similarity.model_validate(given))
    return await embed(request, schemas.Embed.model_validate(given))


@api("text-embeddings-inference", "/embed_all", schema=schemas.EmbedAll)
async def embed_all(request: Request, body: schemas.EmbedAll) -> Response:
    model = _embedding(request, body.model)
    states = await model.states(_texts(request, body.inputs), truncate=bool(body.truncate), side=body.side)
    return reply([np.ascontiguousarray(x) for x in states])


@api("text-embeddings-inference", "/embed_sparse", schema=schemas.EmbedSparse)
async def embed_sparse(request: Request, body: schemas.EmbedSparse) -> Response:
    """Weights of the vocabulary's tokens, by a masked-language model, as SPLADE has them."""
    model = _answering(request, body.model, "sparse-embedding")
    found, _ = await model.answers(_texts(request, body.inputs), truncation=bool(body.truncate))
    return reply(found)


@api("text-embeddings-inference", "/predict", schema=schemas.Predict)
async def predict(request: Request, body: schemas.Predict) -> Response:
    given = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    is_one = isinstance(given[0], str)
    several: list[Any] = [given] if is_one else list(given)
    request.app.state.serve.check_count(len(several))
    items = [tuple(sequence) if len(sequence) > 1 else sequence[0] for sequence in several]
    model = _answering(request, body.model, "text-classification", "rerank")
    function = "none" if body.raw_scores else None
    if model.kind == "rerank":
        scores, _ = await model.answers(items, function_to_apply=function, truncation=bool(body.truncate))
        label = next(iter(model.pipeline.runner.config.id2label.values()))
        found = [[{"label": label, "score": score}] for score in scores]
    else:
        found, _ = await model.answers(items, top_k=None, function_to_apply=function, truncation=bool(body.truncate))
    return reply(found[0] if is_one else found)


@api("text-embeddings-inference", "/rerank", schema=schemas.Rerank)
@api("infinity", "/infinity/rerank", schema=schemas.Rerank)
async def rerank(request: Request, body: schemas.Rerank) -> Response:
    model = _answering(request, body.model, "rerank")
    if body.texts is None:
        texts = schemas.listed(body.documents or [])
        rows, tokens = await _ranked(request, model, body.query, texts, body.top_n)
        kept = texts if body.return_documents else None
        results = [{"index": i, "relevance_score": score, **_kept("document", kept, i)} for i, score in rows]
        head = {"id": uuid.uuid4().hex, "object": "rerank", "created": int(time.time()), "model": model.name}
        return reply({**head, "results": results, "usage": _usage(tokens)})
    rows, _ = await _ranked(request, model, body.query, body.texts, None, body.truncate, raw=body.raw_scores)
    kept = body.texts if body.return_text else None
    return reply([{"index": i, "score": score, **_kept("text", kept, i)} for i, score in rows])


def _kept(name: str, values: list[Any] | None, i: int) -> dict[str, Any]:
    return {} if values is None else {name: values[i]}


async def _ranked(
    request: Request,
    model: Answering,
    query: str,
    texts: list[str],
    top: int | None,
    truncate: bool | None = None,
    *,
    raw: bool = False,
) -> tuple[list[tuple[int, float]], int]:
    """Places and scores of texts, best first; of equals, the first."""
    request.app.state.serve.check_count(len(texts))
    pairs, function = [(query, text) for text in texts], "none" if raw else None
    scores, tokens = await model.answers(pairs, function_to_apply=function, truncation=bool(truncate))
    order = sorted(range(len(texts)), key=lambda i: -scores[i])[:top]
    return [(i, scores[i]) for i in order], tokens


@api("text-embeddings-inference", "/similarity", schema=schemas.Similarity)
async def similarity(request: Request, body: schemas.Similarity) -> Response:
    texts = [body.inputs.source_sentence, *body.inputs.sentences]
    given = body.parameters
    found = await _embedding(request, body.model).embed(
        _texts(request, texts),
        prompt_name=given.prompt_name,
        truncate=bool(given.truncate),
        side=given.side,
        normalize=True,
    )
    return reply((found.vectors[1:] @ found.vectors[0]).tolist())


@api("text-embeddings-inference", "/tokenize", schema=schemas.Tokenize)
async def tokenize(request: Request, body: schemas.Tokenize) -> Response:
    state = request.app.state.serve
    model = state.pick(body.model, *(served.kind for served in state.models))
    texts = _texts(request, body.inputs)
    made = await aside(texts, lambda: model.tokenizer(texts, add_special_tokens=body.add_special_tokens))
    return reply(
        [
            [
                {"id": i, "text": token, "special": bool(special), "start": start, "stop": stop}
                for i, token, special, (start, stop) in zip(
                    one.ids, one.tokens, one.special_tokens_mask, one.offsets, strict=True
                )
            ]
            for one in made.encodings
        ]
    )


@api("server", "/info")
async def info(request: Request) -> Response:
    from fastbert import __version__

    state = request.app.state.serve
    settings, model = state.settings, state.models[0]
    kind: dict[str, Any]
    if isinstance(model, Embedding):
        pooling = model.embedder.pooling
        kind = {"embedding": {"pooling": pooling if isinstance(pooling, str) else "+".join(pooling)}}
    elif model.kind == "sparse-embedding":
        kind = {"embedding": {"pooling": "splade"}}
    else:
        config = model.pipeline.runner.config
        labels = {"id2label": config.id2label, "label2id": config.label2id}
        kind = {"reranker" if model.kind == "rerank" else "classifier": labels}
    return Response(
        orjson.dumps(
            {
                "model_id": model.name,
                "model_sha": settings.revision,
                "model_dtype": model.dtype,
                "model_type": kind,
                "max_concurrent_requests": settings.max_concurrent_requests,
                "max_input_length": model.max_length,
                "max_batch_tokens": settings.max_batch_tokens,
                "max_batch_requests": None,
                "max_client_batch_size": settings.max_texts,
                "auto_truncate": False,
                "tokenization_workers": 1,
                "version": __version__,
                "sha": None,
                "docker_label": None,
                "models": {served.name: served.kind for served in reversed(state.models)},
            },
            option=orjson.OPT_NON_STR_KEYS,
        ),
        media_type="application/json",
    )


@api("server", "/health")
@api("infinity", "/infinity/health")
async def health(request: Request) -> Response:
    """The process answers."""
    return Response(status_code=200)


@api("server", "/ready")
async def ready(request: Request) -> Response:
    """The models are loaded and have run."""
    return Response(status_code=200 if request.app.state.serve.ready else 503)


# Cohere

_INPUT_TYPES = {"search_query": "query", "search_document": "document"}


@api("Cohere", "/v2/embed", schema=schemas.CohereEmbed)
async def cohere_embed(request: Request, body: schemas.CohereEmbed) -> Response:
    model = _embedding(request, body.model)
    prompt = _INPUT_TYPES.get(body.input_type or "")
    found = await model.embed(
        _texts(request, body.texts),
        prompt_name=prompt if prompt in model.embedder.prompts else None,
        truncate=body.truncate != "NONE",
        side={"START": "left", "END": "right"}.get(body.truncate),
        dimensions=body.output_dimension,
    )
    vectors: dict[str, Any] = {}
    for kind in dict.fromkeys(body.embedding_types):
        if kind == "float":
            vectors[kind] = np.ascontiguousarray(found.vectors)
        elif kind == "base64":
            vectors[kind] = [_base64(vector) for vector in found.vectors]
        else:
            vectors[kind] = np.ascontiguousarray(quantize_vectors(found.vectors, kind))
    meta = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": found.tokens}}
    head = {"id": str(uuid.uuid4()), "response_type": "embeddings_by_type", "texts": body.texts}
    return reply({**head, "embeddings": vectors, "meta": meta})


@api("Cohere", "/v2/rerank", "/v1/rerank", schema=schemas.CohereRerank)
async def cohere_rerank(request: Request, body: schemas.CohereRerank) -> Response:
    model, texts = _answering(request, body.model, "rerank"), schemas.listed(body.documents)
    rows, tokens = await _ranked(request, model, body.query, texts, body.top_n)
    kept = [{"text": text} for text in texts] if body.return_documents else None
    results = [{"index": i, "relevance_score": score, **_kept("document", kept, i)} for i, score in rows]
    meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1, "input_tokens": tokens}}
    return reply({"id": str(uuid.uuid4()), "results": results, "meta": meta})


# vLLM


@api("vLLM", "/classify", schema=schemas.Classify)
@api("infinity", "/infinity/classify", schema=schemas.Classify)
async def classify(request: Request, body: schemas.Classify) -> Response:
    model = _answering(request, body.model, "text-classification")
    texts = _texts(request, body.input)
    function = "none" if body.raw_scores else None
    found, tokens = await model.answers(texts, top_k=None, function_to_apply=function)
    if request.url.path.startswith("/infinity/"):
        head = {"id": uuid.uuid4().hex, "object": "classify", "created": int(time.time()), "model": model.name}
        return reply({**head, "data": found, "usage": _usage(tokens)})
    names = model.pipeline.runner.config.id2label
    data = []
    for i, answer in enumerate(found):
        by_label = {one["label"]: one["score"] for one in answer}
        probs = [by_label[names[k]] for k in sorted(names)]
        data.append({"index": i, "label": answer[0]["label"], "probs": probs, "num_classes": len(probs)})
    return _listed("classify", model.name, data, tokens)


@api("vLLM", "/score", schema=schemas.Score)
async def score(request: Request, body: schemas.Score) -> Response:
    first, second = ([x] if isinstance(x, str) else x for x in (body.text_1, body.text_2))
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise InputError(f"text_1 has {len(first)} texts, text_2 {len(second)}; text_1 must have one or as many")
    request.app.state.serve.check_count(len(first))
    model = request.app.state.serve.pick(body.model, "rerank", "embedding")
    if isinstance(model, Embedding):
        found = await model.embed([*first, *second], normalize=True)
        scores, tokens = (found.vectors[: len(first)] * found.vectors[len(first) :]).sum(1).tolist(), found.tokens
    else:
        scores, tokens = await model.answers(list(zip(first, second, strict=True)))
    data = [{"index": i, "object": "score", "score": float(value)} for i, value in enumerate(scores)]
    return _listed("score", model.name, data, tokens)


@api("vLLM", "/pooling", schema=schemas.Pooling)
async def pooling(request: Request, body: schemas.Pooling) -> Response:
    model = _embedding(request, body.model)
    found = await model.embed(_texts(request, body.input))
    encode: Callable[[np.ndarray], Any] = _base64 if body.encoding_format == "base64" else np.ascontiguousarray
    data = [{"index": i, "object": "pooling", "data": encode(vector)} for i, vector in enumerate(found.vectors)]
    return _listed("pool", model.name, data, found.tokens)


# Of no other server.


@api("server", "/ner", schema=schemas.Entities)
async def ner(request: Request, body: schemas.Entities) -> Response:
    model = _answering(request, body.model, "token-classification")
    found, _ = await model.answers(_texts(request, body.inputs), aggregation_strategy=body.aggregation_strategy)
    plain = [[_plain(entity) for entity in entities] for entities in found]
    return reply(plain[0] if isinstance(body.inputs, str) else plain)


def _plain(entity: dict[str, Any]) -> dict[str, Any]:
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in entity.items()}


@api("server", "/fill-mask", schema=schemas.Masked)
async def fill_mask(request: Request, body: schemas.Masked) -> Response:
    model = _answering(request, body.model, "fill-mask")
    found, _ = await model.answers(_texts(request, body.inputs), top_k=body.top_k, targets=body.targets)
    return reply(found[0] if isinstance(body.inputs, str) else found)


@api("server", "/heads", schema=schemas.SeveralHeads)
async def heads(request: Request, body: schemas.SeveralHeads) -> Response:
    """The answers of several models to each text, by their names; those over one encoder run it once."""
    state, texts = request.app.state.serve, _texts(request, body.inputs)
    kinds = tuple(ALL_ANSWERS)
    names: list[Any] = body.models or [model.name for model in state.models if model.kind in kinds] or [None]
    groups: dict[Batcher, list[Answering]] = {}
    for name in dict.fromkeys(names):
        model = state.pick(name, *kinds, exact=True)
        groups.setdefault(model.batcher, []).append(model)
    several = await asyncio.gather(
        *(group[0].answers_of([model.name for model in group], texts) for group in groups.values())
    )
    found = {name: answers for one in several for name, answers in one.items()}
    plain = {name: [[_plain(one) for one in answer] for answer in found[name]] for name in dict.fromkeys(names)}
    return reply({name: answers[0] for name, answers in plain.items()} if isinstance(body.inputs, str) else plain)


@api("server", "/question-answering", schema=schemas.Question)
async def question_answering(request: Request, body: schemas.Question) -> Response:
    model = _answering(request, body.model, "question-answering")
    settings = body.model_dump(include={"top_k", "max_answer_len", "doc_stride", "handle_impossible_answer"})
    found, _ = await model.answers([{"question": body.question, "context": body.context}], **settings)
    return reply(found[0])
