"""What every mixer promises, whatever its memory."""

import itertools

import pytest
import torch

from ovq.layers import (
    ConstantStateMixer,
    FullAttention,
    GatedDeltaNet,
    Mamba2,
    MixerCache,
    OVQAttention,
    SinkAttention,
    SlidingWindowAttention,
)
from ovq.ops.parts import of_rows
from ovq.ops.splits import alike
from ovq_lab.mixers import (
    MIXERS,
    ForgettingAttention,
    KimiDeltaAttention,
    KVMAttention,
    LinearAttention,
    MesaNet,
    RavenAttention,
    VQAttention,
)
from tests.written import Written

HIDDEN, TOKENS, ROWS = 24, 23, 3
MAKERS = {
    "ovq": lambda **kw: OVQAttention(HIDDEN, 4, 2, 6, num_slots=7, chunk_size=4, conv_size=3, **kw),
    "ovq-rope": lambda **kw: OVQAttention(
        HIDDEN, 4, 4, 6, num_slots=7, chunk_size=4, conv_size=0, use_rope=True, merge="updated", **kw
    ),
    "ovq-norm-rate": lambda **kw: OVQAttention(
        HIDDEN,
        *(4, 2, 6),
        num_slots=7,
        chunk_size=4,
        conv_size=3,
        ablation={"bias": "count+norm", "rate": 0.2},
        **kw,
    ),
    "ovq-gates": lambda **kw: OVQAttention(
        HIDDEN, 4, 2, 6, num_slots=7, chunk_size=4, conv_size=3, forget_gate=True, output_gate=True, **kw
    ),
    "full": lambda **kw: FullAttention(HIDDEN, 4, 2, 6, conv_size=3, **kw),
    "full-rope": lambda **kw: FullAttention(HIDDEN, 4, 1, 6, conv_size=0, use_rope=True, **kw),
    "fox": lambda **kw: ForgettingAttention(HIDDEN, 4, 2, 6, conv_size=3, **kw),
    "fox-rope": lambda **kw: ForgettingAttention(HIDDEN, 4, 1, 6, conv_size=0, use_rope=True, **kw),
    "sliding": lambda **kw: SlidingWindowAttention(HIDDEN, 4, 2, 6, sliding_window=5, conv_size=3, **kw),
    "sliding-nope": lambda **kw: SlidingWindowAttention(
        HIDDEN, 4, 4, 6, sliding_window=2, conv_size=0, use_rope=False, **kw
    ),
    "sinks": lambda **kw: SinkAttention(HIDDEN, 4, 2, 6, num_sinks=2, sink_window=5, conv_size=3, **kw),
    "sinks-long": lambda **kw: SinkAttention(
        HIDDEN, 4, 4, 6, num_sinks=3, sink_window=30, conv_size=0, output_gate=True, **kw
    ),
    "vq": lambda **kw: VQAttention(HIDDEN, 4, 2, 6, num_slots=7, chunk_size=4, conv_size=3, **kw),
    "kvm": lambda **kw: KVMAttention(HIDDEN, 4, 2, 6, num_slots=7, kvm_chunk_size=3, conv_size=3, **kw),
    "kvm-no-leak": lambda **kw: KVMAttention(
        HIDDEN,
        *(4, 2, 6),
        num_slots=9,
        kvm_chunk_size=2,
        kvm_window_chunks=3,
        kvm_growth="plateau",
        kvm_sinks=0,
        kvm_rope_dim=4,
        kvm_norm_leak=False,
        conv_size=0,
        **kw,
    ),
    "raven": lambda **kw: RavenAttention(HIDDEN, 4, 2, 6, raven_slots=9, raven_top_k=3, conv_size=3, **kw),
    "linear": lambda **kw: LinearAttention(HIDDEN, 4, 2, 6, conv_size=3, **kw),
    "deltanet": lambda **kw: GatedDeltaNet(HIDDEN, 4, 2, 6, conv_size=3, **kw),
    "kda": lambda **kw: KimiDeltaAttention(HIDDEN, 4, 2, 6, kda_value_dim=5, conv_size=3, **kw),
    "mesanet": lambda **kw: MesaNet(HIDDEN, 4, 2, 6, conv_size=3, **kw),
    "mamba": lambda **kw: Mamba2(HIDDEN, 4, head_dim=9, state_size=5, conv_size=3, **kw),
}
# Float64 throughout: rotation by other columns, or sums in another order, stay far below this.
TOLERANCE = {"atol": 1e-10, "rtol": 0}


