"""Which layers a selection means, told by the names that models give their modules."""

import pytest

from gumbel_attention.config import GumbelAttentionConfig
from gumbel_attention.selection import PatchedLayer, select
from gumbel_attention.state import AttentionState


def _layers(*names):
    return [PatchedLayer(name, "Attention", "registry") for name in names]


ENCODER = _layers(*(f"bert.encoder.layer.{n}.attention.self" for n in range(12)))
DECODER = _layers(*(f"model.layers.{n}.self_attn" for n in range(3)))
HYBRID = _layers(*(f"model.layers.{n}.self_attn" for n in (3, 7, 11)))
BART = _layers(
    *(f"model.encoder.layers.{n}.self_attn" for n in range(3)),
    *(f"model.decoder.layers.{n}.{kind}" for n in range(2) for kind in ("self_attn", "encoder_attn")),
)
T5 = _layers(
    *(f"encoder.block.{n}.layer.0.SelfAttention" for n in range(2)),
    *(f"decoder.block.{n}.layer.{m}" for n in range(2) for m in ("0.SelfAttention", "1.EncDecAttention")),
)
BERT_DECODER = _layers("bert.encoder.layer.0.attention.self", "bert.encoder.layer.0.crossattention.self")
SHARED = _layers("encoder.albert_layer_groups.0.albert_layers.0.attention")


def names(layers, *wanted):
    return [layer.name for layer in select(layers, wanted)]


def test_none_is_every_layer():
    assert select(BART, None) == BART


