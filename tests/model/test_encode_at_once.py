"""A padded call of a model in one call of the extension: the bits of the ops one by one, or not taken at all."""

import weakref

import pytest
import torch
from support import TINY, poisoned_memory, require_native
from torch import nn

import fastbert
from fastbert.engine import memory
from fastbert.model import bert as bert_module
from fastbert.model import encoder
from fastbert.native import extension
from fastbert.native.encoder import encoder_kind

ROWS, COLUMNS = 5, 9
PAD = TINY.get("pad_token_id", 0)


@pytest.fixture(autouse=True)
def native_and_poisoned():
    """Fresh memory is NaN, also the workspace's: nothing may be read that was not written."""
    require_native()
    with poisoned_memory():
        memory.keep(memory.fresh_bytes(8 << 20))
        yield
        memory.workspace(0)  # taken, and not kept


@pytest.fixture
def taken(monkeypatch):
    """What each call of encode_at_once returned."""
    found = []

    def noted(*args):
        found.append(encoder.encode_at_once(*args))
        return found[-1]

    monkeypatch.setattr(bert_module, "encode_at_once", noted)
    return found


def make(dtype=torch.float32, precision=None, **options):
    torch.manual_seed(0)
    model = fastbert.BertModel(fastbert.BertConfig(**TINY), **options).eval().to(dtype)
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    model.matmul_precision = precision
    return model


def mask_of(kind):
    mask = torch.ones(ROWS, COLUMNS, dtype=torch.long)
    if kind == "right":
        mask[1, 4:] = mask[3, 1:] = 0
    elif kind == "left":
        mask[1, :5] = mask[3, :8] = 0
    elif kind == "holes":
        mask[0, ::2] = mask[2, 3] = mask[4, 5:] = 0
    elif kind == "empty rows":
        mask[0] = mask[4] = mask[2, 6:] = 0
    elif kind == "nothing":
        mask[:] = 0
    return mask


def arguments(kind, types, positions):
    ids = torch.randint(1, TINY["vocab_size"], (ROWS, COLUMNS))
    found = {"input_ids": ids}
    if kind is not None:
        found["attention_mask"] = mask_of(kind)
    if types:
        found["token_type_ids"] = torch.randint(0, 2, ids.shape)
    if positions:
        found["position_ids"] = torch.arange(COLUMNS).flip(0).expand(ids.shape).contiguous()
    return found


def one_by_one(model, given):
    with fastbert.use_backend("reference", "read_mask"), torch.no_grad():  # a demand: the other ops are native
        return model(**given)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [None, "full", "right", "left", "holes", "empty rows", "nothing"])
@pytest.mark.parametrize(("types", "positions"), [(False, False), (True, False), (True, True)])
def test_bits_are_those_of_the_ops(kind, types, positions, taken):
    model, given = make(), arguments(kind, types, positions)
    with torch.no_grad():
        output = model(**given)
    assert taken[0] is not None
    same(output, one_by_one(model, given))
    assert taken[1] is None


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8")]
)
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (29, 40)])
def test_dtypes_precisions_and_sizes(dtype, precision, shape, taken):
    model = make(dtype, precision)
    ids = torch.randint(1, TINY["vocab_size"], shape)
    mask = (torch.rand(shape) < 0.7).long()
    with torch.inference_mode():
        output = model(ids, attention_mask=mask)
    assert taken[0] is not None
    same(output, one_by_one(model, {"input_ids": ids, "attention_mask": mask}))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_fewer_tokens_need_no_more_memory_than_was_asked_for(threads):
    """The workspace is for any number of real tokens up to all; what a smaller number needs is not always less."""
    model, E = make(), TINY["hidden_size"]
    with torch.no_grad():
        model(torch.ones(1, 2, dtype=torch.long))
    whole = vars(model)["_fastbert_plan"].whole
    batch = whole.forms["batch", extension.chosen_isa()[1]][0]
    words, _ = whole.forms["descriptors", extension.chosen_isa()[1]]
    where, kind = (len(whole.layers), words.buffer_info()[0]), encoder_kind(whole, E, torch.float32)
    isa = extension.chosen_isa()[1]
    for rows in (1, 7, 64, 300):
        room = batch.model.workspace_bytes(rows, 8, isa, threads)
        most = max(
            extension.C.encoder_workspace_bytes(kind, *where, tokens, 0, isa, threads) for tokens in range(rows * 8 + 1)
        )
        states = 2 * rows * 8 * E * 4
        assert room >= most + states


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.float16])
def test_masks_of_other_dtypes(dtype, taken):
    model, given = make(), arguments("holes", False, False)
    expected = one_by_one(model, given)
    with torch.no_grad():
        output = model(**given | {"attention_mask": given["attention_mask"].to(dtype)})
    assert taken[-1] is not None
    same(output, expected)