@pytest.fixture(params=MAKERS)
def mixer(request):
    torch.manual_seed(0)
    # The slots of VQ-attention would move with every call in training.
    return MAKERS[request.param]().double().eval()


@pytest.fixture
def x():
    return torch.randn(ROWS, TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mask_of(lengths, side):
    column = torch.arange(TOKENS)
    if side == "left":
        column = column.flip(0)
    return (column < torch.tensor(lengths)[:, None]).long()


def test_what_inference_mode_has_read_is_trained_on(mixer, x):
    gradients = []
    for reading in (torch.inference_mode, torch.no_grad):
        with reading():
            _, _, cache = mixer(x[:, :9], use_cache=True)
        o, _, _ = mixer(x[:, 9:], past_key_values=cache)
        gradients.append(torch.autograd.grad(o.square().sum(), mixer.qkv_proj.weight)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("cuts", [[1], [4, 5], [3, 4, 8, 20], list(range(1, TOKENS))])
def test_a_sequence_in_parts_equals_the_whole(mixer, x, cuts):
    expected, _, _ = mixer(x)
    parts, cache = [], None
    with torch.no_grad():
        for part in x.tensor_split(cuts, dim=1):
            o, _, cache = mixer(part, past_key_values=cache, use_cache=True)
            parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), expected, **TOLERANCE)
    assert cache.get_seq_length() == TOKENS


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_gives_zeros(mixer, x, side):
    mask = mask_of([TOKENS, 9, 2], side)
    o, _, _ = mixer(x, mask)
    assert o[mask == 0].abs().max() == 0
    for row in range(ROWS):
        real = mask[row].bool()
        expected, _, _ = mixer(x[row : row + 1, real])
        torch.testing.assert_close(o[row : row + 1, real], expected, **TOLERANCE)


def test_a_row_of_padding_alone_gives_zeros_and_finite_gradients(mixer, x):
    x.requires_grad_()
    mask = mask_of([TOKENS, 0, 4], "left")
    o, _, _ = mixer(x, mask)
    assert o[1].abs().max() == 0
    o.square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[1].abs().max() == 0
    assert x.grad[mask == 0].abs().max() == 0
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_be_anything(mixer, x, side):
    mask = mask_of([TOKENS, 9, 0], side)
    found = []
    for padding in (0, torch.nan):
        x = x.masked_fill(mask[..., None] == 0, padding).requires_grad_()
        o, _, _ = mixer(x, mask)
        grads = torch.autograd.grad(o.square().sum(), [x, *mixer.parameters()], allow_unused=True)
        found.append([o, *(grad for grad in grads if grad is not None)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("cuts", [[20], [3, 11, 14], list(range(1, TOKENS))])
def test_left_padded_rows_can_be_continued(mixer, x, cuts):
    mask = mask_of([TOKENS, 9, 6], "left")
    expected, _, _ = mixer(x, mask)
    parts, cache, end = [], None, 0
    with torch.no_grad():
        for part in x.tensor_split(cuts, dim=1):
            end += part.shape[1]
            o, _, cache = mixer(part, mask[:, :end], past_key_values=cache, use_cache=True)
            parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), expected, **TOLERANCE)


