"""What may be asked of clients: a request arrives as it was sent or is refused; both sides index the answer alike."""

import json
import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from task.errors import ConfigError, ModelError
from task.signals import MAX_REQUEST_BYTES, NOTHING, SignalRequest, request_from_json, signal_layout
from task.units import make_layout

LAYOUT = make_layout(
    {
        "blocks.0.attn.qkv.lora_A.weight": (2, 4),
        "blocks.0.attn.qkv.lora_B.weight": (12, 2),
        "blocks.1.mlp.fc1.lora_A.weight": (2, 5),
        "blocks.1.mlp.fc1.lora_B.weight": (16, 2),
        "head.weight": (3, 6),
        "head.bias": (3,),
    }
)
FROZEN_A = make_layout({s.name: s.shape for s in LAYOUT.tensors if "lora_A" not in s.name})
HEADLESS = make_layout({s.name: s.shape for s in LAYOUT.tensors if s.unit != "head"})

measured = {
    "class_variance": st.booleans(),
    "update_scores": st.booleans(),
    "update_norms": st.booleans(),
    "gram": st.booleans(),
    "fisher_samples": st.integers(0, 1_000_000),
    "samples": st.sampled_from(["correct", "all"]),
}
along = st.builds(SignalRequest, class_moments=st.sampled_from(["none", "diagonal"]), **measured)
afterwards = st.builds(
    SignalRequest,
    class_moments=st.sampled_from(["none", "diagonal", "full"]),
    taken=st.just("after"),
    model=st.sampled_from(["adapted", "frozen"]),
    images=st.sampled_from(["normalised", "raw"]),
    **measured,
)
requests = along | afterwards
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(requests)
def test_a_request_arrives_as_it_was_sent(request):
    assert request_from_json(request.to_json()) == request


@given(requests)
def test_only_what_is_not_the_default_travels(request):
    default = SignalRequest()
    names = [item.name for item in fields(SignalRequest)]
    changed = {name: getattr(request, name) for name in names if getattr(request, name) != getattr(default, name)}
    assert json.loads(request.to_json()) == changed


def test_nothing_is_asked_for_by_default():
    assert request_from_json("{}") == NOTHING == SignalRequest()
    assert not NOTHING.anything
    assert signal_layout(NOTHING, LAYOUT).size == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("{'gram': true}", "not JSON"),
        ("[" * 4000, "not JSON"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('"gram"', "not a JSON object"),
        ('{"grams": true}', "signals has no key 'grams'; it has: .* Did you mean 'gram'"),
        ('{"gram": {"layer": 1}}', "signals.gram"),
        ('{"gram": "perhaps"}', "signals.gram"),
        ('{"gram": null}', "signals.gram"),
        ('{"class_variance": [true]}', "signals.class_variance"),
        ('{"class_moments": "some"}', "signals.class_moments='some' is not one of: none, diagonal, full"),
        ('{"samples": "wrong"}', "signals.samples='wrong' is not one of: correct, all"),
        ('{"taken": "before"}', "signals.taken='before' is not one of: training, after"),
        ('{"model": "other"}', "signals.model='other' is not one of: adapted, frozen"),
        ('{"images": "mine"}', "signals.images='mine' is not one of: normalised, raw"),
        ('{"fisher_samples": -1}', "signals.fisher_samples=-1 must be at least 0"),
        ('{"fisher_samples": 1000001}', "signals.fisher_samples=1000001 must be at most 1000000"),
        ('{"fisher_samples": 1.5}', "signals.fisher_samples"),
        ('{"fisher_samples": NaN}', "signals.fisher_samples"),
        ('{"fisher_samples": 1e999}', "signals.fisher_samples"),
        ('{"model": "frozen"}', "frozen model or of raw images are taken after training"),
        ('{"images": "raw", "class_variance": true}', "frozen model or of raw images are taken after training"),
        ('{"class_moments": "full"}', "Full covariances are taken after training"),
    ],
)
def test_a_bad_request_is_refused_with_one_sentence(text, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        request_from_json(text)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))


@pytest.mark.parametrize("value", ["${oc.env:PETALWISE_SECRET}", "a${class_moments}b", "${"])
@pytest.mark.parametrize("hide", ["plain", "dollar", "brace"])
def test_interpolations_are_never_resolved(monkeypatch, value, hide):
    monkeypatch.setenv("PETALWISE_SECRET", "all")
    escapes = {"plain": "${", "dollar": "\\u0024{", "brace": "$\\u007b"}
    for values in ({"samples": value}, {value: 1}):
        with pytest.raises(ConfigError, match="holds an interpolation"):
            request_from_json(json.dumps(values).replace("${", escapes[hide]))


