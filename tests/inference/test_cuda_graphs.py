"""fastbert.compile: buckets, buffers and bookkeeping on the CPU with graphs that only pretend; real ones on a GPU."""

import threading
import warnings

import pytest
import torch
from pretended_graphs import PretendedGraphs, as_on_a_gpu
from support import MASKS, TINY, mask_of, tokens
from test_families_live import CONFIGS, make

import fastbert
from fastbert.inference import graph_calls
from fastbert.inference.cuda_graphs import CompiledModel
from fastbert.inference.static_batch import BAD_OFFSETS, Bucket, StaticBatch, bucket_of, token_sizes

CUDA = torch.cuda.is_available()
gpu = pytest.mark.skipif(not CUDA, reason="no GPU")
HEADS = [
    fastbert.BertModel,
    fastbert.BertForPreTraining,
    fastbert.BertForMaskedLM,
    fastbert.BertForNextSentencePrediction,
    fastbert.BertForSequenceClassification,
    fastbert.BertForTokenClassification,
    fastbert.BertForQuestionAnswering,
]


def tiny(kind=fastbert.BertModel, **sizes):
    return kind(fastbert.BertConfig(**{**TINY, **sizes})).eval()


def pretended(model, each=1000, **limits):
    limits = {"max_tokens": 64, "max_graphs": 8, "max_bytes": 10**6, **limits}
    return CompiledModel(model, PretendedGraphs(model, each), **limits)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    as_on_a_gpu(monkeypatch)


@pytest.fixture
def on_device(monkeypatch):
    """Nothing counts as the host's: the way of tensors on a GPU, with tensors that are not."""
    monkeypatch.setattr(graph_calls, "on_host", lambda x: x is None)


@pytest.fixture
def tokens_on_device(monkeypatch):
    """The mask and cu_seqlens are the host's, and known by their dtype; the ids are not."""
    monkeypatch.setattr(graph_calls, "on_host", lambda x: x is None or x.dtype in (torch.bool, torch.int32))


def same(got, expected, rtol=1e-5, atol=1e-5):
    assert type(got) is type(expected) and list(got) == list(expected)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


WAYS = ["host", "tokens_on_device", "on_device"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", HEADS)
def test_same_as_the_model(kind, mask, way, request):
    """Twice over, with a call of another shape in between, so that what lies in the buffers matters."""
    model = tiny(kind)
    compiled = pretended(model)
    if way != "host":
        request.getfixturevalue(way)
    types = tokens(vocab=2) % 2
    for given in ({}, {"token_type_ids": types}, {"position_ids": torch.arange(8).flip(0)}, {}):
        given = {"attention_mask": mask_of(mask), **given}
        if given["attention_mask"] is not None:
            given["attention_mask"] = given["attention_mask"].bool()
        with torch.no_grad():
            expected = model(tokens(), **given)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(compiled(tokens(), **given), expected)
            compiled(tokens(2, 11) + 1)
    assert not compiled.outside
    compiled.check()


@pytest.mark.parametrize("way", WAYS)
def test_packed_input(way, request):
    if way != "host":
        request.getfixturevalue(way)
    model = tiny()
    compiled = pretended(model)
    ids, cu_seqlens = tokens(1, 20)[0], torch.tensor([0, 5, 5, 12, 20], dtype=torch.int32)
    for longest in (None, 8):
        with torch.no_grad():
            expected = model(ids, cu_seqlens=cu_seqlens, max_seqlen=longest)
        same(compiled(ids, cu_seqlens=cu_seqlens, max_seqlen=longest), expected)
    assert not compiled.outside
    compiled.check()


def test_multiple_choice():
    model = tiny(fastbert.BertForMultipleChoice)
    compiled = pretended(model)
    ids = tokens(6, 8).view(2, 3, 8)
    mask = torch.tensor(MASKS["right"] * 2).view(2, 3, 8)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)
    same(compiled(ids, attention_mask=mask), expected)
    assert not compiled.outside
    with pytest.raises(ValueError, match="input_ids has shape"), pytest.warns(UserWarning, match="shapes do not match"):
        compiled(ids[0])


