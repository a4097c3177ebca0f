"""The vLLM plugin without vLLM: options and refusals, plans, positions."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

import foveate
from foveate.layout import ImageLayout, Tile
from foveate.methods.base import EncoderMethod
from foveate.vllm.checks import Checks, unserved
from foveate.vllm.plan import Plan, packed
from foveate.vllm.positions import (
    Placed,
    check_offsets,
    columns_of,
    guessed,
    mended,
    numbers_of,
    unpruned,
)
from foveate.vllm.settings import Settings, encoder_depth, supported

PICTURE, TEXT, OPEN, CLOSE = 9, 1, 7, 8


def test_foveate_imports_no_vllm() -> None:
    code = "import sys, foveate, foveate.vllm, foveate.commands.app; print('vllm' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("0.32.0", True),
        ("0.33.1+cu130", True),
        ("0.32.0rc1", True),
        ("0.31.9", False),
        ("0.34.0", False),
        ("dev", False),
    ],
)
def test_versions(version: str, fits: bool) -> None:
    assert supported(version) == fits


# -- options


def test_options_of_a_server() -> None:
    settings = Settings.parse({"method": "fopru", "keep": 0.25, "back": 1, "lowest": 0.1, "highest": 1.0})
    assert settings.method == foveate.FoPru(keep=0.25, back=1)
    assert (settings.lowest, settings.highest, settings.positions) == (0.1, 1.0, "original")
    alone = Settings.parse(foveate.DivPrune(keep=64).to_dict())
    assert (alone.lowest, alone.highest) == (64, 64)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("fopru", "takes"),
        ({"keep": 0.25}, "method"),
        ({"method": "fopru", "keep": 0.25, "positions": "other"}, "original"),
        ({"method": "fopru", "keep": 0.0}, "keep must be"),
        ({"method": "fopru", "keep": 0.25, "nonsense": 1}, "nonsense"),
        ({"method": "plphp", "keep": 0.25}, "transformers"),
        ({"method": "fastv", "keep": 0.25}, "transformers"),
        ({"method": "mint", "keep": 0.25}, "transformers"),
        ({"method": "fopru", "keep": 0.25, "strategy": "row"}, "depends on the picture"),
        ({"method": "evs", "keep": 0.25}, "depends on the picture"),
        ({"method": "vistog", "keep": 16}, "readers"),
        ({"method": "fopru", "keep": 0.25, "lowest": 0.5}, "must lie in"),
        ({"method": "fopru", "keep": 0.25, "lowest": 16}, "both"),
        ({"method": "fopru", "keep": 0.25, "highest": 2.0}, "highest"),
        ({"method": "nothing", "keep": 0.25}, "nothing"),
    ],
)
def test_refused_options(options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Settings.parse(options)


def test_every_method_is_served_or_refused_with_a_way_out() -> None:
    served = set()
    for name in foveate.methods():
        keep = getattr(foveate.method_class(name).__dataclass_fields__["keep"], "default", None)
        try:
            served.add(Settings.parse({"method": name, "keep": 16 if isinstance(keep, int) else 0.25}).method.name)
        except ValueError as error:
            assert any(way in str(error) for way in ("foveate.prune", "another method", "guide", "weights")), error
    assert {"fopru", "vtc_cls", "visionzip", "divprune", "pooling", "uniform", "random"} <= served
    assert all(issubclass(foveate.method_class(name), EncoderMethod) for name in served)


def test_what_a_request_may_ask_for() -> None:
    settings = Settings.parse({"method": "fopru", "keep": 0.25, "lowest": 0.25, "highest": 0.5})
    assert settings.of_request(None).keep == 0.25
    assert settings.of_request({"keep": 0.4}).keep == 0.4
    for asked, says in (
        ({"keep": 0.2}, "outside"),
        ({"keep": 0.6}, "outside"),
        ({"keep": "x"}, "keep must be"),
        ({"keep": True}, "keep must be"),
        ({"method": "random"}, "takes"),
        ("0.5", "takes"),
    ):
        with pytest.raises(ValueError, match=says):
            settings.of_request(asked)
    # A number of tokens compares with fractions on a picture only.
    patches = torch.arange(64)
    layout = ImageLayout(64, (Tile(patches, (8, 8), patches),))
    settings.check_range(layout, settings.of_request({"keep": 16}).keep)
    with pytest.raises(ValueError, match="outside"):
        settings.check_range(layout, settings.of_request({"keep": 15}).keep)
    with pytest.raises(ValueError, match="outside"):
        settings.check_range(layout, settings.of_request({"keep": 33}).keep)


def config_of(family: str, **more: Any) -> Any:
    config = tiny.config(family)
    for name, value in more.items():
        setattr(config, name, value)
    return config


def test_what_does_not_go_with_a_model() -> None:
    def check(method: str, family: str, m_rope: bool, options: dict[str, Any] | None = None, **more: Any) -> None:
        settings = Settings.parse({"method": method, "keep": 0.25, **(options or {})})
        settings.check_model(config_of(family, **more), m_rope)

    check("fopru", "llava", False)
    check("fopru", "llava", False, {"positions": "compact"})
    check("divprune", "qwen3_vl", True)
    check("divprune", "llava", False, vision_feature_layer=1)
    with pytest.raises(ValueError, match="merges"):
        check("pooling", "qwen3_vl", True)
    with pytest.raises(ValueError, match="compact"):
        check("fopru", "qwen2_vl", True, {"positions": "compact"})
    with pytest.raises(ValueError, match="builds only"):
        check("fopru", "llava", False, vision_feature_layer=1)
    with pytest.raises(ValueError, match="shows none"):
        check("fopru", "fast_vlm", False)
    with pytest.raises(ValueError, match="pixtral encoder"):
        check("divprune", "pixtral", False)
    with pytest.raises(ValueError, match="families"):
        Settings.parse({"method": "fopru", "keep": 0.25}).check_model(SimpleNamespace(model_type="bert"), False)


FAMILIES = ["llava", "llava_next", "llava_onevision", "internvl", "idefics3", "mistral3"]
FAMILIES += ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("family", FAMILIES)
def test_readable_layers_are_those_of_the_model(family: str) -> None:
    model = tiny.build(family)
    known = foveate.get_family(model.config)
    assert known is not None
    base = known.base(model)
    layers = [m for m in base.modules() if type(m).__name__ == type(known.vision_attentions(base)[0]).__name__]
    numbers = known.readable(model.config, encoder_depth(model.config))
    assert [layers[number] for number in numbers] == known.vision_attentions(base)


def vllm_config(**changes: Any) -> Any:
    """What vLLM hands over, with the options that are looked at."""
    at = {
        "compilation_config.cudagraph_mm_encoder": False,
        "compilation_config.compile_mm_encoder": False,
        "parallel_config.pipeline_parallel_size": 1,
        "mm.mm_encoder_tp_mode": "weights",
        "lora_config": None,
        "speculative_config": None,
        **changes,
    }
    multimodal = SimpleNamespace(mm_encoder_tp_mode=at["mm.mm_encoder_tp_mode"], mm_processor_kwargs=None)
    return SimpleNamespace(
        compilation_config=SimpleNamespace(
            cudagraph_mm_encoder=at["compilation_config.cudagraph_mm_encoder"],
            compile_mm_encoder=at["compilation_config.compile_mm_encoder"],
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=at["parallel_config.pipeline_parallel_size"]),
        lora_config=at["lora_config"],
        speculative_config=at["speculative_config"],
        model_config=SimpleNamespace(
            multimodal_config=multimodal,
            hf_config=SimpleNamespace(foveate={"method": at.get("method", "fopru"), "keep": 0.25}),
        ),
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"compilation_config.cudagraph_mm_encoder": True}, "cudagraph_mm_encoder"),
        ({"compilation_config.compile_mm_encoder": True}, "compile_mm_encoder"),
        ({"parallel_config.pipeline_parallel_size": 2}, "tensor-parallel"),
        ({"mm.mm_encoder_tp_mode": "data"}, "divprune"),
        ({"lora_config": SimpleNamespace(enable_tower_connector_lora=True)}, "adapters"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "ngram"),
    ],
)
def test_refused_servers(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Checks.verify_and_update_config(vllm_config(**changes))


def test_servers_that_are_not_refused() -> None:
    fine = {
        "mm.mm_encoder_tp_mode": "data",
        "method": "divprune",
        "lora_config": SimpleNamespace(enable_tower_connector_lora=False),
        "speculative_config": SimpleNamespace(method="ngram"),
    }
    config = vllm_config(**fine)
    assert not list(unserved(config, Settings.parse(config.model_config.hf_config.foveate)))


# -- plans


def plan_of(grid: tuple[int, int], budget: int, structure: bool = False, pinned: int = 0) -> Plan:
    """One tile, then `pinned` newline tokens; where asked for, between two tokens of structure."""
    n = grid[0] * grid[1]
    layout = ImageLayout(n + pinned, (Tile(torch.arange(n), grid, torch.arange(n)),))
    ids = [PICTURE] * (n + pinned)
    full = torch.tensor([OPEN, *ids, CLOSE] if structure else ids)
    return Plan(layout, n, budget, full, full == PICTURE)


def test_a_plan_comes_through() -> None:
    joined = torch.arange(24).view(6, 4)
    tiles = (Tile(torch.arange(6), (2, 3), joined), Tile(torch.arange(7, 11), (2, 2), torch.arange(4), frame=1))
    full = torch.tensor([OPEN, *[PICTURE] * 11, CLOSE])
    plan = Plan(ImageLayout(11, tiles), 30, 5, full, full == PICTURE)
    again = Plan.read(plan.tensor())
    assert (again.patches, again.budget, again.kept) == (30, 5, plan.kept)
    assert again.full.equal(full) and again.embeds.equal(plan.embeds) and again.remaining.equal(plan.remaining)
    for one, other in zip(again.layout.tiles, tiles, strict=True):
        assert one.index.equal(other.index) and one.patches.equal(other.patches)
        assert (one.grid, one.frame) == (other.grid, other.frame)


@pytest.mark.parametrize("structure", [False, True])
@pytest.mark.parametrize("pinned", [0, 3])
def test_what_remains_of_placeholders(structure: bool, pinned: int) -> None:
    plan = plan_of((4, 6), 9, structure, pinned)
    left = plan.full[plan.remaining].tolist()
    assert left == ([OPEN] if structure else []) + [PICTURE] * 9 + ([CLOSE] if structure else [])
    assert plan.prunes and not plan_of((4, 6), 24 + pinned, structure, pinned).prunes


def test_structure_between_tiles_stays_between_them() -> None:
    tiles = tuple(Tile(torch.arange(4) + 4 * i, (2, 2), torch.arange(4) + 4 * i) for i in range(2))
    full = torch.tensor([*[PICTURE] * 4, OPEN, *[PICTURE] * 4])
    plan = Plan(ImageLayout(8, tiles), 8, 4, full, full == PICTURE)
    plan.check("idefics3", False)
    assert not plan.woven
    assert full[plan.remaining].tolist() == [PICTURE, PICTURE, OPEN, PICTURE, PICTURE]


def test_placeholders_that_do_not_fit_are_refused() -> None:
    inside = torch.tensor([PICTURE, PICTURE, OPEN, PICTURE, PICTURE])
    plan = Plan(plan_of((2, 2), 2).layout, 4, 2, inside, inside == PICTURE)
    plan.check("pixtral", False)
    with pytest.raises(ValueError, match="amid"):
        plan.check("pixtral", True)
    with pytest.raises(ValueError, match="finds 4"):
        Plan(plan.layout, 4, 2, inside[:3], inside[:3] == PICTURE).check("llava", False)


def test_breaks_between_rows_are_embedded_with_the_picture() -> None:
    full = torch.tensor([*[PICTURE] * 3, OPEN, *[PICTURE] * 3, CLOSE])
    plan = Plan(plan_of((2, 3), 3).layout, 6, 3, full, full == PICTURE)
    assert plan.woven and plan.placeholders.tolist() == [PICTURE] * 5
    index = torch.tensor([1, 3, 5])
    assert plan.places(index).tolist() == [1, 3, 4, 6, 7] and plan.offsets(index, False).tolist() == [[1, 3, 4, 6, 7]]
    whole = Plan(plan.layout, 6, 6, full, full == PICTURE)
    assert not whole.woven and whole.placeholders.equal(full)
    assert whole.places(torch.arange(6)).tolist() == [0, 1, 2, 4, 5, 6]


def test_patches_are_counted_through_padding() -> None:
    one, two = plan_of((2, 2), 1), plan_of((2, 2), 1)
    first = Plan(one.layout, 7, 1, one.full, one.embeds)  # three patches are padding
    layouts = packed([first, two])
    assert layouts[0].tiles[0].patches.tolist() == [0, 1, 2, 3]
    assert layouts[1].tiles[0].patches.tolist() == [7, 8, 9, 10]


# -- positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    numbers = torch.tensor([[0, 1], [127, 128], [601, 16384], [2**21 - 1, 40000]])
    assert numbers_of(columns_of(numbers, dtype)).equal(numbers)
    if dtype == torch.bfloat16:  # why they are digits
        assert not torch.arange(600).to(dtype).long().equal(torch.arange(600))


def grid_positions(tokens: list[int], items: list[tuple[int, tuple[int, int]]]) -> torch.Tensor:
    """The M-RoPE of Qwen, written anew: (3, prompt). items: where pictures of which grid begin."""
    table, at, position = [], 0, 0
    for offset, (rows, columns) in items:
        table += [[position + i] * 3 for i in range(offset - at)]
        position += offset - at
        table += [[position, position + r, position + c] for r in range(rows) for c in range(columns)]
        at, position = offset + rows * columns, position + max(rows, columns)
    table += [[position + i] * 3 for i in range(len(tokens) - at)]
    return torch.tensor(table).T


@pytest.mark.parametrize("window", [1000, 37, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m_rope", [False, True])
@pytest.mark.parametrize("grids", [[(20, 30)], [(5, 7), (24, 24)], [(3, 3), (3, 3), (40, 2)]], ids=str)
def test_positions_are_those_of_the_unpruned_prompt(
    grids: list[tuple[int, int]], m_rope: bool, dtype: torch.dtype, window: int
) -> None:
    rng, hidden = torch.Generator().manual_seed(0), 16
    tokens, full_tokens, columns, items, starts, embeddings = [TEXT] * 3, [TEXT] * 3, [0, 1, 2], [], [], []
    for number, grid in enumerate(grids):
        n, kept = grid[0] * grid[1], max(1, grid[0] * grid[1] // 4)
        plan = plan_of(grid, kept)
        index = torch.randperm(n, generator=rng)[:kept].sort().values
        items.append(Placed(len(tokens), kept, plan))
        starts.append((len(full_tokens), grid))
        columns += (len(full_tokens) + index).tolist()
        tokens, full_tokens = tokens + [PICTURE] * kept, full_tokens + [PICTURE] * n
        rows = torch.randn(kept, hidden, generator=rng).to(dtype)
        embeddings.append(torch.cat([rows, columns_of(plan.offsets(index, m_rope).T, dtype)], 1))
        if m_rope or number:  # without M-RoPE the first two pictures touch
            tokens, full_tokens, columns = [*tokens, TEXT], [*full_tokens, TEXT], [*columns, len(full_tokens)]
    columns += [len(full_tokens) + i for i in range(4)]
    tokens, full_tokens = tokens + [TEXT] * 4, full_tokens + [TEXT] * 4
    truth = grid_positions(full_tokens, starts) if m_rope else torch.arange(len(full_tokens)).expand(3, -1)
    prompt = unpruned(tokens, items)
    assert prompt.tokens == full_tokens
    assert [(start, length) for start, length in zip(prompt.starts, prompt.lengths, strict=True)] == [
        (start, rows * columns_) for start, (rows, columns_) in starts
    ]
    if m_rope:
        check_offsets(prompt, items, truth)
    table = guessed(prompt, items, truth if m_rope else None)
    media = torch.tensor(tokens) == PICTURE
    for step in range(0, len(tokens), window):
        parts = []
        for item, embedding in zip(items, embeddings, strict=True):
            part = slice(max(step - item.offset, 0), max(min(step + window - item.offset, item.length), 0))
            parts += [embedding[part]] if part.start < part.stop else []
        for _ in range(2):  # a preempted request comes again
            rows, table, behind = mended(table, media, step, parts, hidden, m_rope)
            assert all(row.equal(part[:, :hidden]) for row, part in zip(rows, parts, strict=True))
            assert len(tokens) + behind == int(truth.max()) + 1
    used = slice(0, 3) if m_rope else slice(0, 1)
    assert table[used].equal(truth[used][:, columns])


def test_films_between_pictures_keep_their_positions() -> None:
    """What has no columns is passed over."""
    plan, hidden = plan_of((2, 2), 2), 16
    tokens = [TEXT, 5, 5, 5, TEXT, PICTURE, PICTURE, TEXT]
    items = [Placed(1, 3, None), Placed(5, 2, plan)]
    table = guessed(unpruned(tokens, items), items, None)
    media = torch.tensor([token in (5, PICTURE) for token in tokens])
    film = torch.randn(3, hidden)
    picture = torch.cat([torch.randn(2, hidden), columns_of(torch.tensor([[1], [3]]), torch.float32)], 1)
    rows, table, behind = mended(table, media, 0, [film, picture], hidden, m_rope=False)
    assert [row.shape[1] for row in rows] == [hidden, hidden]
    assert table[0].tolist() == [0, 1, 2, 3, 4, 6, 8, 9] and behind == 2


def test_unknown_positions_are_refused() -> None:
    plan = plan_of((2, 3), 2)
    tokens = [TEXT, PICTURE, PICTURE, TEXT]
    items = [Placed(1, 2, plan)]
    prompt = unpruned(tokens, items)
    right = grid_positions(prompt.tokens, [(1, (2, 3))])
    check_offsets(prompt, items, right)
    for wrong in (right.flip(0), torch.arange(len(prompt.tokens)).expand(3, -1)):
        with pytest.raises(ValueError, match="not known"):
            check_offsets(prompt, items, wrong)


def test_names_of_models_that_are_not_served() -> None:
    from foveate.vllm import models

    with pytest.raises(AttributeError):
        models.FoveateSomethingElse  # noqa: B018
