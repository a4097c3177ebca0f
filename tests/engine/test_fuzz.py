"""Random prompts, methods and ways of decoding against the dense reference; `-m slow` tries many more."""

from __future__ import annotations

import oracle
import pytest
import tiny
from cases import TOLERANCE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import seen_and_kept

import foveate

keeps = st.one_of(st.floats(0.01, 1.0), st.integers(1, 40))
encoder_methods = st.one_of(
    st.builds(foveate.FoPru, keep=keeps, strategy=st.sampled_from(["rank", "row"])),
    st.builds(foveate.Random, keep=keeps),
    st.builds(foveate.Uniform, keep=keeps),
)
layer_methods = st.builds(foveate.FastV, keep=keeps, layer=st.integers(1, 3))
cache_methods = st.one_of(
    st.builds(foveate.PLPHP, keep=keeps, delta=st.floats(0, 0.4), start_layer=st.integers(0, 3)),
    st.builds(foveate.PLPHP, keep=keeps, start_layer=st.just(0), alpha=st.floats(0.4, 1), beta=st.floats(0, 0.4)),
    st.builds(foveate.VisualSnapKV, keep=keeps, window=st.integers(1, 99), kernel=st.sampled_from([1, 5, 9])),
    st.builds(foveate.CSP, keep=keeps, window=st.floats(0.01, 1), cross_share=st.floats(0, 1)),
    st.builds(foveate.AirCache, keep=keeps, alpha=st.floats(0, 1)),
)
decodings = st.sampled_from([oracle.GREEDY, oracle.BEAMS, oracle.SAMPLE, oracle.BEAM_SAMPLE])


@st.composite
def cases(draw):
    """A family with methods that fit it, a batch, and a way of decoding."""
    family = draw(st.sampled_from(tiny.CORE))
    if family == "mllama":
        methods = [draw(st.builds(foveate.TrimmedLlama, keep=keeps))]
    else:
        places = draw(st.sets(st.sampled_from([encoder_methods, layer_methods, cache_methods]), min_size=1))
        methods = [draw(place) for place in (encoder_methods, layer_methods, cache_methods) if place in places]
    images = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    spec = dict(
        images=images,
        text=[draw(st.integers(1, 12)) for _ in images],
        seed=draw(st.integers(0, 9)),
        between=draw(st.integers(0, 3)),
    )
    decoding = draw(decodings) | {"max_new_tokens": draw(st.integers(1, 6))}
    return family, methods, spec, decoding, draw(st.sampled_from(["eager", "sdpa"]))


def check(case) -> None:
    family, methods, spec, decoding, attn = case
    batch, model = tiny.inputs(family, **spec), tiny.build(family, attn)
    with foveate.prune(model, methods, record=True) as pruned:
        run = oracle.run(model, batch, **decoding)
    hides = seen_and_kept(pruned.report, batch["input_ids"].shape[1])
    assert oracle.errors(tiny.build(family, "eager"), batch, run, hides).max() < TOLERANCE


relaxed = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@given(cases())
@settings(relaxed, max_examples=40)
def test_random_cases_equal_the_dense_reference(case):
    check(case)


@pytest.mark.slow
@given(cases())
@settings(relaxed, max_examples=1000, derandomize=False)
def test_many_random_cases_equal_the_dense_reference(case):
    check(case)