def test_tuple_and_positional_arguments():
    model = tiny()
    compiled = pretended(model)
    got = compiled(tokens(), mask_of("right"), return_dict=False)
    assert isinstance(got, tuple) and len(got) == 2
    with torch.no_grad():
        expected = model(tokens(), mask_of("right"), return_dict=False)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_results_are_the_callers_own():
    compiled = pretended(tiny())
    first = compiled(tokens())
    kept = {name: x.clone() for name, x in first.items()}
    compiled(tokens() % 7 + 1)
    assert all(torch.equal(first[name], x) for name, x in kept.items())
    first.last_hidden_state.fill_(0)
    again = compiled(tokens())
    assert all(torch.equal(again[name], x) for name, x in kept.items())


def test_inputs_stay_as_they_are():
    ids, mask = tokens(), mask_of("holes")
    before = ids.clone(), mask.clone()
    pretended(tiny(fastbert.BertForMaskedLM))(ids, mask)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])


@pytest.mark.parametrize("most", [1, 16, 17, 64, 300, 4096])
def test_buckets(most):
    sizes = token_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for count in range(1, most + 1):
        size = bucket_of(count, 1, sizes).tokens
        assert count <= size and (size - count <= size / 5 or size <= 256), (count, size)
    assert [bucket_of(1, texts, sizes).texts for texts in (1, 2, 4, 5, 64, 65)] == [1, 4, 4, 16, 64, 256]


def test_the_bucket_is_that_of_the_real_tokens():
    compiled = pretended(tiny())
    compiled(tokens(3, 20), torch.tensor([[1] * 5 + [0] * 15] * 3))
    assert [graph[:2] for graph in compiled.report().graphs] == [(16, 4)]


def test_the_bucket_of_a_mask_on_the_device_is_that_of_all_positions(on_device):
    compiled = pretended(tiny())
    compiled(tokens(3, 20), torch.tensor([[1] * 5 + [0] * 15] * 3))
    assert [graph[:2] for graph in compiled.report().graphs] == [(64, 4)]


def test_the_least_recently_used_goes():
    compiled = pretended(tiny(), max_graphs=2)
    shapes = {16: (1, 10), 32: (1, 30), 64: (2, 30)}
    for size in (16, 32, 16, 64):
        compiled(tokens(*shapes[size]))
    assert [graph[0] for graph in compiled.report().graphs] == [16, 64]
    compiled(tokens(*shapes[32]))
    report = compiled.report()
    assert [graph[0] for graph in report.graphs] == [64, 32]
    assert (report.captured, report.dropped) == (4, 2)
    assert [graph[2] for graph in report.graphs] == [1, 1]


