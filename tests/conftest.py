"""What every test shares: trio as the loop, one seed for all that is random, and the long mode."""

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import hypothesis
import pytest

T = TypeVar("T")

SAMPLED_SHARE = 10
EXAMPLES = {"long": 1000, "usual": 100, "brief": 30}
"""Of each property that hypothesis tries."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cocoon-host")
    group.addoption("--long", action="store_true", help="run everything, however long it takes")
    group.addoption("--brief", action="store_true", help="of thorough tests too, run a sample")
    group.addoption("--shard", help="run one part only of what is selected: 1/2 and 2/2 are all")
    group.addoption("--seed", type=int, help="what random choices start from (random)")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**32)
    mode = "long" if config.option.long else "brief" if config.option.brief else "usual"
    hypothesis.settings.register_profile("ours", max_examples=EXAMPLES[mode], deadline=None)
    hypothesis.settings.load_profile("ours")


def pytest_report_header(config: pytest.Config) -> str:
    mode = "whole" if config.option.long else "a sample"
    return f"seed: {config.option.seed} (--seed), long tests: {mode}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop what is not in the sample, then what is not in the shard."""
    dropped = set() if config.option.long else _unsampled(config, items)
    if config.option.shard:
        number, _, count = config.option.shard.partition("/")
        kept = [item for item in items if item not in dropped]
        # One after the other, so that each shard gets some of every file's.
        dropped |= set(kept) - set(kept[int(number) - 1 :: int(count)])
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


def _unsampled(config: pytest.Config, items: list[pytest.Item]) -> set[pytest.Item]:
    """Return all but a seeded tenth, and at least one, of the cases of functions marked `long`.

    With `--brief`, as for the second set of libraries, the same of those marked `thorough`. Cases
    of which a mark has a `group` are sampled with all others of that group; a second mark makes it
    a tenth of a tenth.
    """
    sampled = ["long", "thorough"] if config.option.brief else ["long"]
    cases: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        if marks := [mark for mark in item.iter_markers() if mark.name in sampled]:
            groups = [mark.kwargs["group"] for mark in marks if "group" in mark.kwargs]
            group = groups[0] if groups else item.nodeid.partition("[")[0]
            cases.setdefault((group, len(marks)), []).append(item)
    dropped: set[pytest.Item] = set()
    for (name, weight), members in cases.items():
        kept = random.Random(f"{config.option.seed} {name}").sample(
            members, -(-len(members) // SAMPLED_SHARE**weight)
        )
        dropped.update(set(members) - set(kept))
    return dropped


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "trio", {"strict_exception_groups": True}


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """A source of random numbers that the seed and the test's name determine."""
    return random.Random(f"{request.config.option.seed} {request.node.nodeid}")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`rounds(few, many)` says how often to repeat something: `many` times with --long."""
    return lambda few, many: many if request.config.option.long else few


@pytest.fixture
def sample(
    request: pytest.FixtureRequest, rng: random.Random
) -> Callable[[Sequence[Any], int], list[Any]]:
    """`sample(items, few)` picks `few` of the items by the seed; with --long it takes them all."""

    def pick(items: Sequence[T], few: int) -> list[T]:
        if request.config.option.long or few >= len(items):
            return list(items)
        return rng.sample(items, few)

    return pick
