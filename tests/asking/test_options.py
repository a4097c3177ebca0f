"""Methods and keeps as written on the command line."""

import pytest

import foveate
from foveate.asking.mistake import Mistake
from foveate.asking.options import label, parse_keeps, parse_methods, typed, variants

LLAVA = foveate.get_family("llava").places


def test_options_follow_their_method():
    assert parse_methods("fopru:strategy=row, plphp:delta=0.2,start-layer=2,fastv") == [
        ("fopru", {"strategy": "row"}),
        ("plphp", {"delta": 0.2, "start_layer": 2}),
        ("fastv", {}),
    ]


@pytest.mark.parametrize(
    ("text", "value"), [("4:4", (4, 4)), ("0.5:1", (0.5, 1)), ("C:folder", "C:folder"), ("1:", "1:"), ("none", None)]
)
def test_several_numbers_are_one_value(text, value):
    assert typed(text) == value
    ((name, options),) = parse_methods(f"attention_predictor:refresh=3,block={text}")
    assert (name, options) == ("attention_predictor", {"refresh": 3, "block": value})
    assert parse_methods(label(name, options)) == [(name, options)]


def test_all_is_everything_that_fits_with_both_strategies_of_fopru():
    chosen, left_out = variants("all", [0.5, 16], LLAVA, "llava", always=("random", "uniform"), seed=7)
    labels = list(dict.fromkeys(v.label for v in chosen))
    fitting = {name for name in foveate.methods() if foveate.method_class(name).place in LLAVA}
    built = {v.method.name for v in chosen}
    assert labels[:2] == ["random", "uniform"] and {"fopru", "fopru:strategy=row"} <= set(labels)
    assert chosen[0].method.seed == 7 and [v.keep for v in chosen[:2]] == [0.5, 16]
    assert len(fitting - built) <= len(left_out)
    assert any(line.startswith("trimmed_llama: it drops tokens in cross-attention") for line in left_out)


def test_baselines_come_with_whatever_is_named():
    chosen, left_out = variants("fastv,random:seed=3", [0.5], LLAVA, "llava", always=("random",))
    assert [v.label for v in chosen] == ["random", "fastv", "random:seed=3"] and not left_out
    assert [v.method.seed for v in chosen if v.method.name == "random"] == [0, 3]


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ("", "write names"),
        ("plphp:", "write names"),
        ("plphp:delta", "write names"),
        ("delta=2", "write names"),
        ("nonsense", "unknown method"),
        ("plphp:foo=2", "no option foo"),
        ("plphp:delta=9", r"in \[0, 1\]"),
        ("plphp:keep=0.4", "by --keep"),
        ("trimmed_llama", "llava models lack"),
    ],
)
def test_mistakes(methods, says):
    with pytest.raises(Mistake, match=says):
        variants(methods, [0.5], LLAVA, "llava")


@pytest.mark.parametrize("keeps", ["", "0", "1.5", "a", "0.5,", "-1", "true", "nan"])
def test_keeps_that_are_none(keeps):
    with pytest.raises(Mistake):
        parse_keeps(keeps)


def test_keeps_are_fractions_or_counts():
    assert parse_keeps("0.5, 64,0.5,1.0") == [0.5, 64, 1.0]
    assert [repr(keep) for keep in parse_keeps("1,1.0")] == ["1", "1.0"]