def test_memory_is_bounded():
    """The third does not fit next to the others, which go; what does not fit alone runs eagerly."""
    compiled = pretended(tiny(), each=400, max_bytes=1000)
    for length in (10, 30, 40):
        compiled(tokens(1, length))
    report = compiled.report()
    assert [graph[0] for graph in report.graphs] == [64] and report.nbytes == 400
    compiled = pretended(tiny(), each=2000, max_bytes=1000)
    with pytest.warns(UserWarning, match="takes more than max_bytes=1000"):
        compiled(tokens())
    compiled(tokens())
    report = compiled.report()
    assert report.graphs == () and report.nbytes == 0 and report.captured == 1
    assert list(report.outside.values()) == [2]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"labels": torch.zeros(3, 8, dtype=torch.long)}, "labels is given"),
        ({"output_hidden_states": True}, "output_hidden_states is given"),
        ({"output_attentions": True}, "output_attentions is given"),
        ({"output_logits": False, "labels": torch.zeros(3, 8, dtype=torch.long)}, "output_logits is given"),
    ],
)
def test_what_runs_eagerly_is_said_once(given, reason):
    model = tiny(fastbert.BertForMaskedLM)
    compiled = pretended(model)
    expected = model(tokens(), **given)
    with pytest.warns(UserWarning, match=reason):
        same(compiled(tokens(), **given), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(tokens(), **given)
    assert compiled.outside == {reason: 2}
    assert f"outside: 2 calls, {reason}" in str(compiled.report())


def test_more_outside():
    model = tiny(hidden_dropout_prob=0.1)
    compiled = pretended(model)
    with pytest.warns(UserWarning, match="more than max_tokens=64 tokens"):
        assert compiled(tokens(3, 30)).last_hidden_state.shape == (3, 30, 48)
    with pytest.warns(UserWarning, match="inputs_embeds is given"):
        compiled(inputs_embeds=torch.randn(2, 3, 48))
    with pytest.warns(UserWarning, match="there is no token"):
        assert compiled(tokens(0, 5)).last_hidden_state.shape == (0, 5, 48)
    with pytest.warns(UserWarning, match="autocast is on"), torch.autocast("cpu", torch.bfloat16):
        compiled(tokens())
    model.train()
    with pytest.warns(UserWarning, match="dropout is on"):
        x = compiled(tokens()).last_hidden_state
    assert x.requires_grad
    assert compiled.report().captured == 0


def test_errors_are_the_models():
    compiled = pretended(tiny())
    with pytest.raises(ValueError, match="input_ids holds 500; vocab_size is 120"):
        compiled(torch.full((1, 3), 500))
    with pytest.raises(ValueError, match="max_position_embeddings is 40"):
        compiled(tokens(1, 41))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        compiled(tokens(), torch.ones(2, 2))
    with pytest.raises(ValueError, match="attention_mask holds 2"):
        compiled(tokens(), torch.full((3, 8), 2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.full((3, 8), 120)}, "an id in input_ids"),
        ({"input_ids": torch.full((3, 8), -1)}, "an id in input_ids"),
        ({"input_ids": tokens(), "token_type_ids": torch.full((3, 8), 2)}, "an id in input_ids"),
        ({"input_ids": tokens(), "attention_mask": torch.full((3, 8), 2)}, "attention_mask holds another value"),
        ({"input_ids": tokens(1, 8)[0], "cu_seqlens": torch.tensor([0, 8]), "max_seqlen": 7}, "than max_seqlen"),
    ],
)
def test_what_the_device_finds_is_told_later(given, message, on_device):
    """Once, by the next call or by check(); then all is well, in the same buffers."""
    model = tiny()
    for tell in (lambda c: c(tokens()), lambda c: c.check()):
        compiled = pretended(model)
        compiled(**given)
        with pytest.raises(ValueError, match=f"of an earlier call.*{message}"):
            tell(compiled)
        with torch.no_grad():
            same(compiled(tokens(1, 4)), model(tokens(1, 4)))
        compiled.check()


@pytest.mark.parametrize(
    ("offsets", "longest", "wrong"),
    [
        ([0, 8], None, 0),
        ([0, 3, 3, 8], 5, 0),
        ([0, 9], None, BAD_OFFSETS),
        ([0, 7], None, BAD_OFFSETS),
        ([1, 8], None, BAD_OFFSETS),
        ([0, 5, 3, 8], None, BAD_OFFSETS),
        ([0, 3, 8], 4, BAD_OFFSETS),
    ],
)
def test_offsets_that_only_the_device_knows(offsets, longest, wrong, on_device):
    """(Attention on a CPU would look at them itself, so nothing is run.)"""
    model = tiny()
    call = graph_calls.read_call(model, tokens(1, 8)[0], None, None, None, torch.tensor(offsets), longest)
    static = StaticBatch(model, Bucket(16, 4), torch.device("cpu"))
    call.load(static)
    assert int(static.inputs()[1]) & BAD_OFFSETS == wrong


def test_weights_that_change_in_place_are_seen():
    model = tiny()
    compiled = pretended(model)
    before = compiled(tokens()).last_hidden_state
    with torch.no_grad():
        model.embeddings.LayerNorm.weight.mul_(2)
        model.encoder.layer[0].attention.self.query.weight.add_(0.1)
        expected = model(tokens())
    got = compiled(tokens())
    assert not torch.allclose(got.last_hidden_state, before)
    same(got, expected)
    assert compiled.report().captured == 1


