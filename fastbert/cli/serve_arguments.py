"""The arguments of `fastbert serve`."""

from __future__ import annotations

import argparse

from fastbert.cli.finetune_arguments import positive

SERVE_EXAMPLES = """\
examples:
  fastbert serve path/to/model --port 8080
  fastbert serve mail=path/to/classifier names=path/to/tagger path/to/embedder --quantize int8
  fastbert serve path/to/model --processes 4 --api-key SECRET
  fastbert serve --config serve.toml

  curl localhost:8080/v1/embeddings -H 'Content-Type: application/json' -d '{"input": "a text"}'

Routes are those of OpenAI, text-embeddings-inference, Cohere, vLLM and infinity: /docs lists them. Each option can also
be set by the environment, as FASTBERT_SERVE_PORT, or by a TOML file, as port = 8080.
On SIGTERM and Ctrl-C the server takes no more requests, finishes what it has accepted, and ends.
"""


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", metavar="MODEL", nargs="*", help="folders or hub ids, or NAME=PATH; the first is the default"
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file of these options")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="default: 8080; 0 for any that is free")
    parser.add_argument("--api-key", metavar="TOKEN", help="that requests must bear; health and metrics need none")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="default: info")

    models = parser.add_argument_group("models")
    models.add_argument("--device", help="cpu, or a GPU by torch: cuda, cuda:1 (default: a GPU, if there is one)")
    models.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the weights are stored"
    )
    models.add_argument("--precision", choices=("high", "highest"), help="of products in float32, by torch")
    models.add_argument("--quantize", choices=("int8",), help="the layers' products in int8")
    models.add_argument("--revision", help="branch, tag or commit of a hub model")
    models.add_argument("--threads", type=positive, help="of each model's calls (default: the cores)")
    models.add_argument(
        "--cache", nargs="?", const="", metavar="DIR", help="keep packed weights, to start at once the next time"
    )
    models.add_argument("--processes", type=positive, help="that share the weights, each on cores of its own")

    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-batch-tokens", type=positive, metavar="N", help="of a batch (default: 16384)")
    limits.add_argument("--max-latency", type=float, metavar="S", help="seconds a batch may run (default: 0.1)")
    limits.add_argument("--max-queue-tokens", type=positive, metavar="N", help="waiting (default: 262144)")
    limits.add_argument("--max-concurrent-requests", type=positive, metavar="N", help="default: 512")
    limits.add_argument("--max-texts", type=positive, metavar="N", help="of a request (default: 1024)")
    limits.add_argument("--max-body-seconds", type=float, metavar="S", help="to send a body (default: 60)")
    limits.add_argument("--max-body-bytes", type=positive, metavar="N", help="of a request (default: 2000000)")
