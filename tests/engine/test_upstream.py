"""What differs between releases of transformers is read from them, and an unknown one is named."""

from __future__ import annotations

import importlib.resources
import importlib.util
import sys
import types
import warnings
from types import SimpleNamespace

import oracle
import pytest
import tiny
import torch
from cases import PLACES, prune
from transformers import DynamicCache

import foveate
from foveate.engine import session, upstream


def new(self, cache=None): ...


def old(self, past_key_values=None): ...


def neither(self, memory=None): ...


def test_names_come_from_signatures():
    assert upstream.cache_name(new) == "cache" and upstream.cache_name(old) == "past_key_values"
    assert upstream.cache_name(tiny.build("llava").model.forward) == tiny.CACHE
    with pytest.raises(foveate.UnsupportedError, match=r"neither takes no KV cache as cache or past_key_values"):
        upstream.cache_name(neither)


def test_a_cache_is_found_in_either_spelling():
    held = object()
    for name in upstream.CACHE_NAMES:
        assert upstream.cache_in({name: held, "input_ids": 1}) is held
        assert upstream.without_cache({name: held, "input_ids": 1}) == {"input_ids": 1}
        assert upstream.cache_behind(SimpleNamespace(**{name: held})) is held
    assert upstream.cache_in({"cache": None, "past_key_values": held}) is held
    assert upstream.cache_in({"input_ids": 1}) is None and upstream.cache_behind((1, 2)) is None


@pytest.mark.parametrize(("family", "name"), PLACES)
@pytest.mark.parametrize("spelling", upstream.CACHE_NAMES)
@torch.no_grad()
def test_callers_may_use_either_spelling(family, name, spelling):
    """Of the base model, which transformers calls without translating."""
    batch, model = tiny.inputs(family), tiny.build(family)
    with prune(model, name) as pruned:
        expected = oracle.run(model, batch, max_new_tokens=1).logits[:, 0]
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # where transformers renames it first
            hidden = model.model(**batch, **{spelling: cache}).last_hidden_state
        assert torch.equal(model.lm_head(hidden[:, -1:])[:, 0], expected)
        assert sum(layer.bytes for layer in cache.layers) == pruned.report.kv_bytes


def test_paged_batching_is_refused_in_either_spelling():
    class PagedAttentionCache: ...

    batch, model = tiny.inputs("llava"), tiny.build("llava")
    with foveate.prune(model, "plphp"):
        for name in upstream.CACHE_NAMES:
            with warnings.catch_warnings(), pytest.raises(foveate.UnsupportedError, match="PagedAttentionCache"):
                warnings.simplefilter("ignore", FutureWarning)
                model.model(**batch, **{name: PagedAttentionCache()})


def test_an_installed_release_that_was_tested_says_nothing():
    assert upstream.release_note() is None


@pytest.mark.parametrize("found", ["5.18.9", "5.99.0", "6.0.0.dev0"])
def test_an_unknown_release_is_named_and_still_prunes(found, monkeypatch):
    monkeypatch.setattr(upstream, "version", lambda name: found)
    note = upstream.release_note()
    assert found in note and ">=5.19" in note and "<5.25" in note and "foveate check" in note
    batch, model = tiny.inputs("llava"), tiny.build("llava")
    with pytest.warns(UserWarning, match="foveate was tested with transformers") as seen:
        pruned = foveate.prune(model, "fopru", keep=0.25)
    assert seen[0].filename == __file__, "the warning points at the caller"
    with pruned:
        model(**batch)
    assert pruned.report.images == [[(36, 9)]]
    with pytest.raises(foveate.UnsupportedError, match=f"this is {found}"):
        upstream.cache_name(neither)


def test_a_release_without_what_foveate_stands_on_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.cache_utils", types.ModuleType("transformers.cache_utils"))
    spec = importlib.util.spec_from_file_location("foveate.engine.again", upstream.__file__)
    with pytest.raises(ImportError, match=r"this release of transformers lacks what foveate stands on \(cannot import"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_no_other_module_of_the_engine_spells_the_cache():
    """Or the next rename is a hunt again."""
    engine = importlib.resources.files(session.__package__)
    files = [path for path in engine.rglob("*.py") if path.name != "upstream.py"]
    assert len(files) > 20
    assert [path.name for path in files if "past_key_values" in path.read_text()] == []