def test_packed_rows_equal_separate_ones(mixer, x):
    bounds = [0, 1, 8, 8, TOKENS]
    o, _, _ = mixer(x[:1], cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    rows = [x[:1, a:b] for a, b in itertools.pairwise(bounds) if a < b]
    torch.testing.assert_close(o, torch.cat([mixer(row)[0] for row in rows], 1), **TOLERANCE)


def test_packed_rows_of_very_different_lengths_and_their_gradients_are_those_alone(mixer):
    lengths = [3, 70, 1, 0, 2, 9, 1, 4, 1, 3, 1, 1, 0, 17, 2]
    assert len(alike(lengths)) == 5
    x = torch.randn(1, sum(lengths), HIDDEN, dtype=torch.float64, requires_grad=True)
    o, _, _ = mixer(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    expected = torch.cat([mixer(row)[0] for row in x.split(lengths, 1) if row.shape[1]], 1)
    torch.testing.assert_close(o, expected, **TOLERANCE)
    leaves = [x, *mixer.parameters()]
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (o, expected)]
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("changed", [1, 4, 13])
def test_no_output_depends_on_a_later_token(mixer, x, changed):
    other = x.clone()
    other[:, changed] += 1
    before, after = mixer(x)[0], mixer(other)[0]
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


def test_every_parameter_gets_a_gradient(mixer, x):
    mixer(x)[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("num_tokens", [1, 3, 4, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_bytes_is_the_size_of_a_real_cache(mixer, x, num_tokens, dtype):
    _, _, cache = mixer.to(dtype)(x[:, :num_tokens].to(dtype), use_cache=True)
    found = {name: (tuple(t.shape), t.dtype) for name, t in cache.layers[0].parts().items()}
    assert found == of_rows(mixer.state_spec(num_tokens, dtype), ROWS)
    assert cache.nbytes == ROWS * mixer.state_bytes(num_tokens, dtype)


@pytest.mark.parametrize("name", MIXERS)
def test_only_the_state_of_full_attention_grows_without_a_bound(name):
    assert MIXERS[name](HIDDEN, 4).has_bounded_state == (name not in ("full_attention", "fox"))


def test_state_bytes_before_the_first_token(mixer):
    assert mixer.state_bytes(0) == MixerCache().nbytes == 0


def test_batch_operations_on_a_cache_equal_those_on_the_rows(mixer, x):
    def continued(cache, rows):
        return mixer(x[rows, 10:], past_key_values=cache)[0]

    def cached():
        return mixer(x[:, :10], use_cache=True)[2]

    with torch.no_grad():
        expected, _, _ = mixer(x)
        for operation, argument, rows in (
            ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
            ("batch_select_indices", torch.tensor([1]), [1]),
            ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ):
            cache = cached()
            getattr(cache, operation)(argument)
            o = continued(cache, rows)
            torch.testing.assert_close(o, expected[rows, 10:], **TOLERANCE)
        with pytest.raises(ValueError, match="repeats: expected an integer of at least 1, found 0"):
            cache.batch_repeat_interleave(0)
        cache = cached()
        cache.reset()
        assert (cache.nbytes, cache.get_seq_length()) == (0, 0)
        torch.testing.assert_close(mixer(x, past_key_values=cache)[0], expected, **TOLERANCE)


def test_layers_share_a_cache_by_their_index(x):
    torch.manual_seed(0)
    stack = [make(layer_idx=i).double().eval() for i, make in enumerate(MAKERS.values())]

    def run(part, cache):
        for layer in stack:
            o, _, cache = layer(part, past_key_values=cache, use_cache=True)
            part = part + o
        return part, cache

    with torch.no_grad():
        expected, whole = run(x, None)
        first, cache = run(x[:, :9], None)
        second, cache = run(x[:, 9:], cache)
    assert len(cache.layers) == len(stack)
    torch.testing.assert_close(torch.cat([first, second], 1), expected, **TOLERANCE)
    assert cache.nbytes == whole.nbytes


def test_on_the_meta_device_outputs_have_shapes(mixer, x):
    o, _, cache = mixer.to("meta")(x.to("meta"), use_cache=True)
    o, _, _ = mixer(o[:, :1], past_key_values=cache)
    assert (o.device.type, o.shape) == ("meta", x[:, :1].shape)


def test_bfloat16_and_autocast_stay_near_float32(mixer, x):
    x = x.float()
    expected = mixer.float()(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = mixer(x)[0]
    assert under_autocast.dtype == torch.bfloat16
    o = mixer.bfloat16()(x.bfloat16())[0]
    assert o.dtype == torch.bfloat16
    for found in (under_autocast, o):
        # Rounding may send a few keys to other slots: most outputs are near, not all.
        near = (found.float() - expected).abs() < 0.02
        assert near.float().mean() > 0.8


def test_unknown_keyword_arguments_are_refused(mixer, x):
    with pytest.raises(ValueError, match=r"cu_seqlens.*found \['cu_seqlen'\]"):
        mixer(x[:1], cu_seqlen=torch.tensor([0, TOKENS]))
    with pytest.raises(ValueError, match="output_attentions=False, found True"):
        mixer(x, output_attentions=True)


def test_what_a_model_is_given_may_be_handed_to_its_layers(mixer, x):
    given = {"num_items_in_batch": 7, "cache_position": torch.arange(TOKENS), "return_dict": True}
    assert torch.equal(mixer(x, **given)[0], mixer(x)[0])


@pytest.mark.parametrize("shape", [(ROWS, TOKENS, HIDDEN + 1), (TOKENS, HIDDEN), (ROWS, 0, HIDDEN)])
def test_hidden_states_of_another_shape_are_refused(mixer, shape):
    with pytest.raises(ValueError, match=rf"tokens >= 1, {HIDDEN}\], found"):
        mixer(torch.zeros(shape, dtype=torch.float64))


def test_what_is_no_tensor_is_refused(x):
    mixer = MAKERS["ovq"]().double()
    with pytest.raises(ValueError, match=r"hidden_states of shape .* found list"):
        mixer(x.tolist())
    with pytest.raises(ValueError, match=r"attention_mask of shape .* = \[3, 23\] .* found list"):
        mixer(x, [[1] * TOKENS] * ROWS)


def test_a_batch_without_rows(mixer, x):
    o, _, cache = mixer(x[:0, :9], use_cache=True)
    assert o.shape == (0, 9, HIDDEN)
    o, _, cache = mixer(x[:0, 9:], past_key_values=cache)
    assert o.shape == (0, TOKENS - 9, HIDDEN)
    assert cache.get_seq_length() == TOKENS


def test_a_call_that_fails_leaves_the_cache_as_it_was(mixer, x):
    _, _, cache = mixer(x[:, :9], use_cache=True)

    def fail(*args):
        raise KeyboardInterrupt

    # As late as it can: when the state has been stored. The call would also be the first with padding.
    hook = mixer.o_proj.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        mixer(x[:, 9:15], mask_of([15, 15, 12], "right")[:, :15], past_key_values=cache)
    hook.remove()
    o, _, _ = mixer(x[:, 9:], past_key_values=cache)
    torch.testing.assert_close(o, mixer(x)[0][:, 9:], **TOLERANCE)


class Adapted(torch.nn.Module):
    """A projection that does not say its sizes."""

    def __init__(self, projection):
        super().__init__()
        self.weight = projection.weight

    def forward(self, x):
        return x @ self.weight.T


def test_a_projection_need_not_say_its_sizes(mixer, x):
    expected, _, cache = mixer(x, use_cache=True)
    spec = mixer.state_spec(TOKENS, x.dtype)
    mixer.qkv_proj, mixer.o_proj = Adapted(mixer.qkv_proj), Adapted(mixer.o_proj)
    o, _, found = mixer(x, use_cache=True)
    torch.testing.assert_close(o, expected)
    assert found.nbytes == cache.nbytes
    assert mixer.state_spec(TOKENS, x.dtype) == spec


@pytest.mark.parametrize(("num_cached", "num_rows"), [(2, 3), (3, 1), (1, 3)])
def test_a_cache_of_other_rows_is_refused(mixer, x, num_cached, num_rows):
    _, _, cache = mixer(x[:num_cached, :9], use_cache=True)
    with pytest.raises(ValueError, match=f"past_key_values: expected {num_rows} rows, found {num_cached}"):
        mixer(x[:num_rows, 9:], past_key_values=cache)


def test_caches_that_would_give_wrong_numbers_are_refused(mixer, x):
    _, _, cache = mixer(x, mask_of([TOKENS, 9, 2], "left"), use_cache=True)
    with pytest.raises(ValueError, match="some of the cached ones are padding"):
        mixer(x[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="cached columns"):
        mixer(x[:1], cu_seqlens=torch.tensor([0, TOKENS]), past_key_values=cache)
    with pytest.raises(ValueError, match="packed rows cannot be continued"):
        mixer(x[:1], cu_seqlens=torch.tensor([0, TOKENS]), use_cache=True)
    with pytest.raises(ValueError, match="MixerCache or an OVQCache, found dict"):
        mixer(x, past_key_values={})


def test_a_cache_without_padding_left_goes_on_with_a_mask_of_ones(mixer, x):
    _, _, cache = mixer(x[:, :10], mask_of([TOKENS, TOKENS, 16], "left")[:, :10], use_cache=True)
    cache.batch_select_indices(torch.tensor([0, 1]))
    o, _, _ = mixer(x[:2, 10:], torch.ones(2, TOKENS), past_key_values=cache)
    torch.testing.assert_close(o, mixer(x[:2])[0][:, 10:], **TOLERANCE)


def test_a_cache_of_another_mixer_is_refused(x):
    _, _, cache = MAKERS["full"]().double()(x, use_cache=True)
    with pytest.raises(ValueError, match=r"layer 0 .* to hold an OVQState, found all keys and values"):
        MAKERS["ovq"]().double()(x, past_key_values=cache)
    with pytest.raises(ValueError, match="hold the keys and values of a window of 5, found all keys and"):
        MAKERS["sliding"]().double()(x, past_key_values=cache)


@pytest.mark.parametrize("cls", MIXERS.values())
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "num_heads: expected an integer of at least 1, found 0"),
        ({"num_heads": HIDDEN / 4}, r"num_heads: expected an integer of at least 1, found 6\.0"),
        ({"num_heads": 5}, "divide hidden_size .* found hidden_size=24, num_heads=5"),
        ({"num_heads": 2, "head_dim": 0}, "head_dim: expected an integer of at least 1, found 0"),
        ({"num_heads": 2, "head_dim": 6.0}, r"head_dim: expected an integer of at least 1, found 6\.0"),
        ({"num_heads": 2, "head_dim": 3, "use_rope": True}, "even head_dim .* found 3|no rotary embedding"),
        ({"num_heads": 2, "conv_size": 1}, "conv_size .* found 1"),
        ({"num_heads": 2, "conv_size": -1}, "conv_size .* found -1"),
        ({"num_heads": 2, "conv_size": 2.5}, r"conv_size .* found 2\.5"),
        ({"num_heads": 2, "layer_idx": -1}, "layer_idx: expected an integer of at least 0, found -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(HIDDEN, **arguments)


@pytest.mark.parametrize("name", [name for name, cls in MIXERS.items() if not cls.supports_rope])
def test_rotary_embedding_is_refused_where_there_is_none(name):
    with pytest.raises(ValueError, match="use_rope=False, found True"):
        MIXERS[name](HIDDEN, 4, use_rope=True)


@pytest.mark.parametrize("cls", MIXERS.values())
def test_key_value_heads_divide_heads_where_there_are_any(cls):
    error, message = (ValueError, "divide num_heads, found num_heads=3, num_kv_heads=2")
    if cls is Mamba2:
        error, message = (TypeError, "unexpected keyword argument 'num_kv_heads'")
    with pytest.raises(error, match=message):
        cls(HIDDEN, 3, num_kv_heads=2)


@pytest.mark.parametrize("cls", MIXERS.values())
def test_a_misspelt_argument_is_refused(cls):
    message = rf"{cls.__name__}\(\) got an unexpected keyword argument 'conv_sizes'; did you mean 'conv_size'"
    with pytest.raises(TypeError, match=message):
        cls(HIDDEN, 4, conv_sizes=3)


@pytest.mark.parametrize("name", [n for n, cls in MIXERS.items() if issubclass(cls, ConstantStateMixer)])
def test_a_state_of_another_size_is_refused(name):
    x = torch.randn(3, 5, HIDDEN)
    layer = MIXERS[name](HIDDEN, 4, head_dim=6, conv_size=0)
    _, _, cache = MIXERS[name](HIDDEN, 4, head_dim=12, conv_size=0)(x, use_cache=True)
    with pytest.raises(ValueError, match=r"expected .* of shape \[3, .*found \[3, "):
        layer(x, past_key_values=cache)


@pytest.mark.parametrize("name", MIXERS)
def test_the_names_of_weights_are_those_of_saved_models(name):
    """Written out, so that nothing is renamed without a thought for the models there are."""
    decaying = {"gate_proj.weight", "out_norm.weight", "rates.A_log", "rates.dt_bias"}
    slots = {"key_sum", "count", "next_key_sum", "next_count"}
    own = {
        "gated_deltanet": decaying,
        "kda": decaying | {"decay_up_proj.weight", "gate_up_proj.weight", "gate_up_proj.bias"},
        "mesanet": {"gate_proj.weight", "gate_proj.bias", "ridge_bias", "out_norm.weight"},
        "mamba2": decaying | {"skip"},
        "kvm": {"gate_proj.weight", "window_temperature", "state_temperature"}
        | {f"{norm}_norm.{tensor}" for norm in ("q", "k", "state") for tensor in ("weight", "bias")},
        "raven": {"router_proj.weight", "rates.A_log", "rates.dt_bias"}
        | {f"{norm}_norm.weight" for norm in ("q", "k", "out")},
        "fox": {"qk_norm.beta", "forget_gate.weight", "forget_gate.bias"},
        "vq": {"qk_norm.beta"} | {f"dictionary.{tensor}" for tensor in slots},
    }.get(name, {"qk_norm.beta"})
    expected = {"qkv_proj.weight", "qkv_conv.weight", "o_proj.weight"} | own
    assert set(MIXERS[name](HIDDEN, 4).state_dict()) == expected


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in ("full_attention", "fox")])
def test_training_with_a_bounded_state_is_linear_in_tokens(name):
    """The gradient of an index, taken once per chunk, would be as large as the whole each time."""
    # Few slots, so that the state is as large in either case.
    mixer = MIXERS[name](HIDDEN, 4, **{"num_slots": 64} if name in ("ovq", "kvm", "vq") else {})

    def written(length):
        x = torch.randn(1, length, HIDDEN, requires_grad=True)
        with Written() as mode:
            mixer(x)[0].sum().backward()
        return mode.numel

    assert written(2048) < 2.2 * written(1024)


@pytest.mark.parametrize("name", [n for n in MIXERS if n not in ("ovq", "full_attention", "fox")])
def test_packed_rows_beside_a_long_one_cost_no_more_than_without_it(name):
    mixer = MIXERS[name](HIDDEN, 4, **{"num_slots": 64} if name in ("kvm", "vq") else {})

    def written(lengths):
        x = torch.randn(1, sum(lengths), HIDDEN, requires_grad=True)
        with Written() as mode:
            mixer(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))[0].sum().backward()
        return mode.numel

    assert written([512] + 60 * [5]) < 1.3 * (written([512]) + written(60 * [5]))
