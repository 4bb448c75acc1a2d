"""`torch.compile` of a model: a single graph, with masks, packed rows and caches, and the same numbers."""

import pytest
import torch

from ovq.hf import OVQCache
from ovq.hf.cache import CACHE_KEY
from tests.hf.common import left_padded, make_model, random_ids

# Dynamo triggers deprecation warnings of torch's own modules as it imports them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
MIXERS = {"num_hidden_layers": 2, "mixer_types": ["sliding_attention", "ovq"]}


@pytest.fixture(autouse=True)
def forgotten_graphs():
    yield
    torch._dynamo.reset()


def whole(model, backend="aot_eager"):
    """The model as a single graph, differentiated ahead of time, but run by PyTorch: no compiler needed."""
    return torch.compile(model, backend=backend, fullgraph=True)


def padded():
    ids, mask = left_padded([random_ids(1, n, seed=n)[0] for n in (14, 9)])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed():
    ids = random_ids(1, 14)
    return {"input_ids": ids, "labels": ids, "cu_seqlens": torch.tensor([0, 5, 5, 14, 14])}


def plain():
    ids = random_ids(2, 14)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    ("inputs", "changes"),
    [
        # All that is in it is in one of the others as well.
        pytest.param(plain(), {}, marks=pytest.mark.slow),
        (padded() | {"skip_logits": True}, {"merge_gate": True, "forget_gate": True, "merge": "nearest"}),
        (packed(), {}),
    ],
    ids=["plain", "padded, without logits", "packed"],
)
def test_training_is_a_single_graph_and_gives_the_same_loss_and_gradients(inputs, changes):
    model = make_model(**MIXERS, **changes).train()
    results = []
    for function in (model, whole(model)):
        model.zero_grad()
        loss = function(**inputs).loss
        loss.backward()
        results.append((loss.double(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    # transformers' loss, which takes the place of that without logits, computes in float32.
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if "skip_logits" in inputs else {}
    torch.testing.assert_close(*results, **tolerance)


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "num_next"),
    # Without gates states have fewer parts; `tests/ops/test_operator.py` compiles calls with those.
    [
        pytest.param({}, 9, marks=pytest.mark.slow, id="plain, a prompt in two pieces"),
        pytest.param({"forget_gate": True}, 1, id="forgetting"),
    ],
)
def test_a_cache_goes_in_and_out_of_a_single_graph(changes, num_next):
    model, graphs = make_model(**MIXERS, **changes), []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled, ids = whole(model, count), random_ids(2, 40)
    expected = model(ids).logits
    outputs = compiled(ids[:, :17], use_cache=True)
    cache, logits = getattr(outputs, CACHE_KEY), [outputs.logits]
    assert isinstance(cache, OVQCache)
    # Perhaps a piece of a prompt, then token by token; the last ones without the graph.
    for piece in (ids[:, 17 : 17 + num_next], *ids[:, 17 + num_next :].split(1, 1)):
        function = compiled if cache.get_seq_length() < 34 else model
        logits.append(function(piece, **{CACHE_KEY: cache}).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected)
    # The prompt, the piece, the first token, and one for any number of tokens read.
    assert len(graphs) <= 3 + (num_next > 1)


@pytest.mark.slow
@torch.no_grad()
def test_rows_with_padding_go_on_in_a_graph():
    model = make_model(**MIXERS)
    compiled = whole(model)
    ids, mask = left_padded([random_ids(1, n, seed=n)[0] for n in (14, 9)])
    expected = model(ids, attention_mask=mask).logits
    outputs = compiled(ids[:, :11], attention_mask=mask[:, :11], use_cache=True)
    more = compiled(ids[:, 11:], attention_mask=mask, **{CACHE_KEY: getattr(outputs, CACHE_KEY)})
    found = torch.cat([outputs.logits, more.logits], 1)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1])
    with pytest.raises(ValueError, match="found a hole in row 0"):
        compiled(ids, attention_mask=mask.index_fill(1, torch.tensor([12]), 0))


def test_projections_in_a_graph_are_those_of_the_kernels(monkeypatch):
    from ovq.layers import products

    monkeypatch.setattr(products, "_HAS_FASTER_PRODUCTS", True)
    layer = products.Linear(24, 40)
    names = []

    def note(graph, example):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(layer, backend=note, fullgraph=True)
    for shape in ((2, 24), (3, 5, 24), (600, 24)):
        x = torch.randn(*shape, requires_grad=True)
        grad = torch.randn(*shape[:-1], 40)
        results = [
            (y, *torch.autograd.grad(y, (x, layer.weight), grad)) for y in (compiled(x), x @ layer.weight.T)
        ]
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    assert any("ovq.linear" in name for name in names)


OTHERS = ["sink_attention", "gated_deltanet", "mamba2", "linear_attention", "vq", "raven", "mesanet"]


@pytest.mark.parametrize("mixers", [["ovq"], pytest.param(OTHERS, marks=pytest.mark.slow)], ids=len)
@torch.no_grad()
def test_a_model_is_exported_for_any_number_of_rows(mixers):
    model = make_model(num_hidden_layers=len(mixers), mixer_types=mixers)
    rows = {"input_ids": {0: torch.export.Dim("rows", min=2, max=64)}, "use_cache": None}
    given = {"input_ids": random_ids(3, 9), "use_cache": False}
    program = torch.export.export(model, (), given, dynamic_shapes=rows)
    ids = random_ids(5, 9)
    found = program.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_an_exported_model_takes_any_mask():
    model, ids = make_model(), random_ids(2, 9)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    program = torch.export.export(model, (), given)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    given["attention_mask"] = mask
    torch.testing.assert_close(program.module()(**given).logits, model(**given).logits)