def test_quantised_weights_that_change_in_place_are_captured_anew():
    """A graph reads 8-bit copies, which are made again elsewhere when a weight changes, and the old ones given back."""
    model = tiny()
    model.matmul_precision = "int8"
    compiled = pretended(model)
    for captured in (1, 1, 2, 2):
        if captured > compiled.report().captured > 0:
            with torch.no_grad():
                model.encoder.layer[1].attention.self.value.weight.add_(0.1)
        compiled(tokens())
        assert compiled.report().captured == captured


def replace_parameter(model):
    dense = model.encoder.layer[1].output.dense
    dense.weight = torch.nn.Parameter(dense.weight.detach() * 2)


def replace_data(model):
    dense = model.encoder.layer[1].output.dense
    dense.weight.data = dense.weight.data * 2


def replace_module(model):
    old = model.encoder.layer[0].output.dense
    model.encoder.layer[0].output.dense = torch.nn.Linear(old.in_features, old.out_features)


def resize(model):
    model.resize_token_embeddings(130)


def assign(model):
    model.load_state_dict({name: x * 2 for name, x in model.state_dict().items()}, assign=True)


def to_float64(model):
    model.double()


@pytest.mark.parametrize("change", [replace_parameter, replace_data, replace_module, resize, assign, to_float64])
def test_weights_that_are_replaced_are_captured_anew(change):
    model = tiny()
    compiled = pretended(model)
    compiled(tokens())
    compiled(tokens(1, 30))
    change(model)
    with torch.no_grad():
        expected = model(tokens())
    same(compiled(tokens()), expected)
    same(compiled(tokens()), expected)
    assert compiled.report().captured == 3 and compiled.report().dropped == 2


def test_another_backend_is_captured_anew():
    compiled = pretended(tiny())
    compiled(tokens())
    with fastbert.use_backend("reference"):
        compiled(tokens())
    assert compiled.report().captured == 2


def test_nothing_of_the_tail_is_seen():
    """What lies in the buffers behind the last token, and how large they are, changes no bit of a result."""
    model = tiny()
    with fastbert.use_backend("reference"):
        results = []
        for before in ([], [(2, 30)], [(3, 21), (2, 30)]):
            compiled = pretended(model, max_tokens=64)
            compiled._sizes = [64]
            for shape in before:
                compiled(tokens(*shape))
            results.append(compiled(tokens(2, 9), torch.tensor([[1] * 9, [1] * 4 + [0] * 5])).last_hidden_state)
        assert all(torch.equal(x, results[0]) for x in results)


def test_warm_up():
    compiled = pretended(tiny())
    compiled.warm_up([(1, 16), (2, 16), (2, 15)])
    assert compiled.report().captured == 2
    compiled(tokens(2, 16))
    assert compiled.report().captured == 2
    with pytest.raises(ValueError, match=r"shape is \(3, 40\); it must hold 1 to 64 tokens"):
        compiled.warm_up([(3, 40)])
    compiled.clear()
    assert compiled.report().graphs == ()


def test_threads_take_turns():
    model = tiny()
    compiled = pretended(model)
    calls = [(tokens(1 + i % 3, 5 + i), None) for i in range(8)]
    with torch.no_grad():
        expected = [model(*call).last_hidden_state for call in calls]
    problems = []

    def work(offset):
        for i in range(24):
            call = (i * 5 + offset) % len(calls)
            got = compiled(*calls[call]).last_hidden_state
            if not torch.allclose(got, expected[call], atol=1e-5):
                problems.append(call)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and not compiled.outside


def test_inference_mode_and_back():
    """Buffers made in one mode serve in the other."""
    compiled = pretended(tiny())
    with torch.inference_mode():
        inside = compiled(tokens()).last_hidden_state
    outside = compiled(tokens()).last_hidden_state
    assert torch.equal(inside, outside) and not inside.is_inference() and not outside.requires_grad


def test_bad_models_and_limits():
    with pytest.raises(ValueError, match="compile: model is on cpu; CUDA graphs need a GPU"):
        fastbert.compile(tiny())
    with pytest.raises(TypeError, match="compile: model is a Linear; it must be a fastbert model"):
        fastbert.compile(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="max_graphs is 0"):
        fastbert.compile(tiny(), max_graphs=0)