def test_without_a_pooler(taken):
    model, given = make(add_pooling_layer=False), arguments("right", False, False)
    with torch.no_grad():
        output = model(**given)
    assert taken[0] is not None and output.pooler_output is None
    same(output, one_by_one(model, given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.full((ROWS, COLUMNS), TINY["vocab_size"])}, "input_ids holds"),
        ({"input_ids": torch.full((ROWS, COLUMNS), -1)}, "input_ids holds -1"),
        ({"token_type_ids": torch.full((ROWS, COLUMNS), 7)}, "token_type_ids holds 7"),
        ({"position_ids": torch.full((ROWS, COLUMNS), 10**9)}, "position_ids holds"),
        ({"attention_mask": torch.full((ROWS, COLUMNS), 2)}, "attention_mask holds 2"),
        ({"attention_mask": torch.ones(ROWS, 3, dtype=torch.long)}, "attention_mask has shape"),
        ({"input_ids": torch.ones(1, 10_000, dtype=torch.long)}, "max_position_embeddings"),
    ],
)
def test_invalid_arguments_raise_as_without(change, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        make()(**{"input_ids": torch.ones(ROWS, COLUMNS, dtype=torch.long), **change})


def hook_a_linear(model):
    model.encoder.layer[0].output.dense.register_forward_hook(lambda module, args, out: 2 * out)


def wrap_the_table(model):
    class Doubled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    model.embeddings.word_embeddings.__class__ = Doubled


def table_without_a_parameter(model):
    table = model.embeddings.token_type_embeddings
    weight = table.weight.detach().clone()
    del table.weight
    table.weight = weight


def drop_embeddings(model):
    model.embeddings.dropout.train()
    model.embeddings.dropout.p = 0.5


@pytest.mark.parametrize("change", [hook_a_linear, wrap_the_table, table_without_a_parameter, drop_embeddings])
def test_parts_that_are_not_plain_are_not_taken(change, taken):
    model, given = make(), arguments("right", False, False)
    with torch.no_grad():
        model(**given)
        change(model)
        model(**given)
    assert taken[0] is not None and taken[1] is None


@pytest.mark.parametrize("case", ["gradient", "autocast", "int32", "strided"])
def test_calls_that_are_not_taken(case, taken):
    model, given = make(), arguments("right", False, False)
    expected = one_by_one(model, given)
    if case == "int32":
        given["input_ids"] = given["input_ids"].int()
    elif case == "strided":
        given["input_ids"] = given["input_ids"].t().contiguous().t()
    with torch.set_grad_enabled(case == "gradient"), torch.autocast("cpu", enabled=case == "autocast"):
        output = model(**given)
    assert taken[-1] is None
    if case != "autocast":
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)


def test_writes_are_seen():
    """The one call reads weights through pointers: a write of any kind drops them."""
    model, given = make(), arguments("right", True, False)
    position, pooler = model.embeddings.position_embeddings.weight, model.pooler.dense.weight
    writes = [
        lambda: model.embeddings.word_embeddings.weight.data.mul_(2),
        lambda: model.embeddings.LayerNorm.bias.data.add_(1),
        lambda: setattr(pooler, "data", 2 * pooler.data),
        lambda: setattr(position, "data", 3 * position.data),
        lambda: model.resize_token_embeddings(TINY["vocab_size"] + 8),
        lambda: model.encoder.layer[1].output.LayerNorm.weight.data.mul_(0.5),
    ]
    with torch.no_grad():
        before = model(**given)
        for write in writes:
            write()
            after = model(**given)
            assert not torch.equal(after.pooler_output, before.pooler_output) or write is writes[4]
            same(after, one_by_one(model, given))
            before = after


def test_threads_share_a_model():
    from concurrent.futures import ThreadPoolExecutor

    model, given = make(), arguments("holes", True, False)
    expected = one_by_one(model, given)

    def call(_):
        with torch.no_grad():
            return model(**given)

    with ThreadPoolExecutor(4) as pool:
        for output in pool.map(call, range(40)):
            same(output, expected)


def test_a_call_keeps_what_it_reads_until_it_returns():
    """Another thread, or a signal's handler, may drop the forms meanwhile."""
    model = make()
    with torch.no_grad():
        model(torch.ones(1, 2, dtype=torch.long))
    forms = vars(model)["_fastbert_plan"].whole.forms
    isa = extension.chosen_isa()[1]
    words, encoder_of = weakref.ref(forms["descriptors", isa][0]), forms["batch", isa][0]
    fastbert.refresh(model)
    assert not forms and words() is not None
    del encoder_of
    assert words() is None


def test_a_batch_whose_memory_is_not_kept_is_not_taken(taken):
    model = make()
    ids = torch.ones(40_000, 8, dtype=torch.long)
    mask = torch.zeros_like(ids)
    mask[:3] = 1
    with torch.no_grad():
        output = model(ids, attention_mask=mask)
    assert taken == [None]
    assert output.last_hidden_state[:3].all() and not output.last_hidden_state[3:].any()
