"""Python frames of fastbert's own in a warm call: what a call costs in addition to the kernels."""

import sys
from pathlib import Path

import pytest
import torch
from support import TINY, require_native

import fastbert

HOME = str(Path(fastbert.__file__).parent)


def own():
    return fastbert.BertModel(fastbert.BertConfig(**TINY)).eval()


def live():
    import transformers

    return fastbert.accelerate(transformers.BertModel(transformers.BertConfig(**TINY)).eval())


@pytest.mark.parametrize(("make", "most"), [(own, 40), (live, 50)])
@torch.inference_mode()
def test_frames_of_a_warm_call(make, most):
    require_native()
    with torch.inference_mode(False):
        model = make()
    ids, mask = torch.randint(1, TINY["vocab_size"], (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = ids[1, 5:] = 0
    frames, files = [], set()

    def record(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            frames.append(frame.f_code.co_qualname)
            files.add(frame.f_code.co_filename)

    for _ in range(2):
        model(ids, attention_mask=mask)
    sys.setprofile(record)
    try:
        model(ids, attention_mask=mask)
    finally:
        sys.setprofile(None)
    assert "encode_at_once" in frames
    assert len(frames) <= most, frames
    assert len(files) <= 11, files
