"""Those who are refused come again one after another, at half the pace of the replies."""

from __future__ import annotations

from apprentice.serve.api.retry_after import RetrySchedule


def test_times_are_spread_at_half_the_pace_of_the_replies() -> None:
    now = 0.0
    retry_schedule = RetrySchedule(lambda: now)
    for number in range(1000):  # 100 in a second
        now = number / 100
        retry_schedule.record_end()
    delays = [retry_schedule.next_s() for _ in range(500)]
    assert delays == sorted(delays)
    assert (delays[0], delays[49], delays[99], delays[-1]) == (1, 1, 2, 10)
    now += 5.0
    assert retry_schedule.next_s() == 6  # after those that are to come yet
    now += 100.0  # all have come, and no reply has ended lately
    assert [retry_schedule.next_s() for _ in range(3)] == [1, 2, 3]


def test_nobody_is_sent_away_for_more_than_a_minute_however_often_they_ask() -> None:
    now = 0.0
    retry_schedule = RetrySchedule(lambda: now)
    assert [retry_schedule.next_s() for _ in range(200)] == [*range(1, 61), *[60] * 140]
    now = 60.0
    assert retry_schedule.next_s() == 1
