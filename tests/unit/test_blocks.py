import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketune.errors import PlanError
from pocketune.plan.blocks import BlockPlan, number_to_skip, parse_plan, ranges_text, usual_split


@given(st.sets(st.integers(0, 19), max_size=19))
def test_spans_tile_the_blocks_and_text_round_trips(skipped: set[int]) -> None:
    plan = BlockPlan(20, tuple(sorted(skipped)))
    assert [i for span in plan.spans for i in range(span.start, span.stop)] == list(range(20))
    assert {i for span in plan.skipped_spans for i in range(span.start, span.stop)} == skipped
    assert sorted((*plan.kept, *plan.skipped)) == list(range(20))
    assert all(a.skipped != b.skipped for a, b in zip(plan.spans, plan.spans[1:], strict=False))
    assert parse_plan(plan.describe(), 20) == plan


def test_auto_keeps_the_papers_proportions() -> None:
    assert [number_to_skip(57, share) for share in (0.3, 0.4, 0.5)] == [17, 23, 29]
    assert [usual_split(57, share).describe() for share in (0.3, 0.4)] == ["0-6,47-56", "0-12,47-56"]
    plan = usual_split(57, 0.5)
    assert plan.skipped == (*range(19), *range(47, 57))
    assert parse_plan("auto", 12).describe() == "0-3,10-11"
    shares = {"auto:0": "none", "auto:0.01": "11", "auto:0.3": "0-1,10-11", "auto:0.5": "0-3,10-11", "auto:0.99": "0-8,10-11"}
    shares |= {"first:0.5": "0-5", "last:0.25": "9-11", "first:0": "none", "last:0.01": "11"}
    assert {text: parse_plan(text, 12).describe() for text in shares} == shares


def test_a_share_is_a_run_around_the_middle() -> None:
    shares = {"hollow:0": "none", "hollow:0.01": "5", "hollow:0.3": "4-7", "hollow:.5": "3-8", "hollow:0.99": "0-10"}
    assert {text: parse_plan(text, 12).describe() for text in shares} == shares


@given(st.integers(2, 60), st.floats(0, 1, exclude_max=True))
def test_every_kind_of_share_is_rounded_alike(blocks: int, share: float) -> None:
    kinds = ("auto", "first", "last", "hollow")
    counts = {len(parse_plan(f"{kind}:{share:.6f}", blocks).skipped) for kind in kinds if f"{share:.6f}" < "1"}
    assert counts <= {number_to_skip(blocks, float(f"{share:.6f}"))}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hollow:1", "share of blocks"),
        ("hollow:", "share of blocks"),
        ("0-12", "block 12"),
        ("5-3", "5-3"),
        ("x", "skip range"),
        ("", "skip range"),
        ("0-11", "all 12"),
        ("-1", "skip range"),
    ],
)
def test_impossible_ranges_are_refused(text: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        parse_plan(text, 12)


def test_numbers_are_told_as_ranges() -> None:
    assert ranges_text([]) == "" and ranges_text((0, 1, 2, 8, 10, 11)) == "0-2,8,10-11"