def on_gpu(kind=fastbert.BertModel, dtype=torch.float32, **limits):
    model = tiny(kind, hidden_size=64).cuda().to(dtype)
    return model, fastbert.compile(model, **limits)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", HEADS)
def test_gpu_same_as_the_model(kind, mask, dtype):
    """Tensors on the CPU, on the GPU, and ids there with a mask here."""
    model, compiled = on_gpu(kind, dtype)
    ids, mask_here = tokens(), mask_of(mask)
    mask_there = None if mask_here is None else mask_here.cuda()
    with torch.inference_mode():
        expected = model(ids.cuda(), mask_there)
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    ways = [(ids, mask_here), (ids.cuda(), mask_here), (ids.cuda(), mask_there)]
    for given in ways * 2:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(compiled(*given), expected, rtol=bound, atol=bound)
    assert not compiled.outside
    compiled.check()


@gpu
def test_gpu_replays_wait_for_nothing():
    _, compiled = on_gpu()
    ids, mask, types = tokens().cuda(), mask_of("right"), torch.zeros(3, 8, dtype=torch.long)
    ways = [(ids,), (ids, mask), (ids, mask.cuda()), (tokens(), mask, types)]
    for way in ways:
        compiled(*way)
    captured = compiled.report().captured
    torch.cuda.set_sync_debug_mode("error")
    try:
        for way in ways:
            compiled(*way)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled.report().captured == captured and not compiled.outside


@gpu
def test_gpu_bit_equal_on_repeat_and_beside_others():
    _, compiled = on_gpu(dtype=torch.bfloat16)
    ids = tokens(2, 30).cuda()
    first = compiled(ids)
    for shape in ((1, 5), (3, 40), (8, 16)):
        compiled(tokens(*shape).cuda())
    again = compiled(ids)
    assert all(torch.equal(first[name], again[name]) for name in first)


@gpu
def test_gpu_ids_outside_are_told_and_harmless():
    model, compiled = on_gpu()
    bad = tokens().cuda()
    bad[1, 2] = 1 << 40
    compiled(bad)
    with pytest.raises(ValueError, match="an id in input_ids"):
        compiled.check()
    with torch.inference_mode():
        expected = model(tokens().cuda())
    same(compiled(tokens().cuda()), expected)
    compiled.check()


@gpu
def test_gpu_streams_take_turns():
    """Calls on several streams, whose graphs share memory."""
    model, compiled = on_gpu()
    calls = [tokens(1 + i, 40 - 3 * i).cuda() for i in range(4)]
    with torch.inference_mode():
        expected = [model(ids).last_hidden_state for ids in calls]
    compiled.warm_up([tuple(ids.shape) for ids in calls])
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream, ids in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                found.append(compiled(ids).last_hidden_state)
    torch.cuda.synchronize()
    for i, x in enumerate(found):
        torch.testing.assert_close(x, expected[i % 4], rtol=1e-5, atol=1e-5)


@gpu
def test_gpu_memory_and_moved_weights():
    model, compiled = on_gpu(max_graphs=3)
    for length in (10, 20, 33, 40, 10):
        compiled(tokens(1, length).cuda())
    report = compiled.report()
    assert len(report.graphs) == 3 and report.nbytes > 0
    model.half()
    with torch.inference_mode():
        expected = model(tokens().cuda())
    same(compiled(tokens().cuda()), expected, rtol=3e-2, atol=3e-2)
    model.cpu()
    with pytest.warns(UserWarning, match="the model has left cuda"):
        compiled(tokens())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name, tmp_path):
    make(name, "ForTokenClassification").save_pretrained(tmp_path)
    model = fastbert.AutoModelForTokenClassification.from_pretrained(tmp_path)
    graphs, mask = pretended(model), mask_of("right")
    ids = torch.randint(5, 100, mask.shape).masked_fill(mask == 0, model.config.pad_token_id)
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    packed = {"input_ids": ids[mask == 1], "cu_seqlens": cu_seqlens, "max_seqlen": mask.shape[1]}
    with torch.no_grad():
        for arguments in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}, packed):
            torch.testing.assert_close(graphs(**arguments).logits, model(**arguments).logits, rtol=0, atol=1e-6)
    assert not graphs.report().outside, graphs.report()
