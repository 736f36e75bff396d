"""The bodies of requests, under the names of OpenAI, text-embeddings-inference, Cohere and vLLM."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

Texts = StrictStr | Annotated[list[StrictStr], Field(min_length=1)]
Sequence = Annotated[list[StrictStr], Field(min_length=1, max_length=2)]  # a text or a pair


class Body(BaseModel):
    """Names that a route does not have are ignored, as by the servers that it follows."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: StrictStr | None = None


class OpenAIEmbeddings(Body):
    """POST /v1/embeddings"""

    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: StrictInt | None = None
    user: StrictStr | None = None


class Cut(Body):
    truncate: StrictBool | None = None


class Truncation(Cut):
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None

    @property
    def side(self) -> str | None:
        return None if self.truncation_direction is None else self.truncation_direction.lower()


class Embed(Truncation):
    """POST /embed"""

    inputs: Texts
    prompt_name: StrictStr | None = None
    normalize: StrictBool = True
    dimensions: StrictInt | None = None


class Root(Body):
    """POST /: the body of /embed, /similarity or /predict, by the model."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    inputs: Any


class EmbedSparse(Cut):
    """POST /embed_sparse"""

    inputs: Texts


class EmbedAll(Truncation):
    """POST /embed_all"""

    inputs: Texts


class Predict(Cut):
    """POST /predict: a text; a list of it and another, which are a pair; or a list of lists, each a text or a pair."""

    inputs: StrictStr | Sequence | Annotated[list[Sequence], Field(min_length=1)]
    raw_scores: StrictBool = False


class CohereRerank(Body):
    """POST /v2/rerank"""

    query: StrictStr
    documents: Annotated[list[StrictStr | dict[str, Any]], Field(min_length=1)]
    top_n: Annotated[StrictInt, Field(ge=1)] | None = None
    return_documents: StrictBool = False

    @model_validator(mode="after")
    def _have_texts(self) -> Self:
        listed(self.documents)
        return self


class Rerank(Cut):
    """POST /rerank: texts, as by text-embeddings-inference, or documents, as by infinity."""

    query: StrictStr
    texts: Annotated[list[StrictStr], Field(min_length=1)] | None = None
    raw_scores: StrictBool = False
    return_text: StrictBool = False
    documents: Annotated[list[StrictStr | dict[str, Any]], Field(min_length=1)] | None = None
    top_n: Annotated[StrictInt, Field(ge=1)] | None = None
    return_documents: StrictBool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.texts is None) == (self.documents is None):
            raise ValueError("one of texts and documents must be given")
        listed(self.documents or [])
        return self


def listed(documents: list[str | dict[str, Any]]) -> list[str]:
    """The texts of documents.

    Raises:
        ValueError: an object has none.
    """
    found = [document.get("text") if isinstance(document, dict) else document for document in documents]
    if not all(isinstance(text, str) for text in found):
        raise ValueError("each of documents must be a string, or an object with one as 'text'")
    return [str(text) for text in found]


class Similarity(Body):
    """POST /similarity"""

    class Inputs(BaseModel):
        source_sentence: StrictStr
        sentences: Annotated[list[StrictStr], Field(min_length=1)]

    class Parameters(Truncation):
        prompt_name: StrictStr | None = None

    inputs: Inputs
    parameters: Parameters = Parameters()


class Tokenize(Body):
    """POST /tokenize"""

    inputs: Texts
    add_special_tokens: StrictBool = True


class CohereEmbed(Body):
    """POST /v2/embed. Vectors in int8 need a scale that is the same for all requests, which no model here has."""

    texts: Annotated[list[StrictStr], Field(min_length=1)]
    input_type: StrictStr | None = None
    embedding_types: list[Literal["float", "binary", "ubinary", "base64"]] = ["float"]
    output_dimension: StrictInt | None = None
    truncate: Literal["NONE", "START", "END"] = "END"


class Classify(Body):
    """POST /classify"""

    input: Texts
    raw_scores: StrictBool = False


class Score(Body):
    """POST /score: one text or several against one or as many."""

    text_1: Texts
    text_2: Texts


class Pooling(Body):
    """POST /pooling"""

    input: Texts
    encoding_format: Literal["float", "base64"] = "float"


class Entities(Body):
    """POST /ner"""

    inputs: Texts
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"


class Question(Body):
    """POST /question-answering"""

    question: StrictStr
    context: StrictStr
    top_k: Annotated[StrictInt, Field(ge=1)] = 1
    max_answer_len: Annotated[StrictInt, Field(ge=1)] = 15
    doc_stride: StrictInt | None = None
    handle_impossible_answer: StrictBool = False


class Masked(Body):
    """POST /fill-mask"""

    inputs: Texts
    top_k: Annotated[StrictInt, Field(ge=1)] = 5
    targets: Texts | None = None


class SeveralHeads(Body):
    """POST /heads: the models, by default all for classes of texts and tokens."""

    inputs: Texts
    models: Annotated[list[StrictStr], Field(min_length=1)] | None = None
