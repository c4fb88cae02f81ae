"""Which models a site wants, in what order they come, and what is said meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress

import pytest

from ondol.core.catalog import Catalog, DeploymentDoc, GatewayDoc, ModelDoc, SiteDoc
from ondol.errors import OndolError, StateError
from ondol.gateway.models import Models, State, Want, sentence, to_fetch, wanted

pytestmark = pytest.mark.anyio
A, B, C = ("sha256:" + one * 64 for one in "abc")


def catalog(*deployments: tuple[str, str, str], file: str | None = None) -> Catalog:
    """Deployments as (name, model digest, engine) on the site `here`, or on `there` where the name says so."""
    site = SiteDoc(name="here", tier="edge", region="r", country="KR", grid_zone="KR")
    docs = {
        name: DeploymentDoc(
            name=name, site="there" if name.startswith("there") else "here", model=f"m-{digest[7]}", engine=engine,  # type: ignore[arg-type]
        )
        for name, digest, engine in deployments
    }  # fmt: skip
    models = {
        f"m-{digest[7]}": ModelDoc(name=f"m-{digest[7]}", digest=digest, file=file)
        for _, digest, _ in deployments
    }
    return Catalog(
        site=site, gateway=GatewayDoc(name="g"), tenants={}, teams={}, budgets={}, sites={"here": site}, models=models,
        deployments=docs, routes={}, prices={}, exchange={}, grids={},
    )  # fmt: skip


def test_a_site_wants_what_its_own_local_deployments_need() -> None:
    found = wanted(
        catalog(
            ("one", A, "llamacpp"), ("two", A, "llamacpp"), ("three", B, "llamacpp"), ("there-1", C, "llamacpp"),
            ("far", C, "peer"),
        )
    )  # fmt: skip
    assert found == {
        A: Want(digest=A, name="m-a", deployments=("one", "two")),
        B: Want(digest=B, name="m-b", deployments=("three",)),
    }
    assert wanted(catalog(("one", A, "llamacpp"), file="models/x.gguf")) == {}
    assert [one.digest for one in to_fetch(found, {B})] == [A]
    assert [one.digest for one in to_fetch(dict(reversed(found.items())), ())] == [A, B]


WANT = Want(digest=A, name="helper", deployments=("d",))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (None, "helper: its model is not here yet; it is about to be fetched"),
        (State(), "helper: asks its sources for the model"),
        (State(done=40, total=93_000_000, bytes_per_s=3.1e6, source="hub"), "helper: 0 % of 93 MB fetched, 3.1 MB/s from hub"),
        (State(done=46_500_000, total=93_000_000, bytes_per_s=900), "helper: 50 % of 93 MB fetched, 0.9 kB/s"),
        (State(done=50, total=100, problem="waits for 22:00"), "helper: 50 % of 0.0001 MB fetched; waits for 22:00"),
        (State(problem="no source has it"), "helper: no source has it"),
    ],
)  # fmt: skip
def test_the_sentence_of_a_model_on_its_way(state: State | None, words: str) -> None:
    assert sentence(WANT, state) == words


class Fetcher:
    """Fetches when the test lets it."""

    def __init__(self) -> None:
        self.store: list[str] = []
        self.asked: list[str] = []
        self.noted: list[str] = []
        self.cancelled: list[str] = []
        self.problems: list[OndolError] = []
        self.go = asyncio.Event()
        self.wanted: Collection[str] = ()

    async def fetch(
        self, digest: str, *, wanted: Collection[str], say: Callable[[int, int, float, str], None]
    ) -> None:
        self.asked.append(digest)
        self.wanted = wanted
        if self.problems:
            raise self.problems.pop(0)
        say(1, 4, 0.0, "hub")
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(digest)
            raise
        self.store.append(digest)

    def held(self) -> Sequence[str]:
        return list(self.store)

    def used(self, digests: Collection[str]) -> None:
        self.noted.extend(digests)


async def settled(holds: Callable[[], bool]) -> None:
    """Let the loop run until something holds; the store is asked in a thread."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - the store is asked in a thread
            await asyncio.sleep(0.001)