def test_too_long_a_request_is_refused_before_it_is_parsed():
    longest = "{}".ljust(MAX_REQUEST_BYTES)
    assert request_from_json(longest) == NOTHING
    with pytest.raises(ConfigError, match="too long"):
        request_from_json(longest + " ")
    with pytest.raises(ConfigError, match="too long"):
        request_from_json("{" * (MAX_REQUEST_BYTES + 1))


@given(st.dictionaries(st.sampled_from([item.name for item in fields(SignalRequest)]) | st.text(), json_values))
def test_any_json_is_a_request_that_can_be_followed_or_is_refused(values):
    text = json.dumps(values)
    try:
        request = request_from_json(text)
    except ConfigError:
        return
    assert request_from_json(request.to_json()) == request
    assert request.taken == "after" or (request.model, request.images) == ("adapted", "normalised")
    assert signal_layout(request, LAYOUT).size >= 0


@given(st.text())
def test_any_other_text_is_refused_with_the_one_error(text):
    try:
        request_from_json(text)
    except ConfigError:
        return
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (SignalRequest(class_variance=True), {"class-count": (3,), "class-variance": (3,)}),
        (
            SignalRequest(class_moments="diagonal"),
            {"class-count": (3,), "class-mean": (3, 6), "class-variances": (3, 6)},
        ),
        (
            SignalRequest(class_moments="full", class_variance=True, taken="after"),
            {"class-count": (3,), "class-variance": (3,), "class-mean": (3, 6), "class-covariance": (3, 6, 6)},
        ),
        (SignalRequest(update_scores=True), {"score-a": (2,), "score-b": (2,), "refused-scores": (1,)}),
        (
            SignalRequest(update_norms=True),
            {"norm-a": (2,), "norm-b": (2,), "norm-product": (2,), "label-entropy": (1,)},
        ),
        (
            SignalRequest(gram=True),
            {"gram:blocks.0.attn.qkv": (10,), "gram:blocks.1.mlp.fc1": (15,), "gram:head": (28,)},
        ),
        (SignalRequest(fisher_samples=1), {"fisher": (LAYOUT.size,)}),
    ],
    ids=lambda value: value.to_json() if isinstance(value, SignalRequest) else "",
)
def test_the_answer_has_what_is_asked_for_in_this_order(request_, expected):
    layout = signal_layout(request_, LAYOUT)
    assert [(spec.name, spec.shape) for spec in layout.tensors] == list(expected.items())
    assert layout.size == sum(math.prod(shape) for shape in expected.values())


@given(requests)
def test_the_parts_of_an_answer_are_those_of_its_requests(request):
    """Asking for several things gives the index of each, one after another."""
    alone = [
        replace(request, update_scores=False, update_norms=False, gram=False, fisher_samples=0),
        SignalRequest(update_scores=request.update_scores),
        SignalRequest(update_norms=request.update_norms),
        SignalRequest(gram=request.gram),
        SignalRequest(fisher_samples=request.fisher_samples),
    ]
    expected = [(spec.name, spec.shape) for part in alone for spec in signal_layout(part, LAYOUT).tensors]
    assert [(spec.name, spec.shape) for spec in signal_layout(request, LAYOUT).tensors] == expected


@given(requests)
def test_something_is_asked_for_where_the_answer_is_not_empty(request):
    names = [spec.name for spec in signal_layout(request, LAYOUT).tensors]
    of_classes = [name for name in names if name.startswith("class-")]
    assert request.anything == bool(names)
    assert request.of_classes == bool(of_classes)
    assert request.without_training == (bool(names) and names == of_classes and request.taken == "after")


def test_a_frozen_a_has_no_score_but_its_place_and_the_gram_matrix_is_of_its_output():
    request = SignalRequest(update_scores=True, update_norms=True, gram=True, fisher_samples=1)
    shapes = {spec.name: spec.shape for spec in signal_layout(request, FROZEN_A).tensors}
    assert shapes["score-a"] == shapes["score-b"] == shapes["norm-a"] == shapes["norm-b"] == (2,)
    assert shapes["gram:blocks.0.attn.qkv"] == shapes["gram:blocks.1.mlp.fc1"] == (3,)
    assert shapes["fisher"] == (FROZEN_A.size,)


@pytest.mark.parametrize(
    "request_", [SignalRequest(class_variance=True), SignalRequest(class_moments="diagonal"), SignalRequest(gram=True)]
)
def test_signals_of_a_head_need_one(request_):
    with pytest.raises(ModelError, match="no linear head.*blocks.0, blocks.1"):
        signal_layout(request_, HEADLESS)


def test_signals_of_layers_need_no_head():
    request = SignalRequest(update_scores=True, update_norms=True, fisher_samples=1)
    assert signal_layout(request, HEADLESS).size == 2 * 2 + 1 + 3 * 2 + 1 + HEADLESS.size
