"""The pandas UDF of docs/clusters.md, on local Spark where pyspark and Java are."""

import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_bert import save_tiny

from fastbert.light import TextEmbedder

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"


def test_the_page(tmp_path, monkeypatch):
    pytest.importorskip("pyspark")
    (program,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "pyspark" in block]
    model = save_tiny(tmp_path / "model")
    texts = [f"text {i} of a cat" for i in range(300)]
    (tmp_path / "texts").mkdir()
    for k in range(3):
        pq.write_table(pa.table({"id": range(k, 300, 3), "text": texts[k::3]}), tmp_path / "texts" / f"{k}.parquet")
    for given, own in (("path/to/model", model), ("texts/", tmp_path / "texts"), ("vectors/", tmp_path / "vectors")):
        program = program.replace(f'"{given}"', repr(str(own)))
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exec(program, {"__name__": "page"})
    found = pq.read_table(tmp_path / "vectors").sort_by("id")
    assert found["text"].to_pylist() == texts
    vectors = np.array(found["embedding"].to_pylist(), np.float32)
    assert np.array_equal(vectors, TextEmbedder.from_pretrained(model).embed(texts))