@asynccontextmanager
async def running(models: Models) -> AsyncIterator[None]:
    task = asyncio.create_task(models.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Site:
    """A runner over a fetcher, and what it said."""

    def __init__(self) -> None:
        self.fetcher = Fetcher()
        self.arrived: list[str] = []
        self.notes: list[str] = []
        self.models = Models(self.fetcher, arrived=self._arrived, note=self.notes.append)

    async def _arrived(self, digest: str) -> None:
        self.arrived.append(digest)


async def test_models_come_one_after_the_other_and_each_arrival_is_told() -> None:
    site = Site()
    async with running(site.models):
        site.models.want(catalog(("one", A, "llamacpp"), ("two", B, "llamacpp")))
        await settled(lambda: site.models.say(A) == "m-a: 25 % of 4e-06 MB fetched from hub")
        assert site.models.say(B) == "m-b: its model is not here yet; it is about to be fetched"
        assert site.models.say(C).startswith("no deployment here wants")
        assert site.fetcher.asked == [A]
        assert set(site.fetcher.wanted) == {A, B}
        site.fetcher.go.set()
        await settled(lambda: site.arrived == [A, B])
    assert site.models.states() == {}
    assert site.notes == ["m-a: the model is here", "m-b: the model is here"]


async def test_what_is_here_is_not_fetched_and_counts_as_used() -> None:
    site = Site()
    site.fetcher.store = [A, C]
    async with running(site.models):
        site.models.want(catalog(("one", A, "llamacpp")))
        await settled(lambda: site.fetcher.noted == [A])
        assert site.models.say(A) == "m-a: the model is here, and is about to be loaded"
    assert site.fetcher.asked == []


async def test_a_problem_is_said_once_and_tried_again_when_something_changes() -> None:
    site = Site()
    site.fetcher.go.set()
    site.fetcher.problems = [
        StateError("the disk is full", retry_after_s=3600),
        StateError("the disk is full"),
    ]
    one = catalog(("one", A, "llamacpp"))
    async with running(site.models):
        site.models.want(one)
        await settled(lambda: site.models.say(A) == "m-a: the disk is full")
        assert site.models.states() == {"m-a": "m-a: the disk is full"}
        site.models.want(one)
        await settled(lambda: len(site.fetcher.asked) == 2)
        await settled(lambda: not site.fetcher.problems)
        site.models.want(one)
        await settled(lambda: site.arrived == [A])
    assert site.notes == ["m-a: the disk is full", "m-a: the model is here"]


async def test_what_is_no_longer_wanted_is_left_at_once() -> None:
    site = Site()
    async with running(site.models):
        site.models.want(catalog(("one", A, "llamacpp")))
        await settled(lambda: site.fetcher.asked == [A])
        site.models.want(catalog(("two", B, "llamacpp")))
        await settled(lambda: site.fetcher.asked == [A, B])
        assert site.fetcher.cancelled == [A]
    assert site.arrived == []
    assert site.fetcher.cancelled == [A, B]


async def test_a_new_catalogue_that_still_wants_it_does_not_disturb_a_fetch() -> None:
    site = Site()
    async with running(site.models):
        site.models.want(catalog(("one", A, "llamacpp")))
        await settled(lambda: site.fetcher.asked == [A])
        for _ in range(2):
            site.models.want(catalog(("one", A, "llamacpp"), ("two", B, "llamacpp")))
            await asyncio.sleep(0.01)
        site.fetcher.go.set()
        await settled(lambda: site.arrived == [A, B])
    assert site.fetcher.cancelled == []
    assert site.fetcher.asked == [A, B]


async def test_one_that_is_unwanted_by_the_second_change_is_left_too() -> None:
    site = Site()
    async with running(site.models):
        site.models.want(catalog(("one", A, "llamacpp")))
        await settled(lambda: site.fetcher.asked == [A])
        site.models.want(catalog(("one", A, "llamacpp"), ("two", B, "llamacpp")))
        await asyncio.sleep(0.01)
        site.models.want(catalog(("two", B, "llamacpp")))
        await settled(lambda: site.fetcher.cancelled == [A])
        site.fetcher.go.set()
        await settled(lambda: site.arrived == [B])
