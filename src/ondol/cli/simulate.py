"""`ondol simulate`: what a load would cost, take and emit on a fleet, by policy."""

from __future__ import annotations

import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ondol.cli.installation import AsJson, CommandFailed
from ondol.cli.output import console, duration, print_json, significant, table
from ondol.cli.simulation_fleet import fleet_model
from ondol.simulate.compare import NAMES, OPTIMUM, Compared, compare
from ondol.simulate.compare import Progress as Told
from ondol.simulate.fleet import FleetModel
from ondol.simulate.generate import from_text
from ondol.simulate.outcome import Outcome
from ondol.simulate.report import page
from ondol.simulate.trace import Trace
from ondol.simulate.trace_files import as_csv, read_trace
from ondol.simulate.workload import lay


def _check_policies(_: object, value: tuple[str, ...]) -> None:
    for name in value:
        if name not in NAMES:
            raise ValueError(f"found {name!r}; allowed: {', '.join(NAMES)}")


def simulate(
    trace: str,
    /,
    *,
    fleet: Annotated[Path, Parameter(help="A folder with a fleet's documents, or one site's file.")],
    policy: Annotated[
        tuple[str, ...],
        Parameter(help="Which policies; all of them where none is named.", validator=_check_policies, negative="",
                  consume_multiple=True),
    ] = (),
    report: Annotated[Path | None, Parameter(help="Write an HTML page with plots.")] = None,
    show: Annotated[bool, Parameter(name="--open", negative="", help="Open that page in a browser.")] = False,
    repair: Annotated[
        bool, Parameter(negative="", help="Leave out rows that are wrong, and sort by time; says what it did.")
    ] = False,
    save: Annotated[Path | None, Parameter(help="Write the trace that is played as CSV.")] = None,
    seed: Annotated[int, Parameter(help="For what is drawn: generated traces, doors of callers without region.")] = 1,
    as_json: AsJson = False,
) -> int:  # fmt: skip
    """Replay a trace through the gateway's own stages on a fleet, and compare policies.

    Args:
        trace: A .csv, .jsonl or .parquet file; or a generated one, such as bursty:requests=1000,rate=5.
    """
    if show and report is None:
        raise CommandFailed("--open belongs to --report FILE.html: it opens that page.")
    screen = console(stderr=True)
    played = from_text(trace, seed) or read_trace(Path(trace), repair=repair)
    for sentence in played.repairs:
        screen.print(f"repaired: {sentence}", style="yellow", soft_wrap=True)
    if save is not None:
        save.write_text(as_csv(played), encoding="utf-8")
    model = fleet_model(fleet)
    for note in model.notes:
        screen.print(f"note: {note}", style="dim", soft_wrap=True)
    workload = lay(played, model, seed=seed)
    with _bar(len(workload), quiet=as_json) as told:
        compared = compare(workload, policy or NAMES, told)
    if report is not None:
        report.write_text(page(compared, played, model, fleet_name=fleet.name, seed=seed), encoding="utf-8")
    if as_json:
        print_json(compared.outcomes)
    else:
        _show(compared, played, model)
        if report is not None:
            print(f"report: {report}")
    if show and report is not None:
        webbrowser.open(report.resolve().as_uri())
    return 0


@contextmanager
def _bar(requests: int, *, quiet: bool) -> Iterator[Told]:
    screen = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=screen, disable=quiet or not screen.is_terminal, transient=True) as bar:
        task = bar.add_task("finding the optimum", total=requests)

        def told(policy: str, count: int) -> None:
            bar.update(task, description=policy, completed=count)

        yield told


def _show(compared: Compared, trace: Trace, model: FleetModel) -> None:
    screen = console()
    span = trace.times[-1] - trace.times[0]
    limits = compared.limits
    screen.print(
        f"{len(trace)} requests in {significant(span)} s on {len(model.places)} places; limits: first token "
        f"{duration(limits.first_token_ms / 1000)}, whole {duration(limits.total_ms / 1000)}", soft_wrap=True,
    )  # fmt: skip
    made = table(
        [
            ("policy", False), ("ttft", True), ("p95", True), ("total", True), ("p95", True), ("USD", True),
            ("g CO2e", True), ("hits", True), ("missed", True), ("gap", True),
        ],
        gap=2 if screen.width >= 100 else 1,
    )  # fmt: skip
    made.columns[0].no_wrap = True
    for one in compared.outcomes:
        made.add_row(one.policy, *_cells(one))
    screen.print(made)
    if compared.method is not None:
        screen.print(
            "ttft: median time to the first token; total: mean of the whole; missed: refused, or later than a limit",
            style="dim", soft_wrap=True,
        )  # fmt: skip
        screen.print(f"gap: cost over the {compared.method}, less one", style="dim", soft_wrap=True)
    else:
        screen.print("gap: unknown, since a place has no price", style="dim")
    if OPTIMUM in {one.policy for one in compared.outcomes}:
        screen.print("the optimum's cost is proven to be the least possible within the limits", style="dim")


def _cells(one: Outcome) -> list[str]:
    late = None if one.violations is None else one.violations / one.requests
    return [
        _ms(one.ttft_ms_p50), _ms(one.ttft_ms_p95), _ms(one.total_ms_mean), _ms(one.total_ms_p95),
        significant(one.cost_usd), significant(one.carbon_g), _percent(one.hit_rate), _percent(late),
        _percent(one.gap_to_optimum),
    ]  # fmt: skip


def _ms(value: float | None) -> str:
    return duration(None if value is None else value / 1000)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f} %"
