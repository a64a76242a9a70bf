"""Labelled samples of the zoo, and what a model answers to them: task metric, standard error, agreement with float.

The zoo's own `score.py` reads the data and feeds the models; several candidates are asked at once, so that pictures are
read once.  Pictures come also moved, mirrored and brightened, with the label that they had: variants of one picture are
no independent samples, so that all standard errors are by picture (jackknife: each picture left out once).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Scorer: TypeAlias = Any  # the zoo's score.py, a module of no package
Recipe: TypeAlias = dict[str, Any]
Answers: TypeAlias = list[
    list[Any]
]  # of each unit (picture, pair, sequence), to each of its variants
Picture: TypeAlias = npt.NDArray[np.uint8]


class EnoughError(Exception):
    """As many samples as were asked for."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to change a picture that keeps its label."""

    mirrored: bool = False
    down: int = 0
    right: int = 0
    gain: float = 1.0

    def __call__(self, picture: Picture) -> Picture:
        """`picture` [..., height, width, channels] changed; what comes in at the edges repeats them."""
        found = picture[..., ::-1, :] if self.mirrored else picture
        if self.down or self.right:
            rows = np.clip(np.arange(found.shape[-3]) - self.down, 0, found.shape[-3] - 1)
            columns = np.clip(np.arange(found.shape[-2]) - self.right, 0, found.shape[-2] - 1)
            found = found[..., rows, :, :][..., columns, :]
        if self.gain != 1:
            found = np.clip(np.rint(found * self.gain), 0, 255).astype(np.uint8)
        return np.ascontiguousarray(found)


VARIANTS = (
    Variant(mirrored=True),
    Variant(right=1),
    Variant(mirrored=True, down=-1, right=-1),
    Variant(down=2, gain=1.1),
    Variant(mirrored=True, right=2, gain=0.9),
    Variant(down=-2, right=1, gain=0.85),
    Variant(mirrored=True, down=1, right=-3),
    Variant(right=-4, gain=1.15),
)
"""Beside the picture itself."""

CHIRAL = ("mnist", "ocr")
"""What says something else in the mirror."""