@pytest.mark.parametrize(
    ("layers", "wanted", "expected"),
    [
        (DECODER, [0], ["model.layers.0.self_attn"]),
        (DECODER, [-1], ["model.layers.2.self_attn"]),
        (DECODER, [-3], ["model.layers.0.self_attn"]),
        (ENCODER, [1], ["bert.encoder.layer.1.attention.self"]),
        (ENCODER, [-1], ["bert.encoder.layer.11.attention.self"]),
        (SHARED, [0], ["encoder.albert_layer_groups.0.albert_layers.0.attention"]),
        (DECODER, [2, 0, 0], ["model.layers.0.self_attn", "model.layers.2.self_attn"]),
        (DECODER, [-1, "*.0.*"], ["model.layers.0.self_attn", "model.layers.2.self_attn"]),
        (ENCODER, ["bert.encoder.layer.1?.*"], [f"bert.encoder.layer.{n}.attention.self" for n in (10, 11)]),
        (ENCODER, ["*.layer.[13].*"], [f"bert.encoder.layer.{n}.attention.self" for n in (1, 3)]),
        (DECODER, ["model.layers.1.self_attn"], ["model.layers.1.self_attn"]),
        (DECODER, ["1:"], ["model.layers.1.self_attn", "model.layers.2.self_attn"]),
        (DECODER, [":-1"], ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
        (DECODER, ["-9:1"], ["model.layers.0.self_attn"]),
        (DECODER, range(1, 3), ["model.layers.1.self_attn", "model.layers.2.self_attn"]),
        (ENCODER, ["2:4"], [f"bert.encoder.layer.{n}.attention.self" for n in (2, 3)]),
        (HYBRID, ["4:"], ["model.layers.7.self_attn", "model.layers.11.self_attn"]),
        (HYBRID, ["-2:"], ["model.layers.7.self_attn", "model.layers.11.self_attn"]),
        (DECODER, [":"], [f"model.layers.{n}.self_attn" for n in range(3)]),
    ],
)
def test_numbers_and_patterns(layers, wanted, expected):
    assert names(layers, *wanted) == expected


def test_a_number_is_that_of_the_layer_also_where_other_layers_have_no_attention():
    assert names(HYBRID, 7) == ["model.layers.7.self_attn"]
    assert names(HYBRID, -1) == ["model.layers.11.self_attn"]
    with pytest.raises(ValueError, match="layers=0 matches nothing"):
        names(HYBRID, 0)


def test_a_number_means_that_layer_of_every_stack():
    assert names(BART, 0) == [
        "model.encoder.layers.0.self_attn",
        "model.decoder.layers.0.self_attn",
        "model.decoder.layers.0.encoder_attn",
    ]
    assert names(BART, -1) == [
        "model.encoder.layers.2.self_attn",
        "model.decoder.layers.1.self_attn",
        "model.decoder.layers.1.encoder_attn",
    ]
    assert names(BART, 2) == ["model.encoder.layers.2.self_attn"]
    assert names(T5, 1) == [
        "encoder.block.1.layer.0.SelfAttention",
        "decoder.block.1.layer.0.SelfAttention",
        "decoder.block.1.layer.1.EncDecAttention",
    ]


@pytest.mark.parametrize(
    ("layers", "part", "ends"),
    [
        (BART, "encoder", ["self_attn"] * 3),
        (BART, "decoder", ["self_attn"] * 2),
        (BART, "cross", ["encoder_attn"] * 2),
        (T5, "encoder", ["SelfAttention"] * 2),
        (T5, "decoder", ["SelfAttention"] * 2),
        (T5, "cross", ["EncDecAttention"] * 2),
        (BERT_DECODER, "encoder", ["attention.self"]),
        (BERT_DECODER, "cross", ["crossattention.self"]),
    ],
)
def test_parts(layers, part, ends):
    found = names(layers, part)
    assert len(found) == len(ends)
    for name, end in zip(found, ends, strict=True):
        assert name.endswith(f".{end}")
        assert part == "cross" or part in name.split(".")


@pytest.mark.parametrize("name", ["self_attn", "cross_attn", "encoder_decoder_attention", "encoder.0.attn"])
def test_cross_attention_is_told_by_its_name(name):
    layer = PatchedLayer(f"decoder.layers.0.{name}", "Attention", "registry")
    assert layer.is_cross == (name in ("cross_attn", "encoder_decoder_attention"))


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (DECODER, 3),
        (DECODER, -4),
        (DECODER, "cross"),
        (DECODER, "encoder"),
        (DECODER, "decoder"),
        (DECODER, "model.layers"),
        (DECODER, "SELF_ATTN"),
        (_layers("attention"), 0),
        (_layers("attention"), -1),
    ],
)
def test_what_matches_nothing_is_refused_and_the_error_names_what_there_is(layers, wanted):
    with pytest.raises(ValueError, match="matches nothing") as error:
        select(layers, [wanted])
    assert all(text in str(error.value) for text in (repr(wanted), layers[0].name))


def test_one_element_that_matches_nothing_is_enough():
    with pytest.raises(ValueError, match="layers=9 matches nothing"):
        select(DECODER, [0, 9])


def test_number_and_stack_of_a_layer():
    layer = T5[-1]
    assert (layer.index, layer.stack) == (1, "decoder.block.*.layer.1.EncDecAttention")
    assert (PatchedLayer("attention", "A", "registry").index, PatchedLayer("0", "A", "registry").index) == (None, 0)
    assert PatchedLayer("conv1d.attention2", "A", "registry").index is None


def test_a_layer_prints_its_name_class_and_way():
    assert str(DECODER[0]) == "model.layers.0.self_attn (Attention, by registry)"


@pytest.mark.parametrize("heads", [[4], [-5], [0, 7]])
def test_heads_that_a_layer_does_not_have_are_refused(heads):
    with pytest.raises(ValueError, match="match nothing: the layer has 4 heads"):
        AttentionState(GumbelAttentionConfig(heads=heads), 4)


@pytest.mark.parametrize("heads", [None, [0], [3, -4], [-1]])
def test_heads_that_a_layer_has_are_accepted(heads):
    assert AttentionState(GumbelAttentionConfig(heads=heads), 4).num_heads == 4
