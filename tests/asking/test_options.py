"""Methods and keeps as written on the command line and in Python."""

import pytest

import foveate
from foveate.asking.mistake import Mistake
from foveate.asking.options import check_alone, parse_keeps, parse_methods, typed, variants
from foveate.methods.grammar import Part, label, parse_method, shared

LLAVA = foveate.get_family("llava").places


def test_options_follow_their_method():
    assert parse_methods("fopru:strategy=row, plphp:delta=0.2,start-layer=2,fastv") == [
        (Part("fopru", {"strategy": "row"}),),
        (Part("plphp", {"delta": 0.2, "start_layer": 2}),),
        (Part("fastv", {}),),
    ]


def test_methods_that_act_together_are_joined_and_each_has_its_own_options():
    both = (Part("divprune", {"keep": 0.5}), Part("plphp", {"delta": 0.2, "alpha": 1}))
    assert parse_methods("divprune:keep=0.5+plphp:delta=0.2,alpha=1, fastv") == [both, (Part("fastv", {}),)]
    assert parse_method(label(both)) == both
    assert parse_method("fopru + plphp") == (Part("fopru", {}), Part("plphp", {}))
    assert parse_method("prefixkv:schedule=a+b.json,keep=1e+0") == (
        Part("prefixkv", {"schedule": "a+b.json", "keep": 1.0}),
    )


@pytest.mark.parametrize("name", ["PLPHP", "plphp", "PlPhP", "Visual-SnapKV", "VisualSnapKV", "VIDEOLLM_MOD"])
def test_names_are_found_without_regard_to_case_and_hyphens(name):
    known = {"plphp": "plphp", "visualsnapkv": "visual_snapkv", "videollmmod": "videollm_mod"}
    known = known[name.lower().replace("-", "").replace("_", "")]
    assert parse_method(name) == (Part(known, {}),) and foveate.method_class(name).name == known


def test_what_was_meant_is_said():
    with pytest.raises(ValueError, match=r"unknown method 'plph'; did you mean plphp"):
        foveate.get_method("plph")
    with pytest.raises(ValueError, match=r"unknown method 'zzz'; known: adaptinfer, "):
        foveate.get_method("zzz")


def test_python_reads_the_same_grammar():
    assert foveate.get_method("plphp:delta=0.2", keep=0.3) == foveate.PLPHP(keep=0.3, delta=0.2)
    with pytest.raises(ValueError, match=r"delta: plphp:delta=0\.2 says it already"):
        foveate.get_method("plphp:delta=0.2", delta=0.3)
    with pytest.raises(ValueError, match="one method here"):
        foveate.get_method("divprune:keep=0.5+csp")


def test_further_options_go_to_every_method_that_has_them_and_does_not_say_them():
    parts = parse_method("fopru:keep=0.5+plphp:delta=0.1")
    assert shared(parts, {"keep": 0.25}) == [{"keep": 0.5}, {"keep": 0.25, "delta": 0.1}]
    with pytest.raises(ValueError, match=r"no option 'layer': fopru has keep, .*; plphp has keep, "):
        shared(parts, {"layer": 2})
    with pytest.raises(ValueError, match=r"delta: fopru:keep=0.5\+plphp:delta=0.1 says it already|delta: plphp"):
        shared(parts, {"delta": 0.2})


@pytest.mark.parametrize(
    ("text", "value"), [("4:4", (4, 4)), ("0.5:1", (0.5, 1)), ("C:folder", "C:folder"), ("1:", "1:"), ("none", None)]
)
def test_several_numbers_are_one_value(text, value):
    assert typed(text) == value
    ((part,),) = parse_methods(f"attention_predictor:refresh=3,block={text}")
    assert part == Part("attention_predictor", {"refresh": 3, "block": value})
    assert parse_methods(str(part)) == [(part,)]


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


def test_what_is_kept_is_said_for_all_or_by_each():
    chosen, _ = variants("divprune:keep=0.5+csp,divprune:keep=0.5+csp:keep=0.4", [0.25, 0.1], LLAVA, "llava")
    assert [(v.label, v.keep, *(m.keep for m in v.methods)) for v in chosen] == [
        ("divprune:keep=0.5+csp", 0.25, 0.5, 0.25),
        ("divprune:keep=0.5+csp", 0.1, 0.5, 0.1),
        ("divprune:keep=0.5+csp:keep=0.4", 0.4, 0.5, 0.4),
    ]
    assert {v.place for v in chosen} == {"encoder+cache"}


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ("", "write names"),
        ("plphp:", "write names"),
        ("plphp:delta", "write names"),
        ("delta=2", "write names"),
        ("fopru+", "write names"),
        ("+fopru", "write names"),
        ("nonsense", "unknown method"),
        ("fopru+nonsense", "unknown method 'nonsense'"),
        ("plphp:foo=2", "no option foo"),
        ("plphp:delta=9", r"in \[0, 1\]"),
        ("plphp:delta=0.1,delta=0.2", "given delta twice"),
        ("plphp:keep=4.5", "keep"),
        ("trimmed_llama", "it drops tokens in cross-attention, which llava models lack"),
        ("fopru+trimmed_llama", "trimmed_llama drops tokens in cross-attention, which llava models lack"),
    ],
)
def test_mistakes(methods, says):
    with pytest.raises(Mistake, match=says):
        variants(methods, [0.5], LLAVA, "llava")


@pytest.mark.parametrize(("methods", "says"), [("fopru+csp", "each method alone"), ("csp:keep=0.5", "leave keep out")])
def test_where_a_budget_is_looked_for_methods_come_alone_and_without_one(methods, says):
    check_alone("csp,fopru:back=1")
    with pytest.raises(Mistake, match=says):
        check_alone(methods)


@pytest.mark.parametrize("keeps", ["", "0", "1.5", "a", "0.5,", "-1", "true", "nan"])
def test_keeps_that_are_none(keeps):
    with pytest.raises(Mistake):
        parse_keeps(keeps)


def test_keeps_are_fractions_or_counts():
    assert parse_keeps("0.5, 64,0.5,1.0") == [0.5, 64, 1.0]
    assert [repr(keep) for keep in parse_keeps("1,1.0")] == ["1", "1.0"]