def scoring(zoo: Path) -> Scorer:
    """The zoo's own `score.py`."""
    spec = importlib.util.spec_from_file_location("score", zoo / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Task:
    """A model of the zoo with its labelled samples."""

    def __init__(self, zoo: Path, name: str, limit: int = 0, made: Path | None = None) -> None:
        self.zoo, self.name, self.limit, self.made = zoo, name, limit, made or zoo / "models"
        text = (zoo / "models" / f"{name}.json").read_text(encoding="utf-8")
        self.recipe: Recipe = json.loads(text)
        if "npz" in self.recipe["data"] and isinstance(self.recipe["data"]["npz"], dict):
            tag, file = next(iter(self.recipe["data"]["npz"].items()))  # later sets show some again
            self.recipe["data"]["npz"] = {tag: file}
        self.score = scoring(zoo)
        self.kind: str = self.recipe["task"]
        self.answer = ANSWERS.get(self.kind)
        self.labels = self._labels()

    @property
    def float_model(self) -> Path:
        """The model as it came; one that is too large for the zoo lies where it was made."""
        inside: Path = self.zoo / self.recipe["file"]
        return inside if inside.exists() else self.made / inside.name

    def variants(self, count: int) -> list[Variant]:
        """At most `count` ways to change the pictures; none where samples are none."""
        if self.kind not in PICTURES:
            return []
        chosen: tuple[Variant, ...] = VARIANTS
        if self.name.startswith(CHIRAL):
            chosen = tuple(dataclasses.replace(v, mirrored=False) for v in chosen)
        return [each for each in dict.fromkeys(chosen) if each != Variant()][:count]

    def record(self, count: int) -> list[dict[str, Any]]:
        """What scoring feeds first."""
        feeds: list[dict[str, Any]] = []
        original = self.score.T

        class Recorder(original):  # type: ignore[misc, valid-type]
            def __call__(self, *given: Any, **named: Any) -> Any:  # noqa: ANN401
                values = dict(zip(self.i, given, strict=False)) if given else named
                feeds.append({name: np.array(value) for name, value in values.items()})
                if len(feeds) >= count:
                    raise EnoughError
                return self.s.run(None, values)

        self._run(Recorder, self.float_model)
        return feeds

    def answers(self, models: Sequence[Path], variants: Sequence[Variant]) -> list[Answers]:
        """What each model answers to each unit, in itself and in its variants."""
        if self.answer is None:
            return [self._parts(model) for model in models]
        told: list[list[list[Any]]] = [
            self._asked(models, vary) for vary in (Variant(), *variants)
        ]  # by variant, model, unit
        return [
            [list(unit) for unit in zip(*(each[index] for each in told), strict=True)]
            for index in range(len(models))
        ]

    def _asked(self, models: Sequence[Path], vary: Variant) -> list[list[Any]]:
        """What each model answers to each unit, changed in one way."""
        found: list[list[Any]] = [[] for _ in models]
        original, score, recipe = self.score.T, self.score, self.recipe
        assert self.answer is not None
        answer, labels = self.answer, self.labels

        class Panel(original):  # type: ignore[misc, valid-type]
            def __init__(self, _path: str) -> None:
                super().__init__(str(models[0]))
                self.all = [self.s, *(score.sess(str(each)) for each in models[1:])]

            def __call__(self, *given: Any, **named: Any) -> Any:  # noqa: ANN401
                values = dict(zip(self.i, given, strict=False)) if given else named
                outputs = [session.run(None, values) for session in self.all]
                for into, each in zip(found, outputs, strict=True):
                    label = labels[len(into)]
                    into.append([answer(score, recipe, each), _sure(recipe, each, label)])
                return outputs[0]

        plain = dict(score.PRE)
        image = score.img
        if self.kind == "plate":
            score.img = lambda path: _picture(vary(np.asarray(image(path))))
        for name, norm in plain.items():
            score.PRE[name] = lambda x, norm=norm: norm(_on_pixels(vary, x))
        try:
            self._run(Panel, models[0])
        finally:
            score.img = image
            score.PRE.update(plain)
        return found

    def _run(self, wrapper: type, model: Path) -> None:
        original, score = self.score.T, self.score
        score.T = wrapper
        score.ARGS = SimpleNamespace(threads=1, opt="all", limit=self.limit)
        try:
            score.TASK[self.kind](self.recipe, str(self.zoo), str(model))
        except EnoughError:
            pass
        finally:
            score.T = original

    def _parts(self, model: Path) -> Answers:
        """What the metric is made of, where it is no share of right answers: of each unit."""
        kept: list[Any] = []
        name = {"sts": "rank", "detect": "mAP"}.get(self.kind, "")
        original = getattr(self.score, name, None)

        def noted(*given: Any) -> Any:  # noqa: ANN401
            kept.append(given)
            assert original is not None
            return original(*given)

        class Teller(self.score.T):  # type: ignore[misc, name-defined]
            def __call__(self, *given: Any, **named: Any) -> Any:  # noqa: ANN401
                found = super().__call__(*given, **named)
                kept.append((named["input_ids"], found[0]))
                return found

        if name:
            setattr(self.score, name, noted)
        try:
            self._run(self.score.T if name else Teller, model)
        finally:
            if name:
                setattr(self.score, name, original)
        return PARTS[self.kind](kept)

    def metric(self, answers: Answers, units: Sequence[int]) -> float:
        """The task metric over some units, in points: a hundredth of its range; more is better."""
        if self.answer is None:
            return METRICS[self.kind](self.score, [answers[i] for i in units])
        shares = [np.mean([a == self.labels[i] for a, _ in answers[i]]) for i in units]
        return 100 * float(np.mean(shares))

    @staticmethod
    def sureness(answers: Answers) -> npt.NDArray[np.float64]:
        """How probable each unit's label is by the model, in points, on average over its variants."""
        return np.array([100 * np.mean([sure for _, sure in unit]) for unit in answers])

    def _labels(self) -> list[Any]:
        data, root = self.recipe["data"], self.zoo
        if self.kind in ("array", "bytes"):
            file = data["npz"]
            file = next(iter(file.values())) if isinstance(file, dict) else file
            with np.load(root / file) as archive:
                found = archive["y"].tolist()
        elif self.kind in ("imagenet", "vww", "plate"):
            key = "person" if self.kind == "vww" else "label"
            rows = json.loads((root / data["labels"]).read_text(encoding="utf-8"))
            found = [row[key] for row in rows]
        else:
            return []
        return list(found[: self.limit or None])


@dataclasses.dataclass(frozen=True)
class Change:
    """What becomes of the metric.

    Attributes:
        drop: points lost; negative where some are won.
        error: its standard error, of the paired difference, by unit.
        same: share of answers that are those of float; NaN where answers are numbers.
        count: answers.
        sure: points that the probability of the label falls, which no coin decides; NaN where there is none.
        sure_error: its standard error.
    """

    drop: float
    error: float
    same: float
    count: int
    sure: float = math.nan
    sure_error: float = math.nan


def change(task: Task, plain: Answers, found: Answers) -> Change:
    """How far the answers `found` are behind those of float, with the jackknife's standard error."""
    units = range(len(plain))

    def drop(kept: Sequence[int]) -> float:
        return task.metric(plain, kept) - task.metric(found, kept)

    if task.answer is not None:  # a mean: its jackknife in closed form
        each = np.array([drop([i]) for i in units])
        fallen = task.sureness(plain) - task.sureness(found)
        told = (*_mean(each), *_same(plain, found), *_mean(fallen))
        return Change(*told)
    each = np.array([drop([j for j in units if j != i]) for i in units])
    spread = ((each - each.mean()) ** 2).sum()
    error = math.sqrt(float(spread) * (len(each) - 1) / len(each))
    same = _same_tokens(plain, found) if task.kind == "lm" else (math.nan, len(plain))
    return Change(drop(units), error, *same)


def _mean(each: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each)))


