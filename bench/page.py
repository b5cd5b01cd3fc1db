"""docs/performance.md's tables and plots, from the file of results: every figure on the page stands in one of them.

A table stands between two comments with its name; what is between them is written anew, everything else is prose, and true
whatever the figures are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import fleet, plots, stages

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
FOLDER = ROOT / "docs" / "performance"
RESULTS = FOLDER / "results.json"

#: How many open streams the page plans for.
FLEETS = [5_000, 20_000, 100_000, 1_000_000]

Results = Mapping[str, Any]


def write(results: Results) -> None:
    """The file of results, the plots, and the page's tables."""
    FOLDER.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name, text in drawn(results).items():
        (FOLDER / name).write_text(text)
    PAGE.write_text(page(PAGE.read_text(), results))


def page(text: str, results: Results) -> str:
    """The page with the tables of these results. KeyError where it has a table that there is not."""

    def table(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- bench: {name} -->\n\n" + "\n".join(TABLES[name](results)) + f"\n\n<!-- bench: {name} ends -->"

    return re.sub(r"<!-- bench: (\w+) -->.*?<!-- bench: \1 ends -->", table, text, flags=re.DOTALL)


def drawn(results: Results) -> dict[str, str]:
    """The plots by the names of their files."""
    sides = ("worker", "Redis")
    compared = {
        name: _sides(results["comparison"][key]["steady"]) for key, name in (("service", "aistream"), ("naive", "naive relay"))
    }
    scaled = {f"{one['workers']} worker{'s' * (one['workers'] > 1)}": _sides(one) for one in results["scaling"]["workers"]}
    places = {"here": "viewer beside the generation", "elsewhere": "viewer on another worker"}
    scaled |= {name: _sides(results["scaling"]["viewer"][place]) for place, name in places.items()}
    memory = results["memory"]
    held = [(0, memory["empty_pss_kib"] / 1024), *((one["open"], one["pss_kib"] / 1024) for one in memory["open"])]
    by_stage = results["stages"]
    sizes = [(one["batch"], one["token_us"]) for one in results["batches"]["sizes"]]
    return {
        "stages.svg": plots.bars("What a token costs, by stage", "µs of CPU per token", _by_stage(by_stage["token_us"])),
        "sessions.svg": plots.bars(
            f"What a session of {by_stage['session_tokens']} tokens costs, by stage",
            "ms of CPU per session",
            _by_stage(by_stage["session_ms"]),
        ),
        "comparison.svg": plots.bars("What a token costs, beside a naive relay", "µs of CPU per token", compared, sides),
        "batches.svg": plots.line(
            "Cost by batch size", "tokens in one write of the provider", "µs of CPU per token", sizes, logarithmic=True
        ),
        "memory.svg": plots.line("Memory of one worker", "open streams", "MiB (PSS)", held),
        "scaling.svg": plots.bars("Two workers, and viewers elsewhere", "µs of CPU per token", scaled, sides),
    }


def _sides(summary: Results) -> list[float]:
    return [summary["token_us"] - summary["redis_us"], summary["redis_us"]]


def _by_stage(costs: Mapping[str, float]) -> dict[str, list[float]]:
    return {stage: [costs[stage]] for stage in stages.STAGES if costs[stage] > 0.005 * sum(costs.values())}


def rows(head: Sequence[str], body: Iterable[Sequence[object]]) -> list[str]:
    """A table in Markdown; all columns but the first are figures."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return [*lines, *(f"| {' | '.join(map(str, cells))} |" for cells in body)]


def _facts(results: Results) -> list[str]:
    facts = results["facts"]
    commits = {part: results[part]["commit"] for part in results if part != "facts"}
    others = [results["comparison"][key][load]["foreign"] for key in ("service", "naive") for load in ("light", "steady")]
    of = [f"{commit} ({part})" for part, commit in commits.items()] if len(set(commits.values())) > 1 else [facts["commit"]]
    body = {
        "commit": ", ".join(of),
        "date": facts["date"],
        "machine": facts["machine"],
        "kernel": facts["kernel"],
        "Python": facts["python"],
        "Redis": facts["redis_server"],
        "packages": facts["packages"],
        "`ulimit -n`": f"{facts['files']:,}",
        "other load on the service's core meanwhile": f"{min(others):.0%} to {max(others):.0%}",
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in body.items())]


def _comparison(results: Results) -> list[str]:
    ours, naive = (results["comparison"][key] for key in ("service", "naive"))

    def row(what: str, of: Callable[[Results], float], form: str, mark: Callable[[Results], bool] | None = None) -> list[str]:
        told = [f"{of(one):{form}}" + (" (the load's limit)" if mark and mark(one) else "") for one in (ours, naive)]
        return [what, *told, f"{of(naive) / of(ours):.2f}" if of(ours) > 0 else "–"]

    def limited(one: Results) -> bool:
        return bool(one["saturation"]["harness_limited"])

    steady = ours["steady"]["streams"]
    light = ours["light"]["streams"]
    return rows(
        ["", "aistream", "naive relay", "naive : aistream"],
        [
            row(f"CPU per token, {steady} streams × 20 tokens/s, µs", lambda one: one["steady"]["token_us"], ".0f"),
            row("of it Redis, µs", lambda one: one["steady"]["redis_us"], ".1f"),
            row(f"CPU per token, {light} streams × 20 tokens/s, µs", lambda one: one["light"]["token_us"], ".0f"),
            ["streams that failed in these loads", ours["failed"], naive["failed"], ""],
            row("CPU per stream beside its tokens, ms", lambda one: one["setup_ms"], ".1f"),
            row(f"added latency of a token, {light} streams, p50, ms", lambda one: one["light"]["latency_ms"]["p50"], ".1f"),
            row("p99, ms", lambda one: one["light"]["latency_ms"]["p99"], ".1f"),
            row("added time to the first token, p50, ms", lambda one: one["light"]["first_token_ms"]["p50"], ".1f"),
            row(
                "tokens/s that one core carries (p99 < 100 ms)",
                lambda one: one["saturation"]["tokens_per_second"],
                ",.0f",
                limited,
            ),
        ],
    )


def _stages(results: Results) -> list[str]:
    measured = results["stages"]
    token, session = measured["token_us"], measured["session_ms"]
    body = [
        [stage, f"{token[stage]:.1f}", f"{token[stage] / sum(token.values()):.0%}", f"{session[stage]:.2f}"]
        for stage in stages.STAGES
    ]
    body.append(["**together**", f"**{sum(token.values()):.1f}**", "", f"**{sum(session.values()):.2f}**"])
    return rows(["stage", "µs per token", "share", f"ms per session of {measured['session_tokens']} tokens"], body)


def _batches(results: Results) -> list[str]:
    sizes = results["batches"]["sizes"]
    body = [
        [one["batch"], f"{one['token_us']:.1f}", f"{one['redis_us']:.1f}", f"{one['latency_ms']['p50']:.1f}"] for one in sizes
    ]
    return rows(["tokens in one write", "µs per token", "of it Redis", "added latency p50, ms"], body)


def _memory(results: Results) -> list[str]:
    body = [
        [
            f"{one['open']:,}",
            one["failed"],
            f"{one['pss_kib'] / 1024:.0f}",
            f"{one['stream_kib']:.1f}",
            f"{one['stream_files']:.2f}",
            f"{one['core']:.0%}",
            f"{one['token_us']:.0f}",
            f"{one['answer_ms']['p50']:.1f} / {one['answer_ms']['p99']:.1f}",
            f"{one['latency_ms']['p50']:.1f} / {one['latency_ms']['p99']:.1f}",
        ]
        for one in results["memory"]["open"]
    ]
    head = ["open streams, 1 token/s each", "failed", "MiB (PSS)", "KiB per stream", "descriptors per stream", "of a core"]
    told = rows([*head, "µs per token", "`/health` p50 / p99, ms", "token p50 / p99, ms"], body)
    if results["memory"]["cut_short"]:
        told += ["", f"Fewer than wanted: `ulimit -n` is {results['memory']['files']:,} here."]
    session = results["memory"]["session"]
    told += ["", f"Redis, for a session of {session['answer_tokens']:,} tokens:", ""]
    return told + rows(
        ["", ""],
        [
            ["KiB that it keeps of a finished one", f"{session['kept_bytes'] / 1024:.1f}"],
            ["commands, those of scripts included", f"{session['commands']:,.0f}"],
        ],
    )


def _scaling(results: Results) -> list[str]:
    told = results["scaling"]
    names = {"here": "viewer beside the generation", "elsewhere": "viewer on another worker"}
    body = [(f"{one['workers']} worker{'s' * (one['workers'] > 1)}", one) for one in told["workers"]]
    body += [(names[place], one) for place, one in told["viewer"].items()]
    lines = rows(
        ["", "µs per token", "of it Redis", "added latency p50, ms", "p99, ms"],
        [
            [
                name,
                f"{one['token_us']:.0f}",
                f"{one['redis_us']:.1f}",
                f"{one['latency_ms']['p50']:.1f}",
                f"{one['latency_ms']['p99']:.1f}",
            ]
            for name, one in body
        ],
    )
    if told["cores"] < 2:
        lines += ["", "Both workers shared one core here, the load had the other: what they carry together was not measured."]
    return lines


def _units(results: Results) -> list[str]:
    slow, fast = (fleet.Units.of(results, pace) for pace in fleet.PACES)
    body: list[tuple[str, str, Callable[[fleet.Units], float], str]] = [
        ("t", "worker, µs per token", lambda one: one.token_us, ".1f"),
        ("r", "Redis, µs per token", lambda one: one.redis_token_us, ".1f"),
        ("s", "worker, ms per stream beside its tokens", lambda one: one.setup_ms, ".1f"),
        ("q", "Redis, ms per stream beside its tokens", lambda one: one.redis_setup_ms, ".2f"),
        ("m", "worker's memory, KiB per open stream", lambda one: one.stream_kib, ".1f"),
        ("w", "worker's memory without streams, MiB", lambda one: one.worker_kib / 1024, ".0f"),
        ("k", f"Redis' memory, KiB per session of {fleet.ANSWER:,} tokens", lambda one: one.kept_bytes / 1024, ".1f"),
        ("p", "network, bytes per token from the provider", lambda one: one.provider_bytes, ".0f"),
        ("v", "network, bytes per token to a viewer", lambda one: one.viewer_bytes, ".0f"),
    ]
    head = ["", "unit", *(f"at {one.pace:g} token{'s' * (one.pace > 1)}/s" for one in (slow, fast))]
    return rows(head, [[f"*{name}*", what, f"{of(slow):{form}}", f"{of(fast):{form}}"] for name, what, of, form in body])


def _limits(results: Results) -> list[str]:
    found = [{limit.what: limit.streams for limit in fleet.limits(fleet.Units.of(results, pace))} for pace in fleet.PACES]
    heads = [f"streams, {pace} token{'s' * (pace > 1)}/s each" for pace in fleet.PACES]
    return rows(["one worker holds at most", *heads], [[what, *(f"{one[what]:,}" for one in found)] for what in found[0]])


def _fleet(results: Results) -> list[str]:
    lines: list[str] = []
    for pace in fleet.PACES:
        units = fleet.Units.of(results, pace)
        every = [fleet.fleet(units, streams) for streams in FLEETS]
        body: list[tuple[str, Callable[[fleet.Fleet], str]]] = [
            ("on one worker, breaks first", lambda one: one.breaks_first),
            ("tokens/s", lambda one: f"{one.tokens_per_second:,.0f}"),
            ("new streams/s", lambda one: f"{one.sessions_per_second:,.0f}"),
            ("workers' cores, busy", lambda one: f"{one.cores:,.1f}"),
            ("**workers**", lambda one: f"**{one.workers:,}**"),
            ("workers' memory, GiB", lambda one: f"{one.memory:,.1f}"),
            ("Redis' cores, busy", lambda one: f"{one.redis_cores:,.2f}"),
            ("**Redis shards**", lambda one: f"**{one.shards:,}**"),
            ("Redis' memory, GiB", lambda one: f"{one.redis_memory:,.1f}"),
            ("network from providers, Gbit/s", lambda one: f"{one.from_provider:,.2f}"),
            ("network to viewers, Gbit/s", lambda one: f"{one.to_viewers:,.2f}"),
        ]
        head = [f"open streams, {pace} token{'s' * (pace > 1)}/s each", *(f"{one.streams:,}" for one in every)]
        lines += [*rows(head, [[what, *map(of, every)] for what, of in body]), ""]
    return lines[:-1]


TABLES: Mapping[str, Callable[[Results], list[str]]] = {
    "facts": _facts,
    "comparison": _comparison,
    "stages": _stages,
    "batches": _batches,
    "memory": _memory,
    "scaling": _scaling,
    "units": _units,
    "limits": _limits,
    "fleet": _fleet,
}
