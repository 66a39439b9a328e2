"""A bucket is refilled evenly, overflows at its capacity, and may be overdrawn."""

from __future__ import annotations

from apprentice.serve.api.limits.token_bucket import TokenBucket


def test_a_bucket_begins_full_and_is_refilled_in_a_minute() -> None:
    now = 100.0
    bucket = TokenBucket(60, lambda: now)
    assert (bucket.level, bucket.seconds_until(60), bucket.seconds_until(61)) == (60.0, 0.0, 1.0)
    bucket.take(50)
    assert (bucket.level, bucket.seconds_until(40)) == (10.0, 30.0)
    now += 30.0
    assert bucket.level == 40.0
    now += 100.0
    assert bucket.level == 60.0


def test_a_bucket_that_is_overdrawn_pays_with_what_comes_next() -> None:
    now = 0.0
    bucket = TokenBucket(60, lambda: now)
    bucket.take(70)
    assert (bucket.level, bucket.seconds_until(1)) == (-10.0, 11.0)
    bucket.take(-20)
    assert bucket.level == 10.0


def test_a_new_capacity_holds_at_once() -> None:
    now = 0.0
    bucket = TokenBucket(60, lambda: now)
    bucket.capacity = 120
    assert bucket.level == 120.0
    bucket.take(100)
    bucket.capacity = 60
    now += 10.0
    assert bucket.level == 30.0
