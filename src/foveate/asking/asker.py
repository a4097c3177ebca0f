"""Asks a model about pictures with and without pruning, and measures what pruning saves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from foveate.asking.mistake import Mistake, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from foveate.asking.clips import Clip
    from foveate.asking.variant import Variant
    from foveate.methods.base import Method

RUNS = 5  # timed runs of each variant; their median is shown
TIMED_TOKENS = 16  # decoded in every timed run, whatever the length of the answer


@dataclass
class Answer:
    """What one variant said and cost. `variant` is None for the untouched model.

    guide: what the guide of a method that has one said; see `Asker.ask`. Where it answered alone there is no report.
    tries: of a cascade, what was asked, and how sure of its answer the model was then.
    """

    variant: Variant | None
    text: str
    images: list[tuple[int, int]]
    kv_bytes: int
    kv_bytes_unpruned: int | None
    report: Any = field(default=None, repr=False)
    guide: dict[str, Any] | None = None
    tries: tuple[tuple[str, float], ...] = ()
    first_token_s: float | None = None
    ms_per_token: float | None = None

    @property
    def label(self) -> str:
        """The variant in a few words."""
        return "untouched" if self.variant is None else self.variant.label

    @property
    def alone(self) -> bool:
        """Whether the guide answered, and the model did not run."""
        return self.guide is not None and self.guide["alone"]

    def __str__(self) -> str:
        """What was kept, in one line."""
        if self.alone:
            assert self.guide is not None
            return f"{self.label}: the guide answered alone (score {self.guide['score']:.3f}), the model did not run"
        lines = [f"{label}: {sure:.3f} sure" for label, sure in self.tries]
        if self.report is None:
            return ", ".join([*lines, f"then untouched: all {sum(n for n, _ in self.images)} image tokens"])
        return ", ".join([*lines, str(self.report)])

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        methods = () if self.variant is None else self.variant.methods
        options = () if self.variant is None else self.variant.options
        each = [{"method": m.name, "options": own} for m, own in zip(methods, options, strict=True)]
        return {
            "method": "+".join(m.name for m in methods) or None,
            "options": each[0]["options"] if len(each) == 1 else {},
            **({"methods": each} if len(each) > 1 else {}),
            "answer": self.text,
            "images": [{"tokens": tokens, "kept": kept} for tokens, kept in self.images],
            "kv_bytes": self.kv_bytes,
            "kv_bytes_unpruned": self.kv_bytes_unpruned,
            "guide": self.guide,
            "tries": [{"asked": label, "sure": sure} for label, sure in self.tries],
            "first_token_s": self.first_token_s,
            "ms_per_token": self.ms_per_token,
        }


class Asker:
    """One question about some pictures and clips, put to one model in several ways.

    clips: of how many pictures each of them is, for `Pruned.clips`; None where there is nothing to say.
    """

    def __init__(
        self, model: Any, processor: Any, shown: Sequence[Image | Clip], question: str, max_new_tokens: int
    ) -> None:
        from foveate.asking.clips import Clip, in_turn, pictures_each, told

        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        # Of how many frames of a clip the processor makes pictures is its own affair, and none is cut into tiles.
        pictures = [one for one in shown if not isinstance(one, Clip)]
        self.image_sizes = [(one.height, one.width) for one in pictures] if len(pictures) == len(shown) else []
        for what in ("image", "video"):
            placeholder = getattr(processor, f"{what}_token", None)
            if placeholder and placeholder in question:
                raise Mistake(f"the question holds {placeholder}, which stands for an image: leave it out")
        content = [*in_turn(shown, processor), {"type": "text", "text": question}]
        try:
            self.inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=told(shown, processor),
            ).to(model.device, model.dtype)
        except Exception as error:  # e.g. a picture too thin for the processor
            raise Mistake(f"the model's processor refuses these inputs: {one_line(error)}") from error
        self.clips = pictures_each(shown, self.inputs)

    @contextmanager
    def under(self, methods: Method | Sequence[Method], *, record: bool = False) -> Iterator[Any]:
        """The model pruned, and told how large pictures are and which are the frames of a clip."""
        import foveate

        with (
            foveate.prune(self.model, methods, record=record) as pruned,
            pruned.saying(image_sizes=self.image_sizes) if self.image_sizes else nullcontext(),
            pruned.clips(self.clips) if self.clips else nullcontext(),
        ):
            yield pruned

    def ask(self, variant: Variant, *, record: bool, listeners: Sequence[Any] = ()) -> Answer:
        """The answer under these methods, what they kept, and what a guide said.

        listeners: logits processors that change nothing.

        Of a guide: its answer, the score of that where there is a threshold, and whether it answered alone.
        """
        import foveate

        try:
            with self.under(variant.methods, record=record) as pruned:
                text = self.text(listeners)
        except (foveate.UnsupportedError, ValueError) as error:  # e.g. a layer that this model lacks
            raise Mistake(one_line(error)) from error
        report, said, guide = pruned.report, pruned.guided, None
        if said is not None:
            prompt = self.inputs["input_ids"].shape[1]
            guide = {
                "answer": self._decode(said.sequences[0, prompt:]),
                "score": None if said.scores is None else float(said.scores[0]),
                "alone": said.exited,
            }
        if report is None:  # the model read no image, and holds no cache
            family, config = pruned.family, pruned.base.config
            lays = {"pixel_values": family.layouts, "pixel_values_videos": family.video_layouts}
            shown = [lay_out(config, self.inputs) for name, lay_out in lays.items() if name in self.inputs]
            images = [(layout.tokens, 0) for layouts in shown for layout in layouts]
            return Answer(variant, text, images, 0, None, guide=guide)
        images = [(int(tokens), int(kept)) for tokens, kept in report.images[0]]
        return Answer(variant, text, images, report.kv_bytes, report.kv_bytes_unpruned, report, guide)

    def climb(self, rungs: Sequence[Variant], demand: float) -> Answer:
        """The answer under the first of the variants of which the model is sure enough, or untouched.

        demand: the least probability that any of the answer's tokens may have.
        """
        from foveate.asking.sure import Sure

        tries: list[tuple[str, float]] = []
        for rung in rungs:
            sure = Sure.of(self.model)
            answer = self.ask(rung, record=False, listeners=[sure])
            tries.append((answer.label, sure.least[0]))
            answer.tries = tuple(tries)
            if sure.least[0] >= demand:
                return answer
        answer = self.ask_untouched(answer.images)
        answer.tries = tuple(tries)
        return answer

    def ask_untouched(self, images: Sequence[tuple[int, int]]) -> Answer:
        """The answer of the model as it is; its cache is measured, not computed."""
        from foveate.engine.upstream import cache_behind, held_layers

        out = self._generate(max_new_tokens=1, return_dict_in_generate=True)
        tensors = [t for layer in held_layers(cache_behind(out)).values() for t in (layer.keys, layer.values)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        return Answer(None, self.text(), [(tokens, tokens) for tokens, _ in images], size, size)

    def time(self, answers: Sequence[Answer]) -> None:
        """Fill in the times: medians over runs in turn, so that a busy moment hits every variant alike.

        Every variant decodes the same number of tokens, and has answered before: it is warm.
        """
        # With a threshold a guide's answer comes as a whole: there is no token to wait for.
        timed = [
            (answer, () if answer.variant is None else answer.variant.methods, list[tuple[float, float]]())
            for answer in answers
        ]
        timed = [each for each in timed if all(getattr(m, "exit_threshold", None) is None for m in each[1])]
        for _ in range(RUNS):
            for _, methods, measured in timed:
                measured.append(self._timed(methods))
        for answer, _, measured in timed:
            answer.first_token_s = statistics.median(first for first, _ in measured)
            answer.ms_per_token = 1000 * statistics.median(each for _, each in measured)

    def _timed(self, methods: Sequence[Method]) -> tuple[float, float]:
        clock = _Clock()
        pruning: AbstractContextManager[Any] = self.under(methods) if methods else nullcontext()
        with pruning:
            start = time.perf_counter()
            self._generate(min_new_tokens=TIMED_TOKENS, max_new_tokens=TIMED_TOKENS, streamer=clock)
        first, last = clock.ticks[1], clock.ticks[-1]  # the first tick is the prompt
        return first - start, (last - first) / (len(clock.ticks) - 2)

    def text(self, listeners: Sequence[Any] = ()) -> str:
        """What the model says as it is now. listeners: logits processors that change nothing."""
        out = self._generate(max_new_tokens=self.max_new_tokens, logits_processor=list(listeners))
        return self._decode(out[0, self.inputs["input_ids"].shape[1] :])

    def _decode(self, tokens: Any) -> str:
        return str(self.processor.decode(tokens, skip_special_tokens=True)).strip()

    def _generate(self, **options: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.model.generate(**self.inputs, do_sample=False, num_beams=1, **options)


class _Clock:
    """A streamer that notes when each token arrives (on the CPU: the device has finished)."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, value: Any) -> None:
        self.ticks.append(time.perf_counter())

    def end(self) -> None: ...
