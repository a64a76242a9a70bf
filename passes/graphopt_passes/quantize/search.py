"""Which nodes run on integers: what the runtime fuses, where it pays, without the layers that hurt most.

What is faster is decided by a table, so that the same samples give the same bytes; a clock only certifies the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from graphopt.rewrite import RemarkKind, name_of
from graphopt_passes.quantize.narrow import why_narrow
from graphopt_passes.quantize.placement import is_product
from graphopt_passes.quantize.settle import fuse, settle
from graphopt_passes.quantize.trials import GAIN, PROBE_NS, RULE, Trial, Trials

EASED, WORTH = 6, 0.05
"""How many layers are tried in float although the budget is met, and the share of time that a decibel is worth."""

RACED = 2
"""How many of these choices are timed before the layers all go back to integers."""

QUIET_DB = 40.0
"""Signal to noise from which on no more is bought."""


class Search:
    """Finds the nodes to quantise: fused, within the budget, fastest."""

    def __init__(self, trials: Trials) -> None:
        self.trials, self.ctx, self.costs = trials, trials.ctx, trials.costs
        self.refused: list[str] = []

    def best(self, allowed: frozenset[str]) -> Trial:
        """The choice to apply; one without sites where float is better."""
        fused = fuse(self.trials, allowed)
        if not self._choices(fused):
            self._say_too_little(fused)
            return Trial(frozenset())
        settle(self.trials, fused)
        self.costs = self.trials.costs
        for trial in map(self._as_fused, self._acceptable(fused)):
            if trial.sites and self.trials.is_enough(trial) and self._is_worth(trial.sites):
                self._explain(trial, fused)
                ratio = self.trials.ratio(trial.sites) if self.trials.on_host else 0.0
                return dataclasses.replace(
                    trial,
                    ratio=ratio,
                    is_timed=self.trials.is_timed,
                    scalings=self.trials.scalings,
                    inlets=self.trials.inlets,
                )
        self._say_why_not(fused)
        return Trial(frozenset())

    def _as_fused(self, trial: Trial) -> Trial:
        """The same without what the runtime no longer fuses: which neighbours are in integers decides that too.

        A Gemm whose Relu nothing stores, since the next layer stays float, becomes a float FusedGemm, say.
        """
        sites = self.trials.fused(trial.sites)
        if sites == trial.sites:
            return trial
        return self.trials.judged(sites) if sites else Trial(sites)

    def _is_worth(self, sites: frozenset[str]) -> bool:
        """Whether what is gained is worth other numbers, by the table and then by the clock; with --force it is."""
        if self.ctx.options.force or not self.trials.on_host:
            return True
        told = f"{self.trials.predicted(sites):.2f}x by the table of kernel times"
        if not self._pays(sites):
            self.refused.append(told)
            return False
        ratio = self.trials.ratio(sites)
        self.refused.append(f"{ratio:.2f}x by the clock, {told}")
        return ratio >= GAIN

    def _acceptable(self, fused: frozenset[str]) -> Iterator[Trial]:
        """Choices within the budget, the best first."""
        for sites in self._choices(fused):
            trial = self._within_budget(sites)
            if not trial.sites:
                continue
            yield from self._eased(trial)

    def _eased(self, trial: Trial) -> list[Trial]:
        """Choices without the few layers that add far more noise than they save time, the best first; then `trial`.

        Not where the user said what is enough, nor where there is next to no noise, nor where it would take long.
        """
        options = self.ctx.options
        if options.force or options.budget is not None or not self.trials.on_host:
            return [trial]
        if 2 * EASED * self.trials.made_ns > PROBE_NS:
            return [trial]
        ranking = self._ranking(trial.sites)[:EASED]
        # What is dear by itself may open the way: of a residual block, the sum follows the last product for nothing.
        ways = [*self._walk(trial, ranking, wary=True), *self._walk(trial, ranking, wary=False)]
        better = {
            each.sites: each for each in ways if self._price(each.sites) < self._price(trial.sites)
        }
        return [*sorted(better.values(), key=lambda each: self._price(each.sites))[:RACED], trial]

    def _walk(self, trial: Trial, ranking: Sequence[str], *, wary: bool) -> Iterator[Trial]:
        """Choices on the way from `trial` to float, layer by layer; a wary one takes no step that is too dear."""
        # Where what lies between products was kept on integers against the table, it stays so.
        tidy = self._cheapest(trial.sites) == trial.sites
        for name in ranking:
            assert trial.quality is not None
            if trial.quality.sqnr_db >= QUIET_DB:
                return
            rest = self.trials.all_sites(trial.sites - {name})
            rest = self._cheapest(rest) if tidy else rest
            if name not in trial.sites or not rest or not self._pays(rest):
                continue
            if self.trials.spread(rest) >= self.trials.spread(trial.sites):
                continue
            if wary and self._price(rest) >= self._price(trial.sites):
                continue
            found = self.trials.judged(rest)
            if self.trials.is_enough(found):
                trial = found
                yield trial

    def _price(self, sites: frozenset[str]) -> float:
        """Logarithm of the time by the table, and of the noise at what a decibel is worth."""
        time = self.costs.plain(self.trials.whole)
        time -= self.costs.gain(self.trials.placed(sites), self.trials.whole)
        noise = self.trials.spread(sites)
        if time <= 0 or noise <= 0:
            return -math.inf if noise <= 0 < time else math.inf
        return math.log(time) + WORTH * 10 * math.log10(noise)

    def _choices(self, fused: frozenset[str]) -> list[frozenset[str]]:
        """What to try, the fastest by the table first; everything with --force."""
        if self.ctx.options.force:
            return [fused] if fused else []
        if not self.trials.on_host:
            return [wide] if (wide := self._cheapest(fused)) else []
        products = [n for n in self.trials.whole if is_product(n)]
        dense = frozenset(name_of(n) for n in products if n.op_type != "Conv")
        alone = frozenset(name_of(n) for n in products) | self.trials.mixed.layers
        others = (fused - alone) | self.trials.mixed.layers
        bare = self.trials.all_sites(alone)  # what lies between products may be faster in float
        found = [
            self._cheapest(fused),
            self._cheapest(bare),
            self.trials.all_sites(dense | others),
        ]
        found.append(fused)  # the table may be wrong of what lies between: nothing is decoded there
        return [group for group in dict.fromkeys(found) if group and self._pays(group)]

    def _pays(self, sites: frozenset[str]) -> bool:
        return self.trials.predicted(sites) >= GAIN

    def _cheapest(self, sites: frozenset[str]) -> frozenset[str]:
        """The sites without those whose integer kernels lose time, by the table; of other runtimes the too narrow."""
        if not self.trials.on_host:
            return self.trials.all_sites(sites - self._narrow(sites).keys())
        placed = self.trials.placed(sites)
        best = self.costs.gain(placed, self.trials.whole)
        order = sorted(placed, key=lambda n: self.costs.gain({n: placed[n]}, self.trials.whole))
        for node in order:
            rest = self.trials.all_sites(sites - {name_of(node)})
            if not is_product(node) or rest == sites or name_of(node) in self.trials.mixed.layers:
                continue
            gain = self.costs.gain(self.trials.placed(rest), self.trials.whole)
            if gain > best:
                sites, best = rest, gain
        return sites

    def _narrow(self, sites: frozenset[str]) -> dict[str, str]:
        """Those whose kernels gain nothing in integers on a runtime that cannot be timed here, and why."""
        least = self.trials.style.least_channels
        found = {name_of(node): why_narrow(node, least) for node in self.trials.placed(sites)}
        return {name: why for name, why in found.items() if why}

    def _explain(self, best: Trial, wanted: frozenset[str]) -> None:
        """Says what stays float, and why."""
        paying = wanted if self.ctx.options.force else self._cheapest(wanted)
        narrow = {} if self.trials.on_host else self._narrow(wanted)
        for name in sorted(wanted - best.sites):
            if name in paying:
                why = "than it saves time" if self.trials.on_host else "than the budget allows"
                self.ctx.missed(RULE, name, f"stays float: accuracy; it adds more noise {why}")
            else:
                why = narrow.get(name, "in 8 bits it would take longer on this processor")
                self.ctx.missed(RULE, name, f"stays float: speed; {why}")

    def _say_too_little(self, fused: frozenset[str]) -> None:
        """Says that no choice promises enough."""
        if not fused:
            self.trials.say("stays float: the runtime fuses none of its layers in 8 bits")
            return
        if not self.trials.on_host:
            why = next(iter(self._narrow(fused).values()))
            self.trials.say(
                f"stays float: no layer is of a size that runs faster in 8 bits there ({why}); --force emits it all "
                "the same"
            )
            return
        best = self.trials.predicted(self._cheapest(fused))
        if best <= 1:
            self.trials.say(
                "stays float: no layer would be faster in 8 bits on this processor; --force emits it all the same"
            )
            return
        self.trials.say(
            f"stays float: too little to gain: in 8 bits it would run at {best:.2f}x the speed of float here, by the "
            f"table of kernel times, and other numbers are for {GAIN}x or more; --force emits it all the same"
        )

    def _say_why_not(self, fused: frozenset[str]) -> None:
        fastest = fused if self.ctx.options.force else self._cheapest(fused)
        found, asked = self.trials.judged(fastest), self.trials.on_host
        ratio = self.trials.ratio(fastest) if asked else math.inf
        if not self.ctx.options.force and ratio < GAIN:
            self.trials.say(
                f"stays float: quantised it would run at {ratio:.2f}x the speed of float here by the clock "
                f"({self.trials.predicted(fastest):.2f}x by the table), and other numbers are for {GAIN}x or more; "
                "--force emits it"
            )
            return
        assert found.quality is not None
        if not math.isfinite(found.quality.sqnr_db):
            self.trials.say(
                "stays float: the float model gives NaN or infinities on the samples, to which nothing can be compared"
            )
            return
        change = found.quality.change
        told = (
            "" if change is None else f" and {change.flips:.1%} of the samples with another class"
        )
        told = f"{found.quality.sqnr_db:.1f} dB{told}: relax it with --budget sqnr>={found.quality.sqnr_db - 0.5:.0f}"
        if not asked:
            self.trials.say(
                f"stays float: no choice of layers is within the budget; all of them together would be at {told}"
            )
            return
        within = f"what it allows is {self.refused[0]}" if self.refused else "it allows none"
        self.trials.say(
            f"stays float: no choice of layers within the budget is {GAIN}x as fast as float ({within}; --force emits "
            f"that); all that pay would be {ratio:.2f}x as fast by the clock at {told}"
        )

    def _within_budget(self, sites: frozenset[str]) -> Trial:
        """The same sites, without those it takes to meet the budget: about log2 trials."""
        whole = self.trials.judged(sites)
        if self.trials.is_enough(whole):
            return whole
        ranking = self._ranking(sites)
        low, high, best = 0, len(ranking), Trial(frozenset())
        asked = 1
        while high - low > 1:
            asked += 1
            middle = (low + high) // 2
            rest = self.trials.all_sites(sites - frozenset(ranking[:middle]))
            rest = rest if self.ctx.options.force else self._cheapest(rest)
            trial = self.trials.judged(rest) if rest else Trial(rest)
            if trial.sites and self.trials.is_enough(trial):
                high, best = middle, trial
            else:
                low = middle
        text = f"the budget was asked of {asked} choices of the {len(ranking)} layers"
        self.ctx.remark(RemarkKind.NOTE, RULE, "", text)
        return best

    def _ranking(self, sites: frozenset[str]) -> list[str]:
        """Products by the noise that they add for the time that they save, worst first."""
        noise = self.trials.noise(sites)
        placed = self.trials.placed(sites)
        gain = self.costs.gain(placed, self.trials.whole)
        worth = {}
        for name in noise.keys() - self.trials.mixed.layers:
            rest = self.trials.placed(sites - {name})
            worth[name] = max(gain - self.costs.gain(rest, self.trials.whole), 1.0)
        return sorted(worth, key=lambda name: (-noise[name] / worth[name], name))