def _same(plain: Answers, found: Answers) -> tuple[float, int]:
    pairs = [
        a[0] == b[0] for p, f in zip(plain, found, strict=True) for a, b in zip(p, f, strict=True)
    ]
    return float(np.mean(pairs)), len(pairs)


def _same_tokens(plain: Answers, found: Answers) -> tuple[float, int]:
    pairs = [
        a == b for p, f in zip(plain, found, strict=True) for a, b in zip(p[1], f[1], strict=True)
    ]
    return float(np.mean(pairs)), len(pairs)


def first_only(answers: Answers) -> Answers:
    """The answers to the units themselves, without variants."""
    return [each[:1] for each in answers]


def _on_pixels(vary: Variant, picture: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Changes what holds pixels [..., height, width, channels] or, of digits, [..., height, width]."""
    if picture.shape[-1] in (1, 3):
        return vary(picture)
    return vary(picture[..., None])[..., 0]


def _picture(pixels: Picture) -> Any:  # noqa: ANN401
    from PIL import Image  # noqa: PLC0415  the zoo's own scoring needs it, and nothing else here

    return Image.fromarray(pixels)


def _sure(recipe: Recipe, outputs: Sequence[Any], label: object) -> float:
    """How probable a class is by the model; NaN where the label is no number."""
    if not isinstance(label, int):
        return math.nan
    flat = np.asarray(outputs[recipe.get("out_index", 0)]).reshape(-1).astype(np.float64)
    flat = flat[recipe["pre"].get("class_offset", 0) :]
    if (flat >= 0).all() and 0 < flat.max() <= PROBABLE:
        return float(flat[label] / flat.sum())
    powers = np.exp(flat - flat.max())
    return float(powers[label] / powers.sum())


PROBABLE = 1.05
"""What no probability exceeds; those that a peer stores in 8 bits do not add up to one."""


def _class(_score: Scorer, recipe: Recipe, outputs: Sequence[Any]) -> int:
    flat = np.asarray(outputs[recipe.get("out_index", 0)]).reshape(-1).astype(np.float64)
    return int(flat[recipe["pre"].get("class_offset", 0) :].argmax())


def _type(_score: Scorer, recipe: Recipe, outputs: Sequence[Any]) -> str:
    return str(recipe["pre"]["labels"][int(np.asarray(outputs[0][0]).argmax())])


def _plate(score: Scorer, recipe: Recipe, outputs: Sequence[Any]) -> str:
    pre = recipe["pre"]
    best = np.asarray(outputs[0])[0].argmax(pre["axis"])
    return str(score.ctc(best, pre["alphabet"], pre["blank"]))


ANSWERS: dict[str, Callable[[Scorer, Recipe, Sequence[Any]], Any]] = {
    "array": _class,
    "imagenet": _class,
    "vww": _class,
    "bytes": _type,
    "plate": _plate,
}
PICTURES = ("array", "imagenet", "vww", "plate")


def _ranked(kept: Sequence[Any]) -> Answers:
    similar, wanted = (values for (values,) in kept[:2])
    return [[float(a), float(b)] for a, b in zip(similar, wanted, strict=True)]


def _boxes(kept: Sequence[Any]) -> Answers:
    wanted, found = kept[0]
    return [[w.tolist(), f.tolist()] for w, f in zip(wanted, found, strict=True)]


def _next_tokens(kept: Sequence[Any]) -> Answers:
    """Of each sequence: nats a token that was to come next, and the tokens expected."""
    found = []
    for tokens, scores in kept:
        rows = np.asarray(scores)[0, :-1].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        logs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        lost = -logs[np.arange(len(rows)), tokens[0, 1:]]
        found.append([lost.tolist(), rows.argmax(axis=1).tolist()])
    return found


def _spearman(score: Scorer, units: Answers) -> float:
    similar, wanted = np.array(units).T
    return 100 * float(np.corrcoef(score.rank(similar), score.rank(wanted))[0, 1])


def _precision(score: Scorer, units: Answers) -> float:
    wanted = [np.array(each[0], float).reshape(-1, 5) for each in units]
    found = [np.array(each[1], float).reshape(-1, 6) for each in units]
    return 100 * float(score.mAP(wanted, found)["mAP50_95"])


def _likelihood(_score: Scorer, units: Answers) -> float:
    return -100 * float(np.mean(list(_chained(each[0] for each in units))))


def _chained(parts: Iterator[list[float]]) -> Iterator[float]:
    for part in parts:
        yield from part


PARTS: dict[str, Callable[[Sequence[Any]], Answers]] = {
    "sts": _ranked,
    "detect": _boxes,
    "lm": _next_tokens,
}
METRICS: dict[str, Callable[[Scorer, Answers], float]] = {
    "sts": _spearman,
    "detect": _precision,
    "lm": _likelihood,
}
